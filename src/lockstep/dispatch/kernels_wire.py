# mypy: disable-error-code="no-untyped-def"
"""Shared parts of the dispatch and combine kernels: words, flags and waits over one host's peer-mapped memory.

docs/explanation/kernels.md says how rows travel. Three rules keep the buffers free of races without a barrier:

1.  Every rank always runs both kernels, even with no tokens, so a finished dispatch means that every peer has left its
    previous combine, and a finished combine means that every peer's experts have read their rows.
2.  After raising the flag to a peer, do not read memory that a *later* launch of that peer may overwrite; what later
    blocks still need (the token counts) is first copied to memory that only this rank writes.
3.  Epochs live in device memory. Dispatch reads `cells[0]` and writes `cells[1]`, combine the reverse: no block
    sees a value written by its own launch. `cells[2]` counts a dispatch's blocks at their barrier; combine zeroes it.

A word is `(epoch << 32) | payload` for a (token, k) pair or values of a row, `(epoch << 20) | num_tokens` for a count.
A tile is `BLOCK_TOKENS` tokens by `BLOCK_COLUMNS` columns; task `i` belongs to block `i % blocks` on every rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

COUNT_BITS = tl.constexpr(20)  # a count word is (epoch << 20) | num_tokens; so at most 2**20 - 1 tokens per rank
PAYLOAD_MASK = tl.constexpr(0xFFFFFFFF)
POLLS_PER_CLOCK = tl.constexpr(64)  # polls between checks of the clock and the abort cell
ALL_TOKENS = tl.constexpr(2**31 - 1)  # in the token-count cell: all rows are tokens
FLAG_LATE = tl.constexpr(1)
TOO_MANY_TOKENS = tl.constexpr(2)


@triton.jit
def now_ns():
    """Return the device's wall clock, ns."""
    return globaltimer()


@triton.jit
def load_acquire(addresses):
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
        "=r,r", [token], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _store_flag(address, word):
    """Store one 64-bit word at integer `address`, from the thread that fenced."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        " @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,l", [address, word], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _barrier_any(flag):
    """A block barrier that returns 1 to all threads if `flag` is not 0 in any of them."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .pred q; setp.ne.u32 p, $1, 0; bar.red.or.pred q, 0, p; selp.u32 $0, 1, 0, q; }",
        "=r,r", [flag], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def as_words(address, ALIGNED: tl.constexpr = 8):
    """Return integer `address`, a multiple of `ALIGNED`, as a pointer to int64."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int64)), ALIGNED)


@triton.jit
def report(peers, status, rank, code, absent, WORLD: tl.constexpr, ABORT: tl.constexpr):
    """End every spin of this group: tell all ranks and this rank's host who was missing."""
    word = (tl.full((), code, tl.int64) << 32) | (rank.to(tl.int64) << 16) | (absent.to(tl.int64) + 1)
    for p in range(WORLD):
        tl.store(as_words(tl.load(peers + p) + ABORT), word)
    tl.store(as_words(status), word)


@triton.jit
def give_up(started, peers, status, rank, absent, budget_ns, WORLD: tl.constexpr, ABORT: tl.constexpr):
    """Return 1 if the wait must end: a peer aborted, or the deadline passed (then abort all ranks)."""
    word = tl.load(as_words(tl.load(peers + rank) + ABORT), volatile=True)
    ended = (word != 0).to(tl.int32)
    if word != 0:
        tl.store(as_words(status), word)
    else:
        if now_ns() - started > budget_ns:
            report(peers, status, rank, 1, absent, WORLD, ABORT)
            ended = tl.full((), 1, tl.int32)
    return ended


@triton.jit
def wait_at_least(
    section, stride, want, include_self, peers, status, rank, budget_ns, WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """Return every source's word at `section + source * stride`, `[WORLD_POW2]`, once it is >= its `want`."""
    source = tl.arange(0, WORLD_POW2)
    counted = (source < WORLD) & ((source != rank) | (include_self != 0))
    addresses = section + tl.minimum(source, WORLD - 1).to(tl.int64) * stride
    words = tl.where(counted, load_acquire(addresses), want)
    late = tl.sum((words < want).to(tl.int32), 0)
    ended = tl.full((), 0, tl.int32)
    if late > 0:
        started = now_ns()
        while (late > 0) & (ended == 0):
            polls = 0
            while (late > 0) & (polls < POLLS_PER_CLOCK):
                words = tl.where(counted, load_acquire(addresses), want)
                late = tl.sum((words < want).to(tl.int32), 0)
                polls += 1
            if late > 0:
                absent = tl.max(tl.where(words < want, source, -1), 0)
                ended = give_up(started, peers, status, rank, absent, budget_ns, WORLD, ABORT)
    # Each thread acquired only its own source's word; the barrier extends that to the block. Each warp also waited by
    # itself: if one gave up, the whole block gives up, or its warps would continue with different words.
    return tl.where(_barrier_any(ended) != 0, want, tl.maximum(words, want))


@triton.jit
def arrived_words(
    words, index, mask, tag, peers, status, rank, source, budget_ns, WORLD: tl.constexpr, ABORT: tl.constexpr,
    SECOND: tl.constexpr = 0,
):  # fmt: skip
    """Return int32 payloads of the words at `index`, `[n]`, once all are of this epoch; also at `index + SECOND`."""
    first = tl.load(words + index, mask, other=0, volatile=True)
    second = tl.load(words + SECOND + index, mask, other=0, volatile=True) if SECOND > 0 else first
    stale = mask & (((first >> 32) != tag) | ((second >> 32) != tag))
    late = tl.max(stale.to(tl.int32), 0)
    ended = tl.full((), 0, tl.int32)
    if late > 0:
        started = now_ns()
        while (late > 0) & (ended == 0):
            polls = 0
            while (late > 0) & (polls < POLLS_PER_CLOCK):
                first = tl.load(words + index, mask, other=0, volatile=True)
                second = tl.load(words + SECOND + index, mask, other=0, volatile=True) if SECOND > 0 else first
                stale = mask & (((first >> 32) != tag) | ((second >> 32) != tag))
                late = tl.max(stale.to(tl.int32), 0)
                polls += 1
            if late > 0:
                absent = tl.max(tl.where(stale, source, -1), 0)
                ended = give_up(started, peers, status, rank, absent, budget_ns, WORLD, ABORT)
                # Each warp polled by itself. Warps that diverge here would meet in the wrong barriers later.
                ended = tl.max(ended + tl.zeros(index.shape, tl.int32), 0)
    if index.shape[0] < 256:
        # If a tile has fewer elements than the block has threads, several threads load each, and `late` checks one of
        # the copies: the other copies may be older. After the barrier all threads see what one saw.
        tl.debug_barrier()
        first = tl.load(words + index, mask, other=0, volatile=True)
        second = tl.load(words + SECOND + index, mask, other=0, volatile=True) if SECOND > 0 else first
    return first.to(tl.int32), second.to(tl.int32)


@triton.jit
def pack_row(values, tag):
    """Return bfloat16 values `[rows, columns]` as self-validating words, `[rows, columns / 2]` int64."""
    bits = values.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    low, high = tl.split(tl.reshape(bits, [bits.shape[0], bits.shape[1] // 2, 2]))
    return (tag << 32) | ((low | (high << 16)).to(tl.int64) & PAYLOAD_MASK)


@triton.jit
def pack_fp8(values, tag):
    """Return fp8 values `[rows, columns]` as self-validating words, `[rows, columns / 4]` int64."""
    bits = values.to(tl.int8, bitcast=True).to(tl.int32) & 0xFF
    shifted = tl.reshape(bits, [bits.shape[0], bits.shape[1] // 4, 4]) << (8 * tl.arange(0, 4))[None, None, :]
    return (tag << 32) | (tl.sum(shifted, 2).to(tl.int64) & PAYLOAD_MASK)


@triton.jit
def unpack_row(payload):
    """Return the bfloat16 values `[rows, columns]` of payloads `[rows, columns / 2]` int32; see `pack_row`."""
    pairs = tl.join(payload & 0xFFFF, (payload >> 16) & 0xFFFF)
    bits = tl.reshape(pairs, [payload.shape[0], 2 * payload.shape[1]])
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def first_task(block, source, WORLD: tl.constexpr, BLOCKS: tl.constexpr):
    """Return `block`'s first task among `source`'s rows; sources are staggered so that few rows spread over blocks."""
    return (block + BLOCKS - (source * (BLOCKS // WORLD)) % BLOCKS) % BLOCKS


@triton.jit
def arrived_counts(
    section, stride, want, peers, status, rank, budget_ns, WORLD: tl.constexpr, WORLD_POW2: tl.constexpr,
    CAPACITY: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """Wait for every rank's count word; return the token counts, 0 for a rank that is epochs ahead after an abort."""
    words = wait_at_least(section, stride, want, 1, peers, status, rank, budget_ns, WORLD, WORLD_POW2, ABORT)
    counts = words - want
    valid = (tl.arange(0, words.shape[0]) < WORLD) & (counts <= CAPACITY)
    return tl.where(valid, counts, 0).to(tl.int32)


@triton.jit
def tag_of(epoch):
    """Return an epoch as the signed value that an arithmetic shift of its word yields."""
    tag = epoch & PAYLOAD_MASK
    return tl.where(tag >= 2147483648, tag - 4294967296, tag)


@triton.jit
def raise_flags(
    peers, rank, section, block, word, WORLD: tl.constexpr, BLOCKS: tl.constexpr, FENCE: tl.constexpr = True
):
    """Raise this block's flag on every other rank; with `FENCE` only after all its stores, else without ordering."""
    zero = tl.full((), 0, tl.int32)
    if FENCE:
        zero = _fence(zero)
    for i in range(1, WORLD):
        base = tl.load(peers + (rank + i) % WORLD)
        _store_flag(base + section + (rank * BLOCKS + block).to(tl.int64) * 8, word + zero)


@triton.jit
def skewed_rank(counts, SKEW_TOKENS: tl.constexpr, WORLD_POW2: tl.constexpr):
    """Return the skewed rank, whose rows go along chains: many tokens, and twice as many as any other; -1 if none."""
    source = tl.arange(0, WORLD_POW2)
    largest = tl.max(counts, 0)
    rank = tl.max(tl.where(counts == largest, source, -1), 0)
    second = tl.max(tl.where(source == rank, 0, counts), 0)
    return tl.where((largest >= SKEW_TOKENS) & (2 * second <= largest), rank, -1)


@triton.jit
def chain(target, token, source, rank, WORLD: tl.constexpr):
    """Return each token's next member after `rank` in its chain (-1: none), members before it, and the last one.

    Token t's chain visits the ranks that hold one of its experts (`target`, `[tokens, k]`, -1 for none) in cyclic
    order, beginning `t % (WORLD - 1)` ranks after the source, which is no member: every rank forwards an equal share.
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
