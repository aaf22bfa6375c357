# No `from __future__ import annotations` here, nothing imported for type checkers only, and no helper on the class:
# foreign callers read DPMetadata by introspection, resolve its annotations and publish each function that they find.

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import torch

from lockstep.errors import ConfigurationError, TokenCountError
from lockstep.metadata.config import ParallelConfig
from lockstep.metadata.contexts import Nested, SizesContext, StepSizes, chunked_rows, cumulative_rows
from lockstep.metadata.sizes import INT32_MAX, abridged, as_plain_int, check_counts, check_int, shown

if TYPE_CHECKING:
    # What is taken besides tensors. At run time the annotations stay the published ones.
    TokenCounts = torch.Tensor | Sequence[int]
    TokenCount = torch.Tensor | int
else:
    TokenCounts = TokenCount = torch.Tensor

COUNTS = "num_tokens_across_dp_cpu"
MAX = "max_tokens_across_dp_cpu"
SIGNED_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
"""What torch does arithmetic with. Counts of the larger unsigned dtypes are kept as int64."""
MANY = 64
"""Entries above which torch finds the extremes of a tensor faster than Python does."""
INTEGER_DTYPES = (*SIGNED_DTYPES, torch.uint16, torch.uint32, torch.uint64)


def check_tensor(name: str, value: torch.Tensor, ndim: int) -> None:
    """Raise `TokenCountError` unless a tensor holds integers on the CPU, one beside the other, in `ndim` dimensions."""
    if value.dtype not in INTEGER_DTYPES:
        raise TokenCountError(f"{name} must have an integer dtype, got {value.dtype}")
    if not value.is_cpu:
        raise TokenCountError(f"{name} must be on the CPU, so that reading it waits for no device, got {value.device}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else value.layout
        raise TokenCountError(f"{name} must be a dense tensor, got {layout}: hand over value.to_dense()")
    if value.ndim != ndim:
        raise TokenCountError(f"{name} must have {ndim} dimension{'s' * (ndim != 1)}, got shape {tuple(value.shape)}")
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TokenCountError(f"{name} must be a plain tensor, got a {type(value).__name__}")


def read_counts(counts: object) -> tuple[tuple[int, ...], torch.Tensor]:
    """Return token counts as plain integers, `[dp_size]`, and in a new tensor of a tensor's own dtype, else int32.

    Raises:
        TokenCountError: if dtype, device, shape or an entry is wrong, naming the entry's rank.
    """
    if torch.is_inference_mode_enabled():  # tensors made in it do not tell whether they were written to
        with torch.inference_mode(False):
            return read_counts(counts)
    if not isinstance(counts, torch.Tensor):
        plain = check_counts(counts, COUNTS)
        return plain, torch.tensor(plain, dtype=torch.int32)
    check_tensor(COUNTS, counts, 1)
    try:
        copy = counts.clone()
        plain = tuple(copy.tolist())
    except Exception:  # a tensor without values: its sentence is that of all else that cannot be read
        check_counts(counts, COUNTS)
        raise
    if len(plain) > MANY:
        lowest, highest = map(int, copy.long().aminmax())
    else:
        lowest, highest = min(plain, default=-1), max(plain, default=-1)
    if not 0 <= lowest <= highest <= INT32_MAX:
        check_counts(plain, COUNTS)
    return plain, copy if copy.dtype in SIGNED_DTYPES else copy.long()


def check_own_count(parallel_config: object, num_tokens: object, counts: tuple[int, ...]) -> int:
    """Check that the counts of all ranks fit to what this rank knows of itself, and return its DP rank.

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


class HoldsCounts:
    """What `DPMetadata` and the class for vLLM have in common: fields for reading, values, copies, subclasses.

    The counts are kept as plain integers, and shown as a tensor. Nobody can keep a caller from writing to that tensor,
    so each function looks whether somebody did, rather than go on with one truth in the field and another in the sizes.
    """

    num_tokens_across_dp_cpu: torch.Tensor
    local_sizes: list[int] | None
    _step: StepSizes
    _nested: Nested

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `dataclass` writes these functions into a subclass that lacks them, and its own compare tensors and fail.
        for name in ("__eq__", "__repr__"):
            if name not in cls.__dict__:
                setattr(cls, name, getattr(cls, name))
        own_post_init = cls.__dict__.get("__post_init__")
        if own_post_init is not None:

            @wraps(own_post_init)
            def post_init(self: "HoldsCounts", *args: Any) -> None:
                HoldsCounts.__post_init__(self)
                own_post_init(self, *args)

            cls.__post_init__ = post_init  # type: ignore[method-assign]  # InitVar adds arguments

    def __post_init__(self) -> None:
        # The constructor that `dataclass` writes for a subclass ends here, with the fields set as they came in.
        if not hasattr(self, "_step"):
            read_fields(self, self.num_tokens_across_dp_cpu, getattr(self, MAX, None), self.local_sizes)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, HoldsCounts)
        return (
            checked_step(self).counts == checked_step(other).counts
            and self.local_sizes == other.local_sizes
            and all(getattr(self, each) == getattr(other, each) for each in further_fields(self, "compare"))
        )

    def __repr__(self) -> str:
        counts, sizes = self._step.counts, self.local_sizes
        parts = [f"{MAX}={max(counts)}"] if has_maximum(self) else []
        parts += [f"{COUNTS}={abridged(counts)}", f"local_sizes={None if sizes is None else abridged(sizes)}"]
        parts += [f"{each}={getattr(self, each)!r}" for each in further_fields(self, "repr")]
        return f"{type(self).__qualname__}({', '.join(parts)})"

    def __getstate__(self) -> object:
        # Copies start outside every context: sharing what is entered, one would change the sizes of the other. Their
        # tensors are their own.
        state: Any = object.__getstate__(self)
        own, slots = state if isinstance(state, tuple) else (state, None)
        step = checked_step(self)
        fresh: dict[str, object] = {"local_sizes": None, "_nested": None}
        shown = read_counts(step.shown)[1]
        fresh |= {COUNTS: shown, "_step": StepSizes(step.counts, step.dp_rank, shown)}
        if has_maximum(self):
            fresh[MAX] = shown.max()
        if slots is None:
            return own | fresh
        # Where `dataclass` has made slots of the fields, they are restored as such.
        in_slots = {name: value for name, value in fresh.items() if name in slots}
        return own | {name: value for name, value in fresh.items() if name not in slots}, slots | in_slots


def has_maximum(metadata: HoldsCounts) -> bool:
    """Return whether the class has a field for the largest count; vLLM's has none."""
    declared: Any = metadata
    return MAX in declared.__dataclass_fields__


def checked_step(metadata: HoldsCounts) -> StepSizes:
    """Return the counts and sizes; raise `TokenCountError` if a field that shows them was written to or set."""
    step = metadata._step
    for name, expected in ((COUNTS, list(step.counts)), (MAX, max(step.counts))):
        found = getattr(metadata, name, expected)  # not by `__dict__`: once made, it slows each attribute down
        if found is not expected and (not isinstance(found, torch.Tensor) or found.tolist() != expected):
            raise TokenCountError(
                f"{name} was changed after the metadata was made, from {shown(expected)} to {shown(found)}: make new "
                "metadata, since the other ranks and the sizes know nothing of it"
            )
    return step


def further_fields(metadata: HoldsCounts, kind: Literal["compare", "repr"]) -> list[str]:
    """Return the fields that a subclass has added, without those declared with `compare=False` or `repr=False`."""
    own = (MAX, COUNTS, "local_sizes")
    declared: Any = metadata
    return [each.name for each in fields(declared) if each.name not in own and getattr(each, kind)]


def read_fields(metadata: HoldsCounts, counts: object, largest: object = None, local_sizes: object = None) -> None:
    """Set the attributes from what a constructor was given, checked; `largest` is None for a class without it."""
    plain, tensor = read_counts(counts)
    if has_maximum(metadata):
        if isinstance(largest, torch.Tensor):
            check_tensor(MAX, largest, 0)
        given = check_int(MAX, largest, maximum=None, error=TokenCountError)
        if given != max(plain):
            most = f"{max(plain)} on DP rank {plain.index(max(plain))}"
            raise TokenCountError(f"{MAX} must be the largest count, {most}, got {shown(given)}")
    sizes = None if local_sizes is None else list(check_counts(local_sizes, "local_sizes"))
    set_counts(metadata, plain, tensor)
    if sizes is not None:
        metadata.local_sizes, metadata._nested = sizes, []


def set_counts(
    metadata: HoldsCounts, counts: tuple[int, ...], tensor: torch.Tensor, dp_rank: int | None = None
) -> None:
    """Set the attributes from what `read_counts` returned; the object may have none yet."""
    if has_maximum(metadata):
        metadata.max_tokens_across_dp_cpu = tensor.max()  # type: ignore[attr-defined]
    metadata.num_tokens_across_dp_cpu = tensor
    metadata.local_sizes = metadata._nested = None
    metadata._step = StepSizes(counts, dp_rank, tensor)


@dataclass(init=False, eq=False, repr=False)
class DPMetadata(HoldsCounts):
    """How many tokens each data-parallel rank has in this step, and the sizes that follow from it.

    Made once per step, with the same counts on every rank, so that all ranks derive the same sizes for every collective
    that they are about to join. A layer enters one of the two contexts, `sp_local_sizes` or `chunked_sizes`, and reads
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
    # No parameter of `dataclasses.replace`: what it makes is a copy, and starts outside every context.
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
            TokenCountError: if a count has the wrong dtype, device, shape or sign, or the maximum is not the counts'.
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
        counts, tensor = read_counts(num_tokens_across_dp_cpu)
        dp_rank = check_own_count(parallel_config, num_tokens, counts)
        # Not through the constructor, which would read the counts a second time.
        metadata = object.__new__(DPMetadata)
        set_counts(metadata, counts, tensor, dp_rank)
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
        sizes = checked_step(self).find(chunked_rows, sequence_parallel_size, max_chunk_size_per_rank, chunk_idx)
        context = SizesContext()
        context.metadata = self
        context.sizes = sizes
        context.alone = False
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
        key, sizes, counts, version = self._step.last
        # By identity, which costs least and never takes True for 1; the same small int is always the same object.
        if (
            sequence_parallel_size is not key
            or self.num_tokens_across_dp_cpu is not counts
            or counts._version != version
        ):
            sizes = checked_step(self).find_last(sequence_parallel_size)
        context = SizesContext()
        context.metadata = self
        context.sizes = sizes
        context.alone = False
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
        return torch.tensor(checked_step(self).find(cumulative_rows, sp_size), dtype=torch.int64)
