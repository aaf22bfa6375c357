from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lockstep.metadata.sizes import abridged, check_counts, check_int, chunk_sizes, sp_rows, sp_sizes

_OPTIONS = ("sequence_parallel_size", "max_chunk_size_per_rank", "rank", "min_rows")


@dataclass(frozen=True, slots=True)
class Chunk:
    """One slice of a step."""

    index: int  # which chunk, from 0
    sizes: tuple[int, ...]  # rows per EP rank, `[ep_size]`; the same tuple on every rank
    start: int  # first row of this rank's own slice that belongs to the chunk
    stop: int  # one past the last; `stop - start` is this rank's number of real rows, 0 if none are left


class ChunkPlan:
    """All chunks of a step, known before the step runs and the same on every rank.

    Iterating gives each `Chunk` in order; `len(plan)` is `ceil(longest rank / max_chunk_size_per_rank)`, or 0 if
    no rank has tokens.

    With sequence parallelism the tokens of a DP rank are cut into contiguous slices of `ceil(count / sp)` rows, the
    last ones shorter or empty. With `min_rows=0` the sizes are real rows, zero included. With `min_rows=1` they are
    what `DPMetadata.chunked_sizes` shows to external callers: slices padded to equal length, and one dummy row
    for a rank with none left. `start` and `stop` count real rows in either case.

    Args:
        num_tokens_across_dp: tokens per DP rank, `[dp_size]`, each in `0..2**31 - 1`.
        sequence_parallel_size: ranks that share the tokens of one DP rank, >= 1.
        max_chunk_size_per_rank: maximum rows per rank and chunk, >= 1; None for one chunk of any length.
        rank: the EP rank for `start` and `stop`, `0..ep_size - 1`.
        min_rows: rows of a rank with none left, 0 or 1.

    Attributes:
        num_tokens_across_dp: the counts as plain integers, `[dp_size]`.
        sp_rows: real rows of each EP rank in the whole step, `[ep_size]`.

    Raises:
        TokenCountError: if a count is wrong, naming its rank.
        ConfigurationError: if a size, the rank or `min_rows` is out of range.

    Example:
        >>> for chunk in ChunkPlan([500, 200, 256], max_chunk_size_per_rank=256, rank=1):
        ...     print(chunk)
        Chunk(index=0, sizes=(256, 200, 256), start=0, stop=200)
        Chunk(index=1, sizes=(244, 0, 0), start=200, stop=200)
    """

    def __init__(
        self, num_tokens_across_dp: object, sequence_parallel_size: int = 1, max_chunk_size_per_rank: int | None = None,
        rank: int = 0, *, min_rows: int = 0,
    ) -> None:  # fmt: skip
        self.num_tokens_across_dp = check_counts(num_tokens_across_dp)
        self.sequence_parallel_size = check_int("sequence_parallel_size", sequence_parallel_size, 1)
        self.sp_rows = sp_rows(self.num_tokens_across_dp, self.sequence_parallel_size)
        self.min_rows = check_int("min_rows", min_rows, 0, 1)
        self.rank = check_int("rank", rank, 0, len(self.sp_rows) - 1)
        # A DP rank's first slice is its longest, so real and padded rows need equally many chunks.
        longest = max(self.sp_rows)
        limit = max(1, longest) if max_chunk_size_per_rank is None else max_chunk_size_per_rank
        self.max_chunk_size_per_rank = check_int("max_chunk_size_per_rank", limit, 1)
        self._num_chunks = -(-longest // self.max_chunk_size_per_rank)
        counts, sp = self.num_tokens_across_dp, self.sequence_parallel_size
        self._step_sizes = sp_sizes(counts, sp) if self.min_rows else self.sp_rows

    def __len__(self) -> int:
        return self._num_chunks

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def __getitem__(self, chunk_idx: int) -> Chunk:
        if not -self._num_chunks <= chunk_idx < self._num_chunks:
            raise IndexError(f"chunk {chunk_idx} of a plan with {self._num_chunks} chunks")
        return self._make_chunk(chunk_idx % self._num_chunks)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, ChunkPlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)}" for name in _OPTIONS)
        return f"ChunkPlan({abridged(self.num_tokens_across_dp)}, {options}): {self._num_chunks} chunks"

    def sp_span(self, rank: int) -> tuple[int, int]:
        """Return an EP rank's share of its DP rank's tokens: `(start, stop)`, without padding.

        Raises:
            ConfigurationError: if `rank` is out of range.

        Example:
            >>> [ChunkPlan([5], sequence_parallel_size=2).sp_span(rank) for rank in range(2)]
            [(0, 3), (3, 5)]
        """
        rank = check_int("rank", rank, 0, len(self.sp_rows) - 1)
        dp_rank, place = divmod(rank, self.sequence_parallel_size)
        start = min(self.num_tokens_across_dp[dp_rank], place * self.sp_rows[rank - place])
        return start, start + self.sp_rows[rank]

    @cached_property
    def _chunks(self) -> tuple[Chunk, ...]:
        # Every layer of a step uses the same chunks: the first layer makes them.
        return tuple(map(self._make_chunk, range(self._num_chunks)))

    def _make_chunk(self, chunk_idx: int) -> Chunk:
        limit, own_rows = self.max_chunk_size_per_rank, self.sp_rows[self.rank]
        start = min(chunk_idx * limit, own_rows)
        sizes = chunk_sizes(self._step_sizes, limit, chunk_idx, self.min_rows)
        return Chunk(chunk_idx, sizes, start, stop=min(start + limit, own_rows))

    def _key(self) -> tuple[object, ...]:
        return (self.num_tokens_across_dp, *(getattr(self, name) for name in _OPTIONS))
