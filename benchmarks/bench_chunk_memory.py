"""Peak memory of one MoE layer against the step's tokens, with chunks of 256 and 1024 rows per rank and without.

Two ranks, the second with a quarter of the first one's tokens; anonymous resident memory of the first, sampled while
the layer runs, less what it was before and less the layer's own result. Results are checked without chunks.

    python benchmarks/bench_chunk_memory.py [--out]

The last line on stdout is one JSON document. `--out` stores one line per measurement in `benchmarks/results/` and the
plot in `docs/images/chunk_memory.svg`.
"""

import argparse
import ctypes
import json
import platform
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep import MoELayer, ParallelConfig, __version__
from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.choose import make_dispatcher
from lockstep.moe.experts import LocalExperts
from lockstep.moe.layers import MoELayers
from lockstep.testing import run_ranks

ROOT = Path(__file__).parents[1]
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 1024, 512, 8, 2
TOKENS = (1024, 2048, 4096, 8192, 16384)
CHUNK_SIZES = (256, 1024, None)
DISPATCHERS = ("allgather", "alltoall")


def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon line in /proc/self/status")


class Peak:
    """The largest anonymous memory while the block runs, sampled every millisecond."""

    def __enter__(self):
        self.peak, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()


def measure():
    # Freed blocks of 256 KiB and more go back to the system at once: what is measured is in use, not kept spare.
    ctypes.CDLL(None).mallopt(-3, 256 * 1024)  # M_MMAP_THRESHOLD
    rank = dist.get_rank()
    config = ParallelConfig(data_parallel_size=2, data_parallel_rank=rank)
    generator = torch.Generator().manual_seed(rank)
    num_local = NUM_EXPERTS // 2
    experts = LocalExperts.from_tensors(
        torch.randn(num_local, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5,
        torch.randn(num_local, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5,
    )
    lines = []
    for name in DISPATCHERS:
        shape = ExpertsShape(NUM_EXPERTS, HIDDEN, TOP_K)
        layer = MoELayer(experts, make_dispatcher(name, dist.group.WORLD, shape), config, shape)
        for tokens in TOKENS:
            counts = [tokens, tokens // 4]
            rows = torch.randn(counts[rank], HIDDEN, generator=generator)
            ids = torch.rand(counts[rank], NUM_EXPERTS, generator=generator).topk(TOP_K).indices
            weights = torch.full((counts[rank], TOP_K), 1 / TOP_K)
            expected = None
            for chunk_size in reversed(CHUNK_SIZES):
                layers = MoELayers([layer], max_chunk_size_per_rank=chunk_size)
                ctypes.CDLL(None).malloc_trim(0)
                dist.barrier()
                before = anonymous_bytes()
                with Peak() as peak, layers.begin(counts) as step:
                    output = step.run_layer(0, rows, ids, weights)
                expected = output if expected is None else expected
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
                own = peak.peak - before - output.nbytes
                lines.append(
                    {"dispatcher": name, "tokens": tokens, "chunk_size": chunk_size, "peak_bytes": max(0, own)}
                )
                del output
    return lines


def plot(results, path):
    """One line per chunk size, tokens on a logarithmic axis; dashed for the all-to-all."""
    left, top, width, height = 70, 30, 520, 300
    colours = {256: "#1b7837", 1024: "#2166ac", None: "#b2182b"}
    largest = max(line["peak_bytes"] for line in results) / 1e6

    def x(tokens):
        return left + width * (tokens.bit_length() - TOKENS[0].bit_length()) / 4

    def y(megabytes):
        return top + height * (1 - megabytes / largest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 190} {top + height + 60}" '
        'font-family="sans-serif" font-size="13" fill="#333">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">Peak memory of one MoE layer, first of two ranks, MB</text>',
    ]
    step = next(step for step in (50, 100, 200, 500, 1000) if largest / step < 8)
    for megabytes in range(0, int(largest) + 1, step):
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y(megabytes)}" y2="{y(megabytes)}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{y(megabytes) + 4}" text-anchor="end">{megabytes}</text>'
        )
    for tokens in TOKENS:
        parts.append(f'<text x="{x(tokens)}" y="{top + height + 20}" text-anchor="middle">{tokens}</text>')
    middle = left + width / 2
    parts.append(f'<text x="{middle}" y="{top + height + 42}" text-anchor="middle">tokens of this rank\'s step</text>')
    legend = 0
    for name in DISPATCHERS:
        for chunk_size in CHUNK_SIZES:
            points = [
                (x(line["tokens"]), y(line["peak_bytes"] / 1e6))
                for line in results
                if (line["dispatcher"], line["chunk_size"]) == (name, chunk_size)
            ]
            dash = ' stroke-dasharray="6 4"' if name == "alltoall" else ""
            style = f'fill="none" stroke="{colours[chunk_size]}" stroke-width="2"{dash}'
            parts.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}" {style}/>')
            at = top + 12 + 20 * legend
            label = f"{name}, " + (f"C = {chunk_size}" if chunk_size else "no chunks")
            parts.append(
                f'<line x1="{left + width + 15}" x2="{left + width + 45}" y1="{at}" y2="{at}" {style}/>'
                f'<text x="{left + width + 52}" y="{at + 4}">{label}</text>'
            )
            legend += 1
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", action="store_true", help="store lines and plot")
    arguments = parser.parse_args()
    results = run_ranks(2, measure, deadline_s=300)[0]
    print(f"{'':10} {'tokens':>7} " + " ".join(f"{f'C = {size}':>10}" for size in CHUNK_SIZES) + "   MB")
    for name in DISPATCHERS:
        for tokens in TOKENS:
            row = {
                line["chunk_size"]: line["peak_bytes"] / 1e6
                for line in results
                if (line["dispatcher"], line["tokens"]) == (name, tokens)
            }
            print(f"{name:10} {tokens:7} " + " ".join(f"{row[size]:10.1f}" for size in CHUNK_SIZES))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    document = {
        "benchmark": "chunk_memory", "hidden": HIDDEN, "top_k": TOP_K, "experts": NUM_EXPERTS, "dtype": "float32",
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__, "lockstep": __version__,
        "commit": commit, "date": datetime.now(UTC).date().isoformat(), "results": results,
    }  # fmt: skip
    if arguments.out:
        path = ROOT / "benchmarks" / "results" / f"chunk_memory_cpu_{document['date']}_{commit}.jsonl"
        common = {key: value for key, value in document.items() if key != "results"}
        path.write_text("".join(json.dumps(common | line) + "\n" for line in results))
        plot(results, ROOT / "docs" / "images" / "chunk_memory.svg")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
