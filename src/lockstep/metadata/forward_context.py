"""The current step, for layers deep inside a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.dp_metadata import DPMetadata


@dataclass(frozen=True)
class ForwardContext:
    """What a layer may know of the current step; the same on all ranks except for the plan's own span.

    Attributes:
        dp_metadata: token counts of all data-parallel ranks.
        chunk_plan: the rows of each rank in each chunk of an MoE layer; None if the engine chunks by itself.
        step: step number, for messages and records.
    """

    dp_metadata: DPMetadata
    chunk_plan: ChunkPlan | None = None
    step: int = 0


_current: ContextVar[ForwardContext | None] = ContextVar("lockstep_forward_context", default=None)


@contextmanager
def set_forward_context(context: ForwardContext | DPMetadata) -> Iterator[ForwardContext]:
    """Make a step's context visible to `get_forward_context` inside the block. Blocks nest and restore the outer one.

    Args:
        context: the context, or a bare `DPMetadata` of which one is made.
    """
    if isinstance(context, DPMetadata):
        context = ForwardContext(context)
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def get_forward_context() -> ForwardContext:
    """Return the context of the step that this thread is running.

    Raises:
        RuntimeError: outside a `set_forward_context` block.
    """
    context = _current.get()
    if context is None:
        raise RuntimeError(
            "no forward context is set: run the model inside `with lockstep.join(model):`, or wrap the forward pass in "
            "`with lockstep.set_forward_context(metadata):`"
        )
    return context
