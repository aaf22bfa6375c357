"""The ranks of an engine: what its front needs of them, and those that are processes of this host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from lockstep.coordination.membership import publish
from lockstep.coordination.processes import ProcessState
from lockstep.errors import RankAbsentError
from lockstep.runner.launcher import MARGIN_S, PRELOAD, loopback_store, rank_environment
from lockstep.runner.processes import OnMessage, Ranks
from lockstep.runner.ranks import EngineOptions
from lockstep.runner.worker import run_worker

_STOP_S = 10.0


class EngineRanks(Protocol):
    """What an engine's front needs of the ranks behind it; `num_processes` of them send `ready` once each.

    Where they `can_survive`, they go on without those that die, as the front decides it.
    """

    num_processes: int
    can_survive: bool

    def start(self, on_message: OnMessage) -> None:
        """Start them. From then on `on_message(rank, message)` is called for each message, from any thread.

        A rank that has failed sends `{"failed": type, "why": text}` and nothing after that.
        """

    def send(self, data_rank: int, message: dict[str, Any]) -> None:
        """Send a message to all processes of a data-parallel rank."""

    def check(self, is_ending: bool = False) -> None:
        """Raise `RankAbsentError` for ranks that are stopped, or kill them where the others can survive that.

        `is_ending` where the others have noticed, and wait.
        """

    def kill_one(self, rank: int) -> None:
        """End a rank that is given up."""

    def publish(self, epoch: int, members: Sequence[int]) -> None:
        """Let ranks know who the members of an epoch are."""

    def states(self) -> list[tuple[int, ProcessState]]:
        """Return each process and what the operating system says of it."""

    def stop(self) -> None:
        """Let all ranks end, and wait for it."""

    def kill(self, error: BaseException | None = None) -> None:
        """End all ranks now, because of an error if there is one; from any thread, and as often as one likes."""


class RankProcesses:
    """Ranks as processes of this host. The methods are those of `EngineRanks`."""

    def __init__(self, options: EngineOptions) -> None:
        self.num_processes, self.can_survive = options.world_size, options.can_survive
        self._options = options
        self._store = loopback_store()
        self._ending = False
        self._on_message: OnMessage
        self._ranks = Ranks(
            self.num_processes, run_worker, (options, self._store.port), self._hear, preload=PRELOAD,
            environment=lambda rank: rank_environment(rank, options.world_size), patience_s=options.deadline_s,
        )  # fmt: skip

    def start(self, on_message: OnMessage) -> None:  # noqa: D102
        self._on_message = on_message
        self._ranks.__enter__()

    def send(self, data_rank: int, message: dict[str, Any]) -> None:  # noqa: D102
        size = self._options.tensor_parallel_size
        for process in self._ranks.processes[data_rank * size : (data_rank + 1) * size]:
            process.send(message)

    def kill_one(self, rank: int) -> None:  # noqa: D102
        self._ranks.processes[rank].kill()

    def publish(self, epoch: int, members: Sequence[int]) -> None:  # noqa: D102
        publish(self._store, epoch, members)

    def check(self, is_ending: bool = False) -> None:  # noqa: D102
        limit_s = self._options.deadline_s
        for rank in self._ranks.stopped(limit_s / 2 if is_ending else limit_s + MARGIN_S):
            if self.can_survive:
                self.kill_one(rank)
                continue
            stopped = f"rank {rank} was stopped (process {self._ranks.processes[rank].pid})"
            text = f"{stopped} and did not go on within {self._options.deadline_s:g} s"
            raise RankAbsentError(text, (rank,))

    def states(self) -> list[tuple[int, ProcessState]]:  # noqa: D102
        return [(process.pid, process.state()) for process in self._ranks.processes]

    def stop(self) -> None:  # noqa: D102
        self._ending = True
        for data_rank in range(self._options.data_parallel_size):
            self.send(data_rank, {"stop": True})
        until = time.monotonic() + _STOP_S
        for process in self._ranks.processes:
            process.exit_code(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self, error: BaseException | None = None) -> None:  # noqa: D102
        self._ending = True
        self._ranks.kill()

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if not self._ending:
            self._on_message(rank, message)
