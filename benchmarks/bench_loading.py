"""Memory of each rank while it loads its part of a checkpoint of more than 1 GB that is made on the spot.

Measured per rank, in processes of their own: anonymous resident memory (`Anonymous` of /proc/self/smaps_rollup) before
and after loading, and its peak, sampled by a thread. Expected: dense weights + experts / ranks. Both layouts, one file
and many, with and without a conversion of the dtype. Baseline: Transformers' own loader, all experts on each rank.

    python benchmarks/bench_loading.py [--out] [--ranks 2]

The last line on stdout is one JSON document. `--out` stores one line per measurement in `benchmarks/results/`.
"""

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep import __version__
from lockstep.models.experts_modules import find_experts
from lockstep.models.loading import load_pretrained
from lockstep.testing import run_ranks

RESULTS = Path(__file__).parent / "results"


def anonymous_bytes():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Anonymous line in /proc/self/smaps_rollup")


class Peak:
    """The largest anonymous memory while the block runs, sampled every 5 ms."""

    def __enter__(self):
        self.peak, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        while not self._done.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def make_checkpoints(folder):
    """Qwen3-MoE of 1.2 GB in bfloat16: one tensor per expert in one file, and fused in many files."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=1024, moe_intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_experts=40, num_experts_per_tok=4,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "per-expert, 1 file", max_shard_size="10GB")
    model.save_pretrained(folder / "fused, many files", save_original_format=False, max_shard_size="200MB")


def measure(path, dtype, how):
    """Load on this rank and return what it cost, in bytes."""
    import transformers

    transformers.logging.disable_progress_bar()
    rank, size = dist.get_rank(), dist.get_world_size()
    load_pretrained(str(Path(path).parent / "tiny"), ep_rank=rank, ep_size=size)  # imports and caches are not counted
    before = anonymous_bytes()
    start = time.perf_counter()
    with Peak() as peak:
        if how == "lockstep":
            model = load_pretrained(path, ep_rank=rank, ep_size=size, dtype=dtype, process_group=dist.group.WORLD)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    seconds = time.perf_counter() - start
    after = anonymous_bytes()
    experts = {id(parameter) for _, module in find_experts(model) for parameter in module.parameters()}
    sizes = [(id(parameter) in experts, parameter.nbytes) for parameter in model.parameters()]
    return {
        "experts_bytes": sum(nbytes for is_expert, nbytes in sizes if is_expert),
        "dense_bytes": sum(nbytes for is_expert, nbytes in sizes if not is_expert),
        "anonymous_bytes": after - before,
        "peak_bytes": peak.peak - before,
        "seconds": round(seconds, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", action="store_true", help="store the lines in benchmarks/results/")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockstep-loading-"))
    results = []
    try:
        from lockstep.models.tiny import make_tiny

        make_tiny(folder / "tiny")
        make_checkpoints(folder)
        on_disk = sum(file.stat().st_size for file in (folder / "per-expert, 1 file").glob("*.safetensors"))
        print(f"checkpoint: {on_disk / 1e9:.2f} GB, {arguments.ranks} ranks; MB per rank, the largest of the ranks")
        print(f"{'':24} {'dtype':9} {'':12} {'dense+experts/ranks':>20} {'anonymous':>10} {'peak':>6} {'seconds':>8}")
        for layout in ("per-expert, 1 file", "fused, many files"):
            for dtype in (torch.bfloat16, torch.float32):
                for how in ("lockstep", "transformers"):
                    ranks = run_ranks(arguments.ranks, measure, str(folder / layout), dtype, how, deadline_s=300)
                    line = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
                    line = {"layout": layout, "dtype": str(dtype), "how": how, **line}
                    results.append(line)
                    held = (line["dense_bytes"] + line["experts_bytes"]) / 1e6
                    print(
                        f"{layout:24} {str(dtype)[6:]:9} {how:12} {held:20.0f} {line['anonymous_bytes'] / 1e6:10.0f} "
                        f"{line['peak_bytes'] / 1e6:6.0f} {line['seconds']:8}",
                        flush=True,
                    )
    finally:
        shutil.rmtree(folder)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    document = {
        "benchmark": "loading", "ranks": arguments.ranks, "checkpoint_bytes": on_disk,
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__, "lockstep": __version__,
        "commit": commit, "date": datetime.now(UTC).date().isoformat(), "results": results,
    }  # fmt: skip
    if arguments.out:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"loading_cpu_{document['date']}_{commit}.jsonl"
        common = {key: value for key, value in document.items() if key != "results"}
        path.write_text("".join(json.dumps(common | line) + "\n" for line in results))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
