"""The clock of a run in real time: elapsed seconds that all ranks agree on, and waits without burning CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from lockstep.workload import Request

_LONGEST_WAIT_S = 0.25
_LONG_GAP_S = 3600.0


class RunClock:
    """Seconds since a run's start, as one rank knows them.

    Ranks start at slightly different times, so their clocks differ. Every agreement carries each rank's
    `elapsed_ms`; the maximum counts, and ranks behind it catch up. So no request arrives on one rank before
    another rank can know, and no latency is negative. A clock begins at 0, or at the age of the run if ranks
    continue after a loss; if its source goes backwards, it stands still.

    Example:
        >>> times = iter([100.0, 101.5, 101.0, 101.25])
        >>> clock = RunClock(read=lambda: next(times))
        >>> clock.elapsed_ms(), clock.elapsed_ms(), clock.elapsed_ms()
        (1500, 1500, 1750)
    """

    def __init__(
        self,
        started_s: float = 0.0,
        read: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._read = read
        self._sleep = sleep
        self._elapsed_s = started_s
        self._last_reading = read()

    def elapsed_s(self) -> float:
        """Return the seconds since the run's start; never less than before."""
        reading = self._read()
        self._elapsed_s += max(0.0, reading - self._last_reading)
        self._last_reading = reading
        return self._elapsed_s

    def elapsed_ms(self) -> int:
        """Return the same in whole milliseconds, for the agreement: 24 days fit into one of its words."""
        return int(1000 * self.elapsed_s())

    def catch_up(self, agreed_ms: int) -> None:
        """Move forward to the agreed time if this rank is behind."""
        self._elapsed_s = max(self.elapsed_s(), agreed_ms / 1000)

    def moment(self, run_s: float) -> float:
        """Return the reading of the underlying clock at which the run was `run_s` seconds old, <= `elapsed_s()`."""
        elapsed_s = self.elapsed_s()
        return self._last_reading - (elapsed_s - run_s)

    def wait_for(self, run_s: float, longest_s: float) -> None:
        """Sleep until the run is `run_s` seconds old, at most `longest_s`: other ranks expect an agreement."""
        # One extra millisecond, since the agreement carries whole ones.
        wait_s = min(run_s - self.elapsed_s() + 0.001, longest_s, _LONGEST_WAIT_S)
        if wait_s > 0:
            self._sleep(wait_s)


def expected_duration(requests: Sequence[Request]) -> str:
    """Return a run's minimum duration in words, and the longest gap in which it only waits; requests by arrival.

    Example:
        >>> expected_duration([Request(0, 0.0, 1, 1), Request(1, 200_000.0, 1, 1)])
        '--clock wall: the last request arrives after 2 d 7 h 33 min, so the run takes at least that long; ranks wait \
2 d 7 h 33 min before request 1. --rate-scale shortens all gaps'
    """
    last_s = requests[-1].arrival_s if requests else 0.0
    told = f"--clock wall: the last request arrives after {_duration(last_s)}, so the run takes at least that long"
    gaps = [(b.arrival_s - a.arrival_s, b.request_id) for a, b in itertools.pairwise(requests)]
    gap_s, request_id = max(gaps, default=(0.0, 0))
    if gap_s < _LONG_GAP_S:
        return told
    return f"{told}; ranks wait {_duration(gap_s)} before request {request_id}. --rate-scale shortens all gaps"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
