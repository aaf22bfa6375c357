# No `from __future__ import annotations` here, nothing imported for type checkers only, and no helper on the class:
# foreign callers read DPMetadata by introspection, resolve its annotations and publish each function that they find.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lockstep.errors import ConfigurationError, TokenCountError
from lockstep.metadata.config import ParallelConfig
from lockstep.metadata.contexts import SizesContext, StepSizes, chunked_rows, cumulative_rows
from lockstep.metadata.sizes import INT32_MAX, abridged, as_plain_int, check_counts, check_int

if TYPE_CHECKING:
    # What is taken besides tensors. At run time the annotations stay the published ones.
    TokenCounts = torch.Tensor | Sequence[int]
    TokenCount = torch.Tensor | int
else:
    TokenCounts = TokenCount = torch.Tensor

COUNTS = "num_tokens_across_dp_cpu"
MAX = "max_tokens_across_dp_cpu"
INTEGER_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, value: torch.Tensor, ndim: int) -> None:
    """Check that a tensor holds integers on the CPU.

    Args:
        name: what the message calls it.
        value: the tensor.
        ndim: the number of dimensions that it must have.

    Raises:
        TokenCountError: if dtype, device or shape is another.
    """
    if value.dtype not in INTEGER_DTYPES:
        raise TokenCountError(f"{name} must have an integer dtype, got {value.dtype}")
    if not value.is_cpu:
        raise TokenCountError(f"{name} must be on the CPU, so that reading it waits for no device, got {value.device}")
    if value.ndim != ndim:
        raise TokenCountError(f"{name} must have {ndim} dimension{'s' * (ndim != 1)}, got shape {tuple(value.shape)}")


def read_counts(counts: object) -> tuple[tuple[int, ...], torch.Tensor]:
    """Read token counts once.

    Args:
        counts: tokens per DP rank, `[dp_size]`: an integer tensor on the CPU, an array, or a sequence of integers.

    Returns:
        The counts as plain integers, and as a tensor of its own, `[dp_size]`, of the dtype of the tensor that came in,
        otherwise int32.

    Raises:
        TokenCountError: if dtype, device, shape or an entry is wrong, naming the entry's rank.
    """
    if not isinstance(counts, torch.Tensor):
        plain = check_counts(counts, COUNTS)
        return plain, torch.tensor(plain, dtype=torch.int32)
    check_tensor(COUNTS, counts, 1)
    copy = counts.clone()
    plain = tuple(copy.tolist())
    if not plain:
        check_counts(plain, COUNTS)
    # Made once per step, before the first layer runs: for few ranks plain Python is the faster way to the extremes.
    many = len(plain) > 128
    lowest, highest = (int(copy.min()), int(copy.max())) if many else (min(plain), max(plain))
    if lowest < 0 or highest > INT32_MAX:
        check_counts(plain, COUNTS)
    return plain, copy


def check_own_count(parallel_config: object, num_tokens: object, counts: tuple[int, ...]) -> int:
    """Check that the counts of all ranks fit to what this rank knows of itself.

    Args:
        parallel_config: anything with `data_parallel_size` and `data_parallel_rank`.
        num_tokens: tokens of this rank.
        counts: tokens per DP rank.

    Returns:
        This rank's DP rank.

    Raises:
        ConfigurationError: if size and rank cannot be read or do not fit together.
        TokenCountError: if there is not one count per DP rank, or this rank's is not `num_tokens`.
    """
    try:
        size = parallel_config.data_parallel_size  # type: ignore[attr-defined]
        rank = parallel_config.data_parallel_rank  # type: ignore[attr-defined]
    except AttributeError:
        raise ConfigurationError(
            f"parallel_config must have data_parallel_size and data_parallel_rank, got {parallel_config!r}"
        ) from None
    dp_size = check_int("data_parallel_size", size, 1)
    dp_rank = check_int("data_parallel_rank", rank)
    if dp_rank >= dp_size:
        raise ConfigurationError(f"data_parallel_rank must be below data_parallel_size {dp_size}, got {dp_rank}")
    if len(counts) != dp_size:
        raise TokenCountError(
            f"{COUNTS} must have one entry per DP rank, {dp_size}, got {len(counts)} (on DP rank {dp_rank})"
        )
    if as_plain_int(num_tokens) != counts[dp_rank]:
        own = check_int(f"num_tokens of DP rank {dp_rank}", num_tokens, error=TokenCountError)
        raise TokenCountError(f"{COUNTS} has {counts[dp_rank]} on DP rank {dp_rank}, whose num_tokens is {own}")
    return dp_rank


@dataclass(init=False)
class DPMetadata:
    """How many tokens each data-parallel rank has in this step, and the sizes that follow from it.

    Made once per step, with the same counts on every rank, so that all ranks derive the same sizes for every collective
    that they are about to join. A layer enters one of the two contexts, `sp_local_sizes` or `chunked_sizes`, and reads
    the sizes inside it.

    The counts are copied and read once: writing to a tensor later changes nothing. Sizes are computed once per
    arguments; the lists are shared, so read them and do not change them. Two objects are equal if their values are;
    none is hashable.

    Attributes:
        max_tokens_across_dp_cpu: the largest count, a 0-d tensor.
        num_tokens_across_dp_cpu: tokens per DP rank, `[dp_size]`, a tensor of integers on the CPU.
        local_sizes: rows per rank inside a context, `[ep_size]`, plain integers; None outside.

    Example:
        >>> metadata = DPMetadata(7, [5, 7])
        >>> with metadata.sp_local_sizes(2) as sizes:
        ...     print(sizes)
        [3, 3, 4, 4]
    """

    max_tokens_across_dp_cpu: torch.Tensor
    num_tokens_across_dp_cpu: torch.Tensor
    local_sizes: list[int] | None = None

    def __init__(
        self,
        max_tokens_across_dp_cpu: TokenCount,
        num_tokens_across_dp_cpu: TokenCounts,
        local_sizes: list[int] | None = None,
    ) -> None:
        """Make the metadata from the counts of all ranks and their maximum; `make` finds the maximum itself.

        Args:
            max_tokens_across_dp_cpu: the largest count: a 0-d integer tensor on the CPU, or an integer.
            num_tokens_across_dp_cpu: tokens per DP rank, `[dp_size]`, each in `0..2**31 - 1`: an integer tensor on the
                CPU, an array, or a sequence of integers.
            local_sizes: rows per rank, shown until the first context is entered; leave it out.

        Raises:
            TokenCountError: if a count has the wrong dtype, device, shape or sign, or the maximum is not the counts'.
        """
        counts, counts_tensor = read_counts(num_tokens_across_dp_cpu)
        if isinstance(max_tokens_across_dp_cpu, torch.Tensor):
            check_tensor(MAX, max_tokens_across_dp_cpu, 0)
        given = check_int(MAX, max_tokens_across_dp_cpu, maximum=None, error=TokenCountError)
        if given != max(counts):
            largest = f"{max(counts)} on DP rank {counts.index(max(counts))}"
            raise TokenCountError(f"{MAX} must be the largest count, {largest}, got {given}")
        self.max_tokens_across_dp_cpu = counts_tensor.max()
        self.num_tokens_across_dp_cpu = counts_tensor
        self.local_sizes = None if local_sizes is None else list(check_counts(local_sizes, "local_sizes"))
        self._step = StepSizes(counts)
        self._entered: SizesContext | list[SizesContext] | None = None

    @staticmethod
    def make(
        parallel_config: ParallelConfig,
        num_tokens: int,
        num_tokens_across_dp_cpu: TokenCounts,
    ) -> "DPMetadata":
        """Make the metadata of this step from the counts of all ranks, checked against what this rank knows.

        Args:
            parallel_config: a `ParallelConfig`, or any object with `data_parallel_size` and `data_parallel_rank`.
            num_tokens: tokens of this rank in this step, >= 0.
            num_tokens_across_dp_cpu: tokens per DP rank, `[data_parallel_size]`, each in `0..2**31 - 1`: an integer
                tensor on the CPU, an array, or a sequence of integers. Entry `data_parallel_rank` must be `num_tokens`.

        Returns:
            The metadata, with no sizes set.

        Raises:
            TokenCountError: if there is not one count per rank, one has the wrong dtype, device, shape or sign, or this
                rank's is not `num_tokens`.
            ConfigurationError: if size and rank of `parallel_config` do not fit together.

        Example:
            >>> config = ParallelConfig(data_parallel_size=3, data_parallel_rank=0)
            >>> DPMetadata.make(config, 500, [500, 200, 256])
            DPMetadata(max_tokens_across_dp_cpu=500, num_tokens_across_dp_cpu=[500, 200, 256], local_sizes=None)
        """
        counts, counts_tensor = read_counts(num_tokens_across_dp_cpu)
        dp_rank = check_own_count(parallel_config, num_tokens, counts)
        # Not through the constructor, which would read the counts a second time.
        metadata = object.__new__(DPMetadata)
        metadata.max_tokens_across_dp_cpu = counts_tensor.max()
        metadata.num_tokens_across_dp_cpu = counts_tensor
        metadata.local_sizes = None
        metadata._step = StepSizes(counts, dp_rank)
        metadata._entered = None
        return metadata

    def chunked_sizes(self, sequence_parallel_size: int, max_chunk_size_per_rank: int, chunk_idx: int) -> SizesContext:
        """Set `local_sizes` to the rows of one chunk, for use in a `with` block.

        A rank that has no rows left in the chunk brings one dummy row, so that every rank joins every collective.

        Args:
            sequence_parallel_size: ranks that share the tokens of one DP rank, >= 1.
            max_chunk_size_per_rank: most rows that one rank brings per chunk, >= 1.
            chunk_idx: which chunk, from 0. Past the end every rank brings one dummy row.

        Returns:
            A context manager. Entering it sets the sizes and gives them, `[dp_size * sequence_parallel_size]`; leaving
            it gives the outer sizes back, or None.

        Raises:
            ConfigurationError: at once, not on entering, if an argument is below its limit.

        Example:
            >>> metadata = DPMetadata(500, [500, 200, 256])
            >>> with metadata.chunked_sizes(1, max_chunk_size_per_rank=256, chunk_idx=1) as sizes:
            ...     print(sizes)
            [244, 1, 1]
        """
        sizes = self._step.find(chunked_rows, sequence_parallel_size, max_chunk_size_per_rank, chunk_idx)
        context = SizesContext()
        context.metadata = self
        context.sizes = sizes
        return context

    def sp_local_sizes(self, sequence_parallel_size: int) -> SizesContext:
        """Set `local_sizes` to the rows of the whole step, for use in a `with` block.

        Args:
            sequence_parallel_size: ranks that share the tokens of one DP rank, >= 1; 1 gives the counts themselves.

        Returns:
            A context manager. Entering it sets the sizes and gives them, `ceil(count / sequence_parallel_size)`, each
            repeated that many times, zero staying zero, `[dp_size * sequence_parallel_size]`; leaving it gives the
            outer sizes back, or None.

        Raises:
            ConfigurationError: at once, not on entering, if `sequence_parallel_size` < 1.

        Example:
            >>> with DPMetadata(5, [0, 5]).sp_local_sizes(2) as sizes:
            ...     print(sizes)
            [0, 0, 3, 3]
        """
        step = self._step
        key, sizes = step.last
        # By identity, which costs least and never takes True for 1; the same small int is always the same object.
        if sequence_parallel_size is not key:
            sizes = step.find_last(sequence_parallel_size)
        context = SizesContext()
        context.metadata = self
        context.sizes = sizes
        return context

    def get_chunk_sizes_across_dp_rank(self) -> list[int] | None:
        """Return the sizes of the context that is entered.

        Returns:
            Rows per rank, `[ep_size]`. The list is shared: read it, do not change it.

        Raises:
            RuntimeError: outside `chunked_sizes` and `sp_local_sizes`.

        Example:
            >>> metadata = DPMetadata(7, [5, 7])
            >>> with metadata.sp_local_sizes(1):
            ...     print(metadata.get_chunk_sizes_across_dp_rank())
            [5, 7]
        """
        if self.local_sizes is None:
            raise RuntimeError(
                "there are no sizes outside a context: call this within `with metadata.chunked_sizes(...)` "
                "or `with metadata.sp_local_sizes(...)`"
            )
        return self.local_sizes

    def cu_tokens_across_sp(self, sp_size: int) -> torch.Tensor:
        """Return the running sum of the rows of each rank.

        Args:
            sp_size: ranks that share the tokens of one DP rank, >= 1.

        Returns:
            The running sum of what `sp_local_sizes(sp_size)` gives, `[dp_size * sp_size]`, int64, a tensor of the
            caller's own.

        Raises:
            ConfigurationError: if `sp_size` < 1.

        Example:
            >>> DPMetadata(7, [5, 7]).cu_tokens_across_sp(2).tolist()
            [3, 6, 10, 14]
        """
        return torch.tensor(self._step.find(cumulative_rows, sp_size), dtype=torch.int64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DPMetadata):
            return NotImplemented
        return self._step.counts == other._step.counts and self.local_sizes == other.local_sizes

    def __repr__(self) -> str:
        sizes = None if self.local_sizes is None else abridged(self.local_sizes)
        return (
            f"DPMetadata({MAX}={max(self._step.counts)}, {COUNTS}={abridged(self._step.counts)}, local_sizes={sizes})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Copies start outside every context: sharing the stack, one would change the sizes of the other.
        return DPMetadata, (self.max_tokens_across_dp_cpu, self.num_tokens_across_dp_cpu)
