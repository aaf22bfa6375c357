"""Dispatch and combine of every backend, timed between local ranks: what a machine's constants are fitted to."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from lockstep.dispatch.base import Dispatcher, ExpertsShape, Route
from lockstep.dispatch.choose import DispatcherOptions, backend_names, can_map, make_dispatcher, mapping_facts
from lockstep.dispatch.collectives import gather_json
from lockstep.dispatch.constants import Exchange

NUM_EXPERTS = 64
# Size of a row and experts per row. On GPUs each pair's kernels are compiled first, which takes most of the time.
SHAPES = {"cpu": ((256, 1), (256, 8), (2048, 1), (2048, 8)), "cuda": ((2048, 1), (2048, 8), (7168, 8))}
# Rows of the first rank, and of each other. Not none at all: ranks that agreed on that exchange nothing.
ROWS = ((1, 0), (1, 1), (16, 16), (128, 128), (512, 0), (512, 512), (1024, 128))

_Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, ids and weights


def measure(device_type: str, samples: int) -> list[tuple[str, Exchange, float]]:
    """Time one dispatch and its combine in every backend and case; experts compute nothing. Runs on each rank.

    Calls are eager, the sums that each backend takes by itself are in them, and the slowest rank counts.

    Args:
        device_type: "cpu" (float32, gloo) or "cuda" (bfloat16, NCCL and mapped memory).
        samples: timed calls of each case, of which the median counts; one more warms up.

    Returns:
        Backend, exchange and time in us; the same on all ranks.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    cuda = device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    group, control = dist.new_group(backend="nccl" if cuda else "gloo"), dist.new_group(backend="gloo")
    names = backend_names(can_map(gather_json(mapping_facts(device), control)))
    found: list[tuple[str, Exchange, float]] = []
    for hidden, top_k in SHAPES[device_type]:
        num_experts = NUM_EXPERTS * num_ranks
        shape = ExpertsShape(num_experts, hidden, top_k, dtype, device)
        options = DispatcherOptions(max_rows_per_rank=max(map(max, ROWS)))
        dispatchers = {name: make_dispatcher(name, group, shape, options) for name in names}
        for first, others in ROWS:
            sizes = (first, *[others] * (num_ranks - 1))
            states = hidden * dtype.itemsize
            exchange = Exchange(sizes, num_experts, top_k, states + 8 * top_k, states)
            generator = torch.Generator().manual_seed(rank)
            rows = torch.randn(sizes[rank], hidden, generator=generator).to(device, dtype)
            ids = torch.rand(sizes[rank], num_experts, generator=generator).topk(top_k).indices.to(device, torch.int32)
            weights = torch.full((sizes[rank], top_k), 1 / top_k, device=device)
            times = _time_us(dispatchers, sizes, (rows, ids, weights), samples, control)
            found.extend((name, exchange, us) for name, us in times.items())
    return found


def _time_us(
    dispatchers: dict[str, Dispatcher], sizes: tuple[int, ...], rows: _Rows, samples: int, control: dist.ProcessGroup
) -> dict[str, float]:
    """The median over the samples of each backend, in us; the slowest rank counts."""
    outputs = {}
    for name, dispatcher in dispatchers.items():
        handle = dispatcher.dispatch(dispatcher.route(sizes), *rows)
        outputs[name] = handle.hidden_states[handle.gather_index].to(rows[0].dtype)
        dispatcher.combine(outputs[name], handle)
    # In turns, so that what else the machine does meanwhile hits all of them alike.
    times = [
        [_once_us(one, one.route(sizes), rows, outputs[name], control) for name, one in dispatchers.items()]
        for _ in range(samples)
    ]
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=control)
    return {name: statistics.median(slowest[:, index].tolist()) for index, name in enumerate(dispatchers)}


def _once_us(
    dispatcher: Dispatcher, route: Route, rows: _Rows, expert_output: torch.Tensor, control: dist.ProcessGroup
) -> float:
    if expert_output.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(control)
    started = time.perf_counter()
    dispatcher.combine(expert_output, dispatcher.dispatch(route, *rows))
    if expert_output.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e6
