"""Waits with a deadline: for a collective, a GPU, or a call that may hang. Torch waits half an hour, or forever."""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from lockstep.errors import LockstepError, RankAbsentError

if TYPE_CHECKING:
    from lockstep.coordination.peers import Peers

T = TypeVar("T")

DEADLINE_S = 30.0  # default longest wait for any rank, in seconds
INTERRUPTIBLE_S = 0.25
"""Longest single wait of a user's thread; longer ones repeat it.

Python handles signals between two calls. A signal that arrives just before a wait does not interrupt it, so Ctrl-C
would have no effect until the wait ends, and some never do.
"""
SPIN_NS = 20_000  # how long a wait spins
_CHECK_S = 0.1
_YIELD_NS = 400_000
_SLEEP_SHARE = 0.02
_SLEEP_S = (0.00002, 0.001)

_waited = threading.local()


class Lookout:
    """The pauses between the polls of one wait: none at first, then yields, then sleeps.

    `check` may end the wait by an error; where it returns True, a rank compiles, and the time limit starts anew.
    """

    def __init__(self, timeout_s: float, check: Callable[[], object] | None, spin_ns: int = SPIN_NS) -> None:
        self._timeout_s, self._check, self._spin_ns = timeout_s, check, spin_ns
        self._start()

    def _start(self) -> None:
        self._started_ns = time.monotonic_ns()
        self._next_check_ns = _CHECK_S * 1e9

    def pause(self) -> None:
        """Pause until the next poll; `TimeoutError` after the time limit."""
        waited_ns = time.monotonic_ns() - self._started_ns
        if waited_ns >= self._timeout_s * 1e9:
            raise TimeoutError(f"no answer within {self._timeout_s:.3g} s")
        if waited_ns >= self._next_check_ns:
            self._next_check_ns = waited_ns + _CHECK_S * 1e9
            if self._check is not None and self._check():
                self._start()
        if waited_ns >= _YIELD_NS:
            time.sleep(min(max(_SLEEP_SHARE * waited_ns / 1e9, _SLEEP_S[0]), _SLEEP_S[1]))
        elif waited_ns >= self._spin_ns:
            os.sched_yield()  # also to other threads; a sleep of 0 would take 60 us, the kernel's timer slack


def wait_until(done: Callable[[], bool], timeout_s: float, check: Callable[[], object] | None = None) -> None:
    """Poll until an event or collective of a GPU is done; any other wait for it has no limit."""
    lookout = Lookout(timeout_s, check)
    while not done():
        lookout.pause()


def wait_for(work: dist.Work, timeout_s: float, check: Callable[[], object] | None = None) -> None:
    """Wait for an asynchronous collective of gloo: a `TimeoutError`, or a `ConnectionError` where a peer's broke."""
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            # In slices: Python sees Ctrl-C only between two waits. A slice that ends leaves the collective running.
            work.wait(datetime.timedelta(seconds=min(max(left_s, 0.001), _CHECK_S)))
            return
        except RuntimeError as error:
            message = first_line(error)
            if "imed out" not in message and "imeout" not in message:
                raise ConnectionError(f"a peer's connection broke ({message})") from error
            completed = work.is_completed()
            if completed:
                # It has ended since the slice did: with success, or by the group's own limit, which may come a little
                # before ours. Waiting once more tells which, at once.
                with contextlib.suppress(RuntimeError):
                    work.wait()
                    return
            if completed or left_s <= _CHECK_S:
                raise TimeoutError(f"no answer within {timeout_s:.3g} s") from error
        if check is not None:
            check()


def join(thread: threading.Thread) -> None:
    """Wait until a thread has ended; Ctrl-C always interrupts it."""
    while thread.is_alive():
        thread.join(INTERRUPTIBLE_S)


def within(call: Callable[[], T], seconds: float, last_answer: Callable[[], float] | None = None) -> T:
    """Run a call that may hang in a thread; `TimeoutError` `seconds` after its start, or after `last_answer()`."""
    outcome: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    started = time.monotonic()
    threading.Thread(target=run, name="lockstep-store", daemon=True).start()
    while not outcome.done():
        left_s = (last_answer() if last_answer is not None else started) + seconds - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no answer within {seconds:.3g} s")
        futures.wait([outcome], min(left_s, INTERRUPTIBLE_S))
    return outcome.result()


def first_line(error: BaseException) -> str:
    """Return an exception's message up to its first line break; C++ stack traces follow there."""
    return str(error).strip().split("\n", 1)[0]


@dataclass
class _Watch:
    """Who watches a group's waits; `members` are its ranks, empty for all; `parked` waits for its last GPU work."""

    peers: "Peers"
    members: tuple[int, ...]
    parked: Callable[[], None] | None = None


_watches: dict[str, _Watch] = {}


def watch_group(group: dist.ProcessGroup, peers: "Peers | None", members: Sequence[int] = ()) -> None:
    """Let `peers` watch the waits of a group's collectives; None ends that. `members`: see `_Watch`."""
    _watches.pop(group.group_name, None)
    if peers is not None:
        _watches[group.group_name] = _Watch(peers, tuple(members))


def peers_of(group: dist.ProcessGroup) -> "Peers | None":
    """Return the peers that watch a group, if any."""
    watch = _watches.get(group.group_name)
    return watch.peers if watch is not None else None


def waited_s() -> float:
    """Return this thread's total time waiting in collectives, in seconds; take differences for single steps."""
    seconds: float = getattr(_waited, "seconds", 0.0)
    return seconds


def count_wait(started: float) -> None:
    """Add the time since `started`, by `time.perf_counter`, to this thread's total wait."""
    _waited.seconds = waited_s() + time.perf_counter() - started


def await_parked(peers: "Peers") -> None:
    """Wait for the parked work of these peers' groups. Call it before the host reads anything from the GPU."""
    for watch in list(_watches.values()):
        if watch.peers is peers and watch.parked is not None:
            parked, watch.parked = watch.parked, None
            parked()


def await_work(
    work: dist.Work, name: str, group: dist.ProcessGroup, deadline_s: float = DEADLINE_S, *, host_waits: bool = True,
    on_gpu: bool | None = None,
) -> None:  # fmt: skip
    """Wait for a collective, or raise `RankAbsentError`. On a GPU, without `host_waits`, park it for `await_parked`."""
    watch = _watches.get(group.group_name)
    check = watch.peers.check if watch is not None else None
    on_gpu = dist.get_backend(group) == "nccl" if on_gpu is None else on_gpu
    if on_gpu:
        work.wait()  # orders streams; the host would go on, and wait without a limit where it next needs a result

    def wait() -> None:
        started = time.perf_counter()
        try:
            if on_gpu:
                wait_until(work.is_completed, deadline_s, check)
                return  # most of that wait was for this rank's own GPU
            wait_for(work, deadline_s, check)
            count_wait(started)
        except (LockstepError, TimeoutError, ConnectionError) as error:
            if watch is not None:
                watch.peers.end_wait(name, started, deadline_s, error, watch.members)
            who = f"rank {group.rank()}: {name}"
            text = f"{who} did not end within {deadline_s:g} s: {error}; its group is not used again"
            raise RankAbsentError(text) from error

    if on_gpu and watch is not None:
        # Work of one group ends in order: a wait for this piece covers what was parked before.
        watch.parked = None if host_waits else wait
        if not host_waits:
            return
    wait()
