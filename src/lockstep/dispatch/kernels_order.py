# mypy: disable-error-code="no-untyped-def"
"""The experts' order, made on the GPU while rows are on the link: by expert, source, token and k; deterministic."""

from __future__ import annotations

import triton
import triton.language as tl

from lockstep.dispatch.kernels_wire import POLLS_PER_CLOCK, arrived_words, as_words, give_up, load_acquire, now_ns


@triton.jit
def order_one_tile(
    own, limits, tag, peers, status, rank, first_expert, gather_index, pair_weights, tokens_per_expert,
    expert_offsets, inverse, budget_ns, WORLD: tl.constexpr, WORLD_POW2: tl.constexpr, CAPACITY: tl.constexpr,
    TOPK: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, PAIRS: tl.constexpr,
    IDS: tl.constexpr, WEIGHTS: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """The order if `TILE` words per source hold all pairs: read the words once and keep them in registers."""
    lane = tl.arange(0, WORLD_POW2 * TILE)
    source, pair = lane // TILE, lane % TILE
    limit = tl.reshape(tl.broadcast_to(limits[:, None], [WORLD_POW2, TILE]), [WORLD_POW2 * TILE])
    words = as_words(own + IDS)
    if TILE > PAIRS:
        # Polling many words slows down the arrival of new ones: poll the last word of each
        # sending block first.
        parts: tl.constexpr = TILE // PAIRS
        part = tl.arange(0, WORLD_POW2 * parts)
        most = tl.reshape(tl.broadcast_to(limits[:, None], [WORLD_POW2, parts]), [WORLD_POW2 * parts])
        last = tl.minimum((part % parts + 1) * PAIRS, most) - 1
        arrived_words(
            words, (part // parts) * (CAPACITY * TOPK) + last, last >= (part % parts) * PAIRS, tag, peers, status,
            rank, part // parts, budget_ns, WORLD, ABORT, (WEIGHTS - IDS) // 8,
        )  # fmt: skip
    mask = pair < limit
    index = source * (CAPACITY * TOPK) + pair
    ids, bits = arrived_words(
        words, index, mask, tag, peers, status, rank, source, budget_ns, WORLD, ABORT, (WEIGHTS - IDS) // 8
    )
    local = ids - rank * EXPERTS
    for expert in range(first_expert, EXPERTS, STEP):
        mine = mask & (local == expert)
        lower = mask & (local >= 0) & (local < expert)
        # Pairs of this expert in the lower half, of earlier experts in the upper: one scan, one sum.
        ones = mine.to(tl.int32) + (lower.to(tl.int32) << 16)
        before = tl.cumsum(ones, 0)
        total = tl.sum(ones, 0)
        first, count = total >> 16, total & 0xFFFF
        position = first + (before & 0xFFFF) - 1
        tl.store(gather_index + position, source * CAPACITY + pair // TOPK, mine)
        tl.store(pair_weights + position, bits.to(tl.float32, bitcast=True), mine)
        # Pairs of other ranks' experts have no position here; the experts' blocks share the work of marking them.
        foreign = mask & ((local < 0) | (local >= EXPERTS)) & (index % EXPERTS == expert)
        tl.store(inverse + index, tl.where(mine, position, -1), mine | foreign)
        tl.store(tokens_per_expert + expert, count)
        tl.store(expert_offsets + expert + 1, first + count)


@triton.jit
def _meet(cell, blocks, peers, status, rank, budget_ns, WORLD: tl.constexpr, ABORT: tl.constexpr):
    """Barrier of the first `blocks` blocks of this launch; `cell` counts them, and combine zeroes it."""
    tl.debug_barrier()
    tl.atomic_add(cell, 1, sem="acq_rel", scope="gpu")
    address = cell.to(tl.int64)
    came = load_acquire(address)
    ended = tl.full((), 0, tl.int32)
    started = now_ns()
    while (came < blocks) & (ended == 0):
        polls = 0
        while (came < blocks) & (polls < POLLS_PER_CLOCK):
            came = load_acquire(address)
            polls += 1
        if came < blocks:
            ended = give_up(started, peers, status, rank, rank, budget_ns, WORLD, ABORT)
    tl.debug_barrier()


@triton.jit
def _orders_in_slice(local, mine, GROUPS_OF_EXPERTS: tl.constexpr):
    """Return how many earlier pairs of a slice go to the same expert, `[slice]` int32; a count fits a byte."""
    words = tl.arange(0, GROUPS_OF_EXPERTS)[None, :]
    shift = ((local & 7) * 8).to(tl.int64)
    own_word = mine[:, None] & ((local >> 3)[:, None] == words)
    ones = tl.where(own_word, (tl.full((), 1, tl.int64) << shift)[:, None], tl.zeros((), tl.int64))
    before = tl.cumsum(ones, 0) - ones
    return (tl.sum(tl.where(own_word, before, 0), 1) >> shift).to(tl.int32) & 255


@triton.jit
def order_slices(
    own, limits, tag, peers, cells, status, rank, block, gather_index, pair_weights, tokens_per_expert,
    expert_offsets, inverse, scratch, budget_ns, WORLD: tl.constexpr, WORLD_POW2: tl.constexpr,
    CAPACITY: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr,
    BLOCKS: tl.constexpr, SLICE: tl.constexpr, IDS: tl.constexpr, WEIGHTS: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """The order of any number of pairs: blocks count their slices into `scratch`, meet at a barrier, then write."""
    sources = tl.arange(0, WORLD_POW2)
    experts = tl.arange(0, EXPERTS_POW2)
    lanes = tl.arange(0, SLICE)
    slices = tl.cdiv(limits, SLICE)
    ends = tl.cumsum(slices, 0)
    total_slices = tl.sum(slices, 0)
    each = tl.cdiv(total_slices, BLOCKS)
    busy = tl.cdiv(total_slices, each)
    first = block * each
    last = tl.minimum(first + each, total_slices)
    ids_words = as_words(own + IDS)
    weight_words = as_words(own + WEIGHTS)
    if first < last:
        counts = tl.zeros((EXPERTS_POW2,), tl.int32)
        for number in range(first, last):
            source = tl.sum((ends <= number).to(tl.int32), 0)
            pair = (number - tl.sum(tl.where(sources < source, slices, 0), 0)) * SLICE + lanes
            mask = pair < tl.sum(tl.where(sources == source, limits, 0), 0)
            index = source * (CAPACITY * TOPK) + pair
            ids, _ = arrived_words(
                ids_words, index, mask, tag, peers, status, rank, source, budget_ns, WORLD, ABORT,
                (WEIGHTS - IDS) // 8,
            )  # fmt: skip
            local = ids - rank * EXPERTS
            mine = mask & (local >= 0) & (local < EXPERTS)
            local = tl.where(mine, local, 0)
            order = _orders_in_slice(local, mine, (EXPERTS_POW2 + 7) // 8) + tl.gather(counts, local, 0)
            tl.store(inverse + index, tl.where(mine, order, -1), mask)
            counts += tl.histogram(local, EXPERTS_POW2, mask=mine)
        tl.store(scratch + block * EXPERTS_POW2 + experts, counts)
        _meet(cells + 2, busy, peers, status, rank, budget_ns, WORLD, ABORT)
        total = tl.zeros((EXPERTS_POW2,), tl.int32)
        before = tl.zeros((EXPERTS_POW2,), tl.int32)
        for start in range(0, busy, 32):
            row = start + tl.arange(0, 32)[:, None]
            others = tl.load(scratch + row * EXPERTS_POW2 + experts[None, :], row < busy, other=0, volatile=True)
            total += tl.sum(others, 0)
            before += tl.sum(tl.where(row < block, others, 0), 0)
        starts = tl.cumsum(total, 0) - total
        if block == 0:
            tl.store(tokens_per_expert + experts, total, experts < EXPERTS)
            tl.store(expert_offsets + 1 + experts, starts + total, experts < EXPERTS)
        begin = starts + before
        for number in range(first, last):
            source = tl.sum((ends <= number).to(tl.int32), 0)
            pair = (number - tl.sum(tl.where(sources < source, slices, 0), 0)) * SLICE + lanes
            mask = pair < tl.sum(tl.where(sources == source, limits, 0), 0)
            index = source * (CAPACITY * TOPK) + pair
            local = tl.load(ids_words + index, mask, other=-1, volatile=True).to(tl.int32) - rank * EXPERTS
            bits = tl.load(weight_words + index, mask, other=0, volatile=True).to(tl.int32)
            order = tl.load(inverse + index, mask, other=-1, volatile=True)
            # If the abort cell ended a wait, words may have changed since.
            mine = (order >= 0) & (local >= 0) & (local < EXPERTS)
            at = tl.gather(begin, tl.where(mine, local, 0), 0) + order
            mine = mine & (at < WORLD * CAPACITY * TOPK)
            tl.store(gather_index + at, source * CAPACITY + pair // TOPK, mine)
            tl.store(pair_weights + at, bits.to(tl.float32, bitcast=True), mine)
            tl.store(inverse + index, at, mine)
