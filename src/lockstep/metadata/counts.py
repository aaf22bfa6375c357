# The token counts of a step: read, checked, shown as tensors, and guarded against writes to these tensors.
# Annotations resolve at run time, as in dp_metadata.py.

from array import array
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch

from lockstep.errors import ConfigurationError, TokenCountError
from lockstep.metadata.contexts import NO_CONTEXT, Nested, SizesContext, sizes_context
from lockstep.metadata.sizes import INT32_MAX, abridged, as_plain_int, check_counts, check_int, shown, sp_sizes

if TYPE_CHECKING:
    # Accepted besides tensors. At run time the annotations stay the published ones.
    TokenCounts = torch.Tensor | Sequence[int]
    TokenCount = torch.Tensor | int
else:
    TokenCounts = TokenCount = torch.Tensor

COUNTS = "num_tokens_across_dp_cpu"
MAX = "max_tokens_across_dp_cpu"
OWN_ATTRIBUTES = (COUNTS, MAX, "local_sizes", "_step", "_nested", "_resting", "_weak")
TYPECODES = {torch.int32: "i", torch.int64: "q", torch.int16: "h", torch.int8: "b", torch.uint8: "B"}
"""Dtypes with torch arithmetic, as `array` type codes. Counts of the larger unsigned dtypes are kept as int64."""
INTEGER_DTYPES = (*TYPECODES, torch.uint16, torch.uint32, torch.uint64)
FEW, MANY = 16, 128
"""Up to this many entries Python copies counts faster than torch; above it torch finds their extremes faster."""
MOST_LISTS = 1024
"""Size lists kept per step: more than a step's chunks, but bounded if a caller keeps asking for more chunks."""


class StepSizes:
    """The counts of one step and the size lists derived from them, hidden from the surface of `DPMetadata`."""

    __slots__ = ("address", "counts", "dp_rank", "expected", "fullest", "largest", "lists", "memory", "shown")

    def __init__(self, counts: tuple[int, ...], memory: Any, shown: torch.Tensor, fullest: int) -> None:
        self.counts = counts
        self.fullest = fullest  # a rank with the largest count
        self.dp_rank: int | None = None
        self.shown = shown  # the tensor that shows the counts to callers
        self.largest: Any = None  # the tensor that shows the largest of them
        self.address = shown.data_ptr()
        self.memory = memory  # its memory, a mutable array: differs from `expected` once a caller has written to it
        self.expected = memory[:]
        self.lists: dict[object, list[int]] = {}  # by their arguments


def check_tensor(name: str, value: torch.Tensor, ndim: int) -> None:
    """Raise `TokenCountError` unless a tensor is a plain, dense CPU tensor of integers in `ndim` dimensions."""
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


def read_counts(counts: object) -> StepSizes:
    """Return checked token counts and a new tensor that shows them, in a given tensor's dtype, else int32."""
    if not isinstance(counts, torch.Tensor):
        return show(check_counts(counts, COUNTS), torch.int32)
    if not (type(counts) is torch.Tensor and counts.dtype in TYPECODES and counts.ndim == 1 and counts.is_cpu):
        check_tensor(COUNTS, counts, 1)
    dtype = counts.dtype if counts.dtype in TYPECODES else torch.int64
    num_counts = counts.numel()
    try:
        if num_counts <= FEW:
            step = show(tuple(counts.tolist()), dtype)
        else:
            memory = bytearray(num_counts * dtype.itemsize)
            copy = torch.frombuffer(memory, dtype=dtype).copy_(counts)
            plain = tuple(copy.tolist())
            fullest = int(copy.argmax()) if num_counts > MANY else plain.index(max(plain))
            step = StepSizes(plain, memory, copy, fullest)
    except Exception:  # no counts, one beyond its dtype, a tensor without values, or a layout that cannot be listed
        check_tensor(COUNTS, counts, 1)
        check_counts(counts, COUNTS)
        raise
    lowest = min(step.counts) if num_counts <= MANY else int(step.shown.min())
    if lowest < 0 or step.counts[step.fullest] > INT32_MAX:
        check_counts(counts, COUNTS)
    return step


def show(counts: tuple[int, ...], dtype: torch.dtype) -> StepSizes:
    """Return counts with a tensor that shows them."""
    memory = array(TYPECODES[dtype], counts)
    return StepSizes(counts, memory, torch.frombuffer(memory, dtype=dtype), counts.index(max(counts)))


def check_own_count(parallel_config: object, num_tokens: object, counts: tuple[int, ...]) -> int:
    """Check the counts of all ranks against what this rank knows of itself, and return its DP rank."""
    try:
        size = parallel_config.data_parallel_size  # type: ignore[attr-defined]
        rank = parallel_config.data_parallel_rank  # type: ignore[attr-defined]
    except AttributeError:
        raise ConfigurationError(
            f"parallel_config must have data_parallel_size and data_parallel_rank, got {parallel_config!r}"
        ) from None
    if not (type(size) is type(rank) is int and 0 <= rank < size <= INT32_MAX):
        size, rank = check_int("data_parallel_size", size, 1), check_int("data_parallel_rank", rank)
        if rank >= size:
            raise ConfigurationError(f"data_parallel_rank must be below data_parallel_size {size}, got {rank}")
    if len(counts) != size:
        raise TokenCountError(
            f"{COUNTS} must have one entry per DP rank, {size}, got {len(counts)} (on DP rank {rank})"
        )
    if as_plain_int(num_tokens) != counts[rank]:
        own = check_int(f"num_tokens of DP rank {rank}", num_tokens, error=TokenCountError)
        raise TokenCountError(f"{COUNTS} has {counts[rank]} on DP rank {rank}, whose num_tokens is {own}")
    return int(rank)


class HoldsCounts:
    """Common base of `DPMetadata` and the class for vLLM: read-only fields, equality, copies, subclasses.

    The counts are kept as plain integers and shown as a tensor. Nothing can keep a caller from writing to that tensor,
    so each function compares its memory with a copy, rather than continue with a field that contradicts the
    sizes. The comparison is one call into C, and sees what NumPy writes, which torch's version counter does not.
    """

    num_tokens_across_dp_cpu: torch.Tensor
    local_sizes: list[int] | None
    _step: StepSizes
    _nested: Nested
    _resting: SizesContext
    _weak: ref["HoldsCounts"]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `dataclass` adds these functions to a subclass that lacks them, and its versions compare tensors and fail.
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
        # The constructor that `dataclass` writes for a subclass ends here, with the fields set as passed.
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
        step, sizes = self._step, self.local_sizes
        parts = [f"{MAX}={step.counts[step.fullest]}"] if has_maximum(self) else []
        parts += [f"{COUNTS}={abridged(step.counts)}", f"local_sizes={None if sizes is None else abridged(sizes)}"]
        parts += [f"{each}={getattr(self, each)!r}" for each in further_fields(self, "repr")]
        return f"{type(self).__qualname__}({', '.join(parts)})"

    def __getstate__(self) -> object:
        # Copies start outside every context: with a shared context, one would change the sizes of the other. Their
        # tensors are their own.
        step, state = checked_step(self), object.__getstate__(self)
        attributes, slots = state if isinstance(state, tuple) else (state, {})
        further = {name: value for name, value in {**attributes, **slots}.items() if name not in OWN_ATTRIBUTES}
        return step.shown, step.dp_rank, further

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        counts, dp_rank, further = state
        set_counts(self, read_counts(counts), dp_rank)
        for name, value in further.items():
            setattr(self, name, value)


def has_maximum(metadata: HoldsCounts) -> bool:
    """Return whether the class has a field for the largest count; vLLM's has none."""
    declared: Any = metadata
    return MAX in declared.__dataclass_fields__


def checked_step(metadata: HoldsCounts) -> StepSizes:
    """Return the counts and sizes; raise `TokenCountError` if a field that shows them has been changed."""
    step = metadata._step
    if (
        step.memory == step.expected
        and metadata.num_tokens_across_dp_cpu is step.shown
        and step.shown.data_ptr() == step.address
        and getattr(metadata, MAX, step.largest) is step.largest
    ):
        return step
    for name, expected in ((COUNTS, list(step.counts)), (MAX, step.counts[step.fullest])):
        found = getattr(metadata, name, expected)  # not by `__dict__`: once created, it slows down every attribute
        if found is not expected and (not isinstance(found, torch.Tensor) or found.tolist() != expected):
            raise TokenCountError(
                f"{name} was changed after the metadata was made, from {shown(expected)} to {shown(found)}: make new "
                "metadata, since the other ranks and the sizes know nothing of it"
            )
    return step


def further_fields(metadata: HoldsCounts, kind: Literal["compare", "repr"]) -> list[str]:
    """Return the fields that a subclass has added, without those declared with `compare=False` or `repr=False`."""
    declared: Any = metadata
    return [each.name for each in fields(declared) if each.name not in OWN_ATTRIBUTES and getattr(each, kind)]


def read_fields(metadata: HoldsCounts, counts: object, largest: object = None, local_sizes: object = None) -> None:
    """Check a constructor's arguments and set the attributes; `largest` is None for a class without it."""
    step = read_counts(counts)
    if has_maximum(metadata):
        if isinstance(largest, torch.Tensor):
            check_tensor(MAX, largest, 0)
        given = check_int(MAX, largest, maximum=None, error=TokenCountError)
        if given != step.counts[step.fullest]:
            most = f"{step.counts[step.fullest]} on DP rank {step.fullest}"
            raise TokenCountError(f"{MAX} must be the largest count, {most}, got {shown(given)}")
    sizes = None if local_sizes is None else list(check_counts(local_sizes, "local_sizes"))
    set_counts(metadata, step)
    if sizes is not None:
        metadata.local_sizes, metadata._nested = sizes, []


def set_counts(metadata: HoldsCounts, step: StepSizes, dp_rank: int | None = None) -> None:
    """Set the attributes from what `read_counts` returned; the object may have none yet."""
    step.dp_rank = dp_rank
    if has_maximum(metadata):
        # A view, so that a write to it is noticed like a write to the counts.
        step.largest = step.shown[step.fullest]
        metadata.max_tokens_across_dp_cpu = step.largest  # type: ignore[attr-defined]
    metadata.num_tokens_across_dp_cpu = step.shown
    metadata.local_sizes = metadata._nested = None
    metadata._step, metadata._resting, metadata._weak = step, NO_CONTEXT, ref(metadata)


def find_sizes(metadata: HoldsCounts, function: Callable[..., list[int]], *args: int) -> list[int]:
    """Return `function(counts, *args)`, computed on the first call; errors name this rank."""
    step = metadata._step
    # As plain integers: True and 1.0 equal 1, so a cached result would let them pass unchecked.
    key = (function, *map(as_plain_int, args))
    sizes = step.lists.get(key)
    if sizes is None or step.memory != step.expected or metadata.num_tokens_across_dp_cpu is not step.shown:
        checked_step(metadata)
    if sizes is None:
        try:
            sizes = function(step.counts, *args)
        except ConfigurationError as error:
            if step.dp_rank is None:
                raise
            raise ConfigurationError(f"{error} (on DP rank {step.dp_rank} of {len(step.counts)})") from None
        if len(step.lists) >= MOST_LISTS:
            step.lists.clear()
        step.lists[key] = sizes
    return sizes


def step_context(metadata: HoldsCounts, sequence_parallel_size: int) -> SizesContext:
    """Return a new context for the sizes of the whole step."""
    context, step = sizes_context(metadata, find_sizes(metadata, sp_sizes, sequence_parallel_size)), metadata._step
    # Not by a tensor or array, which can change its value and remain the same object.
    if type(sequence_parallel_size) is int:
        context.key = sequence_parallel_size
        context.shown, context.memory, context.expected = step.shown, step.memory, step.expected
    return context
