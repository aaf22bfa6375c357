"""The layer over real ranks against the reference in one process."""

import itertools

import pytest
import torch
import torch.distributed as dist

from lockstep.coordination.forward_context import ForwardContext, set_forward_context
from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.config import ParallelConfig
from lockstep.metadata.dp_metadata import DPMetadata
from lockstep.moe.experts import LocalExperts
from lockstep.moe.layer import MoELayer
from lockstep.moe.reference import moe_reference
from lockstep.testing import MoEInputs, record_collectives, run_ranks

DISPATCHERS = {"allgather": AllGatherDispatcher}
COUNTS = {
    4: [[3, 1, 4, 2], [5, 0, 0, 7], [0, 1, 0, 0], [0, 0, 0, 0], [12, 1, 1, 1]],
    2: [[3, 1], [0, 5], [7, 0], [0, 0], [1, 1]],
    1: [[9], [1], [0], [3]],
}
# What the results of one layer may differ by from the reference's, relative to the largest value.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def _tensor_parallel_group(config):
    groups = [
        dist.new_group(list(range(first, first + config.tensor_parallel_size)))
        for first in range(0, config.world_size, config.tensor_parallel_size)
    ]
    return groups[config.data_parallel_rank]


def run_cases(dp_size, tp_size, dispatcher_name, chunk_sizes, dtypes):
    rank = dist.get_rank()
    config = ParallelConfig(dp_size, rank // tp_size, tp_size, rank % tp_size)
    tp_group = _tensor_parallel_group(config)
    outcomes = []
    for seed, (counts, chunk_size, dtype) in enumerate(itertools.product(COUNTS[dp_size], chunk_sizes, dtypes)):
        inputs = MoEInputs.make(counts, seed, dtype=dtype)
        dispatcher = DISPATCHERS[dispatcher_name](dist.group.WORLD, 8)
        local = slice(rank * dispatcher.num_local_experts, (rank + 1) * dispatcher.num_local_experts)
        experts = LocalExperts.from_tensors(inputs.gate_up_proj[local], inputs.down_proj[local])
        layer = MoELayer(
            experts, dispatcher, config, hidden_size=16, top_k=2, dtype=dtype, tensor_parallel_group=tp_group
        )
        plan = ChunkPlan(counts, tp_size, chunk_size, rank)
        metadata = DPMetadata.make(config, counts[config.data_parallel_rank], counts)
        mine = (inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
        mine = [tensors[config.data_parallel_rank] for tensors in mine]
        results, logs = [], []
        for _ in range(2):
            with set_forward_context(ForwardContext(metadata, plan)), record_collectives() as log:
                results.append(layer(*mine))
            logs.append(list(log))
        # The reference gives every expert-parallel rank's experts, whichever DP rank the rows belong to.
        spread = [inputs.hidden_states, inputs.topk_ids, inputs.topk_weights]
        padded = [[*tensors, *[tensors[0][:0]] * (config.world_size - dp_size)] for tensors in spread]
        expected = moe_reference(*padded, inputs.gate_up_proj, inputs.down_proj)[config.data_parallel_rank]
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        difference = float((results[0].float() - expected.float()).abs().max()) / scale if expected.numel() else 0.0
        outcomes.append(
            {
                "case": (counts, chunk_size, str(dtype)),
                "shape_right": results[0].shape == expected.shape,
                "difference": difference,
                "tolerance": TOLERANCE[dtype],
                "repeats": torch.equal(results[0], results[1]),
                "log": [entry for entry in logs[0] if entry[0] != "tp"],
                "chunks": len(plan),
            }
        )
    return outcomes


def _check(all_outcomes, tp_size):
    for outcomes in zip(*all_outcomes, strict=True):
        for outcome in outcomes:
            assert outcome["shape_right"], outcome
            assert outcome["difference"] <= outcome["tolerance"], outcome
            assert outcome["repeats"], outcome
        if tp_size == 1:
            assert all(outcome["log"] == outcomes[0]["log"] for outcome in outcomes), [o["log"] for o in outcomes]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("dp_size", "tp_size"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_layer_equals_the_reference_for_every_split_count_and_chunk_size(dp_size, tp_size):
    chunk_sizes = [None, 1, 2, 3, 4, 5, 7, 12, 100]
    outcomes = run_ranks(
        dp_size * tp_size, run_cases, dp_size, tp_size, "allgather", chunk_sizes, [torch.float32, torch.bfloat16]
    )
    _check(outcomes, tp_size)
    assert sum(outcome["chunks"] for outcome in outcomes[0]) > 30


def fail_in_experts():
    rank = dist.get_rank()
    inputs = MoEInputs.make([3, 2])
    dispatcher = AllGatherDispatcher(dist.group.WORLD, 8)
    local = LocalExperts.from_tensors(
        inputs.gate_up_proj[rank * 4 : rank * 4 + 4], inputs.down_proj[rank * 4 : rank * 4 + 4]
    )
    calls = []

    def experts(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 1:
            raise ValueError("an expert broke")
        return local(*args)

    config = ParallelConfig(2, rank)
    layer = MoELayer(experts, dispatcher, config, hidden_size=16, top_k=2)
    plan = ChunkPlan([3, 2], 1, 1, rank)
    metadata = DPMetadata.make(config, [3, 2][rank], [3, 2])
    message = ""
    with set_forward_context(ForwardContext(metadata, plan)):
        mine = (inputs.hidden_states[rank], inputs.topk_ids[rank], inputs.topk_weights[rank])
        try:
            layer(*mine)
        except ValueError as error:
            message = str(error)
        again = layer(*mine)
    expected = moe_reference(
        inputs.hidden_states, inputs.topk_ids, inputs.topk_weights, inputs.gate_up_proj, inputs.down_proj
    )[rank]
    return message, torch.allclose(again, expected, atol=1e-5)


@pytest.mark.ranks(2)
def test_a_failure_in_the_experts_leaves_the_ranks_in_step():
    assert run_ranks(2, fail_in_experts) == [("", True), ("an expert broke", True)]
