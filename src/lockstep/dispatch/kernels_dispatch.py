# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel that carries tokens to their experts; see `kernels_wire.py` for the rules."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lockstep.dispatch.kernels_order import order_one_tile, order_slices
from lockstep.dispatch.kernels_wire import (
    ALL_TOKENS,
    COUNT_BITS,
    PAYLOAD_MASK,
    arrived_counts,
    arrived_words,
    as_words,
    chain,
    first_task,
    pack_fp8,
    pack_row,
    raise_flags,
    report,
    skewed_rank,
    tag_of,
    wait_at_least,
)


@triton.jit
def _send_routing(
    topk_ids, topk_weights, num_tokens, epoch, tag, peers, rank, block, WORLD: tl.constexpr, CAPACITY: tl.constexpr,
    TOPK: tl.constexpr, BLOCKS: tl.constexpr, COPIES: tl.constexpr, COPIES_POW2: tl.constexpr, PAIRS: tl.constexpr,
    IDS: tl.constexpr, WEIGHTS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Store this rank's count and its pairs' experts and weights into every rank's buffer, its own too."""
    if block == BLOCKS - 1:  # this block has the fewest pairs to send
        # One copy of the count for each polling block: polls of a shared word would be serialized.
        copies = tl.arange(0, COPIES_POW2)
        word = ((epoch << COUNT_BITS) | num_tokens) + tl.zeros((COPIES_POW2,), tl.int64)
        for i in range(WORLD):
            base = tl.load(peers + (rank + 1 + i) % WORLD)
            tl.store(as_words(base + COUNTS) + rank * COPIES + copies, word, copies < COPIES)
    for start in range(block * PAIRS, num_tokens * TOPK, BLOCKS * PAIRS):
        pair = start + tl.arange(0, PAIRS)
        mask = pair < num_tokens * TOPK
        ids = tl.load(topk_ids + pair, mask, other=0).to(tl.int64) & PAYLOAD_MASK
        weights = tl.load(topk_weights + pair, mask, other=0).to(tl.float32)
        bits = weights.to(tl.int32, bitcast=True).to(tl.int64) & PAYLOAD_MASK
        for i in range(WORLD):
            base = tl.load(peers + (rank + 1 + i) % WORLD)
            at = rank * (CAPACITY * TOPK) + pair
            tl.store(as_words(base + IDS) + at, (tag << 32) | ids, mask)
            tl.store(as_words(base + WEIGHTS) + at, (tag << 32) | bits, mask)


@triton.jit
def _forward_rows(
    own, tag, longest, peers, status, rank, source, stage, first, end, stride, budget_ns, WORLD: tl.constexpr,
    CAPACITY: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, ROWS: tl.constexpr, SCALES: tl.constexpr, IDS: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """Forward `source`'s rows, of whose chains this rank is stage `stage`, to the next rank, into the same slot."""
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    per_token: tl.constexpr = BLOCK_COLUMNS // 128
    # As wide as the block has threads, so that no word is loaded twice; see `arrived_words`.
    width: tl.constexpr = max(256 // BLOCK_TOKENS, 8)
    choice = tl.arange(0, width)[None, :]
    words = tl.int8 if FP8 else tl.int16
    mine = tl.multiple_of((own + ROWS).to(tl.pointer_type(words)), 16)
    for task in range(first, end, stride):
        token = (task // column_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        column = (task % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        slot = source * CAPACITY + token
        named = (token < longest)[:, None] & (choice < TOPK)
        ids, _ = arrived_words(
            as_words(own + IDS), tl.reshape(slot[:, None] * TOPK + choice, [BLOCK_TOKENS * width]),
            tl.reshape(named, [BLOCK_TOKENS * width]), tag, peers, status, rank, source, budget_ns, WORLD, ABORT,
        )  # fmt: skip
        ids = tl.reshape(ids, [BLOCK_TOKENS, width])
        target = tl.where(named & (ids >= 0), ids // EXPERTS, -1)
        after, before, _ = chain(target, token, source, rank, WORLD)
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
def _as_sent(values, FP8: tl.constexpr):
    """Return bfloat16 rows in the buffers' format; for fp8 also the scale of each row of 128 values, float32."""
    if FP8:
        largest = tl.max(tl.abs(values.to(tl.float32)), 1)
        scale = tl.where(largest > 0, largest * (1.0 / 448.0), 1.0)
        values = (values.to(tl.float32) * (1.0 / scale)[:, None]).to(tl.float8e4nv)
    else:
        scale = tl.zeros((values.shape[0],), tl.float32)
    return values, scale


@triton.jit
def _store_tile(
    base, values, scale, slot, group, column, wanted, HIDDEN: tl.constexpr, HIDDEN_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Store a tile of rows, see `_as_sent`, at its slots of the buffer at `base`."""
    keep = wanted[:, None] & (column < HIDDEN)
    at = slot[:, None] * HIDDEN_STRIDE + column
    if FP8:
        rows = tl.multiple_of((base + ROWS).to(tl.pointer_type(tl.float8e4nv)), 16)
        tl.store(rows + at, values, keep)
        scales = tl.multiple_of((base + SCALES).to(tl.pointer_type(tl.float32)), 16)
        tl.store(scales + slot * GROUPS + group, scale, wanted & (group < GROUPS))
    else:
        rows = tl.multiple_of((base + ROWS).to(tl.pointer_type(tl.bfloat16)), 16)
        tl.store(rows + at, values, keep)


@triton.jit
def _push_words(
    hidden_states, num_tokens, tag, peers, own, rank, first, WORLD: tl.constexpr, CAPACITY: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WORD_TOKENS: tl.constexpr, ROW_WORDS: tl.constexpr,
    ROWS: tl.constexpr, SCALES: tl.constexpr, ROWS_AS_WORDS: tl.constexpr,
):  # fmt: skip
    """Store few tokens' rows, each followed by its scales, as words into every rank, without reading the routing."""
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    width: tl.constexpr = 128 if FP8 else BLOCK_COLUMNS  # in fp8 a tile's row is one scale group
    rows: tl.constexpr = BLOCK_COLUMNS // width
    values_per_word: tl.constexpr = 4 if FP8 else 2
    row_end: tl.constexpr = HIDDEN_STRIDE // values_per_word
    for task in range(first, num_tokens * column_blocks, BLOCKS):
        token = task // column_blocks
        group = (task % column_blocks) * rows + tl.arange(0, rows)
        column = group[:, None] * width + tl.arange(0, width)[None, :]
        values = tl.load(hidden_states + token * HIDDEN + column, column < HIDDEN, other=0.0)
        sent, scale = _as_sent(values, FP8)
        words = pack_fp8(sent, tag) if FP8 else pack_row(sent, tag)
        pair = group[:, None] * (width // values_per_word) + tl.arange(0, width // values_per_word)[None, :]
        at = (rank * WORD_TOKENS + token) * ROW_WORDS
        for i in range(1, WORLD):
            inbox = as_words(tl.load(peers + (rank + i) % WORLD) + ROWS_AS_WORDS, 16)
            tl.store(inbox + at + pair, words, pair < row_end)
            if FP8:
                bits = scale.to(tl.int32, bitcast=True).to(tl.int64) & PAYLOAD_MASK
                tl.store(inbox + at + row_end + group, (tag << 32) | bits, group < GROUPS)
        slot = rank * CAPACITY + token + tl.zeros((rows,), tl.int32)
        _store_tile(
            own, sent, scale, slot, group, column, slot >= 0, HIDDEN, HIDDEN_STRIDE, GROUPS, FP8, ROWS, SCALES
        )  # fmt: skip


@triton.jit
def _receive_words(
    count, tag, peers, status, own, rank, source, first, budget_ns, WORLD: tl.constexpr, CAPACITY: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WORD_TOKENS: tl.constexpr, ROW_WORDS: tl.constexpr,
    ROWS: tl.constexpr, SCALES: tl.constexpr, ROWS_AS_WORDS: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """Wait for the words of `source`'s rows, and store the rows where rows sent without words arrive."""
    column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    groups: tl.constexpr = BLOCK_COLUMNS // 128 if FP8 else 0  # of one tile
    values_per_word: tl.constexpr = 4 if FP8 else 2
    row_end: tl.constexpr = HIDDEN_STRIDE // values_per_word
    pairs: tl.constexpr = BLOCK_COLUMNS // values_per_word
    lane = tl.arange(0, BLOCK_COLUMNS // 2)  # in fp8 the upper half holds the scales
    words = as_words(own + ROWS_AS_WORDS, 16)
    row_words = tl.multiple_of((own + ROWS).to(tl.pointer_type(tl.int32)), 16)
    for task in range(first, count * column_blocks, BLOCKS):
        token = task // column_blocks
        pair = (task % column_blocks) * pairs + lane
        of_row = (lane < pairs) & (pair < row_end)
        group = (task % column_blocks) * groups + lane - pairs
        of_scales = (lane >= pairs) & (lane < pairs + groups) & (group < GROUPS)
        at = (source * WORD_TOKENS + token) * ROW_WORDS + tl.where(lane < pairs, pair, row_end + group)
        payload, _ = arrived_words(
            words, at, of_row | of_scales, tag, peers, status, rank, source, budget_ns, WORLD, ABORT
        )
        slot = source * CAPACITY + token
        tl.store(row_words + slot * row_end + pair, payload, of_row)
        if FP8:
            scales = tl.multiple_of((own + SCALES).to(tl.pointer_type(tl.int32)), 16)
            tl.store(scales + slot * GROUPS + group, payload, of_scales)


@triton.jit
def _push_rows(
    hidden_states, topk_ids, num_tokens, peers, rank, first, end, stride, WORLD: tl.constexpr,
    CAPACITY: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr, EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_STRIDE: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr,
    CHAINED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """Store each token's row once into every rank that holds one of its experts; `CHAINED`: the chain's first."""
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
            after, _, _ = chain(target, token, rank, rank, WORLD)
        sent, scale = _as_sent(values, FP8)
        for i in range(WORLD):
            peer = (rank + 1 + i) % WORLD
            base = tl.load(peers + peer)
            wanted = tl.max((target == peer).to(tl.int32), 1) > 0
            if CHAINED:
                wanted = tl.where(peer == rank, wanted, after == peer)
            _store_tile(
                base, sent, scale, slot, group, column, wanted, HIDDEN, HIDDEN_STRIDE, GROUPS, FP8, ROWS, SCALES
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["max_tokens", "rank", "budget_ns"],
    do_not_specialize_on_alignment=["topk_ids", "topk_weights", "num_tokens_cell"],
)
def dispatch_kernel(
    hidden_states, topk_ids, topk_weights, num_tokens_cell, peers, cells, counts, gather_index, pair_weights,
    tokens_per_expert, expert_offsets, inverse, scratch, status, max_tokens, rank, budget_ns, WORLD: tl.constexpr,
    WORLD_POW2: tl.constexpr, CAPACITY: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr, ORDER_BLOCKS: tl.constexpr,
    PUSH_BLOCKS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SKEW_TOKENS: tl.constexpr,
    CHAIN_ROUND: tl.constexpr, COPIES_POW2: tl.constexpr, WORD_TOKENS: tl.constexpr, ROW_WORDS: tl.constexpr,
    TINY_TILE: tl.constexpr, TILES: tl.constexpr, SLICE: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    SCALES: tl.constexpr, ROWS_AS_WORDS: tl.constexpr, IDS: tl.constexpr, WEIGHTS: tl.constexpr,
    COUNTS: tl.constexpr, FLAGS: tl.constexpr, ABORT: tl.constexpr,
):  # fmt: skip
    """Send tokens to their experts' ranks; at its end all rows have arrived and the experts' order is ready.

    The first `ORDER_BLOCKS` blocks exchange the routing and make the order; the other blocks push rows. All blocks
    must be resident at once. Blocks of equal number walk through the turns of a skewed rank's chains together: in turn
    k the source pushes its round k, and the ranks at place s of a chain pass on round k - s.
    """
    block = tl.program_id(0)
    own = tl.load(peers + rank)
    if PDL:
        # The launch may begin while the previous kernel is ending; nothing above this line reads its results.
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(cells)
    tag = tag_of(epoch)
    asked = tl.load(num_tokens_cell)
    num_tokens = tl.minimum(asked, max_tokens)
    blocks: tl.constexpr = ORDER_BLOCKS + PUSH_BLOCKS
    source = tl.arange(0, WORLD_POW2)
    want = (epoch << COUNT_BITS) + tl.zeros((WORLD_POW2,), tl.int64)
    if block < ORDER_BLOCKS:
        _send_routing(
            topk_ids, topk_weights, num_tokens, epoch, tag, peers, rank, block, WORLD, CAPACITY, TOPK, ORDER_BLOCKS,
            blocks, COPIES_POW2, PAIRS, IDS, WEIGHTS, COUNTS,
        )  # fmt: skip
        arrived = arrived_counts(
            own + COUNTS + block * 8, blocks * 8, want, peers, status, rank, budget_ns, WORLD, WORLD_POW2, CAPACITY,
            ABORT,
        )  # fmt: skip
        if block == 0:
            tl.store(cells + 1, epoch)
            tl.store(counts + source, arrived)
            if (asked > max_tokens) & (asked != ALL_TOKENS):
                report(peers, status, rank, 2, rank, WORLD, ABORT)
        limits = arrived * TOPK
        most = tl.max(limits, 0)
        if most <= TINY_TILE * 2 ** (TILES - 1):
            for i in tl.static_range(TILES):
                fits = (most <= TINY_TILE * 2**i) & ((most > TINY_TILE * 2**i // 2) | (i == 0))
                if fits & (block < EXPERTS):  # further blocks would only poll
                    order_one_tile(
                        own, limits, tag, peers, status, rank, block, gather_index, pair_weights, tokens_per_expert,
                        expert_offsets, inverse, budget_ns, WORLD, WORLD_POW2, CAPACITY, TOPK, EXPERTS, ORDER_BLOCKS,
                        TINY_TILE * 2**i, PAIRS, IDS, WEIGHTS, ABORT,
                    )  # fmt: skip
        else:
            order_slices(
                own, limits, tag, peers, cells, status, rank, block, gather_index, pair_weights, tokens_per_expert,
                expert_offsets, inverse, scratch, budget_ns, WORLD, WORLD_POW2, CAPACITY, TOPK, EXPERTS,
                EXPERTS_POW2, ORDER_BLOCKS, SLICE, IDS, WEIGHTS, ABORT,
            )  # fmt: skip
    else:
        first = block - ORDER_BLOCKS
        column_blocks: tl.constexpr = (HIDDEN + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
        tiles = tl.cdiv(num_tokens, BLOCK_TOKENS) * column_blocks
        arrived = tl.zeros((WORLD_POW2,), tl.int32)
        skewed = tl.full((), -1, tl.int32)
        turns = tl.full((), 0, tl.int32)
        if WORLD > 2:
            # A rank that may be the skewed one reads the counts before it pushes; all other ranks afterwards.
            if num_tokens >= SKEW_TOKENS:
                arrived = arrived_counts(
                    own + COUNTS + block * 8, blocks * 8, want, peers, status, rank, budget_ns, WORLD, WORLD_POW2,
                    CAPACITY, ABORT,
                )  # fmt: skip
            skewed = skewed_rank(arrived, SKEW_TOKENS, WORLD_POW2)
        if skewed != rank:
            if (num_tokens <= WORD_TOKENS) & (WORLD > 1):
                _push_words(
                    hidden_states, num_tokens, tag, peers, own, rank, first_task(first, rank, WORLD, PUSH_BLOCKS),
                    WORLD, CAPACITY, HIDDEN, HIDDEN_STRIDE, GROUPS, FP8, PUSH_BLOCKS, BLOCK_COLUMNS, WORD_TOKENS,
                    ROW_WORDS, ROWS, SCALES, ROWS_AS_WORDS,
                )  # fmt: skip
            else:
                _push_rows(
                    hidden_states, topk_ids, num_tokens, peers, rank, first, tiles, PUSH_BLOCKS, WORLD, CAPACITY, TOPK,
                    TOPK_POW2, EXPERTS, HIDDEN, HIDDEN_STRIDE, GROUPS, FP8, False, BLOCK_TOKENS, BLOCK_COLUMNS, ROWS,
                    SCALES,
                )  # fmt: skip
        if WORLD > 2:
            if num_tokens < SKEW_TOKENS:
                arrived = arrived_counts(
                    own + COUNTS + block * 8, blocks * 8, want, peers, status, rank, budget_ns, WORLD, WORLD_POW2,
                    CAPACITY, ABORT,
                )  # fmt: skip
                skewed = skewed_rank(arrived, SKEW_TOKENS, WORLD_POW2)
            longest = tl.max(arrived, 0)
            tasks = tl.cdiv(longest, BLOCK_TOKENS) * column_blocks
            rounds = tl.cdiv(tl.cdiv(tl.maximum(tasks - first, 0), PUSH_BLOCKS), CHAIN_ROUND)
            turns = tl.where((skewed >= 0) & (rounds > 0), rounds + WORLD - 2, 0)
            for turn in range(turns):
                begin = first + turn * CHAIN_ROUND * PUSH_BLOCKS
                if rank == skewed:
                    _push_rows(
                        hidden_states, topk_ids, num_tokens, peers, rank, begin,
                        tl.minimum(tasks, begin + CHAIN_ROUND * PUSH_BLOCKS), PUSH_BLOCKS, WORLD, CAPACITY, TOPK,
                        TOPK_POW2, EXPERTS, HIDDEN, HIDDEN_STRIDE, GROUPS, FP8, True, BLOCK_TOKENS, BLOCK_COLUMNS,
                        ROWS, SCALES,
                    )  # fmt: skip
                else:
                    if turn > 0:
                        wait_at_least(
                            own + FLAGS + first * 8, PUSH_BLOCKS * 8, want + turn, 0, peers, status, rank, budget_ns,
                            WORLD, WORLD_POW2, ABORT,
                        )  # fmt: skip
                    for stage in range(1, tl.minimum(turn, WORLD - 2) + 1):
                        begin = first + (turn - stage) * CHAIN_ROUND * PUSH_BLOCKS
                        _forward_rows(
                            own, tag, longest, peers, status, rank, skewed, stage, begin,
                            tl.minimum(tasks, begin + CHAIN_ROUND * PUSH_BLOCKS), PUSH_BLOCKS, budget_ns, WORLD,
                            CAPACITY, TOPK, EXPERTS, HIDDEN, HIDDEN_STRIDE, GROUPS, FP8, BLOCK_TOKENS, BLOCK_COLUMNS,
                            ROWS, SCALES, IDS, ABORT,
                        )  # fmt: skip
                raise_flags(peers, rank, FLAGS, first, (epoch << COUNT_BITS) + turn + 1, WORLD, PUSH_BLOCKS)
        if WORLD > 1:
            if (num_tokens > WORD_TOKENS) & (turns == 0):
                raise_flags(peers, rank, FLAGS, first, (epoch << COUNT_BITS) + 1, WORLD, PUSH_BLOCKS)
            if WORLD == 2:
                arrived = arrived_counts(
                    own + COUNTS + block * 8, blocks * 8, want, peers, status, rank, budget_ns, WORLD, WORLD_POW2,
                    CAPACITY, ABORT,
                )  # fmt: skip
            for i in range(1, WORLD):
                peer = (rank + i) % WORLD
                count = tl.sum(tl.where(source == peer, arrived, 0), 0)
                if count <= WORD_TOKENS:
                    _receive_words(
                        count, tag, peers, status, own, rank, peer, first_task(first, peer, WORLD, PUSH_BLOCKS),
                        budget_ns, WORLD, CAPACITY, HIDDEN, HIDDEN_STRIDE, GROUPS, FP8, PUSH_BLOCKS, BLOCK_COLUMNS,
                        WORD_TOKENS, ROW_WORDS, ROWS, SCALES, ROWS_AS_WORDS, ABORT,
                    )  # fmt: skip
            flags = tl.where(turns > 0, want + turns, tl.where(arrived > WORD_TOKENS, want + 1, 0))
            wait_at_least(
                own + FLAGS + first * 8, PUSH_BLOCKS * 8, flags, 0, peers, status, rank, budget_ns, WORLD, WORLD_POW2,
                ABORT,
            )  # fmt: skip
