"""One MoE layer's prefill: all rows at once, in chunks, and with a chunk's dispatch under the experts of another.

    python benchmarks/bench_overlap.py --gpus 2 --commit abc1234 --out overlap.jsonl --trace trace.json.gz

Every way is first checked: the same rows in the same chunks give the same bits with and without overlap. Then CUDA
events around several calls; median of the samples, slowest rank. `parts_us` are dispatch, experts and combine of all
rows at once, each alone. Of one overlapped case a profile says how long dispatch or combine ran at the same time as
kernels of the experts; with `--trace` rank 0 keeps it, for ui.perfetto.dev.
"""

import argparse
import faulthandler
import gzip
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SHAPES = {"qwen3-30b-a3b": (2048, 768, 128), "deepseek-v3": (7168, 2048, 256)}
TOP_K = 8
COUNTS = {2: [(4096, 4096), (4096, 512), (16384, 16384)], 4: [(4096,) * 4, (4096, 512, 64, 64), (16384,) * 4]}


def overlapping_us(events):
    """Return how long kernels of dispatch and combine ran, and how much of that beside others, from a Chrome trace.

    Args:
        events: the trace's `traceEvents`.

    Returns:
        For "dispatch" and for "combine": how many kernels, their time, and the part of it in which a kernel on another
        stream ran, us.
    """
    kernels = [event for event in events if event.get("cat") == "kernel"]
    found = {}
    for part in ("dispatch", "combine"):
        ours = [event for event in kernels if event["name"].startswith(f"{part}_kernel")]
        total, beside = 0.0, 0.0
        for event in ours:
            start, end = event["ts"], event["ts"] + event["dur"]
            others = [
                (max(start, other["ts"]), min(end, other["ts"] + other["dur"]))
                for other in kernels
                if other["args"]["stream"] != event["args"]["stream"]
            ]
            total += event["dur"]
            covered = start
            for first, last in sorted(others):
                if last > max(first, covered):
                    beside += last - max(first, covered)
                    covered = last
        found[part] = {"kernels": len(ours), "us": round(total, 1), "beside_experts_us": round(beside, 1)}
    return found


def profile(step, path=None):
    """Run a step under the profiler and return what `overlapping_us` says of it.

    Args:
        step: to run, several times.
        path: where to keep the trace, gzipped; None forgets it.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        text = Path(folder, "trace.json").read_bytes()
    if path is not None:
        Path(path).write_bytes(gzip.compress(text))
    return overlapping_us(json.loads(text)["traceEvents"])


class Layer:
    """One layer of a shape on this rank, and the ways to run it.

    Args:
        shape: hidden size, inner size, experts.
        capacity: most rows of a rank in a chunk.
        fp8: whether rows are sent in fp8.
    """

    def __init__(self, shape, capacity, fp8=False):
        from lockstep.moe.experts import LocalExperts

        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.hidden, inner, self.num_experts = shape
        self.capacity, self.fp8 = capacity, fp8
        local = self.num_experts // self.ranks
        generator = torch.Generator(self.device).manual_seed(self.rank)

        def weights(*size):
            made = torch.empty(*size, dtype=torch.bfloat16, device=self.device)
            return made.normal_(0, size[-1] ** -0.5, generator=generator)

        self.experts = LocalExperts.from_tensors(
            weights(local, 2 * inner, self.hidden), weights(local, self.hidden, inner)
        )
        self.dispatcher = self.make_dispatcher()

    def make_dispatcher(self, capacity=None, **options):
        """Make an `nvlink` dispatcher for this layer."""
        from lockstep.dispatch.choose import make_mapped_dispatcher

        return make_mapped_dispatcher(
            dist.group.WORLD, num_experts=self.num_experts, hidden_size=self.hidden, top_k=TOP_K,
            max_rows_per_rank=capacity or self.capacity, deadline_s=20, fp8=self.fp8, **options,
        )  # fmt: skip

    def make_overlap(self, blocks):
        """Make what runs chunks with overlap, its dispatcher on so many multiprocessors."""
        from lockstep.moe.overlap import Overlap

        return Overlap(self.make_dispatcher(num_channels=2, blocks=blocks), self.device, blocks)

    def inputs(self, counts, seed):
        """Return this rank's rows, experts and weights."""
        generator = torch.Generator(self.device).manual_seed(1000 * seed + self.rank)
        count = counts[self.rank]
        rows = torch.randn(count, self.hidden, generator=generator, device=self.device).to(torch.bfloat16)
        scores = torch.rand(count, self.num_experts, generator=generator, device=self.device)
        weights, ids = scores.topk(TOP_K, dim=-1)
        return rows, ids, weights / weights.sum(-1, keepdim=True)

    def step(self, counts, chunk, overlap=None, dispatcher=None):
        """Return a function of the inputs that runs the layer in chunks of so many rows."""
        from lockstep.coordination.forward_context import ForwardContext, set_forward_context
        from lockstep.metadata.chunks import ChunkPlan
        from lockstep.metadata.config import ParallelConfig
        from lockstep.metadata.dp_metadata import DPMetadata
        from lockstep.moe.layer import MoELayer

        config = ParallelConfig(self.ranks, self.rank)
        layer = MoELayer(
            self.experts, dispatcher or self.dispatcher, config, hidden_size=self.hidden, top_k=TOP_K,
            dtype=torch.bfloat16, device=self.device, overlap=overlap,
        )  # fmt: skip
        plan = ChunkPlan(counts, max_chunk_size_per_rank=chunk, rank=self.rank)
        context = ForwardContext(DPMetadata.make(config, counts[self.rank], counts), plan)

        def run(*inputs):
            with set_forward_context(context), torch.no_grad():
                return layer(*inputs)

        return run


def time_us(step, calls=4, samples=9):
    """Return the slowest rank's median time of one call, and its 10th and 90th percentile, us."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        for _ in range(calls):
            step()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(events))
    mine = [statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10]]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [round(value, 1) for value in max(everyone)]


def parts_us(layer, counts, inputs):
    """Return the times of dispatch with combine, and of the experts alone, on the slowest rank, us."""
    rows, ids, weights = inputs
    ids, weights = ids.to(torch.int32), weights.float()
    dispatcher = layer.dispatcher
    handle = dispatcher.dispatch(rows, ids, weights, counts)
    per_expert = sum(counts) * TOP_K / layer.num_experts

    def run_experts():
        return layer.experts.on_device(
            handle.hidden_states, handle.state.scales, handle.gather_index, handle.state.expert_offsets, per_expert
        )

    output = run_experts()
    experts = time_us(run_experts)[0]
    dispatcher.combine(output, handle)

    def there_and_back():
        dispatcher.combine(output, dispatcher.dispatch(rows, ids, weights, counts))

    return {"dispatch and combine": time_us(there_and_back)[0], "experts": experts}


def worker(rank, options, store, started):
    faulthandler.dump_traceback_later(options.limit_s + 20, exit=True)
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=options.gpus, device_id=torch.device("cuda", rank)
    )
    versions = {
        "ranks": options.gpus, "hardware": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": options.commit, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip

    def emit(record):
        if rank == 0:
            print(f"{time.time() - started:6.1f} s: {record}", flush=True)
            with open(options.out, "a") as file:
                file.write(json.dumps({"benchmark": "overlap", **record, **versions}) + "\n")

    def has_time():
        spent = torch.tensor([time.time() - started], device="cuda")
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        return float(spent) < options.limit_s - 15

    for name in options.shapes:
        counts_here = [counts for counts in COUNTS[options.gpus] if name == "qwen3-30b-a3b" or max(counts) <= 4096]
        layer = Layer(SHAPES[name], max(map(max, counts_here)))
        overlaps = {blocks: layer.make_overlap(blocks) for blocks in options.blocks}
        for counts in counts_here:
            if not has_time():
                break
            base = {"shape": name, "counts": list(counts)}
            inputs = layer.inputs(counts, 0)
            at_once = layer.step(counts, None)
            median, low, high = time_us(lambda step=at_once, inputs=inputs: step(*inputs))
            emit({**base, "way": "at once", "us": median, "p10_us": low, "p90_us": high,
                  "parts_us": parts_us(layer, counts, inputs)})  # fmt: skip
            profiled = False
            for num_chunks in options.chunks:
                chunk = -(-max(counts) // num_chunks)
                one_by_one = layer.step(counts, chunk)
                ways = {"one after another": (one_by_one, 0)}
                for blocks, overlap in overlaps.items():
                    ways[f"overlap, {blocks} blocks"] = (layer.step(counts, chunk, overlap), blocks)
                for seed in range(2):
                    fresh = layer.inputs(counts, 1 + seed)
                    expected = one_by_one(*fresh)
                    for way, (step, _) in ways.items():
                        if not torch.equal(step(*fresh), expected):
                            raise AssertionError(f"rank {rank}: {way} gives other bits for {base}, {num_chunks} chunks")
                for way, (step, blocks) in ways.items():
                    if not has_time():
                        break
                    median, low, high = time_us(lambda step=step, inputs=inputs: step(*inputs))
                    record = {**base, "way": way, "chunks": num_chunks, "blocks": blocks, "us": median, "p10_us": low,
                              "p90_us": high}  # fmt: skip
                    if blocks and not profiled:
                        keep = options.trace if rank == 0 and counts == counts_here[0] else None
                        record["profile"] = profile(lambda step=step, inputs=inputs: step(*inputs), keep)
                        profiled = True
                    emit(record)
        del layer, overlaps
        torch.cuda.empty_cache()
    dist.barrier()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, choices=sorted(COUNTS))
    parser.add_argument("--shapes", nargs="*", default=["qwen3-30b-a3b"], choices=sorted(SHAPES))
    parser.add_argument("--chunks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--blocks", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--out", default="overlap.jsonl")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--limit-s", type=float, default=120, help="nothing new begins shortly before")
    options = parser.parse_args()
    if torch.cuda.device_count() < options.gpus:
        sys.exit(f"needs {options.gpus} GPUs, found {torch.cuda.device_count()}")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (options, f"{folder}/store", time.time()), nprocs=options.gpus)


if __name__ == "__main__":
    main()
