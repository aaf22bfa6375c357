"""Constants for `auto` on this machine: time dispatch and combine of every backend, fit them, and store the result.

    python benchmarks/calibrate_dispatch.py [--ranks 2] [--out FILE]

Measures eager calls between ranks of this host, on GPUs if there is one for each rank. By default, the constants go to
`~/.config/lockstep/dispatch-<machine>.json`, where `auto` finds them; to use another file, name it in
`$LOCKSTEP_DISPATCH_CONSTANTS`. The last line on stdout is one JSON document.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.choose import DispatcherOptions, backend_names, can_map, make_dispatcher, mapping_facts
from lockstep.dispatch.collectives import gather_json
from lockstep.dispatch.constants import (
    BackendConstants,
    DispatchConstants,
    Exchange,
    features,
    machine_name,
    stored_path,
)
from lockstep.runner.launcher import launch
from lockstep.simulation.cost import nonnegative_least_squares

NUM_EXPERTS = 64
# Size of a row and experts per row. On GPUs each pair's kernels are compiled first, which takes most of the time.
SHAPES = {"cpu": ((256, 1), (256, 8), (2048, 1), (2048, 8)), "cuda": ((2048, 1), (2048, 8), (7168, 8))}
# Rows of the first rank, and of every other rank. Ranks that agree on no rows at all exchange nothing.
ROWS = ((1, 0), (1, 1), (16, 16), (128, 128), (512, 0), (512, 512), (1024, 128))
LIMIT_S = 120.0
MIN_TIMES = 6


def fit(name, measured):
    """Fit one backend's constants, all >= 0, to `(exchange, us)` pairs; errors count relatively."""
    if len(measured) < MIN_TIMES or not all(us > 0 for _, us in measured):
        raise ValueError(f"{name}: a fit needs {MIN_TIMES} times or more, all > 0 us, got {[us for _, us in measured]}")
    table = np.array([features(name, exchange) for exchange, _ in measured])
    latency, *others = nonnegative_least_squares(table, np.array([us for _, us in measured])).tolist()
    return BackendConstants(latency, 0.0, *others)


def calibrate(num_ranks, out=None, samples=9):
    """Measure, fit and store the constants; return what was found as a document."""
    device_type = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= num_ranks else "cpu"
    measured = launch(num_ranks, measure, device_type, samples, limit_s=LIMIT_S)
    by_backend = {}
    for name, exchange, us in measured:
        by_backend.setdefault(name, []).append((exchange, us))
    constants = DispatchConstants(
        {name: fit(name, times) for name, times in by_backend.items()},
        f"measured over {num_ranks} ranks of {machine_name(device_type)}",
    )
    median_error = {}
    for name, times in by_backend.items():
        errors = [abs(constants.backends[name].predict_us(name, exchange) / us - 1) for exchange, us in times]
        median_error[name] = round(statistics.median(errors), 3)
    path = Path(out or stored_path(device_type))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(constants), indent=2) + "\n", encoding="utf-8")
    return {**asdict(constants), "median_error": median_error, "file": str(path)}


def measure(device_type, samples):
    """Return `(backend, exchange, us of the slowest rank)` of an eager dispatch and combine in every case."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    cuda = device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    group, control = dist.new_group(backend="nccl" if cuda else "gloo"), dist.new_group(backend="gloo")
    names = backend_names(can_map(gather_json(mapping_facts(device), control)))
    found = []
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
            times = time_us(dispatchers, sizes, (rows, ids, weights), samples, control)
            found.extend((name, exchange, us) for name, us in times.items())
    return found


def time_us(dispatchers, sizes, rows, samples, control):
    """Return each backend's median over the samples, in us of the slowest rank, after one warm-up call."""
    outputs = {}
    for name, dispatcher in dispatchers.items():
        handle = dispatcher.dispatch(dispatcher.route(sizes), *rows)
        outputs[name] = handle.hidden_states[handle.gather_index].to(rows[0].dtype)
        dispatcher.combine(outputs[name], handle)
    # Backends take turns, so that other load on the machine hits all of them alike.
    times = [
        [once_us(one, one.route(sizes), rows, outputs[name], control) for name, one in dispatchers.items()]
        for _ in range(samples)
    ]
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=control)
    return {name: statistics.median(slowest[:, index].tolist()) for index, name in enumerate(dispatchers)}


def once_us(dispatcher, route, rows, expert_output, control):
    if expert_output.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(control)
    started = time.perf_counter()
    dispatcher.combine(expert_output, dispatcher.dispatch(route, *rows))
    if expert_output.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this host, at least 2")
    parser.add_argument("--out", type=Path, help="file for the constants; by default this machine's own")
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error(f"--ranks must be >= 2, got {options.ranks}: a backend is measured between ranks")
    document = calibrate(options.ranks, options.out)
    print(f"{document['source']}: dispatch and combine")
    for name, values in document["backends"].items():
        terms = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if value)
        print(f"  {name:<10} {terms}; median error {100 * document['median_error'][name]:.0f} %")
    use = "pass it as $LOCKSTEP_DISPATCH_CONSTANTS" if options.out else "dispatcher `auto` uses it from now on"
    print(f"constants: {document['file']}; {use}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
