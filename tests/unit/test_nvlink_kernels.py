"""The one-sided kernels on CPUs: every rank a process, Triton's interpreter for the GPU, shared memory for links.

The whole protocol runs: counts, routing words, flags, rounds, epochs, the abort cell. What only a GPU can show (memory
order, speed) is in tests/gpu.
"""

import importlib.util
import os
import random
import traceback

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretend_gpu import Files

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4"
    ),
]

CASES = [  # ranks, experts, top_k, hidden, capacity, fp8
    (2, 8, 3, 136, 12, False),
    (3, 6, 2, 77, 3, False),
    (2, 4, 4, 260, 6, True),
    (1, 4, 2, 32, 4, False),
]
SKEWED = [  # the same, with one rank that has many more tokens than the others
    (3, 6, 2, 300, 16, True),
    (4, 8, 3, 136, 20, False),
]
EIGHT = {  # a full host: rows by words and behind flags, then along chains, long because most ranks hold an expert
    (8, 16, 12, 40, 8, False): [(1, 0, 2, 1, 0, 2, 1, 1), (8, 1, 0, 3, 2, 0, 1, 4)],
    (8, 8, 7, 40, 8, True): [(5, 3, 0, 5, 4, 1, 2, 3), (0, 2, 1, 0, 4, 8, 1, 0)],
}


def _interpreted():
    """Return the dispatcher's module with its GPU parts replaced; imported late, since it imports Triton."""
    from pretend_gpu import interpret_wire

    return interpret_wire()


class MadeUp:
    """Buffers of three ranks, of which only rank 1 runs: nobody is met."""

    def __init__(self):
        self.buffers = []

    def map(self, nbytes, device):
        self.buffers.extend(torch.zeros(nbytes, dtype=torch.uint8) for _ in range(3))
        return self.buffers[1], [buffer.data_ptr() for buffer in self.buffers]

    def synchronize(self, device):
        pass

    def meet(self, deadline_s):
        pass


def _launch(nvlink, seed):
    # One block orders: the interpreter runs blocks one after another, and such a block waits for what all of them send.
    return nvlink.LaunchSizes(
        order_blocks=1, push_blocks=2, combine_blocks=2, dispatch_tokens=2, combine_tokens=2, columns=128,
        tiny_tile=[2, 8][seed % 2], tiles=[3, 4][seed % 2], word_tokens=[2, 5][seed % 2], slice=32, pairs=8,
        round=1 + 2 * (seed % 2), skew_tokens=6, chain_round=2 - seed % 2,
    )  # fmt: skip


def _rounds(rank, folder, case, seed):
    from dispatch_rounds import Round, check_combine, check_dispatch, made_up_experts

    ranks, num_experts, top_k, hidden, capacity, fp8 = case
    nvlink = _interpreted()
    dispatcher = nvlink.NvlinkDispatcher(
        dist.group.WORLD, num_experts=num_experts, hidden_size=hidden, top_k=top_k, max_tokens_per_rank=capacity,
        fp8=fp8, deadline_s=60 if ranks < 8 else 200, launch=_launch(nvlink, seed),
        device=torch.device("cpu"), memory=Files(dist.group.WORLD, folder),
    )  # fmt: skip
    draw = random.Random(seed)
    for number in range(4 if case not in EIGHT else 2):
        counts = [draw.choice([0, 1, 2, capacity - 1, capacity]) for _ in range(ranks)]
        if case in SKEWED:
            counts = [draw.choice([0, 1, 3]) for _ in range(ranks)]
            counts[draw.randrange(ranks)] = [capacity, 6, capacity - 1, capacity][number]
        elif case in EIGHT:
            counts = EIGHT[case][number]
        elif number == 2:
            counts = [0] * ranks
        this = Round.make(
            counts, num_experts=num_experts, top_k=top_k, hidden=hidden, seed=100 * seed + number, missing=0.2
        )
        if fp8:  # the interpreter rounds to fp8 wrongly where the mantissa carries over: give it exact values
            for rows in this.hidden_states:
                rows.copy_(torch.randint(-7, 8, rows.shape, generator=torch.Generator().manual_seed(number)))
                rows[:, ::128] = 7
        mine = this.hidden_states[rank], this.topk_ids[rank], this.topk_weights[rank]
        handle = dispatcher.dispatch(dispatcher.route(counts), *mine)
        check_dispatch(this, handle, rank, ranks, capacity)
        assert handle.expert_offsets.tolist() == [0, *handle.tokens_per_expert.cumsum(0).tolist()]
        expert_output = made_up_experts(this, handle, rank, ranks)
        poisoned = torch.full_like(this.hidden_states[rank], float("nan"))
        output = dispatcher.combine(expert_output, handle, output=poisoned)
        dispatcher.check(wait=True)
        check_combine(this, output, rank, ranks, fp8)


def _words_or_flags(rank, folder, case, seed):
    """The same bits whether rows travel as words or behind flags, counts on either side of the border, and after reset.

    What a caller hands in is checked: a kernel that is launched directly takes it for what it was compiled for.
    """
    import dataclasses

    from dispatch_rounds import Round, made_up_experts
    from lockstep.errors import ConfigurationError

    nvlink = _interpreted()
    capacity, hidden, top_k, ranks, fp8 = 5, 140, 3, 2, seed == 1
    launch = _launch(nvlink, 0)
    both = [
        nvlink.NvlinkDispatcher(
            dist.group.WORLD, num_experts=6, hidden_size=hidden, top_k=top_k, max_tokens_per_rank=capacity, fp8=fp8,
            deadline_s=60, launch=dataclasses.replace(launch, word_tokens=words),
        device=torch.device("cpu"), memory=Files(dist.group.WORLD, folder),
        )
        for words in (2 if fp8 else 3, 0)  # to their experts, fp8 rows go as words for twice as many tokens
    ]  # fmt: skip
    for number, counts in enumerate([(3, 2), (3, 4), (0, 3), (5, 1)]):
        if number == 2:  # epochs begin again: words of before must not count
            for dispatcher in both:
                dispatcher.reset()
        this = Round.make(counts, num_experts=6, top_k=top_k, hidden=hidden, seed=number, missing=0.2)
        rows, ids, weights = this.hidden_states[rank], this.topk_ids[rank], this.topk_weights[rank]
        results = []
        for dispatcher in both:
            count = torch.tensor([counts[rank]], dtype=torch.int32)
            route = dispatcher.route(counts)
            with pytest.raises(ConfigurationError, match=r"num_tokens must be int32 \[1\], got torch.int64"):
                dispatcher.dispatch(route, rows, ids, weights, count.long())
            handle = dispatcher.dispatch(route, rows, ids, weights, count)
            pairs = int(handle.tokens_per_expert.sum())
            slots = handle.gather_index[:pairs].long()
            expert_output = made_up_experts(this, handle, rank, ranks)
            with pytest.raises(ConfigurationError, match="a row for each of the 10 slots, got 9"):
                dispatcher.combine(expert_output[:9], handle, reduced=True)
            for bad in (rows.float(), rows.new_empty(counts[rank], hidden + 1), rows.new_empty(hidden, capacity).T):
                with pytest.raises(ConfigurationError, match="output must be bfloat16"):
                    dispatcher.combine(expert_output, handle, output=bad)
            received = handle.hidden_states[slots].contiguous().view(torch.uint8)
            sums = dispatcher.combine(expert_output, handle).view(torch.int16)
            dispatcher.check(wait=True)
            results.append([slots, handle.pair_weights[:pairs].clone(), received, sums])
            if fp8:
                results[-1].append(handle.scales[slots])
        for by_words, by_flags in zip(*results, strict=True):
            assert torch.equal(by_words, by_flags)


def _absent(rank, folder, case, seed):
    from lockstep.errors import ConfigurationError, RankAbsentError

    nvlink = _interpreted()
    dispatcher = nvlink.NvlinkDispatcher(
        dist.group.WORLD, num_experts=3, hidden_size=32, top_k=1, max_tokens_per_rank=4, deadline_s=0.5,
        launch=_launch(nvlink, 0),
        device=torch.device("cpu"), memory=Files(dist.group.WORLD, folder),
    )  # fmt: skip
    rows = torch.ones(2, 32, dtype=torch.bfloat16), torch.tensor([[0], [2]]), torch.ones(2, 1)
    route = dispatcher.route([2, 2, 2])
    assert dispatcher.route([2, 5, 2]).chunk_size == 4  # so that no rank brings more than the buffers hold
    with pytest.raises(ConfigurationError, match=f"6 rows on rank {rank}, but max_tokens_per_rank is 4"):
        dispatcher.dispatch(route, *(tensor.repeat(3, 1) for tensor in rows))
    if rank != 2:
        handle = dispatcher.dispatch(route, *rows)
        with pytest.raises(RankAbsentError, match=r"rank 2 did not come within 0\.5 s") as caught:
            dispatcher.combine(rows[0], handle)
        assert caught.value.absent_ranks == (2,)
        with pytest.raises(RankAbsentError):
            dispatcher.dispatch(route, *rows)
    dist.barrier()  # rank 2 has had nothing to wait for
    dispatcher.deadline_s = 60
    dispatcher.reset()
    for _ in range(3):
        handle = dispatcher.dispatch(route, *rows)
        with pytest.raises(ConfigurationError, match="was not combined"):
            dispatcher.dispatch(route, *rows)
        output = dispatcher.combine(handle.hidden_states[handle.gather_index.long()].contiguous(), handle)
        dispatcher.check(wait=True)
        assert torch.equal(output, rows[0])


def _order_blocks(rank, folder, case, seed):
    """Several blocks order together. They run one after another here, so all words lie there, and they run twice."""
    from types import SimpleNamespace

    from dispatch_rounds import Round, check_dispatch
    from lockstep.dispatch import kernels_order

    nvlink = _interpreted()
    kernels_order._meet = lambda *arguments: None
    ranks, top_k, capacity, hidden = 3, 3, 90, 32
    draw = random.Random(seed)
    for number in range(12):
        local, blocks = draw.choice([1, 5, 40]), draw.choice([1, 2, 5, 8])
        num_experts = ranks * local
        memory = MadeUp()
        dispatcher = nvlink.NvlinkDispatcher(
            SimpleNamespace(rank=lambda: 1, size=lambda: ranks), num_experts=num_experts, hidden_size=hidden,
            top_k=min(top_k, num_experts), max_tokens_per_rank=capacity,
            device=torch.device("cpu"), memory=memory, warm_up=False,
            launch=nvlink.LaunchSizes(
                order_blocks=blocks, push_blocks=2, combine_blocks=2, dispatch_tokens=2, combine_tokens=2, columns=128,
                tiny_tile=1, tiles=1, word_tokens=0, slice=draw.choice([32, 64]), skew_tokens=1000,
            ),
        )  # fmt: skip
        counts = [draw.choice([0, 1, 11, 64, capacity]) for _ in range(ranks)]
        counts[1] = max(counts[1], 1)
        this = Round.make(
            counts, num_experts=num_experts, top_k=dispatcher.top_k, hidden=hidden, seed=number, missing=0.2
        )
        layout, slots = dispatcher.layout, (ranks, capacity, dispatcher.top_k)
        words = {
            name: memory.buffers[1][offset : offset + 8 * torch.Size(slots).numel()].view(torch.int64).view(slots)
            for name, offset in (("ids", layout.ids), ("weights", layout.weights))
        }
        flags = memory.buffers[1][layout.counts : layout.abort].view(torch.int64)
        flags[:] = 2**62
        copies = flags[: ranks * (blocks + 2)].view(ranks, blocks + 2)
        for source, count in enumerate(counts):
            copies[source] = (1 << 20) | count
            words["ids"][source, :count] = (1 << 32) | (this.topk_ids[source].long() & 0xFFFFFFFF)
            words["weights"][source, :count] = (1 << 32) | this.topk_weights[source].view(torch.int32).long()
            rows = dispatcher.buffers.rows.view(ranks, capacity, hidden)
            rows[source, :count] = this.hidden_states[source]
        for _ in range(2):  # the first time, blocks wrote their counts for blocks that had not read them yet
            dispatcher.forget_capture()
            mine = this.hidden_states[1], this.topk_ids[1], this.topk_weights[1]
            handle = dispatcher.dispatch(dispatcher.route(counts), *mine)
        check_dispatch(this, handle, 1, ranks, capacity)
        pairs = int(handle.tokens_per_expert.sum())
        owner = torch.arange(local).repeat_interleave(handle.tokens_per_expert)
        order = owner * ranks * capacity + handle.gather_index[:pairs]
        assert bool((order[1:] > order[:-1]).all()), "pairs of an expert are not in the order of source and token"
        inverse = dispatcher.buffers.inverse.view(slots)
        for source, count in enumerate(counts):
            at, ids = inverse[source, :count], this.topk_ids[source]
            mine = (ids >= local) & (ids < 2 * local)
            assert torch.equal(at >= 0, mine)
            assert torch.equal(owner[at[mine].long()], ids[mine].long() - local)


def _ahead(rank, folder, case, seed):
    """Peers that ran on after the abort cell ended a wait left words of later epochs: nothing outside is touched."""
    from types import SimpleNamespace

    from lockstep.errors import RankAbsentError

    nvlink = _interpreted()
    memory = MadeUp()
    dispatcher = nvlink.NvlinkDispatcher(
        SimpleNamespace(rank=lambda: 1, size=lambda: 3, group_name="made up"),
        num_experts=6, hidden_size=32, top_k=2, max_tokens_per_rank=8,
        device=torch.device("cpu"), memory=memory, warm_up=False, launch=_launch(nvlink, 0),
    )  # fmt: skip
    layout, buffers = dispatcher.layout, memory.buffers
    counts = buffers[1][layout.counts : layout.dispatch_flags].view(torch.int64)
    counts[:9].view(3, 3)[0] = (5 << 20) | 7  # four epochs ahead
    counts[:9].view(3, 3)[2] = 1 << 20
    buffers[1][layout.abort :][:8].view(torch.int64).fill_((1 << 32) | (2 << 16) | 3)
    rows, ids = torch.ones(4, 32, dtype=torch.bfloat16), torch.tensor([[2, 3], [2, 5], [0, 1], [3, 2]])
    handle = dispatcher.dispatch(dispatcher.route([0, 4, 0]), rows, ids, torch.ones(4, 2))
    assert dispatcher.buffers.counts.tolist()[:3] == [0, 4, 0]
    assert handle.tokens_per_expert.tolist() == [3, 2]
    dispatcher.check()
    counts[:9].view(3, 3)[2] = 0  # now there is something to wait for
    dispatcher.forget_capture()
    handle = dispatcher.dispatch(dispatcher.route([0, 4, 0]), rows, ids, torch.ones(4, 2))
    assert dispatcher.buffers.counts.tolist()[:3] == [0, 0, 0]
    assert handle.tokens_per_expert.tolist() == [0, 0]
    with pytest.raises(RankAbsentError, match=r"rank 2 did not come within 30 s; rank 2 gave up first"):
        dispatcher.check()


def _lost(rank, folder, case, seed):
    """A rank is lost while others wait for it: the wait ends at once, and they go on without it, whoever has rows."""
    import threading
    import time

    from dispatch_rounds import Round, check_combine, check_dispatch, made_up_experts
    from lockstep.dispatch.base import NO_EXPERT
    from lockstep.errors import LockstepError

    ranks, num_experts, top_k, hidden, capacity, fp8 = case
    lost, places = 1, [place for place in range(ranks) if place != 1]
    nvlink, local = _interpreted(), num_experts // ranks
    dispatcher = nvlink.NvlinkDispatcher(
        dist.group.WORLD, num_experts=num_experts, hidden_size=hidden, top_k=top_k, max_tokens_per_rank=capacity,
        fp8=fp8, deadline_s=100, launch=_launch(nvlink, seed),
        device=torch.device("cpu"), memory=Files(dist.group.WORLD, folder),
    )  # fmt: skip
    left = dist.new_group(places)
    rows = [torch.ones(2, hidden, dtype=torch.bfloat16), torch.zeros(2, top_k, dtype=torch.int32), torch.ones(2, top_k)]
    rows[1] += local * torch.arange(2, dtype=torch.int32)[:, None]  # the second row goes to the lost rank
    for turn in range(2):
        if turn == 1 and rank == lost:
            return  # its memory remains mapped, full of words of the first turn
        if turn == 1:
            threading.Thread(target=lambda: (time.sleep(0.5), dispatcher.end_waits())).start()
        started = time.monotonic()
        handle = dispatcher.dispatch(dispatcher.route([2] * ranks), *rows)
        if turn == 0:
            dispatcher.combine(torch.zeros_like(handle.hidden_states).repeat(top_k, 1), handle)
            dispatcher.check()
    assert time.monotonic() - started < 60
    with pytest.raises(LockstepError, match=f"rank {rank} has ended its waits for others"):
        dispatcher.check()
    dispatcher.rejoin(left, places)
    for number in range(6):
        draw = random.Random(100 * seed + number)
        counts = [draw.choice([0, 1, 2, 6, capacity - 1, capacity]) if place != lost else 0 for place in range(ranks)]
        this = Round.make(
            counts, num_experts=num_experts, top_k=top_k, hidden=hidden, seed=100 * seed + number, missing=0.2
        )
        for place in range(ranks):  # its experts' slots are empty
            this.topk_ids[place][this.topk_ids[place] // local == lost] = NO_EXPERT
        mine = this.hidden_states[rank], this.topk_ids[rank], this.topk_weights[rank]
        handle = dispatcher.dispatch(dispatcher.route([counts[place] for place in places]), *mine)
        check_dispatch(this, handle, rank, ranks, capacity)
        output = dispatcher.combine(made_up_experts(this, handle, rank, ranks), handle)
        dispatcher.check(wait=True)
        check_combine(this, output, rank, ranks, fp8)


def _child(rank, ranks, folder, name, case, seed):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        globals()[name](rank, folder, case, seed)
    except BaseException:
        with open(os.path.join(folder, f"error{rank}"), "w") as file:
            file.write(traceback.format_exc())
        os._exit(1)
    if name != "_lost":
        dist.barrier()
    os._exit(0)


def _run(tmp_path, name, ranks, case=None, seed=0):
    try:
        mp.spawn(_child, (ranks, str(tmp_path), name, case, seed), nprocs=ranks)
    except Exception:
        for path in sorted(tmp_path.glob("error*")):
            print(path.name, path.read_text())
        raise


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES + SKEWED, ids=lambda case: "-".join(map(str, case)))
def test_random_rounds_equal_the_reference(tmp_path, case, seed):
    _run(tmp_path, "_rounds", case[0], case, seed)


@pytest.mark.parametrize("case", EIGHT, ids=lambda case: "-".join(map(str, case)))
def test_rounds_of_eight_ranks_equal_the_reference(tmp_path, case):
    _run(tmp_path, "_rounds", case[0], case)


@pytest.mark.parametrize("seed", [0, 1], ids=["bf16", "fp8"])
def test_words_and_flags_give_the_same_bits(tmp_path, seed):
    _run(tmp_path, "_words_or_flags", 2, seed=seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", [(3, 6, 2, 77, 9, False), (4, 8, 3, 136, 20, False)], ids=["3 ranks", "4 ranks"])
def test_ranks_go_on_without_one_that_is_lost_in_a_dispatch(tmp_path, case, seed):
    _run(tmp_path, "_lost", case[0], case, seed)


def test_a_rank_that_does_not_come_is_named_and_the_group_can_be_reset(tmp_path):
    _run(tmp_path, "_absent", 3)


def test_many_blocks_order_together(tmp_path):
    _run(tmp_path, "_order_blocks", 1)


def test_words_of_ranks_that_ran_on_after_an_error_make_no_addresses(tmp_path):
    _run(tmp_path, "_ahead", 1)
