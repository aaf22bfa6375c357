"""A model on dispatchers that stand in for the one-sided GPU one: rows in fp8, steps of several chunks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lockstep
from dispatch_rounds import round_to_fp8, undo_scales
from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import find_experts
from lockstep.moe.experts import FEW_ROWS, LocalExperts
from lockstep.moe.fp8 import dequantise, quantise
from lockstep.testing import run_ranks
from mapped import on_device, stand_in


def run_model(folder, prompt):
    from transformers import AutoModelForCausalLM

    rank, made = dist.get_rank(), stand_in()

    def load():
        return AutoModelForCausalLM.from_pretrained(Path(folder, "tiny"), dtype=torch.bfloat16).eval()

    ids = torch.arange(prompt)[None] + 65

    def logits(**options):
        model = lockstep.parallelize(load(), **options)
        with lockstep.join(model), torch.no_grad():  # rank 1 has nothing to run, so that there is one step for certain
            return model(input_ids=ids).logits.float() if rank == 0 else torch.ones(1)

    expected = logits(dispatcher="allgather")
    whole = load()
    for _, module in find_experts(whole):
        module.register_forward_pre_hook(
            lambda _, args: (undo_scales(*round_to_fp8(args[0])).to(torch.bfloat16), *args[1:])
        )
    with torch.no_grad():
        rounded = whole(input_ids=ids).logits.float()

    def error(found, wanted=expected):
        return float((found - wanted).norm() / wanted.norm()) if rank == 0 else 0.0

    fp8 = logits(dispatcher="nvlink", fp8_dispatch=True)
    cut = logits(dispatcher="nvlink", fp8_dispatch=True, max_chunk_size_per_rank=3)
    model = lockstep.from_pretrained(
        Path(folder, "tiny"), quantize_experts="fp8", dispatcher="nvlink", fp8_dispatch=True
    )
    with lockstep.join(model), torch.no_grad():
        in_fp8 = model(input_ids=ids).logits.float() if rank == 0 else torch.ones(1)
    for _, module in find_experts(whole):
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(module, name)
            parameter.data = dequantise(*quantise(parameter.data), torch.bfloat16)
    with torch.no_grad():
        all_rounded = whole(input_ids=ids).logits.float()
    errors = {
        "all in fp8": error(in_fp8),
        "all in fp8, from rounded ones": error(in_fp8, all_rounded),
        "bf16": error(logits(dispatcher="nvlink")),
        "fp8": error(fp8),
        "fp8, from rounded rows": error(fp8, rounded),
        "fp8 in chunks": error(cut),
        "fp8 in chunks, from rounded rows": error(cut, rounded),
    }
    return errors, [(one.fp8, one.calls) for one in made]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lockstep.models.tiny import make_tiny

    folder = tmp_path_factory.mktemp("mapped")
    make_tiny(folder / "tiny", num_layers=2, hidden_size=128, dtype=torch.bfloat16)
    return folder


@pytest.mark.ranks(2)
def test_rows_in_fp8_and_steps_of_several_chunks(folder):
    (errors, made), (_, made_by_idle_rank) = run_ranks(2, run_model, str(folder), 10)
    assert made == made_by_idle_rank
    # Rows in fp8 or not, calls of two layers; 10 rows are 4 chunks of 3. Experts in fp8 take rows in fp8 too.
    assert made == [(True, 2), (True, 8), (True, 2), (False, 2)]
    assert errors["all in fp8, from rounded ones"] < 0.03 < errors["all in fp8"], errors
    assert errors["bf16"] < 0.02, errors
    # Four significant bits of each value are kept: the whole model agrees once its experts get rows rounded so.
    for name in ("fp8", "fp8 in chunks"):
        assert errors[f"{name}, from rounded rows"] < 0.02 < errors[name], errors


@pytest.mark.parametrize("fp8", [False, True])
def test_kernels_are_loaded_with_rows_of_the_kind_that_steps_bring(fp8):
    seen = []

    class Seen(LocalExperts):
        def on_device(self, hidden_states, scales, gather_index, expert_offsets, rows_per_expert):
            output = on_device(self, hidden_states, scales, gather_index[:1], expert_offsets, rows_per_expert)
            seen.append((hidden_states.dtype, hidden_states.stride(), len(gather_index), rows_per_expert > FEW_ROWS))
            assert torch.equal(output, torch.zeros(1, 384, dtype=torch.bfloat16))

    weights = torch.ones(3, 32, 384, dtype=torch.bfloat16), torch.ones(3, 384, 16, dtype=torch.bfloat16)
    Seen.from_tensors(*weights).warm_up(640, fp8)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    assert seen == [(dtype, (384, 1), 640, False), (dtype, (384, 1), 640, True)]


def test_fp8_is_refused_where_rows_cannot_be_sent_so():
    with pytest.raises(ConfigurationError, match="fp8_dispatch needs dispatcher 'nvlink', got 'auto'"):
        lockstep.from_pretrained("nowhere", fp8_dispatch=True)


def run_unlike_ranks(folder):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(Path(folder, "tiny"), dtype=torch.bfloat16)
    model = lockstep.parallelize(whole, dispatcher="nvlink", fp8_dispatch=dist.get_rank() == 0)
    with pytest.raises(lockstep.errors.RankMismatchError) as caught, lockstep.join(model):
        pass
    return str(caught.value)


@pytest.mark.ranks(2)
def test_ranks_that_would_send_otherwise_are_refused(folder):
    message = "ranks disagree about fp8_dispatch: rank 0: True, rank 1: False"
    assert run_ranks(2, run_unlike_ranks, str(folder)) == [message] * 2
