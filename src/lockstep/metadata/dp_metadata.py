# No `from __future__ import annotations` here, nothing imported for type checkers only, and no helper on the class:
# foreign callers read DPMetadata by introspection, resolve its annotations and publish each function that they find.

from dataclasses import dataclass, field
from sys import getrefcount

import torch

from lockstep.metadata.config import ParallelConfig
from lockstep.metadata.contexts import NO_CONTEXT, UNSHARED, SizesContext, sizes_context
from lockstep.metadata.counts import (
    HoldsCounts,
    TokenCount,
    TokenCounts,
    check_own_count,
    find_sizes,
    read_counts,
    read_fields,
    set_counts,
    step_context,
)
from lockstep.metadata.sizes import chunked_rows, cumulative_rows


@dataclass(init=False, eq=False, repr=False)
class DPMetadata(HoldsCounts):
    """How many tokens each data-parallel rank has in this step, and the sizes that follow from it.

    Made once per step from the same counts on every rank, so that all ranks derive the same sizes for every collective
    of the step. A layer enters one of the two contexts, `sp_local_sizes` or `chunked_sizes`, and reads
    the sizes inside it.

    The counts are copied and read once; the tensors that show them are for reading, and a call after one was changed
    raises `TokenCountError`. Sizes are computed once per arguments; the lists are shared, so read them and do not
    change them. Two objects of one class are equal if their values are; none is hashable.

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
    # No parameter of `dataclasses.replace`: its result is a copy, and starts outside every context.
    local_sizes: list[int] | None = field(default=None, init=False)

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
            TokenCountError: if a count has the wrong dtype, device, shape or sign, or the maximum is wrong.
        """
        read_fields(self, num_tokens_across_dp_cpu, max_tokens_across_dp_cpu, local_sizes)

    @staticmethod
    def make(parallel_config: ParallelConfig, num_tokens: int, num_tokens_across_dp_cpu: TokenCounts) -> "DPMetadata":
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
        step = read_counts(num_tokens_across_dp_cpu)
        dp_rank = check_own_count(parallel_config, num_tokens, step.counts)
        # Not through the constructor, which would read the counts a second time.
        metadata = object.__new__(DPMetadata)
        set_counts(metadata, step, dp_rank)
        return metadata

    def chunked_sizes(self, sequence_parallel_size: int, max_chunk_size_per_rank: int, chunk_idx: int) -> SizesContext:
        """Set `local_sizes` to the rows of one chunk, for use in a `with` block.

        A rank with no rows left in the chunk sends one dummy row, so that every rank joins every collective.

        Args:
            sequence_parallel_size: ranks that share the tokens of one DP rank, >= 1.
            max_chunk_size_per_rank: maximum rows per rank and chunk, >= 1.
            chunk_idx: which chunk, from 0. Past the end every rank sends one dummy row.

        Returns:
            A context manager. Entering it sets and returns the sizes, `[dp_size * sequence_parallel_size]`; leaving
            it restores the outer sizes, or None.

        Raises:
            ConfigurationError: at once, not on entering, if an argument is below its limit.

        Example:
            >>> metadata = DPMetadata(500, [500, 200, 256])
            >>> with metadata.chunked_sizes(1, max_chunk_size_per_rank=256, chunk_idx=1) as sizes:
            ...     print(sizes)
            [244, 1, 1]
        """
        sizes = find_sizes(self, chunked_rows, sequence_parallel_size, max_chunk_size_per_rank, chunk_idx)
        return sizes_context(self, sizes)

    def sp_local_sizes(self, sequence_parallel_size: int) -> SizesContext:
        """Set `local_sizes` to the rows of the whole step, for use in a `with` block.

        Args:
            sequence_parallel_size: ranks that share the tokens of one DP rank, >= 1; 1 gives the counts themselves.

        Returns:
            A context manager. Entering it sets and returns the sizes, `ceil(count / sequence_parallel_size)`, each
            repeated that many times (zero stays zero), `[dp_size * sequence_parallel_size]`; leaving it restores the
            outer sizes, or None.

        Raises:
            ConfigurationError: at once, not on entering, if `sequence_parallel_size` < 1.

        Example:
            >>> with DPMetadata(5, [0, 5]).sp_local_sizes(2) as sizes:
            ...     print(sizes)
            [0, 0, 3, 3]
        """
        context = self._resting
        # By identity, which is cheapest and never takes True for 1; a small int is always the same object.
        if (
            context.key is not sequence_parallel_size
            or context.memory != context.expected
            or context.shown is not self.num_tokens_across_dp_cpu
            or getrefcount(context) != UNSHARED
        ):
            context = step_context(self, sequence_parallel_size)
        else:
            self._resting = NO_CONTEXT
        context.metadata = self
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
            The running sum of the sizes of `sp_local_sizes(sp_size)`, `[dp_size * sp_size]`, int64, a tensor of the
            caller's own.

        Raises:
            ConfigurationError: if `sp_size` < 1.

        Example:
            >>> DPMetadata(7, [5, 7]).cu_tokens_across_sp(2).tolist()
            [3, 6, 10, 14]
        """
        return torch.tensor(find_sizes(self, cumulative_rows, sp_size), dtype=torch.int64)
