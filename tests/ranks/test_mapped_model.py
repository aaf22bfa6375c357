"""A model on dispatchers that stand in for the one-sided GPU one: rows in fp8, and chunks that overlap."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import lockstep
from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.errors import ConfigurationError
from lockstep.models import huggingface
from lockstep.moe.experts import FEW_ROWS, LocalExperts
from lockstep.testing import run_ranks

GROUP = 128  # values that share a scale


class MappedDispatcher(AllGatherDispatcher):
    """Leaves the counts to the device, rows in fp8 if so wished, like the GPU's."""

    name = "nvlink"

    def __init__(self, process_group, num_experts, fp8, **options):
        super().__init__(process_group, num_experts)
        self.fp8, self.options, self.calls = fp8, options, 0

    def dispatch(self, *arguments):
        self.calls += 1
        handle = super().dispatch(*arguments)
        rows, scales = handle.hidden_states, None
        if self.fp8:
            grouped = rows.float().view(len(rows), -1, GROUP)
            scales = grouped.abs().amax(-1).clamp_min(1e-30) / 448
            rows = (grouped / scales[..., None]).to(torch.float8_e4m3fn).view(rows.shape)
        offsets = torch.cat([torch.zeros(1), handle.tokens_per_expert.cumsum(0)]).to(torch.int32)
        state = SimpleNamespace(expert_offsets=offsets, scales=scales, sent=handle)
        return replace(handle, hidden_states=rows, state=state)

    def combine(self, expert_output, handle):
        return super().combine(expert_output, handle.state.sent)


def on_device(self, hidden_states, scales, gather_index, expert_offsets, rows_per_expert):
    """What the GPU's kernels compute, from scales and offsets that the host has not looked at."""
    assert (scales is None) == (hidden_states.dtype is torch.bfloat16)
    rows = hidden_states
    if scales is not None:
        rows = (rows.float() * scales.repeat_interleave(GROUP, 1)).to(torch.bfloat16)
    return self(rows, gather_index, expert_offsets.diff().long())


def run_model(folder, prompt):
    from transformers import AutoModelForCausalLM

    rank, made = dist.get_rank(), []

    def make(process_group, *, num_experts, fp8=False, **options):
        made.append(MappedDispatcher(process_group, num_experts, fp8, **options))
        return made[-1]

    huggingface.make_mapped_dispatcher = make
    LocalExperts.on_device = on_device

    def logits(overlap_from=None, **options):
        whole = AutoModelForCausalLM.from_pretrained(Path(folder, "tiny"), dtype=torch.bfloat16)
        model = lockstep.parallelize(whole, **options)
        model.__dict__["_lockstep_parallel"].overlap_from = overlap_from
        with lockstep.join(model), torch.no_grad():  # rank 1 has nothing to run, so that there is one step for certain
            return model(input_ids=torch.arange(prompt)[None] + 65).logits.float() if rank == 0 else torch.ones(1)

    expected = logits(dispatcher="allgather")

    def error(found):
        return float((found - expected).norm() / expected.norm())

    errors = {
        "bf16": error(logits(dispatcher="nvlink")),
        "fp8": error(logits(dispatcher="nvlink", fp8_dispatch=True)),
        "overlap": error(logits(dispatcher="nvlink", overlap_from=8)),
        "all": error(logits(dispatcher="nvlink", overlap_from=8, fp8_dispatch=True, max_chunk_size_per_rank=3)),
        "too short": error(logits(dispatcher="nvlink", overlap_from=prompt + 1)),
    }
    return errors, [(one.fp8, one.options.get("num_channels", 1), one.calls) for one in made]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lockstep.models.tiny import make_tiny

    folder = tmp_path_factory.mktemp("mapped")
    make_tiny(folder / "tiny", num_layers=2, hidden_size=128, dtype=torch.bfloat16)
    return folder


@pytest.mark.ranks(2)
def test_rows_in_fp8_and_chunks_that_overlap(folder):
    (errors, made), (_, made_by_idle_rank) = run_ranks(2, run_model, str(folder), 10)
    assert made == made_by_idle_rank
    # Of two layers: fp8 or not, dispatches under way, calls.
    assert made == [
        (False, 1, 2),
        (True, 1, 2),
        (False, 1, 0), (False, 2, 4),  # two chunks
        (True, 1, 0), (True, 2, 8),  # four of at most 3 rows
        (False, 1, 2), (False, 2, 0),
    ]  # fmt: skip
    for name in ("bf16", "overlap", "too short"):
        assert errors[name] < 0.02, errors
    # Four significant bits of each value, and a few more where values of a row are alike in size.
    for name in ("fp8", "all"):
        assert 0.002 < errors[name] < 0.06, errors


@pytest.mark.parametrize("fp8", [False, True])
def test_kernels_are_loaded_with_rows_of_the_kind_that_steps_bring(monkeypatch, fp8):
    seen = []

    def look(self, hidden_states, scales, gather_index, expert_offsets, rows_per_expert):
        output = on_device(self, hidden_states, scales, gather_index[:1], expert_offsets, rows_per_expert)
        seen.append((hidden_states.dtype, hidden_states.stride(), len(gather_index), rows_per_expert > FEW_ROWS))
        assert torch.equal(output, torch.zeros(1, 384, dtype=torch.bfloat16))

    monkeypatch.setattr(LocalExperts, "on_device", look)
    weights = torch.ones(3, 32, 384, dtype=torch.bfloat16), torch.ones(3, 384, 16, dtype=torch.bfloat16)
    LocalExperts.from_tensors(*weights).warm_up(640, fp8)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    assert seen == [(dtype, (384, 1), 640, False), (dtype, (384, 1), 640, True)]


def test_fp8_is_refused_where_rows_cannot_be_sent_so():
    with pytest.raises(ConfigurationError, match="fp8_dispatch needs dispatcher 'nvlink', got 'allgather'"):
        lockstep.from_pretrained("nowhere", fp8_dispatch=True)


def run_unlike_ranks(folder, name):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(Path(folder, "tiny"), dtype=torch.bfloat16)
    options = {"fp8_dispatch": dist.get_rank() == 0} if name == "fp8" else {}
    model = lockstep.parallelize(whole, dispatcher="nvlink", **options)
    if name == "overlap":
        model.__dict__["_lockstep_parallel"].overlap_from = 100 + dist.get_rank()
    with pytest.raises(lockstep.errors.RankMismatchError) as caught, lockstep.join(model):
        pass
    return str(caught.value)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp8", "ranks disagree about fp8 dispatch: rank 0: True, rank 1: False"),
        ("overlap", "ranks disagree about overlap from: rank 0: 100, rank 1: 101"),
    ],
)
def test_ranks_that_would_cut_or_send_otherwise_are_refused(folder, name, message):
    assert run_ranks(2, run_unlike_ranks, str(folder), name) == [message] * 2
