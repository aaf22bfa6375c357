"""Starts the ranks of one host, watches them, and ends them."""

import contextlib
import functools
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lockstep.coordination.processes import ProcessIdentity, ProcessState, pid_namespace
from lockstep.errors import ConfigurationError, LockstepError, RankAbsentError
from lockstep.runner.failures import error_of, failure_of, first_cause
from lockstep.runner.leftovers import STORE, end_with_parent, run_folder

logger = logging.getLogger(__name__)

# Imported once, in the server that the ranks are forked from: four ranks on two cores then start as fast as one.
_PRELOAD = (
    "torch.distributed.tensor",
    "transformers.generation.utils",
    "lockstep.engine.rank_engine",
    "lockstep.runner.run",
)
# How long the other ranks may go on once one has failed: they need it to notice, and to say so.
_AFTER_FAILURE_S = 3.0
_AFTER_INTERRUPT_S = 0.5
_AFTER_KILL_S = 5.0
# Ranks are forked from a server that has everything imported, but many of them on few cores take their time.
_START_S = 5.0
_LOOK_S = 0.25
# What the ranks themselves find out comes first: it says more.
_MARGIN_S = 1.5
_INTERRUPTED = 130
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable: how often all ranks have been started anew. torchrun's; `launch` sets it as well."""

Ranks = list[tuple[Any, Connection]]
"""Process and pipe of each rank."""


class _Lost(Exception):
    """Ranks died, or did not answer any more: what to raise if they are not started again."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def launch(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    max_restarts: int = 0,
    limit_s: float | None = None,
    deadline_s: float = 30.0,
    preload: Sequence[str] = _PRELOAD,
) -> Any:
    """Run `function(*args)` on `num_ranks` processes of this host, joined in a gloo group, and return rank 0's result.

    The ranks meet through a file and talk over loopback only. They end with this process, however it ends.

    Args:
        num_ranks: how many, >= 1.
        function: what each rank runs; importable by name. All ranks end it at about the same time.
        *args: its arguments.
        max_restarts: how often all ranks are started again after one of them died or did not answer before its
            deadline. The function finds the number of restarts in `RESTARTS_VARIABLE`, as under torchrun.
        limit_s: how long all of it may take, in seconds; None for as long as it takes.
        deadline_s: longest wait, in seconds, for a rank: to start, to go on where it was stopped, and to end once
            another one has.
        preload: modules that the server imports from which ranks are forked. It is started once per process.

    Raises:
        LockstepError: what the first failing rank raised, if it was one; ranks that did not end within `limit_s`.
        RankAbsentError: ranks that were stopped, or that did not end after the others had.
        PeerFailedError: for any other exception of a rank, or its death; carries message and rank.
        KeyboardInterrupt: after Ctrl-C, when all ranks have ended (within two seconds).
    """
    if num_ranks < 1:
        raise ConfigurationError(f"the number of ranks must be >= 1, got {num_ranks}")
    restarts = 0
    while True:
        try:
            with run_folder() as folder, forked_ranks(
                num_ranks, preload, _rank_main, num_ranks, str(folder), function, args, restarts, deadline_s
            ) as ranks:  # fmt: skip
                return _Watch(ranks, limit_s, deadline_s).result()
        except _Lost as lost:
            if restarts == max_restarts:
                raise lost.error from None
            restarts += 1
            logger.warning("%s; starting all ranks again, %d of %d times", lost, restarts, max_restarts)


@contextlib.contextmanager
def forked_ranks(num_ranks: int, preload: Sequence[str], main: Callable[..., None], *args: Any) -> Iterator[Ranks]:
    """Run `main(rank, sender, *args)` in processes forked from a server that has imported `preload`.

    In the block they are at work; they end with it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    ranks: Ranks = []
    try:
        with _uninterrupted():
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=main, args=(rank, sender, *args), name=f"rank-{rank}")
                process.start()
                sender.close()
                ranks.append((process, receiver))
        yield ranks
    except KeyboardInterrupt:
        for process, _ in ranks:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
        until = time.monotonic() + _AFTER_INTERRUPT_S
        for process, _ in ranks:
            process.join(max(0.0, until - time.monotonic()))
        raise
    finally:
        for process, receiver in ranks:
            if process.is_alive():
                process.kill()
            process.join(_AFTER_KILL_S)
            receiver.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back in the block: a rank that is only half started would be known to nobody.

    The server that ranks are forked from is started in it and inherits the mask: Ctrl-C is for this process and the
    ranks. The mask alone does not hold back what another thread of this process receives.
    """
    resource_tracker.ensure_running()  # which lifts the mask when it starts
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        if threading.current_thread() is threading.main_thread():
            for held in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(held) is not None:
                    before[held] = signal.signal(held, lambda number, _frame: came.append(number))
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number in came:
            signal.raise_signal(number)


class _Watch:
    """Waits for all ranks: for one that was stopped, and for the last ones, at most as long as for any rank."""

    def __init__(self, ranks: Ranks, limit_s: float | None, deadline_s: float) -> None:
        self._processes = [process for process, _ in ranks]
        self._limit_s = limit_s
        self._deadline_s = deadline_s
        self._waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
        self._failures: list[tuple[int, dict[str, Any]]] = []
        self._stopped_s = dict.fromkeys(range(len(ranks)), 0.0)
        self._result: Any = None

    def result(self) -> Any:
        """Return what rank 0 returned, or raise what is worth most of what the ranks said."""
        ends = math.inf if self._limit_s is None else time.monotonic() + self._limit_s
        until, why = ends, f"did not end within {self._limit_s or 0:g} s"
        while self._waiting:
            looked = time.monotonic()
            ready = wait(list(self._waiting), timeout=max(0.0, min(_LOOK_S, until - looked)))
            for receiver in ready:
                if self._take(receiver):
                    limit_s, text = self._deadline_s + _MARGIN_S, "did not end within {:g} s after other ranks had"
                else:
                    limit_s, text = _AFTER_FAILURE_S, "did not end within {:g} s after another rank had failed"
                if time.monotonic() + limit_s < until:
                    until, why = time.monotonic() + limit_s, text.format(limit_s)
            if ready:
                continue
            now = time.monotonic()
            stopped = self._stopped_too_long(min(now - looked, 2 * _LOOK_S))
            if stopped and not self._failures:
                raise self._absent(stopped, f"stood still for more than {self._deadline_s:g} s")
            if now >= until:
                break
        if self._failures:
            raise self._worst_failure()
        late = sorted(self._waiting.values())
        if late and until == ends:
            raise LockstepError(f"rank {', '.join(map(str, late))} {why}")
        if late:
            raise self._absent(late, why)
        return self._result

    def _take(self, receiver: Any) -> bool:
        """Take what a rank has sent, or note its death; return whether it has ended well."""
        rank = self._waiting.pop(receiver)
        try:
            message = receiver.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join(1.0)
            interrupted = process.exitcode == _INTERRUPTED
            why = f"its process ended with exit code {process.exitcode}"
            message = {"failed": "KeyboardInterrupt" if interrupted else "died", "why": why}
        if "failed" in message:
            self._failures.append((rank, message))
        elif rank == 0:
            self._result = message["done"]
        return "done" in message

    def _stopped_too_long(self, seconds: float) -> list[int]:
        """Count for how long each rank has been stopped. Time in which this process was stopped too does not count."""
        for rank in self._waiting.values():
            stopped = self._state(rank) == "stopped"
            self._stopped_s[rank] = self._stopped_s[rank] + seconds if stopped else 0.0
        # A little later than the ranks themselves, which know more of each other.
        limit_s = self._deadline_s + _MARGIN_S
        return [rank for rank in sorted(self._waiting.values()) if self._stopped_s[rank] > limit_s]

    def _state(self, rank: int) -> ProcessState:
        return ProcessIdentity(self._processes[rank].pid or 0, 0, pid_namespace()).state()

    def _absent(self, ranks: list[int], why: str) -> _Lost:
        states = "; ".join(f"the process of rank {rank} is {self._state(rank)}" for rank in ranks)
        numbers = ", ".join(map(str, ranks))
        return _Lost(RankAbsentError(f"rank{'s' if len(ranks) > 1 else ''} {numbers} {why}; {states}", tuple(ranks)))

    def _worst_failure(self) -> Exception:
        rank, message = first_cause(self._failures)
        if message["failed"] == "died":
            return _Lost(error_of(rank, message))
        if message["failed"] == "RankAbsentError":  # and none that says more
            stopped = [late for late in self._waiting.values() if self._state(late) == "stopped"]
            return _Lost(RankAbsentError(message["why"], tuple(stopped)))
        return error_of(rank, message)


def _rank_main(
    rank: int, sender: Connection, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...],
    restarts: int, deadline_s: float,
) -> None:  # fmt: skip
    """A rank's life, from the first line to the last: whatever ends it, no traceback of ours is left on the terminal.

    Until the handler stands, Ctrl-C is held back by the mask that the server of ranks has.
    """
    exit_code, pid = _INTERRUPTED, os.getpid()
    try:
        end_with_parent()
        signal.signal(signal.SIGINT, _interrupt_once)
        signal.signal(signal.SIGTERM, _terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ[RESTARTS_VARIABLE] = str(restarts)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        message = _run_rank(rank, num_ranks, folder, function, args, deadline_s)
        if os.getpid() == pid:
            sender.send(message)
            sender.close()
        exit_code = int("failed" in message)
    except Exception:
        logger.exception("rank %d could not say how it ended", rank)
        exit_code = 1
    except SystemExit as ended:  # of a process that the function has forked: its exit is not this rank's
        exit_code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        # At once: groups may be in any state, and waiting for an orderly end of them could take their whole time-out.
        os._exit(exit_code)


def _run_rank(
    rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...], deadline_s: float
) -> dict[str, Any]:
    import torch.distributed as dist

    from lockstep.runner.ranks import join_group

    pid = os.getpid()
    try:
        store = functools.partial(dist.FileStore, str(Path(folder, STORE)), num_ranks)
        join_group(rank, num_ranks, store, max(deadline_s, _START_S))
        return {"done": function(*args)}
    except BaseException as error:
        if os.getpid() != pid:  # a forked child unwinds: it has no say in what becomes of this rank
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from None
        if isinstance(error, KeyboardInterrupt):
            raise
        return failure_of(rank, error)


def _terminate(*_: object) -> None:
    """End at once: the launcher sees it, and says so."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt_once(*_: object) -> None:
    """Raise `KeyboardInterrupt`, and ignore Ctrl-C from then on: the rank is ending."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
