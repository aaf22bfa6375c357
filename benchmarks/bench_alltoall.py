"""Dispatch and combine over CPU ranks: bytes on the wire against the plan, and time of the slowest rank.

Compared in one run, no expert compute, results checked against the reference sum first:
- `alltoall`: each row once per rank that needs it; `allgather`: every row to every rank;
- `per_pair`: a plain `all_to_all_single` of one row per (token, expert), counts first;
- `transformers`: its own `ep_implementation="all_to_all"`, which also sends one row per (token, expert).

    python benchmarks/bench_alltoall.py [--out] [--samples 15]

The last line on stdout is one JSON document. `--out` stores one line per measurement in `benchmarks/results/`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep import __version__
from lockstep.dispatch.collective_dispatchers import AllGatherDispatcher, AllToAllDispatcher, ranks_needed
from lockstep.testing import MoEInputs, run_ranks

RESULTS = Path(__file__).parent / "results"
HIDDEN, NUM_EXPERTS, DTYPE = 1024, 64, torch.float32
COUNTS = {2: [(64, 64), (256, 1), (256, 0)], 4: [(64, 64, 64, 64), (256, 1, 17, 130), (512, 0, 3, 0)]}
TOP_K = (1, 2, 8)


def ours(dispatcher):
    """A dispatcher with experts that give back what they get."""

    def run(rows, ids, weights, counts):
        handle = dispatcher.dispatch(dispatcher.route(counts), rows, ids, weights)
        return dispatcher.combine(handle.hidden_states.index_select(0, handle.gather_index), handle)

    return run


def per_pair(rows, ids, weights, counts):
    num_ranks, top_k = dist.get_world_size(), ids.shape[1]
    owner = ids.reshape(-1) // (NUM_EXPERTS // num_ranks)
    order = torch.argsort(owner, stable=True)
    send = torch.bincount(owner, minlength=num_ranks)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    send, receive = send.tolist(), receive.tolist()
    received = rows.new_empty((sum(receive), HIDDEN))
    dist.all_to_all_single(received, rows[order // top_k], receive, send)
    returned = rows.new_empty((sum(send), HIDDEN))
    dist.all_to_all_single(returned, received, send, receive)
    pairs = torch.empty_like(returned)
    pairs[order] = returned
    return (pairs.view(-1, top_k, HIDDEN) * weights.unsqueeze(-1)).sum(dim=1)


def make_transformers():
    from transformers.distributed.expert_parallel import AllToAllEP

    class Experts(torch.nn.Module):
        num_experts = NUM_EXPERTS // dist.get_world_size()

        def forward(self, rows, ids, weights):
            return rows * weights

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    implementation = AllToAllEP(Experts(), mesh["ep"], mesh["tp"])
    return lambda rows, ids, weights, counts: implementation(rows, ids, weights)


@contextmanager
def counted_bytes():
    """Bytes that this rank sends to other ranks through any all-to-all, whoever calls it."""
    import transformers.distributed.expert_parallel as transformers_ep

    sent, rank = [0], dist.get_rank()
    originals = dist.all_to_all_single, transformers_ep.all_to_all_single, transformers_ep.all_to_all_single_autograd

    def count(tensor, send_sizes):
        if send_sizes is None:
            per_rank = tensor.numel() // dist.get_world_size()
            sent[0] += (tensor.numel() - per_rank) * tensor.element_size()
        else:
            others = sum(send_sizes) - send_sizes[rank]
            sent[0] += others * (tensor.numel() // max(1, tensor.shape[0])) * tensor.element_size()

    def plain(output, tensor, recv_sizes=None, send_sizes=None, **kwargs):
        count(tensor, send_sizes)
        return originals[0](output, tensor, recv_sizes, send_sizes, **kwargs)

    def functional(tensor, recv_sizes, send_sizes, group):
        count(tensor, send_sizes)
        return originals[2](tensor, recv_sizes, send_sizes, group)

    dist.all_to_all_single = transformers_ep.all_to_all_single = plain
    transformers_ep.all_to_all_single_autograd = functional
    try:
        yield sent
    finally:
        dist.all_to_all_single, transformers_ep.all_to_all_single = originals[:2]
        transformers_ep.all_to_all_single_autograd = originals[2]


def planned_bytes(what, ids, top_k):
    """Bytes that this rank sends, from the routing alone; the return of other ranks' rows included, counts not."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    state, num_local = HIDDEN * DTYPE.itemsize, NUM_EXPERTS // num_ranks
    rows = [len(one) for one in ids]
    others = [other for other in range(num_ranks) if other != rank]
    if what == "alltoall":
        needed = [ranks_needed(one, num_local, num_ranks) for one in ids]
        there = sum(int(needed[rank][:, other].sum()) for other in others)
        back = sum(int(needed[other][:, rank].sum()) for other in others)
    elif what == "allgather":
        there, back = rows[rank] * len(others), sum(rows[other] for other in others)
    else:
        there = int((ids[rank] // num_local != rank).sum())
        return (there + sum(int((ids[other] // num_local == rank).sum()) for other in others)) * state
    return there * (state + 8 * top_k) + back * state


@torch.no_grad()
def measure(samples):
    torch.set_num_threads(1)
    group, rank, num_ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    implementations = {
        "alltoall": ours(AllToAllDispatcher(group, NUM_EXPERTS)),
        "allgather": ours(AllGatherDispatcher(group, NUM_EXPERTS)),
        "per_pair": per_pair,
        "transformers": make_transformers(),
    }
    lines = []
    for counts in COUNTS[num_ranks]:
        for top_k in TOP_K:
            inputs = MoEInputs.make(counts, top_k, num_experts=NUM_EXPERTS, top_k=top_k, hidden=HIDDEN, intermediate=1)
            rows, weights = inputs.hidden_states[rank], inputs.topk_weights[rank]
            ids = inputs.topk_ids[rank]
            times = {what: [] for what in implementations}
            sent = {}
            for what, run in implementations.items():
                given = ids.int() if what in ("alltoall", "allgather") else ids
                with counted_bytes() as counter:
                    output = run(rows, given, weights, counts)
                sent[what] = counter[0]
                torch.testing.assert_close(output, rows * weights.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)
            for _ in range(samples):  # in turn, so that whatever else the machine does meets all alike
                for what, run in implementations.items():
                    given = ids.int() if what in ("alltoall", "allgather") else ids
                    dist.barrier()
                    start = time.perf_counter_ns()
                    run(rows, given, weights, counts)
                    times[what].append((time.perf_counter_ns() - start) / 1000)
            lines += [
                {
                    "what": what,
                    "ranks": num_ranks,
                    "tokens": list(counts),
                    "top_k": top_k,
                    "sent_bytes": sent[what],
                    "planned_bytes": planned_bytes(what, inputs.topk_ids, top_k),
                    "times_us": times[what],
                }
                for what in implementations
            ]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", action="store_true", help="store the lines in benchmarks/results/")
    parser.add_argument("--samples", type=int, default=15)
    arguments = parser.parse_args()
    results = []
    for num_ranks in COUNTS:
        for lines in zip(*run_ranks(num_ranks, measure, arguments.samples, deadline_s=300), strict=True):
            slowest = [max(times) for times in zip(*(line["times_us"] for line in lines), strict=True)]
            first = {key: lines[0][key] for key in ("what", "ranks", "tokens", "top_k")}
            results.append(
                first
                | {
                    "slowest_rank_us": round(statistics.median(slowest)),
                    "p10_us": round(sorted(slowest)[len(slowest) // 10]),
                    "p90_us": round(sorted(slowest)[len(slowest) * 9 // 10]),
                    "wire_bytes": sum(line["sent_bytes"] for line in lines),
                    "planned_bytes": sum(line["planned_bytes"] for line in lines),
                }
            )
    print(f"{'tokens per rank':22} {'K':>2} {'':13} {'us':>8} {'wire KiB':>9} {'planned':>9}")
    for line in results:
        tokens = ", ".join(map(str, line["tokens"]))
        kib = line["wire_bytes"] / 1024, line["planned_bytes"] / 1024
        print(
            f"{tokens:22} {line['top_k']:2} {line['what']:13} {line['slowest_rank_us']:8} {kib[0]:9.0f} {kib[1]:9.0f}"
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    document = {
        "benchmark": "alltoall", "hidden": HIDDEN, "experts": NUM_EXPERTS, "dtype": str(DTYPE), "backend": "gloo",
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__, "lockstep": __version__,
        "commit": commit, "date": datetime.now(UTC).date().isoformat(), "results": results,
    }  # fmt: skip
    if arguments.out:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"alltoall_cpu_{document['date']}_{commit}.jsonl"
        common = {key: value for key, value in document.items() if key != "results"}
        path.write_text("".join(json.dumps(common | line) + "\n" for line in results))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
