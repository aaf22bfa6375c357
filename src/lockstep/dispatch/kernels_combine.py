# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel that carries the experts' results back; see `kernels_wire.py` for the rules."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lockstep.dispatch.kernels_wire import (
    COUNT_BITS,
    arrived_words,
    as_words,
    chain,
    first_task,
    pack_row,
    raise_flags,
    skewed_rank,
    tag_of,
    unpack_row,
    wait_at_least,
)


@triton.jit
def _partial_rows(
    expert_output, inverse, weight_words, source, token, here, column, CAPACITY: tl.constexpr, TOPK: tl.constexpr,
    HIDDEN: tl.constexpr, REDUCED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sum a tile of one source's tokens over this rank's experts, weighted; also return which have an expert here."""
    slot = source * CAPACITY + token
    inside = (column < HIDDEN)[None, :]
    wanted = tl.zeros(token.shape, tl.int32) > 0
    if REDUCED:
        at = slot.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        if EARLY:
            # Reads unneeded rows too, so that no load waits for the check whether its row is needed.
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
def _combine_words(
    expert_output, output, inverse, peers, counts, status, rank, block, epoch, own, num_tokens, budget_ns,
    WORLD: tl.constexpr, WORLD_POW2: tl.constexpr, CAPACITY: tl.constexpr, TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, WORD_TOKENS: tl.constexpr, ROW_WORDS: tl.constexpr, REDUCED: tl.constexpr,
    IDS: tl.constexpr, WEIGHTS: tl.constexpr, RETURNED_AS_WORDS: tl.constexpr, FLAGS: tl.constexpr,
    ABORT: tl.constexpr,
):  # fmt: skip
    """Few tokens on every rank: send partial sums as self-validating words, and add up those received."""
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    lane = tl.arange(0, 1)
    columns = tl.arange(0, BLOCK_COLUMNS)
    pairs = tl.arange(0, BLOCK_COLUMNS // 2)
    choice = tl.arange(0, TOPK_POW2)
    weight_words = as_words(own + WEIGHTS)
    returned = as_words(own + RETURNED_AS_WORDS, 16)
    tag = tag_of(epoch)
    if (block == 0) & (WORLD > 1):
        raise_flags(peers, rank, FLAGS, block, (epoch << COUNT_BITS) + 1, WORLD, BLOCKS, False)
    for i in range(1, WORLD):
        source = (rank + i) % WORLD
        inbox = as_words(tl.load(peers + source) + RETURNED_AS_WORDS, 16)
        end = tl.load(counts + source) * column_blocks
        for task in range(first_task(block, source, WORLD, BLOCKS), end, BLOCKS):
            token = task // column_blocks
            rows, wanted = _partial_rows(
                expert_output, inverse, weight_words, source, token + lane, lane == 0,
                (task % column_blocks) * BLOCK_COLUMNS + columns, CAPACITY, TOPK, HIDDEN, REDUCED, True,
            )  # fmt: skip
            pair = (task % column_blocks) * (BLOCK_COLUMNS // 2) + pairs
            at = (rank * WORD_TOKENS + token) * ROW_WORDS + pair
            tl.store(inbox + at[None, :], pack_row(rows, tag), wanted[:, None] & (pair < ROW_WORDS)[None, :])
    for task in range(first_task(block, rank, WORLD, BLOCKS), num_tokens * column_blocks, BLOCKS):
        token = task // column_blocks
        column = (task % column_blocks) * BLOCK_COLUMNS + columns
        at = (rank * CAPACITY + token) * TOPK + choice
        ids = tl.load(as_words(own + IDS) + at, choice < TOPK, other=0xFFFFFFFF).to(tl.int32)
        target = tl.where(ids >= 0, ids // EXPERTS, -1)
        mine, _ = _partial_rows(
            expert_output, inverse, weight_words, rank, token + lane, lane == 0, column, CAPACITY, TOPK, HIDDEN,
            REDUCED, True,
        )  # fmt: skip
        pair = (task % column_blocks) * (BLOCK_COLUMNS // 2) + pairs
        total = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
        for peer in tl.static_range(WORLD):
            wanted = (tl.max((target == peer).to(tl.int32), 0) > 0) & (peer != rank)
            payload, _ = arrived_words(
                returned, (peer * WORD_TOKENS + token) * ROW_WORDS + pair, wanted & (pair < ROW_WORDS), tag, peers,
                status, rank, peer, budget_ns, WORLD, ABORT,
            )  # fmt: skip
            rows = tl.where(wanted, unpack_row(tl.reshape(payload, [1, BLOCK_COLUMNS // 2])), 0.0)
            total += tl.where(rank == peer, mine, rows).to(tl.float32)
        at = token.to(tl.int64) * HIDDEN + column[None, :]
        tl.store(output + at, total.to(tl.bfloat16), (column < HIDDEN)[None, :])
    if (block == 0) & (WORLD > 1):
        wait_at_least(
            own + FLAGS, BLOCKS * 8,
            (epoch << COUNT_BITS) + 1 + tl.zeros((WORLD_POW2,), tl.int64), 0,
            peers, status, rank, budget_ns, WORLD, WORLD_POW2, ABORT,
        )  # fmt: skip


@triton.jit
def _combine_rounds(
    expert_output, output, inverse, peers, counts, status, rank, skewed, block, epoch, own, longest, num_tokens,
    budget_ns, WORLD: tl.constexpr, WORLD_POW2: tl.constexpr, CAPACITY: tl.constexpr, TOPK: tl.constexpr,
    TOPK_POW2: tl.constexpr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ROUND: tl.constexpr,
    CHAIN_ROUND: tl.constexpr, CHAINS: tl.constexpr, REDUCED: tl.constexpr, IDS: tl.constexpr,
    WEIGHTS: tl.constexpr, RETURNED: tl.constexpr, FLAGS: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """In each round: push, sum the rows of the previous round, raise the flag; see `combine_kernel`.

    With `CHAINS` there may be a `skewed` rank: in turn k the ranks at place s of a chain of its tokens send round
    k - s, each adding its own partial sum, so that a round is back `WORLD - 1` turns after it began. Rows in
    transit wait in the part of `returned` that would hold the waiting rank's own rows.
    """
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tasks = tl.cdiv(longest, BLOCK_TOKENS) * column_blocks
    mine_first = tl.cdiv(tl.maximum(tasks - block, 0), BLOCKS)
    hops = tl.zeros((), tl.int32)
    # Nothing overlaps the sum of the last round, hence one round, or several of half the size.
    tiles = tl.where(mine_first > ROUND, (ROUND + 1) // 2, ROUND)
    first_source = rank
    if CHAINS:
        hops = tl.where((skewed >= 0) & ((mine_first > 0) | (block == 0)), WORLD - 2, 0)
        tiles = tl.where(skewed >= 0, CHAIN_ROUND, tiles)
        first_source = tl.where(skewed >= 0, skewed, rank)
    rounds = tl.cdiv(mine_first, tiles)
    rounds = tl.where(block == 0, tl.maximum(rounds, 1), rounds)
    lanes = tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    choice = tl.arange(0, TOPK_POW2)[None, :]
    id_words = as_words(own + IDS)
    weight_words = as_words(own + WEIGHTS)
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
                    if CHAINS:  # noqa: SIM102 - a constexpr, so that the body is not even compiled
                        if stage == 1:
                            wait_at_least(
                                own + FLAGS + block * 8, BLOCKS * 8,
                                (epoch << COUNT_BITS) + turn + tl.zeros((WORLD_POW2,), tl.int64), 0,
                                peers, status, rank, budget_ns, WORLD, WORLD_POW2, ABORT,
                            )  # fmt: skip
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
                                after, before, _ = chain(target, token, source, rank, WORLD)
                                here = here & (before == stage)
                        rows, wanted = _partial_rows(
                            expert_output, inverse, weight_words, source, token, here, column, CAPACITY, TOPK,
                            HIDDEN, REDUCED, False,
                        )  # fmt: skip
                        inbox = tl.multiple_of((base + RETURNED).to(tl.pointer_type(tl.bfloat16)), 16)
                        own_place = (rank * CAPACITY + token)[:, None] * HIDDEN_STRIDE + column[None, :]
                        if CHAINS:
                            if source == skewed:
                                came = (wanted & (before > 0))[:, None] & inside
                                earlier = tl.load(returned + own_place, came, other=0.0)
                                rows = (earlier.to(tl.float32) + rows.to(tl.float32)).to(tl.bfloat16)
                                # In transit a row lies at the receiver's own place, finally at its last sender's.
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
        begin = block + (turn - 1 - hops) * tiles * BLOCKS
        end = tl.minimum(tl.cdiv(num_tokens, BLOCK_TOKENS) * column_blocks, begin + tiles * BLOCKS)
        sums = (turn > hops) & (begin < end)
        if WORLD > 1:  # noqa: SIM102
            if (turn > 0) & (sums | (turn == rounds + hops)):
                wait_at_least(
                    own + FLAGS + block * 8, BLOCKS * 8,
                    (epoch << COUNT_BITS) + turn + tl.zeros((WORLD_POW2,), tl.int64), 0, peers, status, rank,
                    budget_ns, WORLD, WORLD_POW2, ABORT,
                )  # fmt: skip
        if sums:
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
                    expert_output, inverse, weight_words, rank, token, here, column, CAPACITY, TOPK, HIDDEN,
                    REDUCED, False,
                )  # fmt: skip
                inside = (column < HIDDEN)[None, :]
                last = tl.full((BLOCK_TOKENS,), -1, tl.int32)
                if CHAINS:
                    _, _, last = chain(target, token, rank, rank, WORLD)
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
        if (turn < rounds + hops) & (WORLD > 1):
            raise_flags(peers, rank, FLAGS, block, (epoch << COUNT_BITS) + turn + 1, WORLD, BLOCKS)


@triton.jit(do_not_specialize=["rank", "budget_ns"])
def combine_kernel(
    expert_output, output, inverse, peers, cells, counts, status, rank, budget_ns, WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr, CAPACITY: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr,
    EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, PDL: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ROUND: tl.constexpr,
    SKEW_TOKENS: tl.constexpr, CHAIN_ROUND: tl.constexpr, WORD_TOKENS: tl.constexpr, ROW_WORDS: tl.constexpr,
    REDUCED: tl.constexpr, IDS: tl.constexpr, WEIGHTS: tl.constexpr, RETURNED: tl.constexpr,
    RETURNED_AS_WORDS: tl.constexpr, FLAGS: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """Expert outputs back to their tokens: one bf16 row per (token, rank), summed in rank order in float32.

    All ranks know the longest rank, hence the number of rounds: every awaited flag is raised. Block 0 always
    has a round, so it serves as the barrier that the next dispatch relies on.
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
    skewed = tl.full((), -1, tl.int32)
    if WORLD > 2:
        skewed = skewed_rank(arrived, SKEW_TOKENS, WORLD_POW2)
    if longest <= WORD_TOKENS:
        _combine_words(
            expert_output, output, inverse, peers, counts, status, rank, block, epoch, own, num_tokens, budget_ns,
            WORLD, WORLD_POW2, CAPACITY, TOPK, TOPK_POW2, EXPERTS, HIDDEN, BLOCKS, BLOCK_COLUMNS, WORD_TOKENS,
            ROW_WORDS, REDUCED, IDS, WEIGHTS, RETURNED_AS_WORDS, FLAGS, ABORT,
        )  # fmt: skip
    else:
        _combine_rounds(
            expert_output, output, inverse, peers, counts, status, rank, skewed, block, epoch, own, longest,
            num_tokens, budget_ns, WORLD, WORLD_POW2, CAPACITY, TOPK, TOPK_POW2, EXPERTS, HIDDEN, HIDDEN_STRIDE,
            BLOCKS, BLOCK_TOKENS, BLOCK_COLUMNS, ROUND, CHAIN_ROUND, WORLD > 2, REDUCED, IDS, WEIGHTS, RETURNED,
            FLAGS, ABORT,
        )  # fmt: skip
