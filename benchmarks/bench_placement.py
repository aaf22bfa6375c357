"""A layer's time and balance under zipf routing: experts in equal shares, and placed by a recorded load.

    python benchmarks/bench_placement.py --gpus 4 --out placement.jsonl

Qwen3-30B's experts (128 of 768, hidden 2048, 8 per token), random weights. Expert e is chosen in proportion to
`1 / (e + 1)`. The load is recorded over 100,000 tokens, and `busiest_over_mean` is that of the pairs that come to the
ranks in 100,000 others. Times are of dispatch, experts and combine, per layer, replayed as CUDA graphs over three
layers so that no weights stay in cache; medians of the slowest rank. Both give the same sums, which is checked first.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LAYERS, TOKENS = 3, 100_000


def draw(count, num_experts, top_k, seed, device):
    """Draw the experts of tokens, `[count, top_k]` int32, and their weights."""
    generator = torch.Generator(device).manual_seed(seed)
    favour = -torch.log(torch.arange(1, num_experts + 1, device=device).float())
    uniform = torch.rand(count, num_experts, generator=generator, device=device).clamp_(1e-9, 1 - 1e-7)
    ids = torch.topk(favour - torch.log(-torch.log(uniform)), top_k, dim=-1).indices.to(torch.int32)
    return ids, torch.rand(count, top_k, generator=generator, device=device) / top_k


def make_layers(group, sizes, placement, device, dtype, name):
    """Layers with the same weights, wherever their experts are placed."""
    import lockstep
    from lockstep.dispatch.choose import DispatcherOptions
    from lockstep.moe.layer import SlotTable

    num_experts, hidden, inner, top_k, most = sizes
    rank, ranks = group.rank(), group.size()
    shape = lockstep.ExpertsShape(placement.num_slots, hidden, top_k, dtype, device)
    options = DispatcherOptions(can_map=True, max_rows_per_rank=most, deadline_s=30.0)
    dispatcher = lockstep.make_dispatcher(name, group, shape, options)
    config, layers = lockstep.ParallelConfig(ranks, rank), []
    for layer in range(LAYERS):
        generator = torch.Generator(device).manual_seed(layer)
        gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator, device=device).to(dtype)
        down = torch.randn(num_experts, hidden, inner, generator=generator, device=device).to(dtype)
        own = [max(0, expert) for expert in placement.slots_of(layer, rank)]
        experts = lockstep.LocalExperts.from_tensors(gate_up[own] / hidden**0.5, down[own] / inner**0.5)
        slots = None if placement.is_identity else SlotTable(placement, layer, rank, device)
        load = torch.zeros(len(own), dtype=torch.int64, device=device)
        layers.append(lockstep.MoELayer(experts, dispatcher, config, shape, slots=slots, load=load))
    return lockstep.MoELayers(layers)


def run(step, rows, ids, weights):
    return [step.run_layer(layer, rows, ids, weights) for layer in range(LAYERS)]


def time_us(layers, rows, ids, weights, samples=15):
    """Return the slowest rank's median time per layer."""
    sizes = [len(rows)] * dist.get_world_size()
    with layers.begin(sizes) as step:
        run(step, rows, ids, weights)
    step.wait()
    if rows.device.type == "cpu":
        return 0.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), layers.begin_capture(sizes) as step:
        run(step, rows, ids, weights)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 6)]
    dist.barrier()
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / LAYERS for a, b in itertools.pairwise(events[5:])]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, statistics.median(times))
    return round(max(everyones), 1)


def worker(rank, arguments, store):
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.FileStore(store, arguments.gpus), rank=rank,
        world_size=arguments.gpus,
    )  # fmt: skip
    from lockstep.moe.placement import Placement, place

    num_experts, hidden, inner, top_k = (128, 2048, 768, 8) if cuda else (16, 32, 16, 4)
    dtype, name = (torch.bfloat16, "nvlink") if cuda else (torch.float32, "allgather")
    ids, _ = draw(TOKENS, num_experts, top_k, 0, device)
    load = torch.bincount(ids.flatten(), minlength=num_experts).tolist()

    def placed(num_slots):
        return place([load] * LAYERS, arguments.gpus, -(-num_slots // arguments.gpus))

    placements = {
        "equal shares": Placement.even(LAYERS, num_experts, arguments.gpus),
        "placed": placed(num_experts),
        f"placed, {arguments.spare} spare slots": placed(num_experts + arguments.spare),
    }
    sizes = num_experts, hidden, inner, top_k, max(arguments.rows)
    made = {kind: make_layers(dist.group.WORLD, sizes, one, device, dtype, name) for kind, one in placements.items()}
    for count in arguments.rows:
        generator = torch.Generator(device).manual_seed(100 + rank)
        rows = torch.randn(count, hidden, generator=generator, device=device).to(dtype)
        ids, weights = draw(count, num_experts, top_k, 1000 + rank, device)
        expected = None
        for kind, layers in made.items():
            with layers.begin([count] * arguments.gpus) as step:
                found = torch.stack(run(step, rows, ids, weights)).float()
            step.wait()
            expected = found if expected is None else expected
            error = float((found - expected).norm() / expected.norm())
            assert error < 1e-2, f"{kind}: relative error {error}"
            us = time_us(layers, rows, ids, weights)
            for layer in layers:
                layer.load.zero_()
            done = turn = 0
            while done < TOKENS:
                ids_of_turn, weights_of_turn = draw(count, num_experts, top_k, 10_000 + 100 * turn + rank, device)
                with layers.begin([count] * arguments.gpus) as step:
                    run(step, rows, ids_of_turn, weights_of_turn)
                step.wait()
                done, turn = done + count * arguments.gpus, turn + 1
            pairs = [None] * arguments.gpus
            dist.all_gather_object(pairs, sum(int(layer.load.sum()) for layer in layers))
            record = {
                "benchmark": "placement", "placement": kind, "ranks": arguments.gpus, "rows_per_rank": count,
                "us_per_layer": us, "busiest_over_mean": round(max(pairs) * len(pairs) / sum(pairs), 3),
                "relative_error": round(error, 5), "hardware": torch.cuda.get_device_name() if cuda else "cpu",
                "torch": torch.__version__, "commit": arguments.commit,
            }  # fmt: skip
            if rank == 0:
                print(json.dumps(record), flush=True)
                if arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    dist.barrier()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="ranks, with a GPU each; on a CPU without GPUs, untimed")
    parser.add_argument("--spare", type=int, default=8, help="spare slots of all ranks together")
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 1024, 4096], help="of each rank in a step")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (arguments, f"{folder}/store"), nprocs=arguments.gpus)


if __name__ == "__main__":
    main()
