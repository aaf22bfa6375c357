# What DPMetadata keeps of a step and hands to a `with` block, without torch.

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import abridged, as_plain_int, check_int, chunk_sizes, sp_size_list, sp_sizes

MOST_LISTS = 1024
"""Size lists kept of one step. More than its chunks, but not without end for who asks for chunk after chunk."""

Nested = list[tuple[int | None, list[int] | None]] | None
"""Where contexts are nested, the `id` and the sizes of each that is entered, the innermost last; else None.

Entered on its own, a context knows that by its flag `alone`, and is noted here by None once another is entered inside
it. Contexts are not referred to: somebody else has to hold one, and one that nobody holds any more is left. An `id`
cannot come to mean another context, since a context takes its own away before it is freed. An empty list stands for
sizes that were set without a context.
"""


class StepSizes:
    """The counts of one step and the size lists made of them, which must not show on the surface of `DPMetadata`."""

    __slots__ = ("counts", "dp_rank", "last", "lists", "shown")

    def __init__(self, counts: tuple[int, ...], dp_rank: int | None = None, shown: Any = None) -> None:
        self.counts = counts
        self.dp_rank = dp_rank
        self.shown = shown  # the tensor that shows the counts, kept to see whether somebody wrote to it
        self.lists: dict[object, list[int]] = {}  # by what they were asked for with
        # What every layer asks for: the sequence-parallel size, its sizes, the tensor and its version then, in one
        # tuple, so that no other thread comes in between.
        self.last: tuple[object, list[int], Any, int] = (None, [], None, 0)

    def find(self, function: Callable[..., list[int]], *args: int) -> list[int]:
        """Return `function(counts, *args)`, computed if nobody asked before; errors name this rank."""
        # As plain integers, or True and 1.0, which equal 1, would pass or not with what was asked for before.
        key = (function, *map(as_plain_int, args))
        sizes = self.lists.get(key)
        if sizes is None:
            try:
                sizes = function(self.counts, *args)
            except ConfigurationError as error:
                if self.dp_rank is None:
                    raise
                raise ConfigurationError(f"{error} (on DP rank {self.dp_rank} of {len(self.counts)})") from None
            if len(self.lists) >= MOST_LISTS:
                self.lists.clear()
            self.lists[key] = sizes
        return sizes

    def find_last(self, sequence_parallel_size: int) -> list[int]:
        """Return the sizes of the whole step, and keep them in `last`."""
        sizes = self.find(sp_size_list, sequence_parallel_size)
        # Not by a tensor or array, which can be written to and be the same object with another value.
        if type(sequence_parallel_size) is int:
            self.last = (sequence_parallel_size, sizes, self.shown, self.shown._version)
        return sizes

    def __reduce__(self) -> tuple[object, ...]:
        # Lists are made anew where the copy arrives.
        return StepSizes, (self.counts, self.dp_rank, self.shown)


class SizesContext:
    """Puts sizes into `local_sizes` of a metadata object while it is entered.

    Of the contexts that are entered and not left, the last entered counts: leaving twice, without having entered, in
    another order, or by dropping the context never leaves sizes behind. No generator: callers from another language
    leave with strings where Python has an exception, at which a generator would raise and leave its sizes set.
    """

    # Whoever makes one sets the attributes. Every layer of every step makes one, and a constructor written in Python
    # would take a third of the time. For the same reason the usual case, one context at a time, is told by a flag.
    __slots__ = ("alone", "metadata", "sizes")
    metadata: Any  # a `DPMetadata`, or the same class with vLLM's surface
    sizes: list[int]
    alone: bool  # whether it is entered, and was so while no other was; see `Nested`

    def __enter__(self) -> list[int]:
        """Set the sizes and return them, `[ep_size]`. The list is shared: read it, do not change it."""
        metadata = self.metadata
        if metadata.local_sizes is None:
            self.alone = True
        else:
            enter_nested(metadata, self)
        metadata.local_sizes = sizes = self.sizes
        return sizes

    def __exit__(self, exc_type: object = None, exc: object = None, tb: object = None) -> Literal[False]:
        """Give the outer sizes back, or None. Takes foreign callers' strings too, and swallows no exception."""
        metadata = self.metadata
        if metadata._nested is not None:
            leave_nested(metadata, self)
        elif self.alone:
            self.alone = False
            metadata.local_sizes = None
        return False

    def __del__(self) -> None:
        # Almost always nothing is entered by now. One that was dropped without leaving leaves here.
        try:
            if self.metadata.local_sizes is not None:
                while is_entered(self):
                    self.__exit__()
        except AttributeError:
            return  # it never got its metadata, or has got one that failed while it was made

    def __repr__(self) -> str:
        return f"SizesContext({abridged(self.sizes)}, {'entered' if is_entered(self) else 'not entered'})"


def is_entered(context: SizesContext) -> bool:
    """Return whether a context is entered and not left."""
    return context.alone or any(key == id(context) for key, _ in context.metadata._nested or ())


def enter_nested(metadata: Any, context: SizesContext) -> None:
    """Note that a context is entered where sizes are set already."""
    if metadata._nested is None:
        metadata._nested = [(None, metadata.local_sizes)]
    if metadata._nested:
        metadata._nested.append((id(context), context.sizes))
    else:  # sizes that no context has set: nobody wants them back
        metadata._nested = None
        context.alone = True


def leave_nested(metadata: Any, context: SizesContext) -> None:
    """Leave a context among several (the last time it was entered), or one left before; show the innermost sizes."""
    nested: list[tuple[int | None, list[int] | None]] = metadata._nested or []
    keys = [key for key, _ in nested]
    if id(context) in keys:
        del nested[len(keys) - 1 - keys[::-1].index(id(context))]
    elif context.alone and None in keys:
        del nested[0]
        context.alone = False
    else:
        return
    metadata.local_sizes = nested[-1][1] if nested else None
    if not nested or (len(nested) == 1 and nested[0][0] is None):
        metadata._nested = None


def chunked_rows(counts: Sequence[int], sequence_parallel_size: int, *args: int) -> list[int]:
    """Return the rows of each rank in one chunk, `[ep_size]`; `args` are those of `chunk_sizes`."""
    return list(chunk_sizes(sp_sizes(counts, sequence_parallel_size), *args))


def cumulative_rows(counts: Sequence[int], sp_size: int) -> list[int]:
    """Return the running sum of the rows of each rank, `[ep_size]`."""
    return list(accumulate(sp_size_list(counts, check_int("sp_size", sp_size, 1))))
