"""Starts the ranks of one host, watches them, and ends them."""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import lockstep.errors
from lockstep.errors import ConfigurationError, LockstepError, PeerFailedError, RankAbsentError

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
_INTERRUPTED = 130
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable: how often all ranks have been started anew. torchrun's; `launch` sets it as well."""


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
    preload: Sequence[str] = _PRELOAD,
) -> Any:
    """Run `function(*args)` on `num_ranks` processes of this host, joined in a gloo group, and return rank 0's result.

    The ranks meet through a file and talk over loopback only. They end with this process, however it ends.

    Args:
        num_ranks: how many, >= 1.
        function: what each rank runs; importable by name.
        *args: its arguments.
        max_restarts: how often all ranks are started again after one of them died or did not answer before its
            deadline. The function finds the number of restarts in `RESTARTS_VARIABLE`, as under torchrun.
        limit_s: how long all of it may take, in seconds; None for as long as it takes.
        preload: modules that the server imports from which ranks are forked. It is started once per process.

    Raises:
        LockstepError: what the first failing rank raised, if it was one; ranks that did not end within `limit_s`.
        PeerFailedError: for any other exception of a rank, or its death; carries message and rank.
        KeyboardInterrupt: after Ctrl-C, when all ranks have ended (within two seconds).
    """
    if num_ranks < 1:
        raise ConfigurationError(f"the number of ranks must be >= 1, got {num_ranks}")
    for restarts in range(max_restarts + 1):
        try:
            return _launch_once(num_ranks, function, args, restarts, limit_s, preload)
        except _Lost as lost:
            if restarts == max_restarts:
                raise lost.error from None
            logger.warning("%s; starting all ranks again, %d of %d times", lost, restarts + 1, max_restarts)
    raise AssertionError


def _launch_once(
    num_ranks: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    restarts: int,
    limit_s: float | None,
    preload: Sequence[str],
) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    ends = None if limit_s is None else time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        ranks: list[tuple[Any, Connection]] = []
        try:
            # The server that ranks are forked from inherits the mask: Ctrl-C is for this process and the ranks.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(rank, num_ranks, folder, sender, function, args, restarts),
                    name=f"rank-{rank}",
                )
                process.start()
                sender.close()
                ranks.append((process, receiver))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            return _watch(ranks, ends, limit_s)
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
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for process, receiver in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
                receiver.close()


def _watch(ranks: list[tuple[Any, Connection]], ends: float | None, limit_s: float | None) -> Any:
    """Wait for all ranks; once one has failed, only a little longer for the others."""
    result: Any = None
    failures: list[tuple[int, str, str]] = []
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    until = ends
    while waiting:
        ready = wait(list(waiting), timeout=None if until is None else max(0.0, until - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                kind, value = receiver.recv()
            except (EOFError, ConnectionResetError):
                process = ranks[rank][0]
                process.join(1.0)
                kind, value = "died", f"its process ended with exit code {process.exitcode}"
                if process.exitcode == _INTERRUPTED:
                    kind = "KeyboardInterrupt"
            if kind == "done":
                result = value if rank == 0 else result
            else:
                failures.append((rank, kind, value))
                until = min(until or math.inf, time.monotonic() + _AFTER_FAILURE_S)
    if not failures and waiting:
        late = ", ".join(map(str, sorted(waiting.values())))
        raise LockstepError(f"rank {late} did not end within {limit_s:g} s")
    if not failures:
        return result
    # The cause, not its echoes: a rank that reports another's failure comes last.
    failures.sort(key=lambda failure: failure[1] in ("PeerFailedError", "RankAbsentError"))
    rank, kind, message = failures[0]
    if kind == "died":
        raise _Lost(PeerFailedError(f"rank {rank} failed: {message}", rank, message))
    if kind == "RankAbsentError":  # and none that says more
        raise _Lost(RankAbsentError(message))
    if kind == "OSError":  # a full disk is no fault of the ranks
        raise OSError(f"rank {rank}: {message}")
    error_class = getattr(lockstep.errors, kind, None)
    if isinstance(error_class, type) and issubclass(error_class, LockstepError):
        raise error_class(message)
    raise PeerFailedError(f"rank {rank} failed: {message}", rank, message)


def _rank_main(
    rank: int,
    num_ranks: int,
    folder: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    restarts: int,
) -> None:
    import torch
    import torch.distributed as dist

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ[RESTARTS_VARIABLE] = str(restarts)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    exit_code = 0
    try:
        if num_ranks > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
            if torch.cuda.is_available():
                torch.cuda.set_device(rank % torch.cuda.device_count())
            store = dist.FileStore(str(Path(folder, "store")), num_ranks)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
        sender.send(("done", function(*args)))
    except KeyboardInterrupt:
        exit_code = _INTERRUPTED
    except (LockstepError, OSError) as error:
        kind = (
            "OSError" if isinstance(error, OSError) and not isinstance(error, LockstepError) else type(error).__name__
        )
        sender.send((kind, str(error)))
        exit_code = 1
    except BaseException as error:
        logger.error("rank %d failed:\n%s", rank, traceback.format_exc())
        sender.send((type(error).__name__, f"{type(error).__name__}: {error}"))
        exit_code = 1
    sender.close()
    # At once: groups may be in any state, and waiting for an orderly end of them could take their whole time-out.
    os._exit(exit_code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
