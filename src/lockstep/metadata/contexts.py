# The contexts that DPMetadata hands to a `with` block: no torch here.

from collections.abc import Callable
from sys import getrefcount
from typing import Any, Literal

from lockstep.metadata.sizes import abridged

Nested = list[tuple[int | None, list[int] | None]] | None
"""The `id` and sizes of each entered context, innermost last, if contexts are nested; else None.

A context entered alone sets its flag `alone`; once another is entered inside it, its `id` here is None. Ids, not
references: a context that its user drops removes its id and is then freed, so no listed id is reused. An empty list
means that sizes were set without a context.
"""


class SizesContext:
    """Shows sizes as `local_sizes` of a metadata object while it is entered.

    The last entered of the contexts still open counts. Leaving twice, without having entered, in
    another order, or by dropping the context never leaves sizes behind. No generator: callers from another language
    pass strings to `__exit__` instead of an exception; a generator would raise on them and leave its sizes set.

    Once left, it rests in the metadata without a reference back, or the two would keep each other alive. From there the
    context of a whole step's sizes goes to layer after layer, but only if nobody else holds it, so callers cannot tell
    it from a new one.
    """

    # Every layer of every step enters one. So the usual case, one context at a time, is marked by a flag, and
    # the code that makes a context sets its attributes: a Python constructor would take a third of the time.
    __slots__ = ("alone", "expected", "key", "memory", "metadata", "owner", "shown", "sizes")
    metadata: Any  # a `DPMetadata`, or the same class with vLLM's surface; None while the context rests
    owner: Callable[[], Any]  # weak reference to the metadata
    sizes: list[int]
    alone: bool  # whether it is entered, and was entered while no other was; see `Nested`
    key: object  # the sequence-parallel size for which it may be handed out again; else the sizes
    shown: Any  # these three as in `StepSizes` of counts.py, if it may be handed out again
    memory: Any
    expected: Any

    def __enter__(self) -> list[int]:
        """Set the sizes and return them, `[ep_size]`. The list is shared: read it, do not change it."""
        metadata = self.metadata
        if metadata is None:
            metadata = self.metadata = self.owner()
            if metadata is None:  # gone, so nobody can read its sizes any more
                return self.sizes
            if metadata._resting is self:  # only its user holds it now, so that dropping it leaves
                metadata._resting = NO_CONTEXT
        if metadata.local_sizes is None:
            self.alone = True
        else:
            enter_nested(metadata, self)
        metadata.local_sizes = sizes = self.sizes
        return sizes

    def __exit__(self, exc_type: object = None, exc: object = None, tb: object = None) -> Literal[False]:
        """Restore the outer sizes, or None, and rest. Accepts foreign callers' strings, and swallows no exception."""
        metadata = self.metadata
        if self.alone and metadata._nested is None:
            self.alone = False
            metadata.local_sizes = self.metadata = None
            metadata._resting = self
        elif metadata is not None:
            leave_nested(metadata, self)
        return False

    def __del__(self) -> None:
        # Almost always nothing is entered by now. A context dropped without leaving is left here.
        try:
            if self.metadata is not None and self.metadata.local_sizes is not None:
                while is_entered(self):
                    leave_nested(self.metadata, self)
        except AttributeError:
            return  # it has no metadata, or metadata whose construction failed

    def __repr__(self) -> str:
        return f"SizesContext({abridged(self.sizes)}, {'entered' if is_entered(self) else 'not entered'})"


NO_CONTEXT = SizesContext()  # placeholder in the metadata while the context is in use, or not made yet
NO_CONTEXT.key = object()


def references(holder: SizesContext) -> int:
    """Return the reference count that a function sees for an object held only by an attribute."""
    held = holder.sizes
    return getrefcount(held)


NO_CONTEXT.sizes = []
UNSHARED = references(NO_CONTEXT)  # 3 up to Python 3.13, 2 where a local variable borrows its reference


def sizes_context(metadata: Any, sizes: list[int]) -> SizesContext:
    """Return a new context."""
    context = SizesContext()
    context.metadata, context.owner, context.alone = metadata, metadata._weak, False
    context.sizes = context.key = sizes
    return context


def is_entered(context: SizesContext) -> bool:
    """Return whether a context is entered and not left."""
    if context.metadata is None:
        return False
    return context.alone or any(key == id(context) for key, _ in context.metadata._nested or ())


def enter_nested(metadata: Any, context: SizesContext) -> None:
    """Record that a context is entered while sizes are already set."""
    if metadata._nested is None:
        metadata._nested = [(None, metadata.local_sizes)]
    if metadata._nested:
        metadata._nested.append((id(context), context.sizes))
    else:  # sizes that no context has set are not restored
        metadata._nested = None
        context.alone = True


def leave_nested(metadata: Any, context: SizesContext) -> None:
    """Leave one of several contexts (its last entry), or one already left; show the innermost sizes."""
    nested: list[tuple[int | None, list[int] | None]]
    nested = metadata._nested or ([(None, context.sizes)] if context.alone else [])
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
