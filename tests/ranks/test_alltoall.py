"""The all-to-all backend: the same bits as the all-gather backend, with each row once per rank that needs it."""

import pytest
import torch
import torch.distributed as dist
from said import say, sleep_until_said

from lockstep.dispatch.base import NO_EXPERT, ExpertsShape
from lockstep.dispatch.collective_dispatchers import AllGatherDispatcher, AllToAllDispatcher, ranks_needed
from lockstep.dispatch.constants import expected_ranks_per_row
from lockstep.errors import RankAbsentError
from lockstep.moe.experts import LocalExperts
from lockstep.moe.reference import moe_reference
from lockstep.testing import MoEInputs, run_ranks

NUM_EXPERTS = 8
COUNTS = {
    1: [[4], [0]],
    2: [[3, 1], [0, 5], [7, 0], [0, 0], [1, 1]],
    4: [[3, 1, 4, 2], [5, 0, 0, 7], [0, 1, 0, 0], [0, 0, 0, 0], [40, 1, 1, 1], [0, 33, 0, 0]],
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def run_cases(top_k, dtype):
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    backends = [AllToAllDispatcher(dist.group.WORLD, NUM_EXPERTS), AllGatherDispatcher(dist.group.WORLD, NUM_EXPERTS)]
    num_local = backends[0].num_local_experts
    outcomes = []
    for seed, counts in enumerate(COUNTS[num_ranks]):
        inputs = MoEInputs.make(counts, seed, num_experts=NUM_EXPERTS, top_k=top_k, dtype=dtype)
        if seed % 2:  # rows that go to no expert: padding and dummy rows look like this
            for ids in inputs.topk_ids:
                ids[1::3] = NO_EXPERT
        local = slice(rank * num_local, (rank + 1) * num_local)
        experts = LocalExperts.from_tensors(inputs.gate_up_proj[local], inputs.down_proj[local])
        mine = (inputs.hidden_states[rank], inputs.topk_ids[rank].int(), inputs.topk_weights[rank])
        outputs, handles = [], []
        for backend in (*backends, backends[0]):
            handle = backend.dispatch(backend.route(counts), *mine)
            expert_output = experts(handle.hidden_states, handle.gather_index, handle.tokens_per_expert)
            outputs.append(backend.combine(expert_output, handle))
            handles.append(handle)
        needed = [ranks_needed(ids, num_local, num_ranks) for ids in inputs.topk_ids]
        expected = None
        if not seed % 2:
            spread = [inputs.hidden_states, inputs.topk_ids, inputs.topk_weights]
            expected = moe_reference(*spread, inputs.gate_up_proj, inputs.down_proj)[rank].float()
        outcomes.append(
            {
                "counts": counts,
                "shape": outputs[0].shape == mine[0].shape and outputs[0].dtype == dtype,
                "same bits as all-gather": torch.equal(outputs[0], outputs[1]),
                "repeats": torch.equal(outputs[0], outputs[2]),
                "each row once per rank": handles[0].hidden_states.shape[0]
                == sum(int(n[:, rank].sum()) for n in needed),
                "reference": expected is None
                or expected.numel() == 0
                or float((outputs[0].float() - expected).abs().max() / expected.abs().max()) <= TOLERANCE[dtype],
                "silent": bool((outputs[0][mine[1][:, 0] < 0] == 0).all()),
            }
        )
    return outcomes


@pytest.mark.ranks(4)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("top_k", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (8, torch.float32)])
def test_same_bits_as_the_all_gather_and_each_row_once_per_rank(num_ranks, top_k, dtype):
    for outcomes in run_ranks(num_ranks, run_cases, top_k, dtype):
        for outcome in outcomes:
            assert all(value for key, value in outcome.items() if key != "counts"), outcome


def one_is_late():
    dispatcher = AllToAllDispatcher(dist.group.WORLD, NUM_EXPERTS, deadline_s=0.5)
    inputs = MoEInputs.make([2, 2])
    if dist.get_rank() == 1:
        sleep_until_said("absent")
        return "late"
    try:
        mine = inputs.hidden_states[0], inputs.topk_ids[0], inputs.topk_weights[0]
        dispatcher.dispatch(dispatcher.route([2, 2]), *mine)
    except RankAbsentError as error:
        say("absent")
        return str(error)


@pytest.mark.ranks(2)
def test_a_rank_that_does_not_come_ends_the_wait():
    assert "all_to_allv did not end" in run_ranks(2, one_is_late)[0]


def test_ranks_of_a_row():
    # 4 experts per rank: experts 0 and 3 live on rank 0, expert 5 on rank 1; a row may go nowhere.
    needed = ranks_needed(torch.tensor([[0, 3], [3, 5], [NO_EXPERT, NO_EXPERT]]), 4, 2)
    assert needed.tolist() == [[True, False], [True, True], [False, False]]


def test_expected_ranks_per_row():
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(64, generator=generator)[:6] for _ in range(4000)])
    seen = ranks_needed(ids, 16, 4).sum().item() / 4000
    assert seen == pytest.approx(expected_ranks_per_row(64, 6, 4), rel=0.02)


def run_auto():
    from lockstep.dispatch.choose import make_dispatcher

    rank, chosen = dist.get_rank(), []
    shape = ExpertsShape(NUM_EXPERTS, 256, 1)
    auto, plain = (make_dispatcher(name, dist.group.WORLD, shape) for name in ("auto", "allgather"))
    for counts in ([2, 3], [900, 0], [0, 0]):
        inputs = MoEInputs.make(counts, 1, num_experts=NUM_EXPERTS, top_k=1, hidden=256)
        mine = (inputs.hidden_states[rank], inputs.topk_ids[rank], inputs.topk_weights[rank])
        outputs = []
        for dispatcher in (auto, plain):
            route = dispatcher.route(counts)
            handle = dispatcher.dispatch(route, *mine)
            outputs.append(dispatcher.combine(handle.hidden_states[handle.gather_index], handle))
            chosen.append(route.backend)
        assert torch.equal(*outputs)
    return chosen[::2]


@pytest.mark.ranks(2)
def test_auto_takes_the_all_to_all_where_it_saves_more_than_its_count_exchange():
    assert run_ranks(2, run_auto) == [["allgather", "alltoall", "allgather"]] * 2
