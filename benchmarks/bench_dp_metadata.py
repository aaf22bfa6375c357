"""What one step's size arithmetic costs: `make` plus 60 layers that enter `sp_local_sizes` and read the sizes.

Baseline, in the same run: the straightforward tensor arithmetic, done anew in each layer. Results are checked first.

    python benchmarks/bench_dp_metadata.py [--out] [--samples 300]

The last line on stdout is one JSON document. `--out` stores one line per measurement in `benchmarks/results/`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from lockstep import DPMetadata, ParallelConfig, __version__
from lockstep.integrations.vllm import DPMetadata as VllmDPMetadata

NUM_LAYERS = 60
RESULTS = Path(__file__).parent / "results"


class VllmConfig:
    """The attributes of vLLM's parallel config that `make` reads."""

    def __init__(self, data_parallel_size: int) -> None:
        self.data_parallel_size = data_parallel_size
        self.data_parallel_rank = 0
        self.is_moe_model = True
        self.use_sequence_parallel_moe = False


def straightforward(counts: torch.Tensor, sp: int) -> list[int]:
    sizes: list[int] = []
    for _ in range(NUM_LAYERS):
        sizes = ((counts + sp - 1) // sp).repeat_interleave(sp).tolist()
    return sizes


def step(make: Callable, config: object, num_tokens: int, counts: torch.Tensor, sp: int) -> list[int]:
    sizes: list[int] = []
    metadata = make(config, num_tokens, counts)
    for _ in range(NUM_LAYERS):
        with metadata.sp_local_sizes(sp):
            sizes = metadata.local_sizes
    return sizes


def measure(
    what: str, make: Callable, config: object, sp: int, samples: int, inputs: list[torch.Tensor]
) -> dict[str, object]:
    """Time one class and the baseline in turn, so that whatever else the machine does meets both alike."""
    for counts in inputs:
        assert step(make, config, int(counts[0]), counts, sp) == straightforward(counts, sp), (
            f"{what} is wrong, sp {sp}"
        )
    times_us: list[float] = []
    baseline_us: list[float] = []
    for sample in range(samples):
        counts = inputs[sample % len(inputs)]
        num_tokens = int(counts[0])
        start = time.perf_counter_ns()
        step(make, config, num_tokens, counts, sp)
        times_us.append((time.perf_counter_ns() - start) / 1000)
        # The baseline is slow and steady enough for fewer samples.
        if sample % 5 == 0:
            start = time.perf_counter_ns()
            straightforward(counts, sp)
            baseline_us.append((time.perf_counter_ns() - start) / 1000)
    p10_us, p90_us = (sorted(times_us)[int(samples * share)] for share in (0.1, 0.9))
    return {
        "what": what,
        "data_parallel_size": len(inputs[0]),
        "sequence_parallel_size": sp,
        "layers": NUM_LAYERS,
        "baseline_us": round(statistics.median(baseline_us), 1),
        "median_us": round(statistics.median(times_us), 1),
        "p10_us": round(p10_us, 1),
        "p90_us": round(p90_us, 1),
        "times_faster": round(statistics.median(baseline_us) / statistics.median(times_us), 1),
    }


def table(rows: list[dict]) -> str:
    """Return the measurements as the Markdown table of docs/benchmarks/dp_metadata.md."""
    lines = [
        "| ranks | sp | straightforward, us | `lockstep.DPMetadata`, us | times faster | for vLLM, us | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for ours in (row for row in rows if row["what"] == "lockstep"):
        place = (ours["data_parallel_size"], ours["sequence_parallel_size"])
        (theirs,) = (
            row
            for row in rows
            if row["what"] == "vllm" and (row["data_parallel_size"], row["sequence_parallel_size"]) == place
        )
        cells = [*place, f"{ours['baseline_us']:.0f}"]
        for row in (ours, theirs):
            cells += [f"{row['median_us']:.0f}", f"{row['times_faster']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def hardware() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", action="store_true", help="store the measurements in benchmarks/results/")
    parser.add_argument("--samples", type=int, default=300, help="measurements of each kind (the baseline: a fifth)")
    parser.add_argument("--data-parallel-sizes", type=int, nargs="+", default=[2, 8, 64, 1024])
    parser.add_argument("--sequence-parallel-sizes", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    if arguments.samples < 10:
        parser.error(f"--samples must be >= 10, got {arguments.samples}")

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    # One class after the other: an engine uses one of them, and Python adapts its code to the class that it meets.
    for what, make, make_config in (
        ("lockstep", DPMetadata.make, lambda dp_size: ParallelConfig(dp_size, 0)),
        ("vllm", VllmDPMetadata.make, VllmConfig),
    ):
        for dp_size in arguments.data_parallel_sizes:
            inputs = [torch.randint(0, 8192, (dp_size,), dtype=torch.int32, generator=generator) for _ in range(4)]
            for sp in arguments.sequence_parallel_sizes:
                row = measure(what, make, make_config(dp_size), sp, arguments.samples, inputs)
                rows.append(row)
                print(
                    f"{what:8} dp {dp_size:5} sp {sp} {row['median_us']:8.1f} us ({row['p10_us']} to {row['p90_us']}), "
                    f"straightforward {row['baseline_us']:8.1f} us, {row['times_faster']} times faster",
                    file=sys.stderr,
                )
    print(table(rows), file=sys.stderr)
    now = datetime.now(UTC)
    document = {
        "benchmark": "dp_metadata",
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lockstep": __version__,
        "commit": commit(),
    }
    if arguments.out:
        name = "".join(letter if letter.isalnum() else "-" for letter in document["hardware"].lower())
        name = "-".join(filter(None, name.split("-")))
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"dp_metadata_{name}_{now:%Y-%m-%d}_{document['commit']}.jsonl"
        path.write_text("".join(json.dumps({**document, **row}) + "\n" for row in rows))
        print(f"stored in {path}", file=sys.stderr)
    print(json.dumps({**document, "rows": rows}))


if __name__ == "__main__":
    main()
