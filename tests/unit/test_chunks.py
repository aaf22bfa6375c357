import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep import ChunkPlan, ConfigurationError, DPMetadata, TokenCountError
from lockstep.metadata.chunks import Chunk

counts_of_ranks = st.lists(st.integers(0, 400), min_size=1, max_size=6)
sp_of_ranks = st.integers(1, 5)
limits = st.one_of(st.none(), st.integers(1, 450))


def test_every_chunk_of_three_uneven_ranks():
    plan = ChunkPlan([500, 200, 256], max_chunk_size_per_rank=256, rank=1)
    assert list(plan) == [Chunk(0, (256, 200, 256), 0, 200), Chunk(1, (244, 0, 0), 200, 200)]
    assert len(plan) == 2
    assert plan[-1] == plan[1] == list(plan)[1]


def test_min_rows_shows_what_chunked_sizes_shows():
    plan = ChunkPlan([0, 300], 2, 100, rank=3, min_rows=1)
    assert [chunk.sizes for chunk in plan] == [(1, 1, 100, 100), (1, 1, 50, 50)]
    assert [(chunk.start, chunk.stop) for chunk in plan] == [(0, 100), (100, 150)]


def test_idle_rank_has_an_empty_span_in_every_chunk():
    assert [(chunk.start, chunk.stop) for chunk in ChunkPlan([0, 300], 1, 100)] == [(0, 0)] * 3


def test_a_step_without_tokens_has_no_chunks():
    for min_rows in (0, 1):
        plan = ChunkPlan([0, 0, 0], 2, 16, min_rows=min_rows)
        assert len(plan) == 0
        assert list(plan) == []


def test_without_limit_the_step_is_one_chunk():
    assert [chunk.sizes for chunk in ChunkPlan([5, 2], 2)] == [(3, 2, 1, 1)]


def test_sequence_parallel_slices_are_contiguous_and_leave_padding_out():
    plan = ChunkPlan([5, 1], sequence_parallel_size=2)
    assert [plan.sp_span(rank) for rank in range(4)] == [(0, 3), (3, 5), (0, 1), (1, 1)]


def test_numpy_counts_give_plain_integers():
    plan = ChunkPlan(np.array([3, 1]), np.int64(1), np.int64(2), np.int64(1))
    assert plan.num_tokens_across_dp == (3, 1)
    assert plan == ChunkPlan([3, 1], 1, 2, 1)
    assert {type(size) for chunk in plan for size in (*chunk.sizes, chunk.start, chunk.stop)} == {int}


def test_plans_are_values():
    plan = ChunkPlan([3, 1], 1, 2)
    assert plan == ChunkPlan((3, 1), max_chunk_size_per_rank=2)
    assert hash(plan) == hash(ChunkPlan((3, 1), max_chunk_size_per_rank=2))
    assert plan != ChunkPlan([3, 1], 1, 2, rank=1)
    assert plan != "plan"
    assert repr(plan) == (
        "ChunkPlan([3, 1], sequence_parallel_size=1, max_chunk_size_per_rank=2, rank=0, min_rows=0): 2 chunks"
    )


def test_a_plan_of_many_chunks_is_not_written_out():
    plan = ChunkPlan([2**31 - 1, 0], max_chunk_size_per_rank=1)
    assert len(plan) == 2**31 - 1
    assert plan[len(plan) - 1] == Chunk(2**31 - 2, (1, 0), 2**31 - 2, 2**31 - 1)


@given(counts_of_ranks, sp_of_ranks, limits)
def test_every_real_row_is_in_exactly_one_chunk(counts, sp, limit):
    plans = [ChunkPlan(counts, sp, limit, rank) for rank in range(len(counts) * sp)]
    for dp_rank, count in enumerate(counts):
        rows = []
        for plan in plans[dp_rank * sp : (dp_rank + 1) * sp]:
            offset, end = plan.sp_span(plan.rank)
            for chunk in plan:
                assert chunk.sizes[plan.rank] == chunk.stop - chunk.start
                rows += range(offset + chunk.start, offset + chunk.stop)
            assert not rows or rows[-1] < end or offset == end
        assert rows == list(range(count))


@given(counts_of_ranks, sp_of_ranks, limits, st.integers(0, 1))
def test_sizes_do_not_depend_on_the_rank_and_keep_the_limit(counts, sp, limit, min_rows):
    plans = [ChunkPlan(counts, sp, limit, rank, min_rows=min_rows) for rank in range(len(counts) * sp)]
    vectors = [[chunk.sizes for chunk in plan] for plan in plans]
    assert all(vector == vectors[0] for vector in vectors)
    assert all(min_rows <= size <= plans[0].max_chunk_size_per_rank for sizes in vectors[0] for size in sizes)
    assert all(chunk.stop - chunk.start <= chunk.sizes[plan.rank] for plan in plans for chunk in plan)
    assert all(any(chunk.stop > chunk.start for chunk in chunks) for chunks in zip(*plans, strict=True))


@given(counts_of_ranks, sp_of_ranks, st.integers(1, 450))
def test_metadata_shows_the_plan_with_dummy_rows(counts, sp, limit):
    metadata = DPMetadata(max(counts), counts)
    for chunk in ChunkPlan(counts, sp, limit, min_rows=1):
        with metadata.chunked_sizes(sp, limit, chunk.index) as sizes:
            assert sizes == list(chunk.sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_parallel_size": 0}, "sequence_parallel_size must be >= 1, got 0"),
        ({"max_chunk_size_per_rank": 0}, "max_chunk_size_per_rank must be >= 1, got 0"),
        ({"max_chunk_size_per_rank": 1.5}, "max_chunk_size_per_rank must be an integer, got 1.5"),
        ({"rank": 2}, "rank must be <= 1, got 2"),
        ({"rank": -1}, "rank must be >= 0, got -1"),
        ({"min_rows": 2}, "min_rows must be <= 1, got 2"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=f"^{message}$"):
        ChunkPlan([4, 4], **arguments)


def test_wrong_counts_and_indexes_are_named():
    with pytest.raises(TokenCountError, match="got -1 on DP rank 1"):
        ChunkPlan([4, -1])
    with pytest.raises(IndexError, match="chunk 2 of a plan with 2 chunks"):
        ChunkPlan([4], max_chunk_size_per_rank=2)[2]
    with pytest.raises(ConfigurationError, match="rank must be <= 0, got 1"):
        ChunkPlan([4]).sp_span(1)
