"""Dispatch and combine on the GPUs of one host, against NCCL in the same run.

    python benchmarks/bench_dispatch.py --out results.jsonl

Each case is checked first (fresh random inputs, NaN-poisoned outputs), then timed with CUDA events: eager and CUDA
graph apart, several input sets, median and 10th/90th percentile of the **slowest rank**. Experts compute nothing here.
Backends:

* `nvlink`        the one-sided kernels; rows already summed over a rank's experts, as in the baselines
* `nvlink_pairs`  the same, with the weighted sum over a rank's experts inside combine
* `ag_rs`         all-gather + reduce-scatter, padded to the longest rank
* `agv_rsv`       the same with uneven lists, not padded
* `a2av`          `all_to_all_single` of one row per (token, rank), counts known beforehand: bytes only
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from uneven import token_counts

EVEN = (1, 8, 32, 128, 512, 1024, 4096)
SHAPES = ((7168, 256), (2048, 128))
TOP_K = 8
# Goals, us, dispatch in fp8 and combine in bf16, CUDA graph: even rows in the order of EVEN, then of `token_counts`.
GOALS = {
    (2, 7168): (9, 10, 13, 24, 52, 90, 290, 290, 33, 48),
    (2, 2048): (8, 8, 9, 13, 24, 35, 105, 105, 17, 22),
    (4, 7168): (10, 11, 15, 30, 95, 165, 600, 300, 42, 70),
    (4, 2048): (9, 9, 11, 17, 34, 58, 190, 110, 24, 32),
}


def time_us(step: Callable[[int], None], graph: bool, calls: int, samples: int) -> list[float]:
    """Return `samples` times of one call of `step(input set)`, us, on this rank."""
    step(0)
    torch.cuda.synchronize()
    run = lambda: [step(i) for i in range(calls)]  # noqa: E731
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            run()
        run = captured.replay
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    dist.barrier()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(events)]


def slowest(times: list[float]) -> dict[str, float]:
    """Return the slowest rank's median and the spread, us."""
    ordered = sorted(times)
    mine = [statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    median, low, high = max(everyone)
    return {"us": round(median, 2), "p10_us": round(low, 2), "p90_us": round(high, 2)}


def baselines(counts, this, rank, world, hidden, num_experts, fp8):
    """Return `{name: step}` of the NCCL baselines; `step(i)` is one dispatch and combine."""
    device = torch.device("cuda", rank)
    out_dtype = torch.uint8 if fp8 else torch.bfloat16
    longest, total, mine = max(counts), sum(counts), counts[rank]

    def rows(n, dtype):
        return torch.ones(n, hidden, dtype=dtype, device=device)

    padded, gathered = rows(longest, out_dtype), rows(longest * world, out_dtype)
    partial, back = rows(longest * world, torch.bfloat16), rows(longest, torch.bfloat16)

    def ag_rs(_):
        dist.all_gather_into_tensor(gathered, padded)
        dist.reduce_scatter_tensor(back, partial)

    exact, received = rows(mine, out_dtype), list(rows(total, out_dtype).split(list(counts)))
    ragged, result = list(rows(total, torch.bfloat16).split(list(counts))), rows(mine, torch.bfloat16)

    def agv_rsv(_):
        dist.all_gather(received, exact)
        dist.reduce_scatter(result, ragged)

    per_rank = num_experts // world
    wanted = [
        [int(((ids >= r * per_rank) & (ids < (r + 1) * per_rank)).any(1).sum()) for r in range(world)]
        for ids in this.topk_ids
    ]
    send, receive = wanted[rank], [w[rank] for w in wanted]
    forth, arrived = rows(sum(send), out_dtype), rows(sum(receive), out_dtype)
    answer, returned = rows(sum(receive), torch.bfloat16), rows(sum(send), torch.bfloat16)

    def a2av(_):
        dist.all_to_all_single(arrived, forth, receive, send)
        dist.all_to_all_single(returned, answer, send, receive)

    wire = sum(s for r, s in enumerate(send) if r != rank)
    return {"ag_rs": ag_rs, "agv_rsv": agv_rsv, "a2av": a2av}, wire


def bench_case(dispatchers, counts, hidden, num_experts, zipf, options, emit):
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from dispatch_rounds import Round, check_combine, check_dispatch, made_up_experts

    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank)
    largest = max(counts)
    calls = 20 if largest <= 128 else 8 if largest <= 1024 else 3
    samples = 15 if largest <= 1024 else 11
    sets = 4 if largest <= 1024 else 2
    inputs = [
        Round.make(counts, num_experts=num_experts, top_k=TOP_K, hidden=hidden, seed=1 + i, device=device, zipf=zipf)
        for i in range(sets)
    ]
    for dtype, (dispatcher, expert_output) in dispatchers.items():
        fp8 = dtype == "fp8"
        base = {
            "hidden": hidden, "experts": num_experts, "top_k": TOP_K, "counts": list(counts), "world": world,
            "routing": f"zipf {zipf:g}" if zipf else "uniform", "dtype": dtype,
        }  # fmt: skip
        for this in inputs[:2]:
            poisoned = torch.full_like(this.hidden_states[rank], float("nan"))
            mine = this.hidden_states[rank], this.topk_ids[rank], this.topk_weights[rank]
            handle = dispatcher.dispatch(dispatcher.route(counts), *mine)
            check_dispatch(this, handle, rank, world, dispatcher.max_tokens_per_rank)
            values = made_up_experts(this, handle, rank, world)
            output = dispatcher.combine(values, handle, output=poisoned)
            check_combine(this, output, rank, world, fp8)
            del values
        outputs = [torch.empty_like(this.hidden_states[rank]) for this in inputs]
        route = dispatcher.route(counts)

        def nvlink(i, dispatcher=dispatcher, route=route, expert_output=expert_output, outputs=outputs, reduced=True):
            this = inputs[i % sets]
            handle = dispatcher.dispatch(route, this.hidden_states[rank], this.topk_ids[rank], this.topk_weights[rank])
            dispatcher.combine(expert_output, handle, reduced=reduced, output=outputs[i % sets])

        steps = {"nvlink": nvlink, "nvlink_pairs": lambda i, f=nvlink: f(i, reduced=False)}
        nccl, wire_rows = baselines(counts, inputs[0], rank, world, hidden, num_experts, fp8)
        if options.baselines:
            steps.update(nccl)
        moved = torch.tensor([wire_rows * hidden * ((1 if fp8 else 2) + 2)], device=device)
        dist.all_reduce(moved, dist.ReduceOp.MAX)
        for name, step in steps.items():
            for graph in (False, True):
                if not graph and options.graph_only:
                    continue
                times = slowest(time_us(step, graph, calls, samples))
                emit({**base, "backend": name, "mode": "graph" if graph else "eager", **times,
                      "wire_bytes_of_busiest_rank": int(moved)})  # fmt: skip
        dispatcher.check(wait=True)
        if options.profile:
            profile(nvlink, f"{hidden} {counts} {dtype}")


def profile(step, title):
    """Print what one dispatch and one combine take as kernels, spinning included, on rank 0."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for i in range(10):
            step(i)
            step(i, reduced=False)
        torch.cuda.synchronize()
    if dist.get_rank() == 0:
        times: dict[str, list[float]] = {}
        for event in seen.events():
            if "kernel" in event.name:
                times.setdefault(event.name.split("(")[0], []).append(event.device_time)
        for name, values in times.items():
            print("  profile", title, name, "us:", [round(v, 1) for v in sorted(values)[:: max(1, len(values) // 5)]])


def table(records, world) -> str:
    """Return the records as a table, best of eager and graph in each cell."""
    names = ["nvlink", "nvlink_pairs", "ag_rs", "agv_rsv", "a2av"]
    lines = [
        f"{'hidden':>6} {'counts':>22} {'routing':>8} {'dtype':>5} {'goal':>5} " + " ".join(f"{n:>12}" for n in names)
    ]
    best: dict[tuple, dict[str, float]] = {}
    for r in records:
        key = (r["hidden"], tuple(r["counts"]), r["routing"], r["dtype"])
        cell = best.setdefault(key, {})
        cell[r["backend"]] = min(cell.get(r["backend"], 1e9), r["us"])
    for (hidden, counts, routing, dtype), cell in best.items():
        rows = [(t,) * world for t in EVEN] + token_counts(world)
        goal = GOALS.get((world, hidden), ())
        wanted = goal[rows.index(counts)] if counts in rows and goal and dtype == "fp8" and routing == "uniform" else ""
        text = ",".join(map(str, counts)) if len(set(counts)) > 1 else str(counts[0])
        nccl = min((cell[n] for n in names[2:] if n in cell), default=0.0)
        lost = " <-- slower than NCCL" if nccl and cell["nvlink"] > nccl else ""
        lines.append(
            f"{hidden:>6} {text:>22} {routing:>8} {dtype:>5} {wanted:>5} "
            + " ".join(f"{cell.get(n, float('nan')):>12.1f}" for n in names) + lost
        )  # fmt: skip
    return "\n".join(lines)


def cases_of(world: int, options: argparse.Namespace) -> list[tuple[tuple[int, ...], float]]:
    """Return the tokens per rank and the zipf exponent of the routing (0: uniform) of each case."""
    if options.counts:
        return [(tuple(map(int, counts.split(","))), 0.0) for counts in options.counts]
    even = [((tokens,) * world, 0.0) for tokens in options.tokens or EVEN]
    if options.tokens:
        return even
    uneven = token_counts(world)
    skewed = [((32,) * world, 1.0), ((1024,) * world, 1.0), (uneven[0], 1.0)]
    growth = [((tokens,) * world, 0.0) for tokens in (2, 4, 16, 64, 256, 2048, 8192)] if options.growth else []
    return even + [(counts, 0.0) for counts in uneven] + skewed + growth


def worker(rank: int, world: int, store: str, options: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=world, device_id=torch.device("cuda", rank)
    )
    from lockstep.dispatch.mapped_layout import launch_sizes
    from lockstep.dispatch.nvlink import NvlinkDispatcher

    began, records = time.time(), []
    versions = {
        "hardware": torch.cuda.get_device_name(), "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "commit": options.commit, "date": options.date,
    }  # fmt: skip

    def emit(record):
        if rank == 0:
            records.append(record)
            with open(options.out, "a") as file:
                file.write(json.dumps({**record, **versions}) + "\n")

    for hidden, num_experts in SHAPES:
        if options.hidden and hidden not in options.hidden:
            continue
        cases = cases_of(world, options)
        capacity = max(max(c) for c, _ in cases)
        for dtype in options.dtypes:
            start = time.time()
            dispatcher = NvlinkDispatcher(
                dist.group.WORLD, num_experts=num_experts, hidden_size=hidden, top_k=TOP_K,
                max_tokens_per_rank=capacity, fp8=dtype == "fp8",
                launch=dataclasses.replace(
                    launch_sizes(132, world, num_experts // world, hidden, capacity), **options.launch
                ) if options.launch else None,
            )  # fmt: skip
            expert_output = torch.randn(
                world * capacity * TOP_K, hidden, device=dispatcher.device, dtype=torch.bfloat16
            )
            if rank == 0:
                print(f"{hidden} {dtype}: ready after {time.time() - start:.1f} s, at {time.time() - began:.0f} s")
            for counts, zipf in cases:
                if time.time() - began < options.limit_s or dist.get_world_size() > 1:
                    bench_case({dtype: (dispatcher, expert_output)}, counts, hidden, num_experts, zipf, options, emit)
            dispatcher.check(wait=True)
            del dispatcher, expert_output
    if rank == 0:
        print(table(records, world))
        print(f"took {time.time() - began:.0f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, the process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="dispatch.jsonl")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--hidden", type=int, nargs="*")
    parser.add_argument("--tokens", type=int, nargs="*", help="tokens per rank, instead of all cases")
    parser.add_argument("--counts", nargs="*", help="tokens of every rank, such as 4096,512, instead of all cases")
    parser.add_argument("--dtypes", nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--growth", action="store_true", help="also 2 to 8192 tokens in powers of two")
    parser.add_argument("--graph-only", action="store_true")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--limit-s", type=float, default=1e9)
    parser.add_argument("--launch", type=json.loads, default={}, help="launch sizes to try, as JSON")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args(arguments)
    options.date = time.strftime("%Y-%m-%d")
    return options


def main() -> None:
    options = read_options()
    if options.gpus < 2:
        sys.exit(f"needs 2 GPUs or more, {socket.gethostname()} has {options.gpus}")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (options.gpus, os.path.join(folder, "store"), options), nprocs=options.gpus)


if __name__ == "__main__":
    main()
