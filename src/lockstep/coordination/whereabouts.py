"""Where each rank is while it is outside of steps: starting, loading, meeting. Written by each, read by who waits."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lockstep.coordination.processes import ProcessIdentity
from lockstep.coordination.waits import within
from lockstep.errors import RankAbsentError

if TYPE_CHECKING:
    import torch.distributed as dist

_BEAT_S = 0.25
_STORE_S = 0.9
# Work between two beats below which a rank counts as standing still: CPU time, and bytes read.
_LEAST_CPU_S, _LEAST_BYTES = 0.002, 1 << 16


class Entry(NamedTuple):
    """What a rank has published: its place, "" for none, a `beat` that grows with its progress there, since when."""

    place: str = ""
    beat: int = 0
    since: float = 0.0
    process: ProcessIdentity = ProcessIdentity(0, 0, 0)

    def describe(self) -> str:
        """Return what is known of the rank, to stand after its number."""
        if not self.place:
            return "has not been seen"
        return f"was last seen {self.place}, {max(0.0, time.time() - self.since):.1f} s ago{self.process.describe()}"


class Whereabouts:
    """What a rank publishes about itself in a store of all ranks of a start, and finds there about other ranks.

    Ranks go by their numbers in the whole start, whatever groups they are in.
    """

    on_enter: ClassVar[Callable[[str], None] | None] = None
    """Called with the place at every `enter`; for tests that break things on purpose."""

    def __init__(self, store: "dist.Store", rank: int) -> None:
        self.rank = rank
        self._store = store
        self._process = ProcessIdentity.own()

    def enter(self, place: str, beat: int = 0) -> None:
        """Publish where this rank is, such as `loading /models/mixtral`; another `beat` than before shows progress."""
        self._store.set(str(self.rank), json.dumps([place, beat, time.time(), self._process]))
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
            beat, cpu_s, read = 0, time.clock_gettime(clock), _bytes_read()
            while not done.wait(_BEAT_S):
                if time.clock_gettime(clock) - cpu_s >= _LEAST_CPU_S or _bytes_read() - read >= _LEAST_BYTES:
                    beat, cpu_s, read = beat + 1, time.clock_gettime(clock), _bytes_read()
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

    def of(self, rank: int) -> Entry:
        """Return what a rank has published."""
        if not self._store.check([str(rank)]):
            return Entry()
        try:
            place, beat, since, (pid, started, namespace) = json.loads(self._store.get(str(rank)))
            return Entry(str(place), int(beat), float(since), ProcessIdentity(int(pid), int(started), int(namespace)))
        except (ValueError, TypeError):
            return Entry()

    def absent(self, message: str, ranks: Sequence[int], place: str) -> RankAbsentError:
        """Return the error for a wait of all `ranks` at a place, naming for whom it was, however the store answers.

        Those are the ranks whose process is gone or stopped, otherwise those that are elsewhere.
        """

        def look() -> tuple[tuple[int, ...], str]:
            entries = {rank: self.of(rank) for rank in ranks if rank != self.rank}
            lost = [rank for rank, entry in entries.items() if entry.process.state() in ("gone", "stopped")]
            late = lost or [rank for rank, entry in entries.items() if entry.place != place]
            return tuple(late), "".join(f"; rank {rank} {entries[rank].describe()}" for rank in late)

        try:
            late, seen = within(look, _STORE_S)
        except (RuntimeError, TimeoutError):
            late, seen = (), "; the store in which ranks say where they are does not answer"
        return RankAbsentError(f"{message}{seen}", late)


def _bytes_read() -> int:
    """Return how much this process has read, from files or disks; 0 where the system does not say."""
    try:
        figures = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(figures["rchar"]) + int(figures["read_bytes"])
    except (OSError, ValueError, KeyError):
        return 0
