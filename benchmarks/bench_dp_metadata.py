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


def measure(dp_size: int, sp: int, samples: int, generator: torch.Generator) -> list[dict]:
    """Time all three in turn, so that whatever else the machine does meets all alike."""
    inputs = [torch.randint(0, 8192, (dp_size,), dtype=torch.int32, generator=generator) for _ in range(4)]
    configs = {"lockstep": ParallelConfig(dp_size, 0), "lockstep vllm": VllmConfig(dp_size)}
    makes = {"lockstep": DPMetadata.make, "lockstep vllm": VllmDPMetadata.make}

    def run(name: str, counts: torch.Tensor, num_tokens: int) -> list[int]:
        if name == "straightforward":
            return straightforward(counts, sp)
        return step(makes[name], configs[name], num_tokens, counts, sp)

    names = ["straightforward", *makes]
    for counts in inputs:
        expected = straightforward(counts, sp)
        for name in names:
            assert run(name, counts, int(counts[0])) == expected, f"{name} is wrong at dp {dp_size}, sp {sp}"
    times: dict[str, list[float]] = {name: [] for name in names}
    for sample in range(samples):
        counts = inputs[sample % len(inputs)]
        num_tokens = int(counts[0])
        for name in names:
            # The baseline is slow and steady enough for fewer samples.
            if name == "straightforward" and sample % 10:
                continue
            start = time.perf_counter_ns()
            run(name, counts, num_tokens)
            times[name].append((time.perf_counter_ns() - start) / 1000)
    baseline_us = statistics.median(times["straightforward"])
    rows = []
    for name in names:
        median_us = statistics.median(times[name])
        low_us, high_us = (sorted(times[name])[int(len(times[name]) * share)] for share in (0.1, 0.9))
        rows.append(
            {
                "what": name,
                "data_parallel_size": dp_size,
                "sequence_parallel_size": sp,
                "layers": NUM_LAYERS,
                "median_us": round(median_us, 1),
                "p10_us": round(low_us, 1),
                "p90_us": round(high_us, 1),
                "times_faster": round(baseline_us / median_us, 1),
            }
        )
    return rows


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
    parser.add_argument("--samples", type=int, default=300, help="measurements of each kind (the baseline: a tenth)")
    parser.add_argument("--data-parallel-sizes", type=int, nargs="+", default=[2, 8, 64, 1024])
    parser.add_argument("--sequence-parallel-sizes", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    if arguments.samples < 10:
        parser.error(f"--samples must be >= 10, got {arguments.samples}")

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for dp_size in arguments.data_parallel_sizes:
        for sp in arguments.sequence_parallel_sizes:
            rows += measure(dp_size, sp, arguments.samples, generator)
            for row in rows[-3:]:
                print(
                    f"dp {dp_size:5} sp {sp} {row['what']:16} {row['median_us']:9.1f} us "
                    f"({row['p10_us']:.1f} to {row['p90_us']:.1f}), {row['times_faster']:.1f} times as fast",
                    file=sys.stderr,
                )
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
