# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that carry tokens to their experts and back over peer-mapped memory of one host.

Two launches make a round: `dispatch_kernel` and `combine_kernel`. Each is one-sided: a rank stores into its peers'
buffers and raises flags there; nobody asks the host anything. Three rules keep the buffers free of races without a
barrier of their own:

1.  Every rank always runs both kernels, with zero tokens too, so a finished dispatch means that every peer has left its
    previous combine, and a finished combine means that every peer's experts have read their rows.
2.  Whatever a *later* launch of a peer may overwrite is not read after the flag to that peer was raised; what later
    blocks still need (the token counts) is copied to memory that only this rank writes.
3.  Epochs live in device memory. Dispatch reads `cells[0]` and writes `cells[1]`, combine reads `cells[1]` and writes
    `cells[0]`: no block can see a value of its own launch, and a replayed graph counts on. `cells[2]` counts the blocks
    of a dispatch that have met; combine zeroes it.

Words that carry their own proof of arrival need neither fence nor flag: `(epoch << 32) | payload` for the routing of
one (token, k) pair, `(epoch << 20) | num_tokens` for a count. Rows are covered by a flag per sending block, which the
block of the same number waits for on the receiver.

A tile is `BLOCK_TOKENS` tokens by `BLOCK_COLUMNS` columns; task `i` belongs to block `i % blocks` on every rank, so the
sender and the receiver of a row agree on its block without a word.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

COUNT_BITS = tl.constexpr(20)  # a count word is (epoch << 20) | num_tokens; so at most 2**20 - 1 tokens per rank
COUNT_MASK = tl.constexpr((1 << 20) - 1)
PAYLOAD_MASK = tl.constexpr(0xFFFFFFFF)
POLLS_PER_CLOCK = tl.constexpr(64)  # polls between two looks at the clock and the abort cell
ALL_TOKENS = tl.constexpr(2**31 - 1)  # in the cell of the token count: as many as there are rows
FLAG_LATE = tl.constexpr(1)
TOO_MANY_TOKENS = tl.constexpr(2)


@triton.jit
def _now_ns():
    """Return the device's wall clock, ns."""
    return globaltimer()


@triton.jit
def _load_acquire(addresses):
    """Load 64-bit words at integer `addresses`, with acquire order at system scope."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [addresses], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _fence(token):
    """Make all stores of this block visible at system scope; one thread pays, after a block barrier."""
    tl.debug_barrier()
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p fence.acq_rel.sys; mov.u32 $0, $1; }",
        "=r,r",
        [token],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _store_flag(address, word):
    """Store one 64-bit word at integer `address`, by the thread that fenced."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        " @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,l",
        [address, word],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _words(address):
    """Return integer `address` as a pointer to int64."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 8)


@triton.jit
def _report(peers, status, rank, code, absent, WORLD: tl.constexpr, ABORT: tl.constexpr):
    """End every spin of this group: tell all ranks who was missing, and this rank's host."""
    word = (tl.full((), code, tl.int64) << 32) | (rank.to(tl.int64) << 16) | (absent.to(tl.int64) + 1)
    for p in range(WORLD):
        tl.store(_words(tl.load(peers + p) + ABORT), word)
    tl.store(_words(status), word)


@triton.jit
def _give_up(started, peers, status, rank, absent, budget_ns, WORLD: tl.constexpr, ABORT: tl.constexpr):
    """Return 1 if the wait must end: a peer said so, or the clock did (then say so to all)."""
    word = tl.load(_words(tl.load(peers + rank) + ABORT), volatile=True)
    ended = (word != 0).to(tl.int32)
    if word != 0:
        tl.store(_words(status), word)
    else:
        if _now_ns() - started > budget_ns:
            _report(peers, status, rank, 1, absent, WORLD, ABORT)
            ended = tl.full((), 1, tl.int32)
    return ended


@triton.jit
def _wait_at_least(
    section,
    stride,
    want,
    include_self,
    peers,
    status,
    rank,
    budget_ns,
    WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr,
    ABORT: tl.constexpr,
):
    """Wait until the word of every source at `section + source * stride` is >= its `want`, `[WORLD_POW2]`.

    Returns:
        The words `[WORLD_POW2]`. Those of a source that did not come, and those beyond the world, are `want`.
    """
    source = tl.arange(0, WORLD_POW2)
    counted = (source < WORLD) & ((source != rank) | (include_self != 0))
    addresses = section + tl.minimum(source, WORLD - 1).to(tl.int64) * stride
    words = tl.where(counted, _load_acquire(addresses), want)
    late = tl.sum((words < want).to(tl.int32), 0)
    ended = tl.full((), 0, tl.int32)
    if late > 0:
        started = _now_ns()
        while (late > 0) & (ended == 0):
            polls = 0
            while (late > 0) & (polls < POLLS_PER_CLOCK):
                words = tl.where(counted, _load_acquire(addresses), want)
                late = tl.sum((words < want).to(tl.int32), 0)
                polls += 1
            if late > 0:
                absent = tl.max(tl.where(words < want, source, -1), 0)
                ended = _give_up(started, peers, status, rank, absent, budget_ns, WORLD, ABORT)
    # Each thread acquired only its own source's word; the barrier shares that with the block.
    tl.debug_barrier()
    return tl.maximum(words, want)


@triton.jit
def _counts_in(words, want, WORLD: tl.constexpr, CAPACITY: tl.constexpr):
    """Return the tokens of every rank from its count word, and 0 for a rank that is epochs ahead.

    A rank can be ahead only after a wait was ended by the abort cell: then no result counts, but no address may be made
    of what it sent.
    """
    counts = words - want
    valid = (tl.arange(0, words.shape[0]) < WORLD) & (counts <= CAPACITY)
    return tl.where(valid, counts, 0).to(tl.int32)


@triton.jit
def _arrived_words(
    ids_words,
    weight_words,
    index,
    mask,
    tag,
    peers,
    status,
    rank,
    source,
    budget_ns,
    WORLD: tl.constexpr,
    ABORT: tl.constexpr,
):
    """Load routing words until all of this epoch are there; returns expert ids (int32) and weights (float32)."""
    ids = tl.load(ids_words + index, mask, other=0, volatile=True)
    weights = tl.load(weight_words + index, mask, other=0, volatile=True)
    stale = mask & (((ids >> 32) != tag) | ((weights >> 32) != tag))
    late = tl.max(tl.max(stale.to(tl.int32), 1), 0)
    ended = tl.full((), 0, tl.int32)
    if late > 0:
        started = _now_ns()
        while (late > 0) & (ended == 0):
            polls = 0
            while (late > 0) & (polls < POLLS_PER_CLOCK):
                ids = tl.load(ids_words + index, mask, other=0, volatile=True)
                weights = tl.load(weight_words + index, mask, other=0, volatile=True)
                stale = mask & (((ids >> 32) != tag) | ((weights >> 32) != tag))
                late = tl.max(tl.max(stale.to(tl.int32), 1), 0)
                polls += 1
            if late > 0:
                absent = tl.max(tl.max(tl.where(stale, source, -1), 1), 0)
                ended = _give_up(started, peers, status, rank, absent, budget_ns, WORLD, ABORT)
    if index.shape[0] * index.shape[1] < 256:
        # A tile of fewer elements than the block has threads is loaded several times over, and `late` looks at one of
        # the copies: the others may be older. After the barrier all see what one saw.
        tl.debug_barrier()
        ids = tl.load(ids_words + index, mask, other=0, volatile=True)
        weights = tl.load(weight_words + index, mask, other=0, volatile=True)
    return ids.to(tl.int32), weights.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _write_pairs(
    local,
    weights,
    valid,
    index,
    slot,
    expert,
    first,
    gather_index,
    pair_weights,
    inverse,
    EXPERTS: tl.constexpr,
):
    """Write one expert's pairs of a tile, which begin at position `first`; returns how many there were.

    The order is by source, then by (token, k): fixed by the counts alone, so results repeat bit for bit.
    """
    mine = valid & (local == expert)
    ones = mine.to(tl.int32)
    per_source = tl.sum(ones, 1)
    before = tl.cumsum(per_source, 0) - per_source
    position = first + before[:, None] + tl.cumsum(ones, 1) - 1
    tl.store(gather_index + position, slot, mine)
    tl.store(pair_weights + position, weights, mine)
    # Pairs of other ranks' experts have no position here; the experts' blocks share the work of saying so.
    foreign = valid & ((local < 0) | (local >= EXPERTS)) & (index % EXPERTS == expert)
    tl.store(inverse + index, tl.where(mine, position, -1), mine | foreign)
    return tl.sum(per_source, 0)


@triton.jit
def _plan_one_tile(
    own,
    limits,
    tag,
    peers,
    status,
    rank,
    first_expert,
    gather_index,
    pair_weights,
    tokens_per_expert,
    expert_offsets,
    inverse,
    budget_ns,
    WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ABORT: tl.constexpr,
):
    """The plan where `TILE` words of every source hold all pairs: one look at the words, kept in registers."""
    source = tl.arange(0, WORLD_POW2)[:, None]
    pair = tl.arange(0, TILE)[None, :]
    mask = pair < limits[:, None]
    index = source * (CAPACITY * TOPK) + pair
    ids, weights = _arrived_words(
        _words(own + IDS), _words(own + WEIGHTS), index, mask, tag, peers, status, rank, source, budget_ns, WORLD, ABORT
    )
    local = ids - rank * EXPERTS
    slot = source * CAPACITY + pair // TOPK
    for expert in range(first_expert, EXPERTS, STEP):
        lower = mask & (local >= 0) & (local < expert)
        first = tl.sum(tl.sum(lower.to(tl.int32), 1), 0)
        count = _write_pairs(
            local, weights, mask, index, slot, expert, first, gather_index, pair_weights, inverse, EXPERTS
        )
        tl.store(tokens_per_expert + expert, count)
        tl.store(expert_offsets + expert + 1, first + count)


@triton.jit
def _meet(cell, blocks, peers, status, rank, budget_ns, WORLD: tl.constexpr, ABORT: tl.constexpr):
    """A barrier among the first `blocks` blocks of this launch; `cell` counts them and is zeroed by combine."""
    tl.debug_barrier()
    tl.atomic_add(cell, 1, sem="acq_rel", scope="gpu")
    address = cell.to(tl.int64)
    came = _load_acquire(address)
    ended = tl.full((), 0, tl.int32)
    started = _now_ns()
    while (came < blocks) & (ended == 0):
        polls = 0
        while (came < blocks) & (polls < POLLS_PER_CLOCK):
            came = _load_acquire(address)
            polls += 1
        if came < blocks:
            ended = _give_up(started, peers, status, rank, rank, budget_ns, WORLD, ABORT)
    tl.debug_barrier()


@triton.jit
def _orders_in_slice(local, mine, GROUPS_OF_EXPERTS: tl.constexpr):
    """Return how many earlier pairs of a slice go to the same expert, `[slice]`, and the pairs per expert.

    Eight experts share a 64-bit word, one byte each, so that one short scan counts them all. A slice has 256 pairs at
    most: the count that a pair reads, its own not included, fits its byte.

    Returns:
        Orders `[slice]` int32.
    """
    words = tl.arange(0, GROUPS_OF_EXPERTS)[None, :]
    shift = ((local & 7) * 8).to(tl.int64)
    own_word = mine[:, None] & ((local >> 3)[:, None] == words)
    ones = tl.where(own_word, (tl.full((), 1, tl.int64) << shift)[:, None], tl.zeros((), tl.int64))
    before = tl.cumsum(ones, 0) - ones
    return (tl.sum(tl.where(own_word, before, 0), 1) >> shift).to(tl.int32) & 255


@triton.jit
def _plan_slices(
    own,
    limits,
    tag,
    peers,
    cells,
    status,
    rank,
    block,
    gather_index,
    pair_weights,
    tokens_per_expert,
    expert_offsets,
    inverse,
    scratch,
    budget_ns,
    WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICE: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ABORT: tl.constexpr,
):
    """The plan for any number of pairs: each block counts its slices, all meet, each writes its slices.

    The order is by expert, source, token and k: fixed by the inputs alone, so results repeat bit for bit. `scratch`
    holds each block's pairs per expert; `inverse` holds, between the two passes, a pair's order among its block's.
    """
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
    ids_words = _words(own + IDS)
    weight_words = _words(own + WEIGHTS)
    if first < last:
        counts = tl.zeros((EXPERTS_POW2,), tl.int32)
        for number in range(first, last):
            source = tl.sum((ends <= number).to(tl.int32), 0)
            pair = (number - tl.sum(tl.where(sources < source, slices, 0), 0)) * SLICE + lanes
            mask = pair < tl.sum(tl.where(sources == source, limits, 0), 0)
            index = source * (CAPACITY * TOPK) + pair
            ids, _ = _arrived_words(
                ids_words,
                weight_words,
                index[None, :],
                mask[None, :],
                tag,
                peers,
                status,
                rank,
                source,
                budget_ns,
                WORLD,
                ABORT,
            )
            local = tl.reshape(ids, [SLICE]) - rank * EXPERTS
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
            # Words can have changed meanwhile after a wait that was ended by the abort cell.
            mine = (order >= 0) & (local >= 0) & (local < EXPERTS)
            at = tl.gather(begin, tl.where(mine, local, 0), 0) + order
            mine = mine & (at < WORLD * CAPACITY * TOPK)
            tl.store(gather_index + at, source * CAPACITY + pair // TOPK, mine)
            tl.store(pair_weights + at, bits.to(tl.float32, bitcast=True), mine)
            tl.store(inverse + index, at, mine)


@triton.jit
def _send_routing(
    topk_ids,
    topk_weights,
    num_tokens,
    epoch,
    tag,
    peers,
    rank,
    block,
    WORLD: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCKS: tl.constexpr,
    COPIES: tl.constexpr,
    COPIES_POW2: tl.constexpr,
    PAIRS: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Store this rank's count and its pairs' experts and weights into every rank's buffer, its own too."""
    if block == 0:
        # A copy of the count for each block that will poll it: one word for all would be asked for in turn.
        copies = tl.arange(0, COPIES_POW2)
        word = ((epoch << COUNT_BITS) | num_tokens) + tl.zeros((COPIES_POW2,), tl.int64)
        for i in range(WORLD):
            base = tl.load(peers + (rank + 1 + i) % WORLD)
            tl.store(_words(base + COUNTS) + rank * COPIES + copies, word, copies < COPIES)
    for start in range(block * PAIRS, num_tokens * TOPK, BLOCKS * PAIRS):
        pair = start + tl.arange(0, PAIRS)
        mask = pair < num_tokens * TOPK
        ids = tl.load(topk_ids + pair, mask, other=0).to(tl.int64) & PAYLOAD_MASK
        weights = tl.load(topk_weights + pair, mask, other=0).to(tl.float32)
        bits = weights.to(tl.int32, bitcast=True).to(tl.int64) & PAYLOAD_MASK
        for i in range(WORLD):
            base = tl.load(peers + (rank + 1 + i) % WORLD)
            at = rank * (CAPACITY * TOPK) + pair
            tl.store(_words(base + IDS) + at, (tag << 32) | ids, mask)
            tl.store(_words(base + WEIGHTS) + at, (tag << 32) | bits, mask)


@triton.jit
def _skewed_rank(counts, SKEW_TOKENS: tl.constexpr, WORLD_POW2: tl.constexpr):
    """Return the rank whose rows go along a chain, or -1: it has many tokens, and twice as many as any other."""
    source = tl.arange(0, WORLD_POW2)
    largest = tl.max(counts, 0)
    rank = tl.max(tl.where(counts == largest, source, -1), 0)
    second = tl.max(tl.where(source == rank, 0, counts), 0)
    return tl.where((largest >= SKEW_TOKENS) & (2 * second <= largest), rank, -1)


@triton.jit
def _chain(target, token, source, rank, WORLD: tl.constexpr):
    """Where `rank` stands in the chains along which `source`'s tokens go from one rank that needs them to the next.

    Token t's chain takes the ranks that hold one of its experts (`target`, `[tokens, k]`, -1 for none) in cyclic order,
    beginning `t % (WORLD - 1)` ranks after the source, so that every rank passes on an equal share. The source itself
    is not a member.

    Returns:
        The next member after `rank` (the first, for the source; -1 at the end), the number of members before it, the
        last member (-1 for an empty chain), each `[tokens]`.
    """
    begin = token % (WORLD - 1)
    own = ((rank + WORLD - source - 1) % WORLD + WORLD - 1 - begin) % (WORLD - 1)
    own = tl.where(rank == source, -1, own)
    nearest = tl.full(token.shape, WORLD, tl.int32)
    farthest = tl.full(token.shape, -1, tl.int32)
    before = tl.zeros(token.shape, tl.int32)
    for i in tl.static_range(1, WORLD):
        place = (i - 1 + WORLD - 1 - begin) % (WORLD - 1)
        member = tl.max((target == (source + i) % WORLD).to(tl.int32), 1) > 0
        nearest = tl.where(member & (place > own), tl.minimum(nearest, place), nearest)
        farthest = tl.where(member, tl.maximum(farthest, place), farthest)
        before += (member & (place < own)).to(tl.int32)
    after = tl.where(nearest < WORLD, (source + 1 + (begin + nearest) % (WORLD - 1)) % WORLD, -1)
    last = tl.where(farthest >= 0, (source + 1 + (begin + farthest) % (WORLD - 1)) % WORLD, -1)
    return after, before, last


@triton.jit
def _forward_rows(
    own,
    tag,
    longest,
    peers,
    status,
    rank,
    source,
    stage,
    first,
    end,
    stride,
    budget_ns,
    WORLD: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ABORT: tl.constexpr,
):
    """Pass `source`'s rows that came to this rank as the `stage`-th of their chains on to the next, same slot."""
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    per_token: tl.constexpr = BLOCK_COLUMNS // 128
    # As wide as the block has threads, so that no word is loaded twice; see `_arrived_words`.
    width: tl.constexpr = max(256 // BLOCK_TOKENS, 8)
    choice = tl.arange(0, width)[None, :]
    words = tl.int8 if FP8 else tl.int16
    mine = tl.multiple_of((own + ROWS).to(tl.pointer_type(words)), 16)
    for task in range(first, end, stride):
        token = (task // column_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        column = (task % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        slot = source * CAPACITY + token
        named = (token < longest)[:, None] & (choice < TOPK)
        ids, _ = _arrived_words(
            _words(own + IDS),
            _words(own + WEIGHTS),
            slot[:, None] * TOPK + choice,
            named,
            tag,
            peers,
            status,
            rank,
            source,
            budget_ns,
            WORLD,
            ABORT,
        )
        target = tl.where(named & (ids >= 0), ids // EXPERTS, -1)
        after, before, _ = _chain(target, token, source, rank, WORLD)
        member = tl.max((target == rank).to(tl.int32), 1) > 0
        after = tl.where(member & (before == stage - 1), after, -1)
        at = slot[:, None] * HIDDEN_STRIDE + column
        values = tl.load(mine + at, (after >= 0)[:, None] & (column < HIDDEN), other=0)
        if FP8:
            group = (task % column_blocks) * per_token + tl.arange(0, per_token)[None, :]
            scales = tl.multiple_of((own + SCALES).to(tl.pointer_type(tl.float32)), 16)
            scale = tl.load(scales + slot[:, None] * GROUPS + group, (after >= 0)[:, None] & (group < GROUPS), other=0)
        for i in range(1, WORLD):
            peer = (rank + i) % WORLD
            base = tl.load(peers + peer)
            keep = (after == peer)[:, None]
            rows = tl.multiple_of((base + ROWS).to(tl.pointer_type(words)), 16)
            tl.store(rows + at, values, keep & (column < HIDDEN))
            if FP8:
                scales = tl.multiple_of((base + SCALES).to(tl.pointer_type(tl.float32)), 16)
                tl.store(scales + slot[:, None] * GROUPS + group, scale, keep & (group < GROUPS))


@triton.jit
def _push_rows(
    hidden_states,
    topk_ids,
    num_tokens,
    peers,
    rank,
    first,
    end,
    stride,
    WORLD: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    FP8: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Store each token's row once into every rank that holds one of its experts, at slot (this rank, token).

    With `CHAINED` into the first rank of the token's chain only, and into this rank's own slots.
    """
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    # In fp8 a tile's row is one scale group of a token, otherwise it is the token.
    width: tl.constexpr = 128 if FP8 else BLOCK_COLUMNS
    per_token: tl.constexpr = BLOCK_COLUMNS // width
    row = tl.arange(0, BLOCK_TOKENS * per_token)
    choice = tl.arange(0, TOPK_POW2)[None, :]
    for task in range(first, end, stride):
        token = (task // column_blocks) * BLOCK_TOKENS + row // per_token
        group = (task % column_blocks) * per_token + row % per_token
        column = group[:, None] * width + tl.arange(0, width)[None, :]
        here = (token < num_tokens)[:, None]
        values = tl.load(hidden_states + token[:, None] * HIDDEN + column, here & (column < HIDDEN), other=0.0)
        ids = tl.load(topk_ids + token[:, None] * TOPK + choice, here & (choice < TOPK), other=-1).to(tl.int32)
        target = tl.where(ids >= 0, ids // EXPERTS, -1)
        slot = rank * CAPACITY + token
        if CHAINED:
            after, _, _ = _chain(target, token, rank, rank, WORLD)
        if FP8:
            largest = tl.max(tl.abs(values.to(tl.float32)), 1)
            scale = tl.where(largest > 0, largest * (1.0 / 448.0), 1.0)
            packed = (values.to(tl.float32) * (1.0 / scale)[:, None]).to(tl.float8e4nv)
        for i in range(WORLD):
            peer = (rank + 1 + i) % WORLD
            base = tl.load(peers + peer)
            wanted = tl.max((target == peer).to(tl.int32), 1) > 0
            if CHAINED:
                wanted = tl.where(peer == rank, wanted, after == peer)
            keep = wanted[:, None] & (column < HIDDEN)
            at = slot[:, None] * HIDDEN_STRIDE + column
            if FP8:
                rows = tl.multiple_of((base + ROWS).to(tl.pointer_type(tl.float8e4nv)), 16)
                tl.store(rows + at, packed, keep)
                scales = tl.multiple_of((base + SCALES).to(tl.pointer_type(tl.float32)), 16)
                tl.store(scales + slot * GROUPS + group, scale, wanted & (group < GROUPS))
            else:
                rows = tl.multiple_of((base + ROWS).to(tl.pointer_type(tl.bfloat16)), 16)
                tl.store(rows + at, values, keep)


@triton.jit
def _raise_flags(peers, rank, section, block, word, WORLD: tl.constexpr, BLOCKS: tl.constexpr):
    """After all stores of this block: raise its flag on every other rank."""
    zero = _fence(tl.full((), 0, tl.int32))
    for i in range(1, WORLD):
        base = tl.load(peers + (rank + i) % WORLD)
        _store_flag(base + section + (rank * BLOCKS + block).to(tl.int64) * 8, word + zero)


@triton.jit(
    do_not_specialize=["max_tokens", "rank", "budget_ns"],
    do_not_specialize_on_alignment=["topk_ids", "topk_weights", "num_tokens_cell"],
)
def dispatch_kernel(
    hidden_states,
    topk_ids,
    topk_weights,
    num_tokens_cell,
    peers,
    cells,
    counts,
    gather_index,
    pair_weights,
    tokens_per_expert,
    expert_offsets,
    inverse,
    scratch,
    status,
    max_tokens,
    rank,
    budget_ns,
    WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
    PLAN_BLOCKS: tl.constexpr,
    PUSH_BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SKEW_TOKENS: tl.constexpr,
    CHAIN_ROUND: tl.constexpr,
    COPIES_POW2: tl.constexpr,
    SMALL_TILE: tl.constexpr,
    SLICE: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COUNTS: tl.constexpr,
    FLAGS: tl.constexpr,
    ABORT: tl.constexpr,
):
    """Tokens to their experts' ranks; when it ends, all rows have come and the plan for the experts is ready.

    The first `PLAN_BLOCKS` blocks exchange the routing and make the plan; the others push rows, so that the plan is
    made while the links are busy. All blocks must be resident at once.

    Where one rank has `SKEW_TOKENS` or more, and twice as many as any other, its link would be the limit: it then sends
    each row once, to the first rank of the row's chain, and the ranks pass it on. Blocks of equal number walk through
    the turns together: in turn k the source pushes its round k, and the ranks that stand at place s of a chain pass on
    round k - s.
    """
    block = tl.program_id(0)
    own = tl.load(peers + rank)
    if PDL:
        # The launch may begin while the kernel before is still ending; nothing it wrote is read above this line.
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(cells)
    tag = epoch & PAYLOAD_MASK
    tag = tl.where(tag >= 2147483648, tag - 4294967296, tag)  # as it comes back from an arithmetic shift
    asked = tl.load(num_tokens_cell)
    num_tokens = tl.minimum(asked, max_tokens)
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    blocks: tl.constexpr = PLAN_BLOCKS + PUSH_BLOCKS
    # With many tiles the plan's blocks push too, once the plan is made. The bound is known to the receivers.
    many: tl.constexpr = 4 * PUSH_BLOCKS
    tiles = tl.cdiv(num_tokens, BLOCK_TOKENS) * column_blocks
    zero = tl.zeros((WORLD_POW2,), tl.int64)
    want = (epoch << COUNT_BITS) + zero
    want_flags = want + 1
    first = block - PLAN_BLOCKS
    stride = tl.where(tiles > many, blocks, PUSH_BLOCKS)
    flags = 1
    source = tl.arange(0, WORLD_POW2)
    arrived = tl.zeros((WORLD_POW2,), tl.int32)
    if block < PLAN_BLOCKS:
        _send_routing(
            topk_ids,
            topk_weights,
            num_tokens,
            epoch,
            tag,
            peers,
            rank,
            block,
            WORLD,
            CAPACITY,
            TOPK,
            PLAN_BLOCKS,
            blocks,
            COPIES_POW2,
            PAIRS,
            IDS,
            WEIGHTS,
            COUNTS,
        )
        words = _wait_at_least(
            own + COUNTS + block * 8, blocks * 8, want, 1, peers, status, rank, budget_ns, WORLD, WORLD_POW2, ABORT
        )
        arrived = _counts_in(words, want, WORLD, CAPACITY)
        if block == 0:
            tl.store(cells + 1, epoch)
            tl.store(counts + source, arrived)
            if (asked > max_tokens) & (asked != ALL_TOKENS):
                _report(peers, status, rank, 2, rank, WORLD, ABORT)
        limits = arrived * TOPK
        if tl.max(limits, 0) <= SMALL_TILE:
            if block < EXPERTS:  # a block more would only poll
                _plan_one_tile(
                    own,
                    limits,
                    tag,
                    peers,
                    status,
                    rank,
                    block,
                    gather_index,
                    pair_weights,
                    tokens_per_expert,
                    expert_offsets,
                    inverse,
                    budget_ns,
                    WORLD,
                    WORLD_POW2,
                    CAPACITY,
                    TOPK,
                    EXPERTS,
                    PLAN_BLOCKS,
                    SMALL_TILE,
                    IDS,
                    WEIGHTS,
                    ABORT,
                )
        else:
            _plan_slices(
                own,
                limits,
                tag,
                peers,
                cells,
                status,
                rank,
                block,
                gather_index,
                pair_weights,
                tokens_per_expert,
                expert_offsets,
                inverse,
                scratch,
                budget_ns,
                WORLD,
                WORLD_POW2,
                CAPACITY,
                TOPK,
                EXPERTS,
                EXPERTS_POW2,
                PLAN_BLOCKS,
                SLICE,
                IDS,
                WEIGHTS,
                ABORT,
            )
        first = tl.where(tiles > many, PUSH_BLOCKS + block, 1 << 30)
        flags = (tiles > many).to(tl.int32)
        want_flags = tl.where(tl.cdiv(arrived, BLOCK_TOKENS) * column_blocks > many, want + 1, 0)
    skewed = tl.full((), -1, tl.int32)
    if WORLD > 2:
        # A rank that may be the skewed one looks at the counts before it pushes; the others, after.
        if (block >= PLAN_BLOCKS) & (num_tokens >= SKEW_TOKENS):
            words = _wait_at_least(
                own + COUNTS + block * 8, blocks * 8, want, 1, peers, status, rank, budget_ns, WORLD, WORLD_POW2, ABORT
            )
            arrived = _counts_in(words, want, WORLD, CAPACITY)
        skewed = _skewed_rank(arrived, SKEW_TOKENS, WORLD_POW2)
    if skewed != rank:
        if num_tokens * column_blocks <= 2 * PUSH_BLOCKS:
            # Few tokens: a tile of one token each, so that more blocks share the latency of their stores.
            _push_rows(
                hidden_states,
                topk_ids,
                num_tokens,
                peers,
                rank,
                first,
                num_tokens * column_blocks,
                PUSH_BLOCKS,
                WORLD,
                CAPACITY,
                TOPK,
                TOPK_POW2,
                EXPERTS,
                HIDDEN,
                HIDDEN_STRIDE,
                GROUPS,
                FP8,
                False,
                1,
                BLOCK_COLUMNS,
                ROWS,
                SCALES,
            )
        else:
            _push_rows(
                hidden_states,
                topk_ids,
                num_tokens,
                peers,
                rank,
                first,
                tiles,
                stride,
                WORLD,
                CAPACITY,
                TOPK,
                TOPK_POW2,
                EXPERTS,
                HIDDEN,
                HIDDEN_STRIDE,
                GROUPS,
                FP8,
                False,
                BLOCK_TOKENS,
                BLOCK_COLUMNS,
                ROWS,
                SCALES,
            )
    if WORLD > 2:
        if (block >= PLAN_BLOCKS) & (num_tokens < SKEW_TOKENS):
            words = _wait_at_least(
                own + COUNTS + block * 8, blocks * 8, want, 1, peers, status, rank, budget_ns, WORLD, WORLD_POW2, ABORT
            )
            arrived = _counts_in(words, want, WORLD, CAPACITY)
            skewed = _skewed_rank(arrived, SKEW_TOKENS, WORLD_POW2)
        longest = tl.max(arrived, 0)
        tasks = tl.cdiv(longest, BLOCK_TOKENS) * column_blocks
        first = tl.where(
            block >= PLAN_BLOCKS, block - PLAN_BLOCKS, tl.where(tasks > many, PUSH_BLOCKS + block, 1 << 30)
        )
        stride = tl.where(tasks > many, blocks, PUSH_BLOCKS)
        rounds = tl.cdiv(tl.cdiv(tl.maximum(tasks - first, 0), stride), CHAIN_ROUND)
        turns = tl.where((skewed >= 0) & (rounds > 0), rounds + WORLD - 2, 0)
        for turn in range(turns):
            begin = first + turn * CHAIN_ROUND * stride
            if rank == skewed:
                _push_rows(
                    hidden_states,
                    topk_ids,
                    num_tokens,
                    peers,
                    rank,
                    begin,
                    tl.minimum(tasks, begin + CHAIN_ROUND * stride),
                    stride,
                    WORLD,
                    CAPACITY,
                    TOPK,
                    TOPK_POW2,
                    EXPERTS,
                    HIDDEN,
                    HIDDEN_STRIDE,
                    GROUPS,
                    FP8,
                    True,
                    BLOCK_TOKENS,
                    BLOCK_COLUMNS,
                    ROWS,
                    SCALES,
                )
            else:
                if turn > 0:
                    _wait_at_least(
                        own + FLAGS + block * 8,
                        blocks * 8,
                        want + turn,
                        0,
                        peers,
                        status,
                        rank,
                        budget_ns,
                        WORLD,
                        WORLD_POW2,
                        ABORT,
                    )
                for stage in range(1, tl.minimum(turn, WORLD - 2) + 1):
                    begin = first + (turn - stage) * CHAIN_ROUND * stride
                    _forward_rows(
                        own,
                        tag,
                        longest,
                        peers,
                        status,
                        rank,
                        skewed,
                        stage,
                        begin,
                        tl.minimum(tasks, begin + CHAIN_ROUND * stride),
                        stride,
                        budget_ns,
                        WORLD,
                        CAPACITY,
                        TOPK,
                        EXPERTS,
                        HIDDEN,
                        HIDDEN_STRIDE,
                        GROUPS,
                        FP8,
                        BLOCK_TOKENS,
                        BLOCK_COLUMNS,
                        ROWS,
                        SCALES,
                        IDS,
                        WEIGHTS,
                        ABORT,
                    )
            _raise_flags(peers, rank, FLAGS, block, (epoch << COUNT_BITS) + turn + 1, WORLD, blocks)
        if turns > 0:
            flags = 0
            want_flags = want + turns
    if WORLD > 1:
        if flags != 0:
            _raise_flags(peers, rank, FLAGS, block, (epoch << COUNT_BITS) + 1, WORLD, blocks)
        _wait_at_least(
            own + FLAGS + block * 8,
            blocks * 8,
            want_flags,
            0,
            peers,
            status,
            rank,
            budget_ns,
            WORLD,
            WORLD_POW2,
            ABORT,
        )


@triton.jit
def _partial_rows(
    expert_output,
    inverse,
    weight_words,
    source,
    token,
    here,
    column,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    HIDDEN: tl.constexpr,
    REDUCED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Sum a tile of one source's tokens over this rank's experts, weighted, in float32.

    Returns:
        The sums rounded to bfloat16, and which tokens have an expert here.
    """
    slot = source * CAPACITY + token
    inside = (column < HIDDEN)[None, :]
    wanted = tl.zeros(token.shape, tl.int32) > 0
    if REDUCED:
        at = slot.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        if EARLY:
            # Rows that will not be needed are read too, but none waits for the answer whether it is.
            total = tl.load(expert_output + at, here[:, None] & inside, other=0.0)
        for k in tl.static_range(TOPK):
            wanted |= tl.load(inverse + slot * TOPK + k, here, other=-1) >= 0
        if EARLY:
            total = tl.where(wanted[:, None], total, 0.0)
        else:
            total = tl.load(expert_output + at, wanted[:, None] & inside, other=0.0)
    else:
        total = tl.zeros((token.shape[0], column.shape[0]), tl.float32)
        for k in tl.static_range(TOPK):
            position = tl.load(inverse + slot * TOPK + k, here, other=-1)
            local = position >= 0
            wanted |= local
            weight = tl.load(weight_words + slot * TOPK + k, here, other=0).to(tl.int32).to(tl.float32, bitcast=True)
            at = position.to(tl.int64)[:, None] * HIDDEN + column[None, :]
            rows = tl.load(expert_output + at, local[:, None] & inside, other=0.0)
            total += tl.where(local, weight, 0.0)[:, None] * rows.to(tl.float32)
    return total.to(tl.bfloat16), wanted


@triton.jit
def _combine_rounds(
    expert_output,
    output,
    inverse,
    peers,
    counts,
    status,
    rank,
    skewed,
    block,
    epoch,
    own,
    longest,
    num_tokens,
    budget_ns,
    WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROUND: tl.constexpr,
    CHAIN_ROUND: tl.constexpr,
    CHAINS: tl.constexpr,
    REDUCED: tl.constexpr,
    EARLY: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RETURNED: tl.constexpr,
    FLAGS: tl.constexpr,
    ABORT: tl.constexpr,
):
    """Push, flag, and sum what came in the round before, round by round; see `combine_kernel`.

    With `CHAINS` there may be a `skewed` rank: in turn k the ranks at place s of a chain of its tokens send round
    k - s, each adding its own partial sum, so that a round has come back `WORLD - 1` turns after it began. What is on
    its way waits in the part of `returned` that would hold the waiting rank's own rows.
    """
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tasks = tl.cdiv(longest, BLOCK_TOKENS) * column_blocks
    mine_first = tl.cdiv(tl.maximum(tasks - block, 0), BLOCKS)
    hops = tl.zeros((), tl.int32)
    tiles = tl.full((), ROUND, tl.int32)
    first_source = rank
    if CHAINS:
        hops = tl.where((skewed >= 0) & ((mine_first > 0) | (block == 0)), WORLD - 2, 0)
        tiles = tl.where(skewed >= 0, CHAIN_ROUND, ROUND)
        first_source = tl.where(skewed >= 0, skewed, rank)
    rounds = tl.cdiv(mine_first, tiles)
    rounds = tl.where(block == 0, tl.maximum(rounds, 1), rounds)
    lanes = tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    choice = tl.arange(0, TOPK_POW2)[None, :]
    id_words = _words(own + IDS)
    weight_words = _words(own + WEIGHTS)
    returned = tl.multiple_of((own + RETURNED).to(tl.pointer_type(tl.bfloat16)), 16)
    for turn in range(rounds + 1 + hops):
        if (turn < rounds + hops) & (WORLD > 1):
            for i in range(1, WORLD + 1):
                # A skewed rank's rows come last: they may wait for what other ranks send in this turn.
                source = (first_source + i) % WORLD
                stages = tl.where(source == rank, 0, 1)
                if CHAINS:
                    stages = tl.where((source == skewed) & (stages > 0), tl.minimum(turn + 1, WORLD - 1), stages)
                theirs = tl.load(counts + source)
                base = tl.load(peers + source)
                for stage in range(stages):
                    if CHAINS:  # noqa: SIM102 - a constexpr, so that what follows is not even compiled
                        if stage == 1:
                            _wait_at_least(
                                own + FLAGS + block * 8,
                                BLOCKS * 8,
                                (epoch << COUNT_BITS) + turn + tl.zeros((WORLD_POW2,), tl.int64),
                                0,
                                peers,
                                status,
                                rank,
                                budget_ns,
                                WORLD,
                                WORLD_POW2,
                                ABORT,
                            )
                    begin = block + (turn - stage) * tiles * BLOCKS
                    end = tl.minimum(tl.cdiv(theirs, BLOCK_TOKENS) * column_blocks, begin + tiles * BLOCKS)
                    for task in range(begin, end, BLOCKS):
                        token = (task // column_blocks) * BLOCK_TOKENS + lanes
                        column = (task % column_blocks) * BLOCK_COLUMNS + columns
                        inside = (column < HIDDEN)[None, :]
                        here = token < theirs
                        after = tl.full((BLOCK_TOKENS,), -1, tl.int32)
                        before = tl.zeros((BLOCK_TOKENS,), tl.int32)
                        if CHAINS:  # noqa: SIM102
                            if source == skewed:
                                at = (source * CAPACITY + token)[:, None] * TOPK + choice
                                named = here[:, None] & (choice < TOPK)
                                ids = tl.load(id_words + at, named, other=0xFFFFFFFF).to(tl.int32)
                                target = tl.where(ids >= 0, ids // EXPERTS, -1)
                                after, before, _ = _chain(target, token, source, rank, WORLD)
                                here = here & (before == stage)
                        rows, wanted = _partial_rows(
                            expert_output,
                            inverse,
                            weight_words,
                            source,
                            token,
                            here,
                            column,
                            CAPACITY,
                            TOPK,
                            HIDDEN,
                            REDUCED,
                            EARLY,
                        )
                        inbox = tl.multiple_of((base + RETURNED).to(tl.pointer_type(tl.bfloat16)), 16)
                        own_place = (rank * CAPACITY + token)[:, None] * HIDDEN_STRIDE + column[None, :]
                        if CHAINS:
                            if source == skewed:
                                came = (wanted & (before > 0))[:, None] & inside
                                earlier = tl.load(returned + own_place, came, other=0.0)
                                rows = (earlier.to(tl.float32) + rows.to(tl.float32)).to(tl.bfloat16)
                                # On the way a row waits at the receiver's own place, at the end at its last sender's.
                                place = tl.where(after < 0, rank, after)
                                at = (place * CAPACITY + token)[:, None] * HIDDEN_STRIDE + column[None, :]
                                for j in range(1, WORLD):
                                    peer = (rank + j) % WORLD
                                    to_peer = wanted & (tl.where(after < 0, source, after) == peer)
                                    base = tl.load(peers + peer)
                                    inbox = tl.multiple_of((base + RETURNED).to(tl.pointer_type(tl.bfloat16)), 16)
                                    tl.store(inbox + at, rows, to_peer[:, None] & inside)
                            else:
                                tl.store(inbox + own_place, rows, wanted[:, None] & inside)
                        else:
                            tl.store(inbox + own_place, rows, wanted[:, None] & inside)
            _raise_flags(peers, rank, FLAGS, block, (epoch << COUNT_BITS) + turn + 1, WORLD, BLOCKS)
        if turn > hops:
            if WORLD > 1:
                _wait_at_least(
                    own + FLAGS + block * 8,
                    BLOCKS * 8,
                    (epoch << COUNT_BITS) + turn + tl.zeros((WORLD_POW2,), tl.int64),
                    0,
                    peers,
                    status,
                    rank,
                    budget_ns,
                    WORLD,
                    WORLD_POW2,
                    ABORT,
                )
            begin = block + (turn - 1 - hops) * tiles * BLOCKS
            end = tl.minimum(tl.cdiv(num_tokens, BLOCK_TOKENS) * column_blocks, begin + tiles * BLOCKS)
            for task in range(begin, end, BLOCKS):
                token = (task // column_blocks) * BLOCK_TOKENS + lanes
                column = (task % column_blocks) * BLOCK_COLUMNS + columns
                here = token < num_tokens
                slot = rank * CAPACITY + token
                ids = tl.load(
                    id_words + slot[:, None] * TOPK + choice,
                    here[:, None] & (choice < TOPK),
                    other=0xFFFFFFFF,
                ).to(tl.int32)
                target = tl.where(ids >= 0, ids // EXPERTS, -1)
                mine, _ = _partial_rows(
                    expert_output,
                    inverse,
                    weight_words,
                    rank,
                    token,
                    here,
                    column,
                    CAPACITY,
                    TOPK,
                    HIDDEN,
                    REDUCED,
                    EARLY,
                )
                inside = (column < HIDDEN)[None, :]
                last = tl.full((BLOCK_TOKENS,), -1, tl.int32)
                if CHAINS:
                    _, _, last = _chain(target, token, rank, rank, WORLD)
                total = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
                for peer in tl.static_range(WORLD):
                    wanted = (tl.max((target == peer).to(tl.int32), 1) > 0) & (peer != rank)
                    if CHAINS:
                        wanted = wanted & ((rank != skewed) | (last == peer))
                    at = (peer * CAPACITY + token)[:, None] * HIDDEN_STRIDE + column[None, :]
                    rows = tl.load(returned + at, wanted[:, None] & inside, other=0.0).to(tl.float32)
                    total += tl.where(rank == peer, mine.to(tl.float32), rows)
                at = token.to(tl.int64)[:, None] * HIDDEN + column[None, :]
                tl.store(output + at, total.to(tl.bfloat16), here[:, None] & inside)


@triton.jit(do_not_specialize=["rank", "budget_ns"])
def combine_kernel(
    expert_output,
    output,
    inverse,
    peers,
    cells,
    counts,
    status,
    rank,
    budget_ns,
    WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROUND: tl.constexpr,
    SKEW_TOKENS: tl.constexpr,
    CHAIN_ROUND: tl.constexpr,
    REDUCED: tl.constexpr,
    IDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RETURNED: tl.constexpr,
    FLAGS: tl.constexpr,
    ABORT: tl.constexpr,
):
    """Expert outputs back to their tokens: one bf16 row per (token, rank), summed in rank order in float32.

    A block pushes `ROUND` tiles to each peer, raises its flag, and only then sums the tiles of the round before: the
    link carries one round while memory is read for another. The number of rounds follows from the longest rank, which
    all ranks know, so every flag that is awaited is raised; block 0 always has a round, and thus is the barrier that
    the next dispatch counts on. The rows of a skewed rank come back along their chains; see `dispatch_kernel`.
    """
    block = tl.program_id(0)
    own = tl.load(peers + rank)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(cells + 1)
    arrived = tl.load(counts + tl.arange(0, WORLD_POW2))
    longest = tl.max(arrived, 0)
    num_tokens = tl.load(counts + rank)
    if block == 0:
        tl.store(cells, epoch + 1)
        tl.store(cells + 2, 0)
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    skewed = tl.full((), -1, tl.int32)
    if WORLD > 2:
        skewed = _skewed_rank(arrived, SKEW_TOKENS, WORLD_POW2)
    if (skewed < 0) & (longest * column_blocks <= BLOCKS):
        # Few tokens: a tile of one token each, so that more blocks share the latency.
        _combine_rounds(
            expert_output,
            output,
            inverse,
            peers,
            counts,
            status,
            rank,
            skewed,
            block,
            epoch,
            own,
            longest,
            num_tokens,
            budget_ns,
            WORLD,
            WORLD_POW2,
            CAPACITY,
            TOPK,
            TOPK_POW2,
            EXPERTS,
            HIDDEN,
            HIDDEN_STRIDE,
            BLOCKS,
            1,
            BLOCK_COLUMNS,
            1,
            1,
            False,
            REDUCED,
            True,
            IDS,
            WEIGHTS,
            RETURNED,
            FLAGS,
            ABORT,
        )
    else:
        _combine_rounds(
            expert_output,
            output,
            inverse,
            peers,
            counts,
            status,
            rank,
            skewed,
            block,
            epoch,
            own,
            longest,
            num_tokens,
            budget_ns,
            WORLD,
            WORLD_POW2,
            CAPACITY,
            TOPK,
            TOPK_POW2,
            EXPERTS,
            HIDDEN,
            HIDDEN_STRIDE,
            BLOCKS,
            BLOCK_TOKENS,
            BLOCK_COLUMNS,
            ROUND,
            CHAIN_ROUND,
            WORLD > 2,
            REDUCED,
            False,
            IDS,
            WEIGHTS,
            RETURNED,
            FLAGS,
            ABORT,
        )
