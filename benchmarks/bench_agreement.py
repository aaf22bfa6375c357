"""What one agreement costs: gloo `all_reduce` of 8 integers, gloo `all_gather`, ours over gloo, ours in shared memory.

    python benchmarks/bench_agreement.py --ranks 2 4 --rounds 2000
    python benchmarks/bench_agreement.py --ranks 2 4 8 16 --pin --out benchmarks/results

Every rank of one host notes when it comes and when it knows, on the host's one clock. A round's cost is the time from
the last rank's coming to the slowest rank's knowing; the share of the ranks' time before the last came is skew, which
no transport can help, and is shown apart. Token counts change in every round, in the last variant all that the engine
says. Ours include encoding, checking all headers, and `decide`. Every result is checked.

With `--pin` each rank's thread gets a physical core of its own, after the groups are open, so that gloo's threads may
use all cores. Garbage collection stays on, as in a run: what was there before is frozen, times go to arrays made
beforehand, and the table says how many collections of all ranks fell into the rounds. The last line is one document.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from array import array
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep import __version__
from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.step import StepRecord
from lockstep.coordination.transports import SharedMemoryTransport, open_transport
from lockstep.engine.rank_engine import EngineRecord
from lockstep.testing import run_ranks

WARM_UP = 200
VARIANTS = (
    "gloo all_reduce of 8 ints",
    "gloo all_gather",
    "coordinator over gloo",
    "coordinator in shared memory",
    "the same, the engine's record",
)


def count_of(rank: int, index: int) -> int:
    return (index * 7 + rank * 13) % 512


def calls(rank: int, num_ranks: int) -> dict:
    """Each variant as a function of the round that returns all ranks' token counts or their sum."""
    reduced = torch.zeros(8, dtype=torch.int64)
    mine = torch.zeros(8, dtype=torch.int64)
    everyones = [torch.zeros(8, dtype=torch.int64) for _ in range(num_ranks)]
    group = dist.new_group(list(range(num_ranks)))
    transport, _ = open_transport(group, 30.0)
    assert isinstance(transport, SharedMemoryTransport)
    over_gloo = Coordinator(dist.group.WORLD)
    in_memory = Coordinator(transport=transport, rank=rank)

    def all_reduce(index: int) -> int:
        reduced.zero_()
        reduced[0] = count_of(rank, index)
        dist.all_reduce(reduced)
        return int(reduced[0])

    def all_gather(index: int) -> int:
        mine[0] = count_of(rank, index)
        dist.all_gather(everyones, mine)
        return sum(int(row[0]) for row in everyones)

    def agree(coordinator: Coordinator, index: int) -> int:
        return sum(coordinator.agree(StepRecord(count_of(rank, index), True)).num_tokens_across_dp)

    def agree_on_run(index: int) -> int:
        said = {"num_outstanding_tokens": 3 * index + rank, "num_kv_tokens": 5 * index, "num_decoding": rank}
        record = EngineRecord(count_of(rank, index), True, **said, prefill_wait_steps=index % 7 - 1)
        return sum(in_memory.agree(record).num_tokens_across_dp)

    functions = (all_reduce, all_gather, lambda i: agree(over_gloo, i), lambda i: agree(in_memory, i), agree_on_run)
    return dict(zip(VARIANTS, functions, strict=True))


def measure(rounds: int, cores: list[int]) -> dict[str, tuple[array, array, int]]:
    """Run on every rank: when it came and when it knew in ns, `[rounds]`, and garbage collections, for each variant."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    variants = calls(rank, num_ranks)
    if cores:
        os.sched_setaffinity(0, {cores[rank]})  # of this thread
    times = {}
    for name, call in variants.items():
        here = rounds if "gloo" not in name else max(200, rounds // 4)
        came, knew = array("q", bytes(8 * here)), array("q", bytes(8 * here))
        gc.collect()
        gc.freeze()
        dist.barrier()
        collections = 0
        for index in range(-WARM_UP, here):
            expected = sum([count_of(other, index) for other in range(num_ranks)])
            if index == 0:
                collections = num_collections()
            before = time.monotonic_ns()
            result = call(index)
            after = time.monotonic_ns()
            if result != expected:
                raise AssertionError(f"rank {rank}: {name} gave {result} in round {index}, expected {expected}")
            if index >= 0:
                came[index], knew[index] = before, after
        times[name] = (came, knew, num_collections() - collections)
    return times


def num_collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def physical_cores() -> list[int]:
    """One processor of each physical core that this process may use, those of one socket together."""
    found = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            place = tuple(int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            place = (0, cpu)
        found.setdefault(place, cpu)
    return [found[place] for place in sorted(found)]


def summarize(name: str, num_ranks: int, per_rank: list[tuple[array, array, int]]) -> dict:
    """One table row from all ranks' times of one variant."""
    cost, total, skew = [], [], []
    rounds = [list(zip(came, knew, strict=True)) for came, knew, _ in per_rank]
    for one_round in zip(*rounds, strict=True):
        last_came = max(came for came, _ in one_round)
        cost.append((max(knew for _, knew in one_round) - last_came) / 1e3)
        whole = sum(knew - came for came, knew in one_round) / 1e3
        total.append(whole / num_ranks)
        skew.append(sum(last_came - came for came, _ in one_round) / 1e3 / max(whole, 1e-9))
    return {
        "variant": name,
        "ranks": num_ranks,
        "rounds": len(cost),
        "p50_us": round(percentile(cost, 50), 2),
        "p99_us": round(percentile(cost, 99), 2),
        "wait_p50_us": round(percentile(total, 50), 2),
        "wait_p99_us": round(percentile(total, 99), 2),
        "skew_share": round(sum(skew) / len(skew), 3),
        "collections": sum(collections for _, _, collections in per_rank),
    }


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def machine() -> dict:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lockstep": __version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, the process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=2000, help="of the variant in shared memory; others a quarter")
    parser.add_argument("--pin", action="store_true", help="give every rank a physical core of its own")
    parser.add_argument("--out", type=Path, help="folder for the results, one JSON line per row")
    return parser.parse_args(arguments)


def main() -> int:
    options = read_options()
    rows, about = [], machine()
    print(f"{about['cpu']}, {about['cores']} processors, torch {about['torch']}, Python {about['python']}")
    print(
        f"{'ranks':>5}  {'variant':32} {'p50 us':>9} {'p99 us':>9} {'x gloo':>7}  {'with skew p50':>13} {'p99':>9} "
        f"{'skew':>6} {'gc':>4}  cores"
    )
    for num_ranks in options.ranks:
        cores = physical_cores() if options.pin else []
        if options.pin and len(cores) < num_ranks:
            cores = sorted(os.sched_getaffinity(0))
        cores = cores[:num_ranks] if len(cores) >= num_ranks else []
        results = run_ranks(num_ranks, measure, options.rounds, cores, deadline_s=500)
        for name in VARIANTS:
            row = summarize(name, num_ranks, [result[name] for result in results])
            row["cores"] = cores
            rows.append(row)
            gloo = rows[-1 - VARIANTS.index(name)]["p50_us"]
            print(
                f"{num_ranks:5}  {name:32} {row['p50_us']:9.1f} {row['p99_us']:9.1f} {gloo / row['p50_us']:7.1f}  "
                f"{row['wait_p50_us']:13.1f} {row['wait_p99_us']:9.1f} {row['skew_share']:6.0%} "
                f"{row['collections']:4}  {','.join(map(str, cores)) or 'any'}",
                flush=True,
            )
    document = {"benchmark": "agreement", "machine": about, "pinned": options.pin, "rows": rows}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        hardware = f"cpu-{about['cores']}-cores"
        path = options.out / f"agreement_{hardware}_{about['date']}_{about['commit']}.jsonl"
        path.write_text("".join(json.dumps({**about, "pinned": options.pin, **row}) + "\n" for row in rows))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
