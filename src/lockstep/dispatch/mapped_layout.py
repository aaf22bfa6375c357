"""How the one-sided kernels are cut into blocks and tiles, and where what they exchange lies in the mapped buffers.

Pure arithmetic that every rank does alike: each writes into its peers' buffers by its own layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

FP8_GROUP = 128
"""Values that share one scale in fp8 rows."""


@dataclass(frozen=True)
class LaunchSizes:
    """How the kernels are cut into blocks and tiles; equal on all ranks.

    All blocks of a launch wait for peers, so all must be resident at once: two per multiprocessor at most.

    Attributes:
        order_blocks, push_blocks: of the dispatch kernel.
        combine_blocks: of the combine kernel.
        dispatch_tokens, combine_tokens, columns: of a tile; powers of two.
        tiny_tile, tiles: how many routing words per source the plan holds in registers at once: `tiny_tile`, a power of
            two, or twice as many, and so on, `tiles` sizes in all. Beyond the largest it goes by slices.
        word_tokens: most tokens of a rank whose rows travel as words that prove their own arrival: twice the bytes, but
            no flag behind a fence. For rows in fp8, which have half the bytes, twice as many.
        slice: routing words that a block of a larger plan counts at a time; a power of two, at most 256.
        pairs: routing words that a block sends at a time; a power of two.
        round: most tiles that a combine block pushes to each peer between two flags.
        skew_tokens: from how many tokens on the rows of one rank are passed on from peer to peer, if no other rank has
            more than half as many; of three ranks or more.
        chain_round: tiles of such a rank that a block handles between two flags.
    """

    order_blocks: int
    push_blocks: int
    combine_blocks: int
    dispatch_tokens: int
    combine_tokens: int
    columns: int
    tiny_tile: int
    tiles: int
    word_tokens: int
    slice: int = 256
    pairs: int = 256
    round: int = 4
    skew_tokens: int = 1024
    chain_round: int = 2


def launch_sizes(
    num_multiprocessors: int, num_ranks: int, num_local_experts: int, hidden_size: int, max_tokens_per_rank: int
) -> LaunchSizes:
    """Return the launch sizes that were measured to be best on H200 (docs/gpu.md).

    Example:
        >>> launch_sizes(132, 2, 128, 7168, 4096).push_blocks
        136
    """
    resident = 2 * num_multiprocessors
    columns = min(1024, max(FP8_GROUP, triton.next_power_of_2(hidden_size)))
    dispatch_tokens = min(16, 8192 // columns)
    combine_tokens = min(8, 4096 // columns)
    ranks = triton.next_power_of_2(num_ranks)
    # Few pairs are planned by a block per expert, many by a block per slice of them.
    order_blocks = min(max(num_local_experts, num_ranks * max_tokens_per_rank // 32), num_multiprocessors)
    column_blocks = -(-hidden_size // columns)
    return LaunchSizes(
        order_blocks=order_blocks,
        push_blocks=min(resident - order_blocks, -(-max_tokens_per_rank // dispatch_tokens) * column_blocks),
        combine_blocks=min(resident, -(-max_tokens_per_rank // combine_tokens) * column_blocks),
        dispatch_tokens=dispatch_tokens,
        combine_tokens=combine_tokens,
        columns=columns,
        tiny_tile=256 // ranks,
        tiles=4,
        word_tokens=min(max_tokens_per_rank, 2**19 // (num_ranks * hidden_size)),
        skew_tokens=max(256, 2**22 // hidden_size),
    )


@dataclass(frozen=True)
class Layout:
    """Byte offsets of one channel's sections in the mapped buffer, each a multiple of 256; equal on all ranks.

    Attributes:
        rows, scales: received rows `[ranks, capacity, hidden_stride]`; those in fp8 have `[ranks, capacity, groups]`
            float32.
        rows_as_words: rows of few tokens, `[ranks, row_word_tokens, words_per_row]` int64: two bfloat16 or four fp8
            values in each, and one for each scale.
        returned, returned_as_words: partial sums that came back, `[ranks, capacity, hidden_stride]` bfloat16, or of few
            tokens `[ranks, word_tokens, hidden_stride / 2]` int64, two bfloat16 in each.
        ids, weights: routing words, `[ranks, capacity, top_k]` int64.
        counts: count words, a copy per block, `[ranks, blocks]` int64.
        dispatch_flags, combine_flags: `[ranks, push_blocks]` and `[ranks, combine_blocks]` int64.
        abort: one int64.
        nbytes: of one channel.
    """

    rows: int
    scales: int
    rows_as_words: int
    returned_as_words: int
    ids: int
    weights: int
    counts: int
    dispatch_flags: int
    combine_flags: int
    abort: int
    returned: int
    nbytes: int
    row_word_tokens: int
    words_per_row: int


def make_layout(
    num_ranks: int, capacity: int, top_k: int, hidden_stride: int, groups: int, fp8: bool, launch: LaunchSizes
) -> Layout:
    """Lay out one channel; see `Layout` for the sections."""
    slots = num_ranks * capacity
    row_word_tokens = launch.word_tokens
    if fp8:
        row_word_tokens = min(2 * row_word_tokens, capacity, launch.skew_tokens - 1)
    words_per_row = -(-(hidden_stride // 4 + groups) // 8) * 8 if fp8 else hidden_stride // 2
    sizes = {
        "ids": slots * top_k * 8,
        "weights": slots * top_k * 8,
        "counts": num_ranks * (launch.order_blocks + launch.push_blocks) * 8,
        "dispatch_flags": num_ranks * launch.push_blocks * 8,
        "combine_flags": num_ranks * launch.combine_blocks * 8,
        "abort": 8,
        "rows_as_words": num_ranks * row_word_tokens * words_per_row * 8,
        "returned_as_words": num_ranks * launch.word_tokens * (hidden_stride // 2) * 8,
        "scales": slots * groups * 4 if fp8 else 0,
        "rows": slots * hidden_stride * (1 if fp8 else 2),
        "returned": slots * hidden_stride * 2,
    }
    offsets: dict[str, int] = {}
    end = 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // 256) * 256
    return Layout(**offsets, nbytes=end, row_word_tokens=row_word_tokens, words_per_row=words_per_row)
