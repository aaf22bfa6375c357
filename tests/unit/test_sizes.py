from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep import ConfigurationError, TokenCountError
from lockstep.metadata.sizes import (
    INT32_MAX,
    MAX_RANKS,
    abridged,
    as_plain_int,
    check_counts,
    check_int,
    chunk_sizes,
    sp_rows,
    sp_sizes,
)

counts_of_ranks = st.lists(st.integers(0, 5000), min_size=1, max_size=16)
sp_of_ranks = st.integers(1, 9)


@pytest.mark.parametrize(
    ("counts", "sp", "sizes", "cumulative"),
    [
        ([5, 7], 2, (3, 3, 4, 4), (3, 6, 10, 14)),
        ([0, 5], 2, (0, 0, 3, 3), (0, 0, 3, 6)),
        ([1, 8], 4, (1, 1, 1, 1, 2, 2, 2, 2), (1, 2, 3, 4, 6, 8, 10, 12)),
        ([500, 200, 256], 1, (500, 200, 256), (500, 700, 956)),
        ([0], 3, (0, 0, 0), (0, 0, 0)),
        ([INT32_MAX], 2, (2**30, 2**30), (2**30, 2**31)),
    ],
)
def test_padded_sizes_and_their_running_sum(counts, sp, sizes, cumulative):
    assert sp_sizes(counts, sp) == list(sizes)
    assert tuple(accumulate(sizes)) == cumulative


def test_real_rows_leave_the_last_slices_shorter_or_empty():
    assert sp_rows([5], 2) == (3, 2)
    assert sp_rows([1, 8], 4) == (1, 0, 0, 0, 2, 2, 2, 2)
    assert sp_rows([9, 0], 4) == (3, 3, 3, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "limit", "chunks"),
    [
        ((500, 200, 256), 256, [(256, 200, 256), (244, 1, 1), (1, 1, 1)]),
        ((120, 80, 140, 100), 64, [(64, 64, 64, 64), (56, 16, 64, 36), (1, 1, 12, 1)]),
        ((0, 0, 150, 150), 100, [(1, 1, 100, 100), (1, 1, 50, 50), (1, 1, 1, 1)]),
    ],
)
def test_chunk_sizes_end_in_dummy_rows(sizes, limit, chunks):
    assert [chunk_sizes(sizes, limit, i) for i in range(len(chunks))] == chunks


def test_chunk_sizes_without_dummy_rows_end_in_zero():
    assert chunk_sizes((500, 200, 256), 256, 1, min_rows=0) == (244, 0, 0)
    assert chunk_sizes((500, 200, 256), 256, 10**30, min_rows=0) == (0, 0, 0)


@given(counts_of_ranks, sp_of_ranks)
def test_real_rows_add_up_to_the_counts_and_never_exceed_the_padded(counts, sp):
    real, padded = sp_rows(counts, sp), sp_sizes(counts, sp)
    assert [sum(real[i * sp : (i + 1) * sp]) for i in range(len(counts))] == counts
    assert all(0 <= row <= size for row, size in zip(real, padded, strict=True))
    assert all(size * sp - count < sp for size, count in zip(padded[::sp], counts, strict=True))


@given(counts_of_ranks, st.integers(1, 6000), st.integers(0, 1))
def test_chunks_cover_every_row_once(sizes, limit, min_rows):
    chunks = [chunk_sizes(sizes, limit, i, min_rows=0) for i in range(-(-max(sizes) // limit))]
    assert [sum(rows) for rows in zip(*chunks, strict=True)] == (sizes if chunks else [])
    assert not any(chunk_sizes(sizes, limit, len(chunks), min_rows=0))
    assert all(min_rows <= size <= limit for size in chunk_sizes(sizes, limit, 1, min_rows))


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), np.array(5)])
def test_integers_of_any_kind_become_plain(value):
    assert type(as_plain_int(value)) is int
    assert as_plain_int(value) == 5


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), 5.0, "5", None, [5], np.array([5, 6])])
def test_what_is_no_integer_is_refused(value):
    assert as_plain_int(value) is None
    with pytest.raises(ConfigurationError, match="max_chunk_size must be an integer, got "):
        check_int("max_chunk_size", value)


def test_limits_are_named():
    with pytest.raises(ConfigurationError, match=r"^sp must be >= 1, got 0$"):
        check_int("sp", 0, 1)
    with pytest.raises(ConfigurationError, match=r"^sp must be <= 2147483647, got 2147483648$"):
        check_int("sp", 2**31)
    with pytest.raises(ConfigurationError, match=r"2 DP ranks must be <= 1048576 ranks, got 2097152"):
        sp_sizes([1, 2], MAX_RANKS)
    with pytest.raises(ConfigurationError, match=r"max_chunk_size_per_rank must be >= 1, got 0"):
        chunk_sizes((1,), 0, 0)
    with pytest.raises(ConfigurationError, match=r"chunk_idx must be >= 0, got -1"):
        chunk_sizes((1,), 1, -1)
    with pytest.raises(ConfigurationError, match=r"min_rows must be <= 1, got 2"):
        chunk_sizes((1,), 1, 0, min_rows=2)


@pytest.mark.parametrize("counts", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), [np.int32(1), 2]])
def test_counts_become_plain_integers(counts):
    checked = check_counts(counts)
    assert checked == (1, 2)
    assert [type(count) for count in checked] == [int, int]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([500, -3], "must be in 0..2147483647, got -3 on DP rank 1"),
        ([2**31, 1], "must be in 0..2147483647, got 2147483648 on DP rank 0"),
        ([1, 2, True], "must be integers, got True on DP rank 2"),
        ([1, 2.0], "must be integers, got 2.0 on DP rank 1"),
        (np.array([1.0, 2.0]), "must be integers, got 1.0 on DP rank 0"),
        (np.array([True, False]), "must be integers, got True on DP rank 0"),
        (np.array([[1, 2]]), r"must be integers, got \[1, 2\] on DP rank 0"),
        (["1"], "must be integers, got '1' on DP rank 0"),
        ("12", "must be a sequence of integers, one per DP rank, got '12'"),
        (5, "must be a sequence of integers, one per DP rank, got 5"),
        (None, "must be a sequence of integers, one per DP rank, got None"),
        ({1, 2}, "must be a sequence of integers, one per DP rank, got {1, 2}"),
        ([], "must have one entry per DP rank, got none"),
    ],
)
def test_wrong_counts_name_value_and_rank(counts, message):
    with pytest.raises(TokenCountError, match=f"^num_tokens_across_dp {message}"):
        check_counts(counts)


def test_long_lists_are_abridged_to_one_line():
    assert abridged([1, 2]) == "[1, 2]"
    assert abridged(range(1024), most=4) == "[0, 1, ..., 1022, 1023] (1024 entries)"
