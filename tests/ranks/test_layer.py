"""The layer over real ranks against the reference in one process."""

import contextlib
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.collective_dispatchers import AllGatherDispatcher
from lockstep.errors import ConfigurationError, TokenCountError
from lockstep.metadata.config import ParallelConfig
from lockstep.moe.experts import LocalExperts
from lockstep.moe.layer import MoELayer
from lockstep.moe.layers import MoELayers
from lockstep.moe.reference import moe_reference
from lockstep.testing import MoEInputs, record_collectives, run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_engine.py"
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
        shape = ExpertsShape(8, 16, 2, dtype)
        layer = MoELayer(experts, dispatcher, config, shape, tensor_parallel_group=tp_group)
        layers = MoELayers([layer], max_chunk_size_per_rank=chunk_size)
        mine = (inputs.hidden_states, inputs.topk_ids, inputs.topk_weights)
        mine = [tensors[config.data_parallel_rank] for tensors in mine]
        results, logs = [], []
        for _ in range(2):
            with record_collectives() as log, layers.begin(counts) as step:
                results.append(step.run_layer(0, *mine))
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
                "chunks": len(step.plan),
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
    layers = MoELayers([MoELayer(experts, dispatcher, config, ExpertsShape(8, 16, 2))] * 2, max_chunk_size_per_rank=1)
    message = ""
    mine = (inputs.hidden_states[rank], inputs.topk_ids[rank], inputs.topk_weights[rank])
    try:
        with layers.begin([3, 2]) as step:
            for index in range(2):
                step.run_layer(index, *mine)
    except ValueError as error:
        message = str(error)
    with layers.begin([3, 2]) as step:
        again = step.run_layer(0, *mine)
    expected = moe_reference(
        inputs.hidden_states, inputs.topk_ids, inputs.topk_weights, inputs.gate_up_proj, inputs.down_proj
    )[rank]
    return message, torch.allclose(again, expected, atol=1e-5)


@pytest.mark.ranks(2)
def test_a_failure_in_the_experts_leaves_the_ranks_in_step():
    assert run_ranks(2, fail_in_experts) == [("", True), ("an expert broke", True)]


def run_in_buffers():
    rank, counts = dist.get_rank(), [3, 0]
    inputs = MoEInputs.make(counts)
    dispatcher = AllGatherDispatcher(dist.group.WORLD, 8)
    local = slice(rank * 4, rank * 4 + 4)
    experts = LocalExperts.from_tensors(inputs.gate_up_proj[local], inputs.down_proj[local])
    layers = MoELayers([MoELayer(experts, dispatcher, ParallelConfig(2, rank), ExpertsShape(8, 16, 2))])
    mine = (inputs.hidden_states[rank], inputs.topk_ids[rank], inputs.topk_weights[rank])
    with layers.begin(counts) as step:
        expected = step.run_layer(0, *mine)
    # The same rows in buffers of 5, with garbage behind them that would spoil everything it came to.
    buffers = torch.full((5, 16), float("nan")), torch.full((5, 2), 10**6), torch.full((5, 2), float("nan"))
    for buffer, rows in zip(buffers, mine, strict=True):
        buffer[: counts[rank]] = rows
    cell = torch.tensor([counts[rank]], dtype=torch.int32)
    with layers.begin(counts, num_rows=cell, capacity=5) as step:
        output = step.run_layer(0, *buffers)
    assert output.shape == (5, 16)
    too_few, step = (
        "3 rows came to MoE layer 0, but its buffers have 5",
        layers.begin(counts, num_rows=cell, capacity=5),
    )
    with pytest.raises(TokenCountError, match=too_few), step:
        step.run_layer(0, *(buffer[:3] for buffer in buffers))
    small, too_small = layers.begin(counts, num_rows=cell, capacity=2), "3 rows do not fit into buffers of 2"
    with pytest.raises(ConfigurationError, match=too_small) if rank == 0 else contextlib.nullcontext(), small:
        small.run_layer(0, *(buffer[:2] for buffer in buffers))  # and rank 1 is not left waiting for rank 0
    return torch.equal(output[: counts[rank]], expected)


@pytest.mark.ranks(2)
def test_rows_of_a_buffer_beyond_the_agreed_ones_go_nowhere():
    assert run_ranks(2, run_in_buffers) == [True, True]


def run_example():
    spec = importlib.util.spec_from_file_location("tiny_engine", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return [rows.shape[0] for rows in example.run(dist.group.WORLD)]


@pytest.mark.ranks(2)
def test_an_engine_of_public_names_alone():
    assert run_ranks(2, run_example) == [[3, 0, 4], [5, 2, 0]]
    assert set(re.findall(r"^from (lockstep\S*) import", EXAMPLE.read_text(), re.MULTILINE)) == {"lockstep"}
