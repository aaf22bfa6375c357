"""Where each rank is while it is outside of steps: starting, loading, meeting. Written by each, read by who waits."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lockstep.coordination.processes import ProcessIdentity, ProcessState
from lockstep.coordination.waits import within

if TYPE_CHECKING:
    import torch.distributed as dist

_BEAT_S = 0.25
_STORE_S = 0.9
# Work between two beats below which a rank counts as standing still: CPU time, and bytes read.
_LEAST_CPU_S, _LEAST_BYTES = 0.002, 1 << 16


class Whereabouts:
    """What a rank publishes about itself in a torch store, and what it finds there about other ranks.

    Args:
        store: that all ranks of a start share.
        rank: this rank's number in the whole start, whatever groups it is in.
    """

    on_enter: ClassVar[Callable[[str], None] | None] = None
    """Called with the place at every `enter`; for tests that break things on purpose."""

    def __init__(self, store: "dist.Store", rank: int) -> None:
        self.rank = rank
        self._store = store
        self._identity = ProcessIdentity.own()

    def enter(self, place: str, beat: int = 0) -> None:
        """Publish where this rank is, such as `loading /models/mixtral`; another `beat` than before shows progress."""
        own = self._identity
        entry = [place, beat, time.time(), own.pid, own.started, own.namespace]
        self._store.set(str(self.rank), json.dumps(entry))
        if Whereabouts.on_enter is not None:
            Whereabouts.on_enter(place)

    @contextlib.contextmanager
    def working(self, place: str) -> Iterator[None]:
        """Publish that this rank works, for as long as it does: the other ranks then wait for it beyond a deadline.

        A rank works if this thread uses the CPU or this process reads. One that is stopped, asleep, or stuck on a disk
        that does not answer makes no progress, and the deadline of whoever waits for it runs.
        """
        done = threading.Event()
        clock = time.pthread_getcpuclockid(threading.get_ident())

        def publish() -> None:
            beat, before = 0, (time.clock_gettime(clock), _bytes_read())
            while not done.wait(_BEAT_S):
                now = (time.clock_gettime(clock), _bytes_read())
                if now[0] - before[0] >= _LEAST_CPU_S or now[1] - before[1] >= _LEAST_BYTES:
                    beat, before = beat + 1, now
                    try:
                        self.enter(place, beat)
                    except RuntimeError:  # the store is gone, and its keeper with it
                        return

        self.enter(place)
        threading.Thread(target=publish, name="lockstep-whereabouts", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def place(self, rank: int) -> str:
        """Return where a rank was last seen, "" where nothing is known."""
        entry = self._entry(rank)
        return entry[0] if entry else ""

    def beat(self, rank: int) -> object:
        """Return what changes whenever a rank enters a place or makes progress there."""
        entry = self._entry(rank)
        return (entry[0], entry[1]) if entry else None

    def state(self, rank: int) -> ProcessState:
        """Return what the operating system says about a rank's process; "unknown" for one of another host."""
        entry = self._entry(rank)
        return ProcessIdentity(*entry[3:6]).state() if entry else "unknown"

    def last_seen(self, rank: int) -> str:
        """Return what is known of a rank, to stand after its number."""
        entry = self._entry(rank)
        if entry is None:
            return "has not been seen"
        place, _, since, *identity = entry
        ago_s = max(0.0, time.time() - since)
        return f"was last seen {place}, {ago_s:.1f} s ago{ProcessIdentity(*identity).describe()}"

    def late(self, ranks: Sequence[int], place: str) -> tuple[tuple[int, ...], str]:
        """Find out for which of `ranks` a wait at a place was, however the store answers.

        Returns:
            The ranks whose process is gone or stopped, otherwise those that are elsewhere; and what is known of each,
            to stand at the end of a message.
        """

        def look() -> tuple[tuple[int, ...], str]:
            lost = [rank for rank in ranks if self.state(rank) in ("gone", "stopped")]
            late = lost or [rank for rank in ranks if self.place(rank) != place]
            return tuple(late), "".join(f"; rank {rank} {self.last_seen(rank)}" for rank in late)

        try:
            found: tuple[tuple[int, ...], str] = within(look, _STORE_S)
            return found
        except (RuntimeError, TimeoutError):
            return (), "; the store in which ranks say where they are does not answer"

    def _entry(self, rank: int) -> "tuple[str, int, float, int, int, int] | None":
        if not self._store.check([str(rank)]):
            return None
        try:
            place, beat, since, pid, started, namespace = json.loads(self._store.get(str(rank)))
            return str(place), int(beat), float(since), int(pid), int(started), int(namespace)
        except (ValueError, TypeError):
            return None


def _bytes_read() -> int:
    """Return how much this process has read, from files or disks; 0 where the system does not say."""
    try:
        figures = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(figures["rchar"]) + int(figures["read_bytes"])
    except (OSError, ValueError, KeyError):
        return 0
