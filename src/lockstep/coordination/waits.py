"""Waits that end: for a collective, for a GPU, for a call that may hang. Torch's own have no limit, or half an hour."""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

CHECK_S = 0.1
"""How often a wait looks whether the others are still there, in seconds."""

# See `pause`.
SPIN_NS = 20_000
_YIELD_NS = 400_000
_SLEEP_SHARE = 0.02
_SLEEP_S = (0.00002, 0.001)


def wait_for(work: dist.Work, timeout_s: float, check: Callable[[], None] | None = None) -> None:
    """Wait for an asynchronous collective; `check`, called every `CHECK_S` seconds, ends the wait by raising.

    Raises:
        TimeoutError: it did not end in time.
        ConnectionError: a peer's connection broke.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        # Slices, because Python sees Ctrl-C only between two waits. A slice that ends leaves the collective running.
        left_s = deadline - time.monotonic()
        try:
            work.wait(datetime.timedelta(seconds=min(max(left_s, 0.001), CHECK_S)))
            return
        except RuntimeError as error:
            message = first_line(error)
            if "imed out" not in message and "imeout" not in message:
                raise ConnectionError(f"a peer's connection broke ({message})") from error
            if work.is_completed():
                # It has come to its end since the slice ended: well, or by the group's own limit, which may come a
                # little before ours. Waiting once more says which, at once.
                with contextlib.suppress(RuntimeError):
                    work.wait()
                    return
                raise TimeoutError(f"no answer within {timeout_s:.3g} s") from error
            if left_s <= CHECK_S:
                raise TimeoutError(f"no answer within {timeout_s:.3g} s") from error
        if check is not None:
            check()


def wait_until(done: Callable[[], bool], timeout_s: float, check: Callable[[], None] | None = None) -> None:
    """Look until an event, or a collective, of a GPU is done; any other wait for it would have no limit.

    `check` is called every `CHECK_S` seconds and ends the wait by raising.

    Raises:
        TimeoutError: it was not done in time.
    """
    started = time.monotonic_ns()
    next_check = started + int(CHECK_S * 1e9)
    while not done():
        now = time.monotonic_ns()
        if now >= started + timeout_s * 1e9:
            raise TimeoutError(f"not done within {timeout_s:.3g} s")
        if now >= next_check:
            next_check = now + int(CHECK_S * 1e9)
            if check is not None:
                check()
        pause(now - started, SPIN_NS)


def pause(waited_ns: int, spin_ns: int) -> bool:
    """Let some time pass between two looks; return whether that was a sleep.

    A wait looks without pause for the first time, then gives way to other threads, and then sleeps between looks: for a
    share of what it has waited, so that it ends late by no more than that.
    """
    if waited_ns >= _YIELD_NS:
        time.sleep(min(max(_SLEEP_SHARE * waited_ns / 1e9, _SLEEP_S[0]), _SLEEP_S[1]))
        return True
    if waited_ns >= spin_ns:
        os.sched_yield()  # also to other threads; a sleep of 0 would take 60 us, the kernel's timer slack
    return False


def first_line(error: BaseException) -> str:
    """Return an exception's message up to its first line break; C++ stack traces follow there."""
    return str(error).strip().split("\n", 1)[0]


def within(call: Callable[[], T], seconds: float, last_answer: Callable[[], float] | None = None) -> T:
    """Run a function that may hang, such as one that asks a store whose keeper is gone, and wait at most so long.

    Args:
        call: the function; runs in a thread of its own.
        seconds: longest wait.
        last_answer: when it was last seen to go on, on the monotonic clock; the limit then counts from there.

    Raises:
        TimeoutError: it did not return in time; it is left behind.
        Exception: what it raised.
    """
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
        futures.wait([outcome], left_s)
    return outcome.result()
