# mypy: disable-error-code="no-untyped-def"
"""Attention over paged keys and values in Triton: a step's decode rows in one launch, and prompts.

The tiles of all decode rows form one line, of which each program of a fixed grid takes an equal share, however uneven
the requests are (stream-K, https://arxiv.org/abs/2301.03598). Where a share's border cuts a row, the program that
arrives last merges the pieces. Both kernels follow FlashAttention's running softmax (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def write_kernel(
    key, value, key_pages, value_pages, slots, key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    key_page_stride, value_page_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, HEADS_PAD: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copy one row's keys and values of all heads to its slot; a negative slot writes nothing."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        page, offset = slot // PAGE, slot % PAGE
        heads = tl.arange(0, HEADS_PAD)[:, None]
        dims = tl.arange(0, HEAD_PAD)[None, :]
        mask = (heads < KV_HEADS) & (dims < HEAD_DIM)
        values = tl.load(key + row * key_row_stride + heads * key_head_stride + dims, mask)
        at = page * key_page_stride + (offset * KV_HEADS + heads) * HEAD_DIM + dims
        tl.store(key_pages + at, values.to(key_pages.dtype.element_ty), mask)
        dims = tl.arange(0, VALUE_PAD)[None, :]
        mask = (heads < KV_HEADS) & (dims < VALUE_DIM)
        values = tl.load(value + row * value_row_stride + heads * value_head_stride + dims, mask)
        at = page * value_page_stride + (offset * KV_HEADS + heads) * VALUE_DIM + dims
        tl.store(value_pages + at, values.to(value_pages.dtype.element_ty), mask)


@triton.jit
def _attend_tile(
    q, peak, weight, total, key_pages, value_pages, key_at, value_at, seen_keys, seen, scaling, softcap,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys of one page into the running softmax: `peak` (base 2), `weight` and `total` per query row.

    Keys that no query row sees are never read: what their memory holds, NaN perhaps, has no effect.
    """
    dims = tl.arange(0, HEAD_PAD)[None, :]
    value_dims = tl.arange(0, VALUE_PAD)[None, :]
    if MASKED:
        k = tl.load(key_pages + key_at[:, None] + dims, seen_keys[:, None] & (dims < HEAD_DIM), other=0.0)
        v = tl.load(
            value_pages + value_at[:, None] + value_dims, seen_keys[:, None] & (value_dims < VALUE_DIM), other=0.0
        )
    else:
        if HEAD_DIM == HEAD_PAD:
            k = tl.load(key_pages + key_at[:, None] + dims)
        else:
            k = tl.load(key_pages + key_at[:, None] + dims, dims < HEAD_DIM, other=0.0)
        if VALUE_DIM == VALUE_PAD:
            v = tl.load(value_pages + value_at[:, None] + value_dims)
        else:
            v = tl.load(value_pages + value_at[:, None] + value_dims, value_dims < VALUE_DIM, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
        scores = (2 * tl.sigmoid(scores * (2 * scaling / softcap)) - 1) * (softcap * _LOG2_E)
    else:
        scores = scores * (scaling * _LOG2_E)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A query row that has seen no key so far, its window begins later: exp2(-inf - 0) = 0, never -inf - -inf.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if GUARDED else new_peak
    p = tl.math.exp2(scores - base[:, None])
    decay = tl.math.exp2(peak - base)
    weight = weight * decay + tl.sum(p, 1)
    total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision="ieee")
    return new_peak, weight, total


@triton.jit
def _normalise(peak, weight, total, sinks, heads, in_group, HAS_SINKS: tl.constexpr):
    """Divide by the softmax's sum, sinks included; rows without keys become zeros."""
    if HAS_SINKS:
        sink = tl.load(sinks + heads, in_group, other=0.0).to(tl.float32) * _LOG2_E
        top = tl.maximum(peak, sink)
        decay = tl.math.exp2(peak - top)
        weight = weight * decay + tl.math.exp2(sink - top)
        total = total * decay[:, None]
    return total / tl.where(weight == 0.0, 1.0, weight)[:, None]


@triton.jit
def _store_result(
    output, sinks, peak, weight, total, row, head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Write the query heads of one row and key head."""
    group = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, VALUE_PAD)
    heads = head * GROUP + group
    result = _normalise(peak, weight, total, sinks, heads, group < GROUP, HAS_SINKS)
    at = (row.to(tl.int64) * (KV_HEADS * GROUP) + heads)[:, None] * VALUE_DIM + dims[None, :]
    tl.store(output + at, result.to(output.dtype.element_ty), (group < GROUP)[:, None] & (dims < VALUE_DIM)[None, :])


@triton.jit
def _load_piece(
    partials, stats, head_start, share, number, pieces,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, GROUP_ROWS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Return one program's piece of a row and key head: peak, weight, total. An absent piece weighs nothing."""
    program = head_start // share + number
    slot = (2 * program + (head_start > program * share).to(tl.int32)).to(tl.int64)
    group = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, VALUE_PAD)
    inside = tl.full((GROUP_ROWS,), 1, tl.int1) & (number < pieces)
    at = 2 * slot * GROUP_PAD + group
    # From L2 (.cg): other multiprocessors wrote these words during this launch.
    peak = tl.load(stats + at, inside, other=float("-inf"), cache_modifier=".cg")
    weight = tl.load(stats + at + GROUP_PAD, inside, other=0.0, cache_modifier=".cg")
    total = tl.load(
        partials + (slot * GROUP_PAD + group)[:, None] * VALUE_DIM + dims[None, :],
        (inside & (group < GROUP))[:, None] & (dims < VALUE_DIM)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    return peak, weight, total


@triton.jit
def _add_piece(peak, weight, total, other_peak, other_weight, other_total):
    """Merge two pieces of which the first has seen a key, so that its peak is finite."""
    new_peak = tl.maximum(peak, other_peak)
    decay, other_decay = tl.math.exp2(peak - new_peak), tl.math.exp2(other_peak - new_peak)
    total = total * decay[:, None] + other_total * other_decay[:, None]
    return new_peak, weight * decay + other_weight * other_decay, total


@triton.jit
def _merge(
    partials, stats, head_start, share, pieces,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, GROUP_ROWS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one row and key head in their order, whichever came last: the same bits every time."""
    peak, weight, total = _load_piece(
        partials, stats, head_start, share, 0, pieces, GROUP, GROUP_PAD, GROUP_ROWS, VALUE_DIM, VALUE_PAD
    )
    for number in range(1, pieces, 4):  # four at a time: their loads are in flight together
        peak0, weight0, total0 = _load_piece(
            partials, stats, head_start, share, number, pieces, GROUP, GROUP_PAD, GROUP_ROWS, VALUE_DIM, VALUE_PAD
        )
        peak1, weight1, total1 = _load_piece(
            partials, stats, head_start, share, number + 1, pieces, GROUP, GROUP_PAD, GROUP_ROWS, VALUE_DIM, VALUE_PAD
        )
        peak2, weight2, total2 = _load_piece(
            partials, stats, head_start, share, number + 2, pieces, GROUP, GROUP_PAD, GROUP_ROWS, VALUE_DIM, VALUE_PAD
        )
        peak3, weight3, total3 = _load_piece(
            partials, stats, head_start, share, number + 3, pieces, GROUP, GROUP_PAD, GROUP_ROWS, VALUE_DIM, VALUE_PAD
        )
        peak, weight, total = _add_piece(peak, weight, total, peak0, weight0, total0)
        peak, weight, total = _add_piece(peak, weight, total, peak1, weight1, total1)
        peak, weight, total = _add_piece(peak, weight, total, peak2, weight2, total2)
        peak, weight, total = _add_piece(peak, weight, total, peak3, weight3, total3)
    return peak, weight, total


@triton.jit(do_not_specialize=["num_rows", "max_pages", "window"])
def decode_kernel(
    query, key_pages, value_pages, block_table, row_seqs, lengths, sinks, output, partials, stats, arrivals, num_rows,
    max_pages, window, query_row_stride, query_head_stride, key_page_stride, value_page_stride, scaling, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, MAX_PIECES: tl.constexpr, STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
    TABLES_READY: tl.constexpr,
):  # fmt: skip
    """Attend with rows of one token each. Tiles are counted in the order (row, key head, keys).

    Program `p` takes the tiles `p * share .. (p + 1) * share`. Of the row and key head that it begins with, and of the
    one that it ends with, it may have only a piece; such pieces go to its slots `2 p` and `2 p + 1`.
    """
    if PDL and not TABLES_READY:
        gdc_wait()
    # The same arithmetic in every program: who takes what needs no second launch.
    rows = tl.arange(0, ROWS)
    in_rows = rows < num_rows
    all_lengths = tl.load(lengths + rows, in_rows, other=0)
    all_lengths = tl.where(tl.load(row_seqs + rows, in_rows, other=-1) < 0, 0, all_lengths)
    tiles = tl.cdiv(all_lengths, TILE)
    if HAS_WINDOW:
        tiles -= tl.maximum(all_lengths - window, 0) // TILE
    tiles = tl.where(in_rows, tl.maximum(tiles, 1), 0)  # a row without keys has one empty tile, for its zeros
    ends = tl.cumsum(tiles, 0) * KV_HEADS
    num_units = tl.sum(tiles, 0) * KV_HEADS
    share = tl.maximum(tl.cdiv(num_units, tl.num_programs(0)), tl.cdiv(tl.max(tiles, 0), MAX_PIECES))
    program = tl.program_id(0)
    first_unit = program * share
    unit = first_unit
    stop = tl.minimum(first_unit + share, num_units)
    row = tl.sum((ends <= unit).to(tl.int32), 0)
    row_start = tl.max(tl.where(ends <= unit, ends, 0), 0)
    if PDL:
        if TABLES_READY:  # shares are found while the kernel before ends
            gdc_wait()
        gdc_launch_dependents()

    group = tl.arange(0, GROUP_PAD)
    in_group = group < GROUP
    dims = tl.arange(0, HEAD_PAD)
    value_dims = tl.arange(0, VALUE_PAD)
    while unit < stop:
        seq = tl.load(row_seqs + row)
        length = tl.where(seq < 0, 0, tl.load(lengths + row))
        first_key = tl.maximum(length - window, 0) if HAS_WINDOW else 0
        first_tile = first_key // TILE
        num_tiles = tl.maximum(tl.cdiv(length, TILE) - first_tile, 1)
        head = (unit - row_start) // num_tiles
        head_start = row_start + head * num_tiles
        head_stop = head_start + num_tiles
        piece_stop = tl.minimum(stop, head_stop)

        table = block_table + seq.to(tl.int64) * max_pages
        begin = (first_tile + unit - head_start) * TILE
        end = tl.minimum((first_tile + piece_stop - head_start) * TILE, length)
        page = tl.load(table + begin // PAGE, begin < end, other=0)
        heads = head * GROUP + group
        q = tl.load(
            query + row.to(tl.int64) * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
            in_group[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        peak = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
        weight = tl.zeros((GROUP_PAD,), tl.float32)
        total = tl.zeros((GROUP_PAD, VALUE_PAD), tl.float32)
        for n in tl.range(begin, end, TILE, num_stages=STAGES):
            # One tile ahead, so that no tile waits for its own page number.
            next_page = tl.load(table + (n + TILE) // PAGE, n + TILE < end, other=0)
            position = n + tl.arange(0, TILE)
            seen = position < length
            if HAS_WINDOW:
                seen = seen & (position >= first_key)
            entry = (n % PAGE + tl.arange(0, TILE)) * KV_HEADS + head
            peak, weight, total = _attend_tile(
                q, peak, weight, total, key_pages, value_pages, page.to(tl.int64) * key_page_stride + entry * HEAD_DIM,
                page.to(tl.int64) * value_page_stride + entry * VALUE_DIM, seen, seen[None, :], scaling, softcap,
                KV_HEADS, HEAD_DIM, HEAD_PAD, VALUE_DIM, VALUE_PAD, HAS_SOFTCAP, True, False,
            )  # fmt: skip
            page = next_page

        pieces = (head_stop - 1) // share - head_start // share + 1
        if pieces == 1:
            _store_result(
                output, sinks, peak, weight, total, row, head, KV_HEADS, GROUP, GROUP_PAD, VALUE_DIM, VALUE_PAD,
                HAS_SINKS,
            )  # fmt: skip
        else:
            slot = (2 * program + (head_start > first_unit).to(tl.int32)).to(tl.int64)
            tl.store(stats + 2 * slot * GROUP_PAD + group, peak)
            tl.store(stats + (2 * slot + 1) * GROUP_PAD + group, weight)
            tl.store(
                partials + (slot * GROUP_PAD + group)[:, None] * VALUE_DIM + value_dims[None, :],
                total,
                in_group[:, None] & (value_dims < VALUE_DIM)[None, :],
            )
            tl.debug_barrier()  # the stores of all threads, before one of them tells
            arrival = arrivals + row * KV_HEADS + head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == pieces - 1:
                tl.store(arrival, 0)  # for the next launch
                whole_peak, whole_weight, whole_total = _merge(
                    partials, stats, head_start, share, pieces, GROUP, GROUP_PAD, GROUP_ROWS, VALUE_DIM, VALUE_PAD
                )
                _store_result(
                    output, sinks, whole_peak, whole_weight, whole_total, row, head, KV_HEADS, GROUP, GROUP_ROWS,
                    VALUE_DIM, VALUE_PAD, HAS_SINKS,
                )  # fmt: skip
        unit = piece_stop
        row_stop = row_start + KV_HEADS * num_tiles
        row = tl.where(unit == row_stop, row + 1, row)
        row_start = tl.where(unit == row_stop, row_stop, row_start)


@triton.jit(do_not_specialize=["num_requests", "max_pages", "window"])
def prompt_kernel(
    query, key_pages, value_pages, block_table, seqs, cu_rows, lengths, sinks, output, num_requests, max_pages, window,
    query_row_stride, query_head_stride, key_page_stride, value_page_stride, scaling, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, REQUESTS: tl.constexpr,
    BLOCK_M: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Attend with the rows of several requests, causal at each request's end.

    A program has `BLOCK_M` query rows: the heads of one key head at consecutive positions of one request, so that short
    requests fill a tile as well. Blocks are numbered over the requests; the longest work, at the ends, goes first.
    """
    POSITIONS: tl.constexpr = BLOCK_M // GROUP_PAD
    requests = tl.arange(0, REQUESTS)
    in_requests = requests < num_requests
    starts = tl.load(cu_rows + requests, in_requests, other=0)
    blocks = tl.cdiv(tl.load(cu_rows + requests + 1, in_requests, other=0) - starts, POSITIONS)
    ends = tl.cumsum(blocks, 0)
    block = tl.sum(blocks, 0) - 1 - tl.program_id(0)
    if block >= 0:
        request = tl.sum((ends <= block).to(tl.int32), 0)
        first_local = (block - tl.max(tl.where(ends <= block, ends, 0), 0)) * POSITIONS
        start = tl.load(cu_rows + request)
        num_rows = tl.load(cu_rows + request + 1) - start
        past = tl.load(lengths + request) - num_rows
        table = block_table + tl.load(seqs + request).to(tl.int64) * max_pages
        head = tl.program_id(1)

        m = tl.arange(0, BLOCK_M)
        local = first_local + m // GROUP_PAD
        heads = head * GROUP + m % GROUP_PAD
        used = (local < num_rows) & (m % GROUP_PAD < GROUP)
        position = past + local
        dims = tl.arange(0, HEAD_PAD)
        q = tl.load(
            query
            + ((start + local).to(tl.int64) * query_row_stride + heads * query_head_stride)[:, None]
            + dims[None, :],
            used[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        total = tl.zeros((BLOCK_M, VALUE_PAD), tl.float32)
        lane = tl.arange(0, TILE)

        # Every query row of the block sees the keys up to its first position's: no masks there, unless by a window.
        first_position = past + first_local
        stop = past + tl.minimum(first_local + POSITIONS, num_rows)
        if HAS_WINDOW:
            whole = tl.maximum(first_position - window + 1, 0) // TILE * TILE
        else:
            whole = (first_position + 1) // TILE * TILE
            page = tl.load(table, whole > 0, other=0)
            for n in tl.range(0, whole, TILE, num_stages=STAGES):
                next_page = tl.load(table + (n + TILE) // PAGE, n + TILE < whole, other=0)
                entry = (n % PAGE + lane) * KV_HEADS + head
                peak, weight, total = _attend_tile(
                    q, peak, weight, total, key_pages, value_pages,
                    page.to(tl.int64) * key_page_stride + entry * HEAD_DIM,
                    page.to(tl.int64) * value_page_stride + entry * VALUE_DIM, used, used, scaling, softcap,
                    KV_HEADS, HEAD_DIM, HEAD_PAD, VALUE_DIM, VALUE_PAD, HAS_SOFTCAP, False, False,
                )  # fmt: skip
                page = next_page
        page = tl.load(table + whole // PAGE, whole < stop, other=0)
        for n in tl.range(whole, stop, TILE, num_stages=STAGES):
            next_page = tl.load(table + (n + TILE) // PAGE, n + TILE < stop, other=0)
            entry = (n % PAGE + lane) * KV_HEADS + head
            seen = (n + lane)[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen = seen & ((n + lane)[None, :] > position[:, None] - window)
            peak, weight, total = _attend_tile(
                q, peak, weight, total, key_pages, value_pages, page.to(tl.int64) * key_page_stride + entry * HEAD_DIM,
                page.to(tl.int64) * value_page_stride + entry * VALUE_DIM, n + lane < stop, seen, scaling, softcap,
                KV_HEADS, HEAD_DIM, HEAD_PAD, VALUE_DIM, VALUE_PAD, HAS_SOFTCAP, True, HAS_WINDOW,
            )  # fmt: skip
            page = next_page

        result = _normalise(peak, weight, total, sinks, heads, used, HAS_SINKS)
        value_dims = tl.arange(0, VALUE_PAD)
        at = ((start + local).to(tl.int64) * (KV_HEADS * GROUP) + heads)[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(output + at, result.to(output.dtype.element_ty), used[:, None] & (value_dims < VALUE_DIM)[None, :])
