"""`lockstep bench calibrate --dispatch`: measure, fit and store what dispatch and combine take on this machine."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.commands.calibrate import check_replaceable
from lockstep.dispatch.base import Dispatcher, ExpertsShape, Route
from lockstep.dispatch.choose import DispatcherOptions, backend_names, can_map, make_dispatcher, mapping_facts
from lockstep.dispatch.collectives import gather_json
from lockstep.dispatch.constants import DispatchConstants, Exchange, fit, machine_name, stored_path
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.runner.launcher import launch
from lockstep.runner.options import RANKS_PER_CORE

NUM_EXPERTS = 64
# Size of a row and experts per row. On GPUs each pair's kernels are compiled first, which takes most of the time.
SHAPES = {"cpu": ((256, 1), (256, 8), (2048, 1), (2048, 8)), "cuda": ((2048, 1), (2048, 8), (7168, 8))}
# Rows of the first rank, and of each other. Not none at all: ranks that agreed on that exchange nothing.
ROWS = ((1, 0), (1, 1), (16, 16), (128, 128), (512, 0), (512, 512), (1024, 128))
_LIMIT_S = 120.0

_Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, ids and weights


def execute_dispatch_calibration(num_ranks: int, out: Path | None, as_json: bool, samples: int = 9) -> int:
    """Measure local ranks, on GPUs if there are enough; store the constants and show how well they fit."""
    most_ranks = RANKS_PER_CORE * (os.cpu_count() or 1)
    if num_ranks > most_ranks:
        raise ConfigurationError(
            f"data_parallel_size must be <= {most_ranks}, {RANKS_PER_CORE} for each core of this host, got {num_ranks}"
        )
    device_type = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= num_ranks else "cpu"
    path = out or stored_path(device_type)
    if out:
        check_replaceable(out, lambda: DispatchConstants.load(out))
    measured: list[tuple[str, Exchange, float]]
    try:
        measured = launch(num_ranks, measure, device_type, samples, limit_s=_LIMIT_S, preload=(__name__,))
    except LockstepError as error:
        raise LockstepError(f"{error}; `lockstep env` tries the backends one by one") from error
    by_backend: dict[str, list[tuple[Exchange, float]]] = {}
    for name, exchange, us in measured:
        by_backend.setdefault(name, []).append((exchange, us))
    constants = DispatchConstants(
        {name: fit(name, times) for name, times in by_backend.items()},
        f"measured over {num_ranks} ranks of {machine_name(device_type)}",
    )
    constants.save(path)
    median_error = {}
    for name, times in by_backend.items():
        errors = sorted(abs(constants.backends[name].predict_us(name, exchange) / us - 1) for exchange, us in times)
        median_error[name] = round(errors[len(errors) // 2], 3)
    if as_json:
        numbers = {name: asdict(one) for name, one in constants.backends.items()}
        document = {"source": constants.source, "constants": numbers, "median_error": median_error, "file": str(path)}
        sys.stdout.write(json.dumps(document) + "\n")
        return 0
    sys.stdout.write(f"{constants.source}: dispatch and combine, us\n")
    for name, one in constants.backends.items():
        sys.stdout.write(
            f"  {name:<10} {one.latency_us:,.1f} + {one.row_us:.3g} per row + {one.dispatch_us_per_mb:,.3g} per MB to "
            f"experts + {one.combine_us_per_mb:,.3g} per MB back + {one.total_us_per_mb:,.3g} per MB of all ranks + "
            f"{one.first_us_per_mb:,.3g} per MB of the first 2; "
            f"half of the {len(by_backend[name])} times within {100 * median_error[name]:.0f} %\n"
        )
    use = "used where LOCKSTEP_DISPATCH_CONSTANTS names it" if out else "dispatcher `auto` chooses by them from now on"
    sys.stdout.write(f"constants: {path}; {use}\n")
    return 0


def measure(device_type: str, samples: int) -> list[tuple[str, Exchange, float]]:
    """Time an eager dispatch and its combine in every backend and case, in us of the slowest rank; alike on all."""
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
    """Return the median of each backend over the samples, after one call that warms up; the slowest rank counts."""
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
