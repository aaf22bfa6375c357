"""Runs a function on the ranks of one host, watches them, and ends them."""

import logging
import math
import os
import queue
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from lockstep.errors import ConfigurationError, LockstepError, PeerFailedError, RankAbsentError
from lockstep.runner.losses import Losses, failure_of, patience_with
from lockstep.runner.options import EngineOptions
from lockstep.runner.processes import LOOK_S, MARGIN_S, OnMessage, Ranks, rank_names

logger = logging.getLogger(__name__)

Said: TypeAlias = "queue.SimpleQueue[tuple[int, dict[str, Any]]]"
"""Messages of ranks, each with its rank."""

# Imported once, in the server that the ranks are forked from: four ranks on two cores then start as fast as one.
PRELOAD = (
    "torch.distributed.tensor",
    "transformers.generation.utils",
    "lockstep.engine.rank_engine",
    "lockstep.runner.run",
)
# Ranks are forked from a server with everything imported, but many of them on few cores are still slow.
_START_S = 5.0
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable: how often all ranks have been restarted. torchrun's; `launch` sets it as well."""


def launch(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    max_restarts: int = 0,
    limit_s: float | None = None,
    deadline_s: float = 30.0,
    preload: Sequence[str] = PRELOAD,
    survivors: EngineOptions | None = None,
) -> Any:
    """Run `function(*args)` on `num_ranks` processes of this host, joined in a gloo group, and return rank 0's result.

    A rank's `LockstepError` is raised here; its death or any other exception becomes a `PeerFailedError`. If ranks died
    or did not answer, all are started again, up to `max_restarts` times. `limit_s` is for each start as a whole,
    `deadline_s` for each wait for a rank. With the options `survivors`, `function` also gets the rank's `Member` as
    `member`, ranks go on without those that are lost, and the result is that of the first member.
    """
    if num_ranks < 1:
        raise ConfigurationError(f"the number of ranks must be >= 1, got {num_ranks}")
    can_survive, restart_ranks = (survivors.can_survive, survivors.restart_ranks) if survivors else (False, 0)
    restarts = 0
    while True:
        said: Said = queue.SimpleQueue()
        store = loopback_store()
        with Ranks(
            num_ranks, _rank_main, (num_ranks, store.port, deadline_s, function, args, survivors),
            _into(said), preload=preload, environment=partial(rank_environment, num_ranks=num_ranks, restarts=restarts),
        ) as ranks:  # fmt: skip
            patience_s = patience_with(deadline_s)
            losses = Losses(num_ranks, can_survive, patience_s, ranks.kill_one, store, ranks.start_again, restart_ranks)
            try:
                return _result(ranks, said, limit_s, deadline_s, losses)
            except (RankAbsentError, PeerFailedError) as error:
                if isinstance(error, RankAbsentError) and not error.absent_ranks:  # a rank's words, which named none
                    error.absent_ranks = tuple(each.rank for each in ranks.processes if each.state() == "stopped")
                lost = isinstance(error, RankAbsentError) or losses.cause_died
                if not lost or restarts == max_restarts:
                    raise
                restarts += 1
                logger.warning("%s; starting all ranks again, %d of %d times", error, restarts, max_restarts)


def _into(said: Said) -> OnMessage:
    return lambda rank, message: said.put((rank, message))


def rank_environment(rank: int, num_ranks: int, restarts: int = 0) -> dict[str, str]:
    """Return the variables of a rank that talks over loopback, unless the user has named another interface."""
    loopback = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, RESTARTS_VARIABLE: restarts}
    return {name: str(number) for name, number in numbers.items()} | loopback


def loopback_store() -> Any:
    """Return a store of this process in which ranks of this host meet."""
    import socket

    import torch.distributed as dist

    # By default the store would listen on every interface.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _result(ranks: Ranks, said: Said, limit_s: float | None, deadline_s: float, losses: Losses) -> Any:
    """Return the first member's result, or raise the failure that caused all others.

    A stopped rank, and those still at work when another has ended, are waited for as long as any rank is.
    """
    waiting = {process.rank for process in ranks.processes}
    result: Any = None
    ends = math.inf if limit_s is None else time.monotonic() + limit_s
    until, why = ends, f"did not end within {limit_s or 0:g} s"
    while waiting and time.monotonic() < until:
        try:
            rank, message = said.get(timeout=max(0.0, min(LOOK_S, until - time.monotonic())))
        except queue.Empty:
            if losses.can_survive or not losses.membership.is_ending:  # otherwise wait for the failure's cause
                ranks.check_stopped(deadline_s, losses.membership.is_ending, losses.can_survive)
        else:
            if "done" not in message:
                if rank in waiting or losses.can_survive:  # otherwise it has reported and ended
                    losses.take(rank, message)
            else:
                waiting.discard(rank)
                result = message["done"] if rank == losses.membership.members[0] else result
                after_s = deadline_s + MARGIN_S
                if time.monotonic() + after_s < until:
                    until = time.monotonic() + after_s
                    why = f"did not end within {after_s:g} s after other ranks had"
        if (members := losses.begin_epoch()) is not None:
            waiting, until = set(members), ends
    if waiting and until == ends:
        raise LockstepError(f"{rank_names(waiting)} {why}")
    if waiting:
        raise ranks.absent(sorted(waiting), why)
    return result


def _rank_main(
    connection: Connection, rank: int, num_ranks: int, port: int, deadline_s: float, function: Callable[..., Any],
    args: tuple[Any, ...], survivors: EngineOptions | None, first_epoch: int = 0,
) -> None:  # fmt: skip
    from lockstep.runner.ranks import Member, join_group, open_store

    pid = os.getpid()
    try:
        limit_s = max(deadline_s, _START_S)
        if survivors is not None:
            member = Member(rank, survivors, port, limit_s, connection.send, first_epoch)
            message = {"done": function(*args, member=member)}
        else:
            if num_ranks > 1:
                join_group(open_store(port, limit_s), rank, num_ranks, limit_s)
            message = {"done": function(*args)}
    except BaseException as error:
        if os.getpid() != pid:  # a forked child unwinds: it does not speak for this rank
            raise
        message = failure_of(rank, error)
    if os.getpid() == pid:
        connection.send(message)
