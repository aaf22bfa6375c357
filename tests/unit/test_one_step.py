"""One step on one rank, without others: which rows it takes, in what order, and what a graph that records it gets."""

from types import SimpleNamespace

import pytest
import torch

from lockstep import ExpertsShape, MoELayer, MoELayers, ParallelConfig, current_step, get_forward_context
from lockstep.dispatch.base import Abilities, DispatchHandle, Route
from lockstep.dispatch.collective_dispatchers import AllGatherDispatcher
from lockstep.errors import ConfigurationError, TokenCountError

SHAPE = ExpertsShape(4, 8, 2)


class Mirror:
    """Gives every row back, and keeps what it was called with."""

    name, abilities, num_experts, num_local_experts = "mirror", Abilities(max_rows_per_rank=16), 4, 2

    def __init__(self):
        self.calls, self.forgotten = [], 0

    def route(self, sizes, limit=None, *, capture=False):
        return Route(self.name, tuple(sizes), min(limit or 16, 16), captures=max(sizes) <= 16)

    def dispatch(self, route, hidden_states, topk_ids, topk_weights, num_tokens=None):
        self.calls.append((route.sizes, hidden_states.shape[0], num_tokens))
        index = torch.arange(hidden_states.shape[0], dtype=torch.int32)
        return DispatchHandle(route, len(index), hidden_states, None, index, index, index, topk_weights, len(index))

    def combine(self, expert_output, handle):
        return expert_output

    def check(self, *, wait=False):
        pass

    def forget_capture(self):
        self.forgotten += 1


def make(num_layers=2, limit=None, experts=lambda rows, *_: rows):
    mirror = Mirror()
    layer = MoELayer(experts, mirror, ParallelConfig(2, 0), SHAPE)
    return MoELayers([layer] * num_layers, max_chunk_size_per_rank=limit), mirror


def rows(count):
    return torch.randn(count, 8), torch.zeros(count, 2, dtype=torch.int64), torch.ones(count, 2)


def test_a_step_is_routed_once_and_every_layer_walks_through_its_chunks():
    layers, mirror = make(limit=4)
    mine = rows(5)
    with layers.begin([5, 1]) as step:
        assert get_forward_context().chunk_plan is step.plan
        outputs = [step.run_layer(index, *mine) for index in range(2)]
    assert all(torch.equal(output, mine[0]) for output in outputs)
    assert [sizes for sizes, _, _ in mirror.calls] == [(4, 1), (1, 0)] * 2
    assert current_step() is None


def test_leaving_a_step_takes_part_in_the_layers_that_are_left():
    layers, mirror = make(num_layers=3)
    with pytest.raises(KeyError), layers.begin([3, 2]) as step:
        step.run_layer(0, *rows(3))
        raise KeyError("the model broke")
    assert [count for _, count, _ in mirror.calls] == [3, 3, 3]  # as many rows as the others expect, for no expert
    with layers.begin([0, 2]) as step:  # an idle rank is one with no rows
        step.take_part_in_rest()
    assert [count for _, count, _ in mirror.calls[3:]] == [0, 0, 0]


def test_layers_come_in_order_with_the_rows_that_were_agreed():
    layers, _ = make()
    with (
        pytest.raises(RuntimeError, match="MoE layer 1 was called where layer 0 was due"),
        layers.begin([3, 2]) as step,
    ):
        step.run_layer(1, *rows(3))
    wrong = r"4 rows came to MoE layer 0, but 3 were agreed for this step on DP rank 0"
    with pytest.raises(TokenCountError, match=wrong), layers.begin([3, 2]) as step:
        step.run_layer(0, *rows(4))


def test_a_captured_step_counts_its_rows_on_the_device():
    layers, mirror = make()
    cell = torch.zeros(1, dtype=torch.int32)
    with layers.begin_capture([0, 0], num_rows=cell, capacity=8) as step:
        assert current_step() is step
        for index in range(2):
            step.run_layer(index, *rows(8))  # what the model computes, whatever the count is at a replay
    with layers.begin_capture([0, 0], num_rows=cell, capacity=0) as step:
        step.take_part_in_rest()
    assert [(count, num_tokens is cell) for _, count, num_tokens in mirror.calls] == [(8, True)] * 2 + [(0, True)] * 2
    with layers.begin([3, 2]) as step:
        assert step.captures
        step.replayed()
    assert len(mirror.calls) == 4  # the graph has issued them


def test_a_capture_that_fails_is_forgotten_and_does_not_hide_why():
    def broken(*_):
        raise ValueError("an expert broke")

    layers, mirror = make(experts=broken)
    with pytest.raises(ValueError, match="an expert broke"), layers.begin_capture([0, 0], capacity=0) as step:
        step.take_part_in_rest()
    assert mirror.forgotten == 1


@pytest.mark.parametrize(
    ("cell", "capacity", "message"),
    [
        (torch.zeros(1, dtype=torch.int64), 8, r"num_rows must be int32 \[1\] on cpu, got torch.int64"),
        (torch.zeros(2, dtype=torch.int32), 8, r"num_rows must be int32 \[1\]"),
        (torch.zeros(1, dtype=torch.int32), None, "num_rows goes with the capacity"),
        (torch.zeros(1, dtype=torch.int32), 2, "3 rows do not fit into buffers of 2"),
        (torch.zeros(1, dtype=torch.int32), 20, "buffers with more rows than the step need one chunk"),
    ],
)
def test_buffers_that_cannot_work_are_refused_and_the_others_are_not_left_waiting(cell, capacity, message):
    layers, mirror = make()
    counts = [3, 2] if capacity != 20 else [17, 2]
    with pytest.raises(ConfigurationError, match=message), layers.begin(counts, num_rows=cell, capacity=capacity):
        raise AssertionError("the model would run")
    assert sum(count for _, count, _ in mirror.calls) == 2 * counts[0]


def test_what_runs_eagerly_only_cannot_be_captured():
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    layer = MoELayer(None, AllGatherDispatcher(group, 4), ParallelConfig(2, 0), SHAPE)
    with pytest.raises(ConfigurationError, match="'allgather' waits on the host, so it cannot be captured"):
        MoELayers([layer]).begin_capture([3, 0])
