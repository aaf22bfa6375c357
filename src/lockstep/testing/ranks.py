"""Run a function on n real ranks and get all results, or the first failing rank's traceback."""

import faulthandler
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lockstep.coordination.waits import INTERRUPTIBLE_S
from lockstep.errors import ConfigurationError
from lockstep.runner.processes import RankProcess, Ranks, how_it_ended

# Imported once, in the server that forks the ranks: a rank then starts in milliseconds instead of seconds.
_PRELOAD = (
    "torch.distributed.tensor",
    "lockstep.models.huggingface",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.mixtral.modeling_mixtral",
)
# How long the other ranks may continue after one has failed: enough to notice and report it.
_AFTER_FAILURE_S = 5.0


class RankFailure(AssertionError):
    """A rank raised, died or did not end in time. The message has its traceback, or each rank's stack."""


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, deadline_s: float = 60.0, may_die: Sequence[int] = ()
) -> list[Any]:
    """Run `function(*args)` on `num_ranks` real processes that share a gloo process group; return their results.

    The function finds its rank with `torch.distributed.get_rank()`. It and its arguments must be importable by name (no
    lambdas, no nested functions). Ranks are fresh processes with one thread each and torch already imported.

    Args:
        num_ranks: how many ranks, >= 1.
        function: run on each rank.
        *args: its arguments, the same on all ranks.
        deadline_s: limit in seconds; ranks that reach it are ended, and the error shows where each was.
        may_die: ranks that may die without a failure; their result is None.

    Returns:
        Each rank's return value, `[num_ranks]`.

    Raises:
        RankFailure: a rank raised, died, or did not end in time.
        ConfigurationError: `num_ranks` < 1.
    """
    if num_ranks < 1:
        raise ConfigurationError(f"num_ranks must be >= 1, got {num_ranks}")
    # The search for GPUs must not open one in the server: its children could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    said: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="lockstep-ranks-") as folder:
        about = (num_ranks, folder, function, args)
        with Ranks(num_ranks, _rank_main, about, lambda *message: said.put(message), preload=_PRELOAD) as ranks:
            return _collect(ranks, said, Path(folder), deadline_s, may_die)


def _collect(
    ranks: Ranks, said: "queue.SimpleQueue[tuple[int, dict[str, Any]]]", folder: Path, deadline_s: float,
    may_die: Sequence[int],
) -> list[Any]:  # fmt: skip
    num_ranks = len(ranks.processes)
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    until = time.monotonic() + deadline_s
    while len(results) + len(failures) < num_ranks and (left_s := until - time.monotonic()) > 0:
        try:
            rank, message = said.get(timeout=min(left_s, INTERRUPTIBLE_S))
        except queue.Empty:
            continue
        if rank in results or rank in failures:  # it has reported and ended
            continue
        if "done" in message or (message["failed"] == "died" and rank in may_die):
            results[rank] = message.get("done")
        else:
            failures[rank] = message["why"]
            until = min(until, time.monotonic() + _AFTER_FAILURE_S)
    if failures:
        raise RankFailure("\n".join(f"--- rank {rank} of {num_ranks}\n{text}" for rank, text in failures.items()))
    missing = sorted(set(range(num_ranks)) - results.keys())
    if missing:
        stacks = [f"--- rank {rank}\n{_stack_of(ranks.processes[rank], folder / f'stack{rank}')}" for rank in missing]
        raise RankFailure(f"ranks {missing} did not end within {deadline_s:g} s; they stood at\n" + "\n".join(stacks))
    return [results[rank] for rank in range(num_ranks)]


def _stack_of(process: RankProcess, path: Path) -> str:
    if process.state() == "gone":
        return how_it_ended(process.exit_code())
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return path.read_text() if path.exists() else "(no stack)"


def _rank_main(
    connection: Connection, rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    pid = os.getpid()
    with Path(folder, f"stack{rank}").open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            store = dist.FileStore(str(Path(folder, "store")), num_ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
            message = {"done": function(*args)}
        except BaseException as error:
            if os.getpid() != pid:  # a process forked by the function does not speak for the rank
                raise
            message = {"failed": type(error).__name__, "why": traceback.format_exc()}
        if os.getpid() == pid:
            connection.send(message)
