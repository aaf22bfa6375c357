"""Weights that each rank has another part of: what was done to them is seen, and what is harmless is not."""

import pytest
import torch

from lockstep.errors import ConfigurationError
from lockstep.models.own_weights import Seal, weights_are_there
from lockstep.moe.experts import LocalExperts


class Experts(torch.nn.Module):
    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(2, 12, 8))
        self.down_proj = torch.nn.Parameter(torch.randn(2, 8, 6))

    def _apply_gate(self, rows):
        gate, up = rows.chunk(2, dim=-1)
        return gate * up


@pytest.fixture
def experts():
    return Experts()


@pytest.fixture
def seal(experts):
    return Seal("Model", "layers.3.experts", experts)


def test_what_is_harmless(experts, seal):
    experts.requires_grad_(False)
    experts.to(torch.float32)
    seal.check()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        experts.to(dtype)
        seal.check_values()
        seal.check()


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda experts: experts.down_proj.detach().zero_(), r"layers\.3\.experts\.down_proj was written in place"),
        (lambda experts: setattr(experts, "down_proj", torch.nn.Parameter(torch.zeros(2, 8, 6))), "was replaced"),
        (lambda experts: experts.double(), r"gate_up_proj was moved or cast inside of join"),
        (lambda experts: delattr(experts, "gate_up_proj"), r"gate_up_proj was replaced"),
        (lambda experts: experts.register_parameter("more", torch.nn.Parameter(torch.zeros(1))), "was added"),
    ],
)
def test_inside_of_join(experts, seal, harm, what):
    harm(experts)
    with pytest.raises(ConfigurationError, match=what):
        seal.check()


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda experts: experts.down_proj.detach().mul_(1), "down_proj was written in place"),
        (lambda experts: experts.down_proj.data[1].neg_(), "down_proj has other values"),
        (lambda experts: experts.to(torch.bfloat16).down_proj.data[0].neg_(), "down_proj has other values"),
        (lambda experts: experts.down_proj.data.fill_(torch.nan), "down_proj has other values"),
        (lambda experts: setattr(experts, "down_proj", torch.nn.Parameter(torch.zeros(1, 8, 6))), "was replaced"),
        (lambda experts: experts.to("meta"), r"gate_up_proj is not there any more \(offloaded to the meta device\)"),
        (lambda experts: experts.register_parameter("more", torch.nn.Parameter(torch.zeros(1))), "more was added"),
    ],
)
def test_between_steps(experts, seal, harm, what):
    harm(experts)
    with pytest.raises(ConfigurationError, match=what):
        seal.check_values()


def test_what_was_done_on_purpose(experts, seal):
    experts.down_proj.detach().neg_()
    seal.accept()
    seal.check()
    seal.check_values()


def test_values_that_are_no_numbers_are_equal_to_themselves(experts):
    experts.down_proj.data.fill_(torch.nan)
    seal = Seal("Model", "experts", experts)
    seal.check_values()
    experts.double()
    seal.check_values()


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        experts = Experts()
    seal = Seal("Model", "experts", experts)
    seal.check()
    experts.down_proj.data.neg_()
    with pytest.raises(ConfigurationError, match="has other values"):
        seal.check_values()


def test_experts_do_not_run_on_overwritten_weights(experts, seal):
    local = LocalExperts(experts, check_weights=seal.check)
    arguments = (torch.ones(1, 8), torch.tensor([0]), [1, 0])
    assert local(*arguments).shape == (1, 8)
    experts.gate_up_proj.detach().zero_()
    with pytest.raises(ConfigurationError, match="gate_up_proj was written in place"):
        local(*arguments)


def test_weights_that_are_not_there():
    weights_are_there(Experts())
    with pytest.raises(ConfigurationError, match=r"Experts are not there \(gate_up_proj is on the meta device\)"):
        weights_are_there(Experts().to("meta"))
