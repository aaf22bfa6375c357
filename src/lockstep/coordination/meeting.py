"""Where ranks are outside of steps, and how they meet: all of them or none."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lockstep.coordination.processes import ProcessIdentity
from lockstep.coordination.waits import first_line, within
from lockstep.errors import RankAbsentError

if TYPE_CHECKING:
    import torch.distributed as dist

# A meeting polls often at first, then less: after a share of the time it has waited.
_POLL_S, _POLL_SHARE, _LONGEST_POLL_S = 0.002, 0.02, 0.05
_LOOK_S = 0.1
_MARGIN_S = 0.5
_BEAT_S = 0.25
_STORE_S = 0.9
# Minimum progress between two beats, else a rank counts as stalled: CPU time, and bytes read.
_LEAST_CPU_S, _LEAST_BYTES = 0.002, 1 << 16


class Entry(NamedTuple):
    """A rank's published place ("" for none), a `beat` that grows with its progress there, and its arrival time."""

    place: str = ""
    beat: int = 0
    since: float = 0.0
    process: ProcessIdentity = ProcessIdentity(0, 0, 0)

    def describe(self) -> str:
        """Return what is known of the rank, in words that follow its number."""
        if not self.place:
            return "has not been seen"
        return f"was last seen {self.place}, {max(0.0, time.time() - self.since):.1f} s ago{self.process.describe()}"


class Whereabouts:
    """Publishes a rank's own place in the start's store, and reads the other ranks' places there, by number."""

    on_enter: ClassVar[Callable[[str], None] | None] = None
    """Called with the place at every `enter`; for tests that break things on purpose."""

    def __init__(self, store: "dist.Store", rank: int) -> None:
        self.rank = rank
        self._store = store
        self._process = ProcessIdentity.own()

    def enter(self, place: str, beat: int = 0) -> None:
        """Publish where this rank is, such as `loading /models/mixtral`; a changed `beat` shows progress."""
        self._store.set(str(self.rank), json.dumps([place, beat, time.time(), self._process]))
        if Whereabouts.on_enter is not None:
            Whereabouts.on_enter(place)

    @contextlib.contextmanager
    def working(self, place: str) -> Iterator[None]:
        """Publish progress (this thread's CPU time, bytes read) inside the block: it extends other ranks' deadlines."""
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
        place, beat, since, process = json.loads(self._store.get(str(rank)))
        return Entry(place, beat, since, ProcessIdentity(*process))

    def absent(self, message: str, ranks: Sequence[int], place: str) -> RankAbsentError:
        """Return the error of a wait for `ranks` at a place, naming those gone or stopped, or else those elsewhere."""

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
    """Return how many bytes this process has read; 0 where the system does not say."""
    try:
        figures = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(figures["rchar"]) + int(figures["read_bytes"])
    except (OSError, ValueError, KeyError):
        return 0


class MeetingPlace:
    """Where ranks exchange a few facts through a torch store, which outlives every group; `name` is for messages.

    A meeting either completes, and every rank knows all facts, or fails, and no rank takes part in it again. The first
    rank to decide writes which. A rank that comes too late waits in the next meeting.
    """

    def __init__(
        self, store: "dist.Store", rank: int, num_ranks: int, *, name: str = "join()",
        whereabouts: Whereabouts | None = None, processes: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.name = name
        self._store = store
        self._processes = list(processes or range(num_ranks))
        self._whereabouts = whereabouts or Whereabouts(store, self._processes[rank])
        self._answered = 0.0

    def meet(self, facts: dict[str, Any], deadline_s: float, *, once: bool = False) -> list[dict[str, Any]]:
        """Wait for all ranks and return the facts, JSON, that each brought, `[num_ranks]`, or raise `RankAbsentError`.

        Collective. `deadline_s` is for a rank without progress, see `Whereabouts.working`. `once`: there is no next.
        """
        self._answered, limit_s = time.monotonic(), deadline_s + _MARGIN_S
        store = f"rank {self._processes[self.rank]}: the store through which ranks meet"
        try:
            return within(lambda: self._meet(facts, deadline_s, once), limit_s, lambda: self._answered)
        except RankAbsentError:
            raise
        except TimeoutError as error:
            why = f"did not answer within {limit_s:g} s: the process that keeps it may have stopped"
            raise RankAbsentError(f"{store} {why}") from error
        except RuntimeError as error:
            raise RankAbsentError(f"{store} does not answer: {first_line(error)}") from error

    def _meet(self, facts: dict[str, Any], deadline_s: float, once: bool) -> list[dict[str, Any]]:
        store, ranks = self._store, range(len(self._processes))
        self._whereabouts.enter(f"waiting in {self.name}")
        number = 0 if once else self._current()
        store.set(f"{number}/{self.rank}", json.dumps(facts))
        patience = Patience(self._whereabouts, deadline_s)
        while True:
            missing = [rank for rank in ranks if not store.check([f"{number}/{rank}"])]
            given_up = patience.exhausted([self._processes[rank] for rank in missing])
            if not missing:
                verdict = self._settle(number, "complete")
            elif given_up:
                verdict = self._settle(number, json.dumps(given_up))
            else:
                verdict = self._verdict(number)
            self._answered = time.monotonic()
            if verdict == "complete":
                self._whereabouts.enter(f"after {self.name}")
                return [json.loads(store.get(f"{number}/{rank}")) for rank in ranks]
            if verdict:
                absent = json.loads(verdict)
                if self._processes[self.rank] not in absent or once:
                    raise self._absent(absent, deadline_s)
                # It ended just before this rank came: join the next one, with the remaining time.
                number = self._current()
                store.set(f"{number}/{self.rank}", json.dumps(facts))
            time.sleep(min(max(_POLL_S, _POLL_SHARE * (self._answered - patience.began)), _LONGEST_POLL_S))

    def _absent(self, absent: list[int], deadline_s: float) -> RankAbsentError:
        own = self._processes[self.rank]
        if own in absent:
            text = f"rank {own} entered {self.name} after the other ranks had waited {deadline_s:g} s and given up"
            return RankAbsentError(text, tuple(absent))
        text = f"rank {own}: ranks {absent} did not enter {self.name} within {deadline_s:g} s"
        for rank in absent:
            entry = self._whereabouts.of(rank)
            if entry.place == f"waiting in {self.name}":  # it waited earlier, in vain
                continue
            text += f"; rank {rank} {entry.describe()}"
            if entry.place.startswith("waiting in join() of") and self.name.startswith("join() of"):
                text += "; all ranks join their models in one order"
        return RankAbsentError(text, tuple(absent))

    def _current(self) -> int:
        """The number of the first meeting that has not ended."""
        number = int(self._store.get("now")) if self._store.check(["now"]) else 0
        while self._verdict(number):
            number += 1
        return number

    def _verdict(self, number: int) -> str:
        key = f"{number}/verdict"
        verdict: bytes = self._store.get(key) if self._store.check([key]) else b""
        return verdict.decode()

    def _settle(self, number: int, verdict: str) -> str:
        """Write a meeting's verdict unless it has one; return the valid one."""
        first: bytes = self._store.compare_set(f"{number}/verdict", "", verdict)
        self._store.compare_set("now", str(number) if number else "", str(number + 1))
        return first.decode()


class Patience:
    """How long to wait for each rank: until it is gone, or a deadline after its last sign of progress."""

    def __init__(self, whereabouts: Whereabouts, deadline_s: float) -> None:
        self.began = self._looked = time.monotonic()
        self._whereabouts = whereabouts
        self._deadline_s = deadline_s
        self._beats: dict[int, tuple[str, int]] = {}
        self._changed: dict[int, float] = {}

    def exhausted(self, missing: Sequence[int]) -> list[int]:
        """Return the missing ranks whose wait is over."""
        now, gone = time.monotonic(), set()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            for rank in missing:
                place, beat, _, process = self._whereabouts.of(rank)
                if self._beats.setdefault(rank, (place, beat)) != (place, beat):
                    self._beats[rank], self._changed[rank] = (place, beat), now
                if process.state() == "gone":
                    gone.add(rank)
        late = {rank for rank in missing if now - self._changed.get(rank, self.began) > self._deadline_s}
        return sorted(gone | late)
