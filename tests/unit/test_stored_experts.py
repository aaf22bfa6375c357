"""Experts read straight from files: equal to the loader's, or refused where the files hold them in another way."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantised
from lockstep.models.experts_modules import expert_parameters, find_experts, slots_held
from lockstep.models.loading import load_pretrained
from lockstep.models.stored_experts import StoredExperts
from lockstep.models.tiny import make_tiny
from lockstep.moe.placement import EMPTY, Placement

PLACEMENT = Placement.of_ranks(8, [[[6, 1, 3], [0, 2, 4, 5, 7]]] * 2, 5)
OF_FOUR = Placement.of_ranks(quantised.NUM_EXPERTS, [[[3, 1], [0, 2]]] * 2, 3)


@pytest.fixture
def folder(tmp_path):
    return make_tiny(tmp_path / "tiny", num_layers=2, hidden_size=128, dtype=torch.bfloat16)


def load(folder, rank=0, placement=PLACEMENT, **options):
    options = {"dtype": torch.bfloat16} | options
    return find_experts(load_pretrained(str(folder), ep_rank=rank, ep_size=2, placement=placement, **options))


@pytest.mark.parametrize("quantize_experts", ["none", "fp8"])
def test_every_expert_is_what_the_loader_reads(folder, quantize_experts):
    placement = PLACEMENT
    if quantize_experts == "fp8":
        quantised.fp8(folder)
        placement = OF_FOUR
    modules, others = (load(folder, rank, placement, quantize_experts=quantize_experts) for rank in range(2))
    stored = StoredExperts.of(str(folder), modules)
    for own in (modules, others):
        for name, module in own:
            for weight_name, parameter in expert_parameters(module):
                for slot, expert in enumerate(slots_held(module)[0]):
                    if expert != EMPTY:
                        found = torch.empty_like(parameter.detach()[slot])
                        stored.read(name, weight_name, expert, found)
                        assert torch.equal(found.view(torch.uint8), parameter.detach()[slot].view(torch.uint8))


def swap_gate_and_up(tensors):
    return {name.replace("gate_proj", "x").replace("up_proj", "gate_proj").replace("x", "up_proj"): tensor
            for name, tensor in tensors.items()}  # fmt: skip


def change_one_value(tensors):
    tensors["model.layers.1.mlp.experts.6.down_proj.weight"][-1, -1] += 1
    return tensors


@pytest.mark.parametrize("change", [swap_gate_and_up, change_one_value])
def test_files_that_hold_other_values_than_the_modules_are_not_read(folder, change):
    modules = load(folder)
    assert StoredExperts.of(str(folder), modules) is not None
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    assert StoredExperts.of(str(folder), modules) is None


def test_modules_in_another_dtype_are_not_filled_from_the_files(folder):
    assert StoredExperts.of(str(folder), load(folder, dtype=torch.float32)) is None
    assert StoredExperts.of(str(folder), load(folder, quantize_experts="fp8")) is None  # quantised on loading
    assert StoredExperts.of(str(folder / "nowhere"), load(folder)) is None
