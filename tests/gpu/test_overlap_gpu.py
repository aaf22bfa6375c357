"""Chunks with one's dispatch under another's experts on real GPUs: the bits of one after another, and a profile."""

import faulthandler
import importlib.util
import os
import random
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu(2),
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}"),
    pytest.mark.timeout(180),
]

SHAPE = (2048, 768, 128)  # hidden, inner, experts
BLOCKS = 16
LIMIT_S = 120  # after which each rank shows where it stands


def _bench():
    path = Path(__file__).parents[2] / "benchmarks" / "bench_overlap.py"
    spec = importlib.util.spec_from_file_location("bench_overlap", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _same_bits(rank, ranks, fp8):
    """Random counts, ranks out of step by some milliseconds, steps without a look between them."""
    layer = _bench().Layer(SHAPE, capacity=1024, fp8=fp8)
    overlap = layer.make_overlap(BLOCKS)
    draw, own = random.Random(1), random.Random(100 + rank)
    for number in range(25):
        chunk = draw.choice([16, 100, 1024])
        most = draw.choice([2, 3, 5]) * chunk
        counts = [draw.choice([0, 1, most, draw.randint(0, most)]) for _ in range(ranks)]
        counts[draw.randrange(ranks)] = most  # so that there are chunks
        inputs = [layer.inputs(counts, 10 * number + i) for i in range(3)]
        one_by_one, overlapped = layer.step(counts, chunk), layer.step(counts, chunk, overlap)
        expected = [one_by_one(*each) for each in inputs]
        found = []
        for each in inputs:
            time.sleep(own.choice([0, 0, 2e-3]))
            found.append(overlapped(*each))
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            if not torch.equal(one, other):
                wrong = (one != other).any(1).nonzero().flatten()
                raise AssertionError(
                    f"rank {rank}, round {number}, step {index}: {len(wrong)} of {len(one)} rows differ with overlap, "
                    f"first {wrong[:8].tolist()}, by up to {float((one.float() - other.float()).abs().max())}, for "
                    f"{counts} rows in chunks of {chunk}"
                )
    layer.dispatcher.check(wait=True)
    overlap.dispatcher.check(wait=True)


def _bits(rank, ranks):
    _same_bits(rank, ranks, False)


def _bits_fp8(rank, ranks):
    _same_bits(rank, ranks, True)


def _in_a_graph(rank, ranks):
    """Steps of three chunks, captured with both streams, replayed with other rows."""
    layer = _bench().Layer(SHAPE, capacity=64)
    overlap = layer.make_overlap(BLOCKS)
    counts = [150 - 100 * (r % 2) for r in range(ranks)]
    step = layer.step(counts, 64, overlap)
    static = layer.inputs(counts, 0)
    step(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        output = step(*static)
    for seed in range(1, 30):
        fresh = layer.inputs(counts, seed)
        for mine, theirs in zip(static, fresh, strict=True):
            mine.copy_(theirs)
        output.fill_(float("nan"))
        graph.replay()
        expected = layer.step(counts, 64)(*fresh)
        assert torch.equal(output, expected), f"rank {rank}: replay {seed} differs from eager without overlap"
    overlap.dispatcher.check(wait=True)


def _profile(rank, ranks):
    """A dispatch runs at the same time as experts, in a profile; without overlap none does."""
    bench = _bench()
    # So many rows that kernels take longer than their calls: the queues fill, as they do in a long prompt.
    layer = bench.Layer(SHAPE, capacity=4096)
    overlap = layer.make_overlap(BLOCKS)
    counts = [4 * 4096] * ranks
    inputs = layer.inputs(counts, 0)
    seen = {}
    for name, beside in (("one after another", None), ("overlap", overlap)):
        step = layer.step(counts, 4096, beside)
        for _ in range(3):
            step(*inputs)
        torch.cuda.synchronize()
        dist.barrier()
        seen[name] = bench.profile(lambda step=step: step(*inputs))
    print(f"rank {rank}: {seen}", flush=True)
    for name, found in seen.items():
        assert found["dispatch"]["kernels"] == found["combine"]["kernels"] == 12, (name, seen)  # 3 steps of 4 chunks
    assert seen["one after another"]["dispatch"]["beside_experts_us"] == 0, seen
    # Of 4 dispatches the first has nothing beside it.
    assert seen["overlap"]["dispatch"]["beside_experts_us"] > 0.2 * seen["overlap"]["dispatch"]["us"], seen
    assert seen["overlap"]["combine"]["beside_experts_us"] > 0, seen


def _child(rank, ranks, folder, names):
    with Path(folder, f"stack{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=stack)
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
        dist.init_process_group(
            "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, device_id=device
        )
        try:
            for name in names:
                began = time.time()
                globals()[name](rank, ranks)
                dist.barrier()
                if rank == 0:
                    print(f"{name} passed in {time.time() - began:.1f} s", flush=True)
        except BaseException:
            Path(folder, f"error{rank}").write_text(traceback.format_exc())
            time.sleep(1)  # for what the others have to say of it
            os._exit(1)
        os._exit(0)


def _run(tmp_path, *names):
    try:
        mp.spawn(_child, (NUM_GPUS, str(tmp_path), names), nprocs=NUM_GPUS)
    except Exception as error:
        found = [path for name in ("error", "stack") for path in sorted(tmp_path.glob(f"{name}*"))]
        text = "\n".join(f"{path.name}\n{path.read_text()}" for path in found if path.stat().st_size)
        raise AssertionError(text or str(error)) from None


def test_the_same_bits_as_one_chunk_after_another(tmp_path):
    _run(tmp_path, "_bits", "_bits_fp8", "_in_a_graph")


def test_a_profile_shows_dispatch_under_experts(tmp_path):
    _run(tmp_path, "_profile")
