"""Norms as one kernel: the same function, only where it is the same function."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lockstep
from lockstep.models.norms import fuse_norms, is_fused
from lockstep.models.tiny import make_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), num_layers=2)


def test_every_norm_is_fused_and_the_logits_stay(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():  # all ones would not show a weight that is forgotten
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.rand(weight.shape) + 0.5)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    # Per layer two norms of rows, one of queries and one of keys; and the last.
    assert fuse_norms(model) == 2 * 4 + 1
    assert fuse_norms(model) == 2 * 4 + 1
    seen = []
    rms_norm = torch.nn.functional.rms_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "rms_norm", lambda *a: seen.append(a[0].shape) or rms_norm(*a))
        found = model(ids).logits
    assert len(seen) == 9
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_another_dtype_go_the_old_way(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    norm, rows = model.model.norm, torch.randn(3, 64).bfloat16()
    expected = norm(rows)
    fuse_norms(model)
    assert torch.equal(norm(rows), expected)


class MadeUpRMSNorm(torch.nn.Module):
    def __init__(self, weight, formula):
        super().__init__()
        self.weight, self.variance_epsilon, self.formula = torch.nn.Parameter(weight), 1e-6, formula

    def forward(self, rows):
        return self.formula(self, rows)


def adds_1_to_the_weight(norm, rows):
    return torch.nn.functional.rms_norm(rows, (8,), 1 + norm.weight, 1e-6)


def adds_epsilon_to_the_root(norm, rows):
    return norm.weight * rows / (rows.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


@pytest.mark.parametrize("formula", [adds_1_to_the_weight, adds_epsilon_to_the_root])
def test_another_formula_is_left_alone(formula):
    model = torch.nn.Sequential(MadeUpRMSNorm(torch.ones(8), formula))
    with pytest.raises(lockstep.ConfigurationError, match="Sequential has no RMSNorm that computes as PyTorch's does"):
        fuse_norms(model)
    assert "forward" not in vars(model[0])


def test_a_forward_that_somebody_replaced_is_left_alone(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    norm, calls = model.model.norm, []
    plain = norm.forward
    norm.forward = lambda rows: calls.append(rows.shape) or plain(rows)
    assert fuse_norms(model) == 2 * 4
    model(torch.arange(6)[None])
    assert calls == [(1, 6, 64)]


def test_weights_that_are_not_there_yet_are_said(checkpoint):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    with pytest.raises(lockstep.ConfigurationError, match="are not there yet: load it first"):
        fuse_norms(model)


def test_norms_are_fused_while_a_model_is_loaded(checkpoint):
    model = lockstep.from_pretrained(checkpoint, fuse_norms=True, device="cpu")
    assert fuse_norms(model) == sum(map(is_fused, model.modules())) == 2 * 4 + 1
    plain = lockstep.from_pretrained(checkpoint, device="cpu")
    assert not any(map(is_fused, plain.modules()))
    assert lockstep.parallelize(plain, fuse_norms=True) is plain
    assert any(map(is_fused, plain.modules()))
