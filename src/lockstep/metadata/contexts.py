# The contexts that DPMetadata hands to a `with` block: no torch here.

from collections.abc import Callable
from sys import getrefcount
from typing import Any, Literal

from lockstep.metadata.sizes import abridged

Nested = list[tuple[int | None, list[int] | None]] | None
"""Where contexts are nested, the `id` and the sizes of each that is entered, the innermost last; else None.

A context that is entered alone has its flag `alone`; once another is entered inside it, None is its `id` here. Ids, not
references: a context that its user drops is freed, and removes its id before, so no listed id is reused. An empty list
means that sizes were set without a context.
"""


class SizesContext:
    """Shows sizes as `local_sizes` of a metadata object while it is entered.

    Of the contexts that are entered and not left, the last entered counts: leaving twice, without having entered, in
    another order, or by dropping the context never leaves sizes behind. No generator: callers from another language
    leave with strings where Python has an exception, at which a generator would raise and leave its sizes set.
    """

    # Every layer of every step enters one. The usual case, one context at a time, is therefore told by a flag, and
    # whoever makes a context sets its attributes: a constructor written in Python would take a third of the time.
    __slots__ = ("alone", "metadata", "owner", "sizes")
    metadata: Any  # a `DPMetadata`, or the same class with vLLM's surface; None while a `StepContext` rests
    owner: Callable[[], Any]  # weak reference to the metadata, of a `StepContext`
    sizes: list[int]
    alone: bool  # whether it is entered, and was so while no other was; see `Nested`

    def __enter__(self) -> list[int]:
        """Set the sizes and return them, `[ep_size]`. The list is shared: read it, do not change it."""
        metadata = self.metadata
        if metadata is None:
            metadata = self.metadata = self.owner()
            if metadata is None:  # gone, and with it everybody who could read its sizes
                return self.sizes
            if metadata._resting is self:  # held by its user alone again, so that dropping it leaves
                metadata._resting = NO_CONTEXT
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
            if self.metadata is not None and self.metadata.local_sizes is not None:
                while is_entered(self):
                    SizesContext.__exit__(self)  # without going to rest
        except AttributeError:
            return  # it never got its metadata, or has got one that failed while it was made

    def __repr__(self) -> str:
        return f"SizesContext({abridged(self.sizes)}, {'entered' if is_entered(self) else 'not entered'})"


class StepContext(SizesContext):
    """The context of a whole step's sizes: one object, handed out to layer after layer.

    Once left, it rests in the metadata without a reference to it, or the two would keep each other alive. It is handed
    out again only if nobody else holds it, so callers cannot tell it from a new one.
    """

    __slots__ = ("expected", "key", "memory", "shown")
    key: object  # the sequence-parallel size that it was asked for with
    shown: Any  # these three as in `StepSizes` of counts.py
    memory: Any
    expected: Any

    def __exit__(self, exc_type: object = None, exc: object = None, tb: object = None) -> Literal[False]:
        """Give the outer sizes back, or None, and rest. Takes foreign callers' strings too."""
        metadata = self.metadata
        if self.alone and metadata._nested is None:
            self.alone = False
            metadata.local_sizes = self.metadata = None
            metadata._resting = self
        elif metadata is not None:
            leave_nested(metadata, self)
        return False


NO_CONTEXT = StepContext()  # rests in the metadata while the context is handed out, or not made yet
NO_CONTEXT.key = object()


def references(holder: SizesContext) -> int:
    """Return how many references a function counts to an object that only an attribute holds."""
    held = holder.sizes
    return getrefcount(held)


NO_CONTEXT.sizes = []
UNSHARED = references(NO_CONTEXT)  # 3 up to Python 3.13, 2 where a local variable borrows its reference


def sizes_context(metadata: Any, sizes: list[int]) -> SizesContext:
    """Return a context that is used once."""
    context = SizesContext()
    context.metadata, context.sizes, context.alone = metadata, sizes, False
    return context


def is_entered(context: SizesContext) -> bool:
    """Return whether a context is entered and not left."""
    if context.metadata is None:
        return False
    return context.alone or any(key == id(context) for key, _ in context.metadata._nested or ())


def enter_nested(metadata: Any, context: SizesContext) -> None:
    """Note that a context is entered where sizes are set already."""
    if metadata._nested is None:
        metadata._nested = [(None, metadata.local_sizes)]
    if metadata._nested:
        metadata._nested.append((id(context), context.sizes))
    else:  # sizes that no context has set are not restored
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
