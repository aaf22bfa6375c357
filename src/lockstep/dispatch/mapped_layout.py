"""Blocks and tiles of the one-sided kernels, and the layout of the memory they exchange; equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import triton

FP8_GROUP = 128  # values that share one scale in fp8 rows


@dataclass(frozen=True)
class LaunchSizes:
    """Blocks and tiles of the kernels; equal on all ranks.

    All blocks of a launch wait for peers, so all must be resident at once: at most two per multiprocessor.
    """

    order_blocks: int  # of the dispatch kernel, as `push_blocks`
    push_blocks: int
    combine_blocks: int
    dispatch_tokens: int  # tokens of a dispatch tile; like the next two, a power of two
    combine_tokens: int
    columns: int
    tiny_tile: int  # smallest number of routing words per source that the order holds in registers; a power of two
    tiles: int  # number of such sizes, each twice the one before; larger orders are made by slices
    word_tokens: int  # maximum tokens per rank to send rows as words; twice as many in fp8, whose rows are half as long
    slice: int = 256  # routing words that a block of a larger order counts at a time; a power of two, at most 256
    pairs: int = 256  # routing words that a block sends at a time; a power of two
    round: int = 4  # maximum tiles that a combine block pushes to each peer between two flags
    skew_tokens: int = 1024  # with this many tokens, twice any other rank's, peers pass a rank's rows on to each other
    chain_round: int = 2  # tiles of such a rank that a block handles between two flags


def launch_sizes(
    num_multiprocessors: int, num_ranks: int, num_local_experts: int, hidden_size: int, max_tokens_per_rank: int
) -> LaunchSizes:
    """Return the launch sizes measured to be best on H200 (docs/benchmarks/gpu.md)."""
    resident = 2 * num_multiprocessors
    columns = min(1024, max(FP8_GROUP, triton.next_power_of_2(hidden_size)))
    dispatch_tokens = min(16, 8192 // columns)
    combine_tokens = min(8, 4096 // columns)
    ranks = triton.next_power_of_2(num_ranks)
    # Few pairs are ordered by one block per expert, many by one block per slice of pairs.
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


def make_layout(
    num_ranks: int, capacity: int, top_k: int, hidden_stride: int, groups: int, fp8: bool, launch: LaunchSizes
) -> SimpleNamespace:
    """Return the byte offsets of the mapped sections, multiples of 256; words hold `row_word_tokens` rows of a rank."""
    slots = num_ranks * capacity
    row_word_tokens = launch.word_tokens
    if fp8:
        row_word_tokens = min(2 * row_word_tokens, capacity, launch.skew_tokens - 1)
    words_per_row = -(-(hidden_stride // 4 + groups) // 8) * 8 if fp8 else hidden_stride // 2
    sizes = {
        "ids": slots * top_k * 8,  # routing words, `[ranks, capacity, top_k]` int64
        "weights": slots * top_k * 8,
        "counts": num_ranks * (launch.order_blocks + launch.push_blocks) * 8,  # count words, a copy per block
        "dispatch_flags": num_ranks * launch.push_blocks * 8,
        "combine_flags": num_ranks * launch.combine_blocks * 8,
        "abort": 8,
        # Two bfloat16 or four fp8 values per int64, and one int64 per scale.
        "rows_as_words": num_ranks * row_word_tokens * words_per_row * 8,
        "returned_as_words": num_ranks * launch.word_tokens * (hidden_stride // 2) * 8,
        "scales": slots * groups * 4 if fp8 else 0,
        "rows": slots * hidden_stride * (1 if fp8 else 2),  # `[ranks, capacity, hidden_stride]`
        "returned": slots * hidden_stride * 2,  # partial sums that came back, bfloat16
    }
    offsets = SimpleNamespace(row_word_tokens=row_word_tokens, words_per_row=words_per_row, nbytes=0)
    for name, size in sizes.items():
        setattr(offsets, name, offsets.nbytes)
        offsets.nbytes += -(-size // 256) * 256
    return offsets
