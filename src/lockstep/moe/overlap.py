"""A step's chunks in two lanes: the next chunk's dispatch runs under the present one's experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lockstep.dispatch.base import Dispatcher

Lane = Callable[[str, int], contextlib.AbstractContextManager[Any]]
"""`lane(part, chunk)`: in this context a chunk's "dispatch", "experts" or "combine" is called."""


def call_order(num_chunks: int, overlap: bool) -> list[tuple[str, int]]:
    """Return what a rank calls for the chunks of a step, in order; the same on every rank.

    With overlap experts are called before the dispatch that is to run under them, so that it does even where kernels
    take less time than their calls.

    Args:
        num_chunks: of the step.
        overlap: whether a chunk is dispatched before the one before it is combined.

    Returns:
        `("dispatch" | "experts" | "combine", chunk)`, each part of each chunk once.

    Example:
        >>> " ".join(f"{part[0].upper()}{chunk}" for part, chunk in call_order(3, True))
        'D0 E0 D1 C0 E1 D2 C1 E2 C2'
        >>> " ".join(f"{part[0].upper()}{chunk}" for part, chunk in call_order(2, False))
        'D0 E0 C0 D1 E1 C1'
    """
    order = []
    for chunk in range(num_chunks):
        if chunk == 0 or not overlap:
            order.append(("dispatch", chunk))
        order.append(("experts", chunk))
        if overlap and chunk + 1 < num_chunks:
            order.append(("dispatch", chunk + 1))
        order.append(("combine", chunk))
    return order


def chunk_size(longest: int, limit: int, overlap_from: int | None) -> int:
    """Return in chunks of what size a step goes through, so that they are of about one length, and two or more.

    Args:
        longest: most rows of one rank in the step.
        limit: most rows of one rank in a chunk, >= 1.
        overlap_from: from how many rows of the longest rank on a step has two chunks or more; None: only by the limit.

    Example:
        >>> chunk_size(5000, 4096, None), chunk_size(4000, 4096, None), chunk_size(4000, 4096, 2048)
        (2500, 4096, 2000)
    """
    num_chunks = -(-longest // limit)
    if overlap_from is not None and longest >= max(2, overlap_from):
        num_chunks = max(2, num_chunks)
    return limit if num_chunks < 2 else -(-longest // num_chunks)


class Overlap:
    """A dispatcher for steps of several chunks, on a stream of its own beside that of the experts.

    On its stream every rank issues D0 D1 C0 D2 C1 D3 C2 ..., and its experts E0 E1 E2 ... on the stream of the caller,
    with events between them. Nothing can wait in a circle: kernels that spin for their peers come one after another and
    in one order on all ranks, so the first that is not done anywhere waits only for experts of an earlier chunk, which
    spin for nobody, and for blocks of experts to end that keep its own blocks out.

    On a GPU the dispatcher's kernels take a few multiprocessors, which the grouped products must leave to them:
    otherwise those that have begun elsewhere wait for the share of work that was given to these.

    Args:
        dispatcher: may have two dispatches under way; its channels take turns.
        device: of the rows.
        multiprocessors: that its kernels take, one block each.
    """

    def __init__(self, dispatcher: Dispatcher, device: torch.device, multiprocessors: int = 0) -> None:
        self.dispatcher = dispatcher
        self._multiprocessors = multiprocessors
        # Its blocks go before those that the experts still have to start.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextlib.contextmanager
    def step(self) -> Iterator[Lane]:
        """Enter a step whose parts are called in `call_order`; after it, the caller's stream has all results.

        Where the experts of a chunk are called, the combine of the chunk two before it is over for the caller's stream,
        so that what this combine read may be freed.
        """
        if self._stream is None:
            yield one_lane
            return
        mine, theirs = torch.cuda.current_stream(), self._stream
        theirs.wait_stream(mine)
        done: dict[tuple[str, int], Any] = {}

        @contextlib.contextmanager
        def lane(part: str, chunk: int) -> Iterator[None]:
            stream = mine if part == "experts" else theirs
            before = {"experts": "dispatch", "combine": "experts"}.get(part)
            if before is not None:
                stream.wait_event(done.pop((before, chunk)))
            with torch.cuda.stream(stream), _room(self._multiprocessors if part == "experts" else 0):
                yield
                if part != "combine":
                    done[part, chunk] = stream.record_event()

        try:
            yield lane
        finally:
            mine.wait_stream(theirs)


def one_lane(part: str, chunk: int) -> contextlib.AbstractContextManager[None]:
    """Stand in for a `Lane` where everything runs in the order of its calls."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def _room(multiprocessors: int) -> Iterator[None]:
    """Have PyTorch's grouped products leave so many multiprocessors free; other builds of it do without."""
    set_carveout = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if not multiprocessors or set_carveout is None:
        yield
        return
    before = torch._C._get_sm_carveout_experimental()
    set_carveout(multiprocessors)
    try:
        yield
    finally:
        set_carveout(before)
