"""The one-sided kernels on real GPUs: all GPUs of this host, one process each."""

import dataclasses
import os
import random
import threading
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu(2),
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}"),
    pytest.mark.timeout(600),
]

CAPTURE = threading.Lock()  # of graphs, where ranks are threads: see test_nvlink_one_gpu.py

SHAPES = [  # local experts, top_k, hidden, capacity, fp8, rounds
    (128, 8, 7168, 256, False, 300),
    (16, 4, 777, 300, False, 500),
    (3, 2, 130, 1000, True, 500),
    (64, 8, 2048, 2500, True, 300),
    (1, 1, 64, 33, False, 500),
    (5, 6, 4097, 128, True, 300),
]


def _dispatcher(**options):
    from lockstep.dispatch.nvlink import NvlinkDispatcher

    return NvlinkDispatcher(dist.group.WORLD, **options)


def _round(rank, counts, seed, num_experts, top_k, hidden, **options):
    from dispatch_rounds import Round

    device = torch.device("cuda", torch.cuda.current_device())
    return Round.make(counts, num_experts=num_experts, top_k=top_k, hidden=hidden, seed=seed, device=device, **options)


def _own(this, rank):
    return this.hidden_states[rank], this.topk_ids[rank], this.topk_weights[rank]


def _route(dispatcher):
    """Counts travel with the rows, so that one route serves all of them."""
    return dispatcher.route([dispatcher.max_tokens_per_rank] * dispatcher.num_ranks)


def _rounds(rank, ranks, make=_dispatcher, shapes=SHAPES):
    """Random counts, zeros among them; every tenth round twice: the same bits."""
    from dispatch_rounds import check_combine, check_dispatch, made_up_experts
    from lockstep.dispatch.mapped_layout import launch_sizes

    for number, (local, top_k, hidden, capacity, fp8, rounds) in enumerate(shapes):
        draw = random.Random(number)
        num_experts = local * ranks
        top_k = min(top_k, num_experts)
        dispatcher = make(
            num_experts=num_experts, hidden_size=hidden, top_k=top_k, max_tokens_per_rank=capacity, fp8=fp8,
            deadline_s=20,
            launch=dataclasses.replace(
                launch_sizes(132, ranks, local, hidden, capacity), skew_tokens=20, chain_round=1 + number % 3,
                word_tokens=(4, 19, 0)[number % 3],
            ),
        )  # fmt: skip
        began = time.time()
        for seed in range(rounds):
            most = draw.choice([1, 4, 32, capacity])
            counts = [draw.choice([0, 1, most, draw.randint(0, most)]) for _ in range(ranks)]
            if draw.random() < 0.3:  # one rank with many more than the others: its rows are passed on
                counts = [count * 10 // capacity for count in counts]
                counts[draw.randrange(ranks)] = draw.choice([20, 33, capacity // 2, capacity])
            this = _round(
                rank, counts, seed, num_experts, top_k, hidden, zipf=draw.choice([0.0, 1.5]),
                missing=draw.choice([0.0, 0.3, 1.0]),
            )  # fmt: skip
            if draw.random() < 0.2:
                time.sleep(draw.random() * 2e-3 * (rank == draw.randrange(ranks)))
            first = None
            for _ in range(2 if seed % 10 == 0 else 1):
                handle = dispatcher.dispatch(dispatcher.route(counts), *_own(this, rank))
                check_dispatch(this, handle, rank, ranks, capacity)
                expert_output = made_up_experts(this, handle, rank, ranks)
                poisoned = torch.full_like(this.hidden_states[rank], float("nan"))
                output = dispatcher.combine(expert_output, handle, output=poisoned)
                check_combine(this, output, rank, ranks, fp8)
                assert first is None or torch.equal(first, output), "other bits for the same inputs"
                first = output
        dispatcher.check(wait=True)
        if rank == 0:
            print(f"{shapes[number]}: {rounds} rounds in {time.time() - began:.1f} s", flush=True)


def _without_checks(rank, ranks, make=_dispatcher):
    """Rounds launched one after another without a look between them, so that ranks run apart; sums compared later."""
    dispatcher = make(num_experts=8 * ranks, hidden_size=512, top_k=2, max_tokens_per_rank=64, deadline_s=20)
    rounds = [_round(rank, [(7 * s + 3 * r) % 65 for r in range(ranks)], s, 8 * ranks, 2, 512) for s in range(20)]
    sums = []
    for number in range(3000):
        this = rounds[number % 20]
        handle = dispatcher.dispatch(_route(dispatcher), *_own(this, rank))
        rows = handle.hidden_states[handle.gather_index]
        sums.append(dispatcher.combine(rows, handle).float().sum())
    dispatcher.check(wait=True)
    by_round = torch.stack(sums).view(-1, 20)
    assert bool((by_round == by_round[0]).all()), "a round gave other sums than its first time"


def _graph(rank, ranks, make=_dispatcher):
    """One captured graph, replayed with counts that change, zero included; the same bits as eager."""
    capacity, hidden, top_k, num_experts = 96, 1024, 4, 16 * ranks
    device = torch.device("cuda", torch.cuda.current_device())
    dispatcher = make(
        num_experts=num_experts, hidden_size=hidden, top_k=top_k, max_tokens_per_rank=capacity, deadline_s=20
    )
    rows = torch.zeros(capacity, hidden, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(capacity, top_k, dtype=torch.int32, device=device)
    weights = torch.zeros(capacity, top_k, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    output = torch.zeros(capacity, hidden, dtype=torch.bfloat16, device=device)

    route = dispatcher.route([capacity] * ranks, capture=True)

    def layer(rows, ids, weights, output, num_tokens):
        handle = dispatcher.dispatch(route, rows, ids, weights, num_tokens)
        return dispatcher.combine(handle.hidden_states[handle.gather_index], handle, output=output)

    layer(rows, ids, weights, output, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with CAPTURE, torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        layer(rows, ids, weights, output, count)
        layer(rows, ids, weights, output, count)
    draw = random.Random(5)
    for seed in range(200):
        counts = [draw.choice([0, 1, 16, capacity, draw.randint(0, capacity)]) for _ in range(ranks)]
        if seed % 20 == 7:
            counts = [0] * ranks
        this, mine = _round(rank, counts, seed, num_experts, top_k, hidden, missing=0.1), counts[rank]
        for static, fresh in zip((rows, ids, weights), _own(this, rank), strict=True):
            static[:mine] = fresh
        count.fill_(mine)
        output.fill_(float("nan"))
        graph.replay()
        expected = layer(*_own(this, rank), None, None)
        assert torch.equal(output[:mine], expected), f"round {seed}: the replay differs from eager for {counts}"
        assert bool(output[mine:].isnan().all()), f"round {seed}: rows beyond the count were written"
    dispatcher.check(wait=True)


def _errors(rank, ranks, make=_dispatcher):
    """A rank that does not come is named everywhere; too many tokens are refused; after reset() all goes on."""
    from lockstep.errors import ConfigurationError, RankAbsentError, TokenCountError

    dispatcher = make(num_experts=ranks, hidden_size=64, top_k=1, max_tokens_per_rank=8, deadline_s=1.0)
    device = torch.device("cuda", torch.cuda.current_device())
    rows = torch.ones(4, 64, dtype=torch.bfloat16, device=device)
    ids = torch.arange(4, dtype=torch.int32, device=device)[:, None] % ranks  # of the dtype that was warmed up
    weights = torch.ones(4, 1, device=device)
    route = dispatcher.route([4] * ranks)
    assert dispatcher.route([4, 9] + [4] * (ranks - 2)).chunk_size == 8
    with pytest.raises(ConfigurationError, match=f"12 rows on rank {rank}, but max_tokens_per_rank is 8"):
        dispatcher.dispatch(route, *(tensor.repeat(3, 1) for tensor in (rows, ids, weights)))

    def works():
        handle = dispatcher.dispatch(route, rows, ids, weights)
        with pytest.raises(ConfigurationError, match="was not combined"):
            dispatcher.dispatch(route, rows, ids, weights)
        output = dispatcher.combine(handle.hidden_states[handle.gather_index], handle)
        dispatcher.check(wait=True)
        assert torch.equal(output, rows)

    works()
    for _ in range(2):
        began = time.time()
        if rank != ranks - 1:
            handle = dispatcher.dispatch(route, rows, ids, weights)
            with pytest.raises(RankAbsentError, match=f"rank {ranks - 1} did not come within 1 s") as caught:
                dispatcher.check(wait=True)
            assert caught.value.absent_ranks == (ranks - 1,)
            assert time.time() - began < 5
            with pytest.raises(RankAbsentError):
                dispatcher.combine(rows, handle)
        dispatcher.reset()
        works()
    too_many = torch.tensor([4 + (rank == 1)], dtype=torch.int32, device=device)
    handle = dispatcher.dispatch(route, rows, ids, weights, too_many)
    with pytest.raises(TokenCountError, match="rank 1 set num_tokens above the rows"):
        # Rank 1 hears of it at once, the others at the latest when it does not come to combine.
        dispatcher.check(wait=True)
        dispatcher.combine(handle.hidden_states[handle.gather_index], handle)
        dispatcher.check(wait=True)
    dispatcher.reset()
    works()


def _three_at_once(rank, ranks):
    """Three dispatchers of two shapes under way, combined in the order of their dispatch."""
    first, third = (_dispatcher(num_experts=4 * ranks, hidden_size=256, top_k=2, max_tokens_per_rank=40) for _ in "ab")
    second = _dispatcher(num_experts=2 * ranks, hidden_size=96, top_k=2, max_tokens_per_rank=16)
    for seed in range(100):
        a, b = (_round(rank, [5, 40] * (ranks // 2) + [0] * (ranks % 2), seed + s, 4 * ranks, 2, 256) for s in (0, 7))
        c = _round(rank, [seed % 17] * ranks, seed, 2 * ranks, 2, 96)
        results = []
        calls = (first, a), (second, c), (third, b)
        handles = [one.dispatch(_route(one), *_own(this, rank)) for one, this in calls]
        for dispatcher, handle in zip((first, second, third), handles, strict=True):
            results.append(dispatcher.combine(handle.hidden_states[handle.gather_index], handle))
        for this, result in zip((a, c, b), results, strict=True):
            rows, _, weights = _own(this, rank)
            expected = rows.float() * weights.sum(1, keepdim=True)
            assert torch.allclose(result.float(), expected, rtol=2e-2, atol=2e-2)
    first.check(wait=True)
    # They are still there when the process ends, which must end all the same.


def _child(rank, ranks, folder, names):
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank)
    )
    try:
        for name in names:
            globals()[name](rank, ranks)
            dist.barrier()
            if rank == 0:
                print(f"{name} passed", flush=True)
    except BaseException:
        with open(os.path.join(folder, f"error{rank}"), "w") as file:
            file.write(traceback.format_exc())
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def _run(tmp_path, *names):
    try:
        mp.spawn(_child, (NUM_GPUS, str(tmp_path), names), nprocs=NUM_GPUS)
    except Exception as error:
        text = "\n".join(f"{path.name}\n{path.read_text()}" for path in sorted(tmp_path.glob("error*")))
        raise AssertionError(text or str(error)) from None


def test_thousands_of_random_rounds_equal_the_reference(tmp_path):
    _run(tmp_path, "_rounds", "_without_checks")


def test_graph_errors_and_three_at_once(tmp_path):
    _run(tmp_path, "_graph", "_errors", "_three_at_once")
