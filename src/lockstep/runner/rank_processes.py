"""The ranks of an engine as processes of this host."""

from __future__ import annotations

import time
from typing import Any

from lockstep.coordination.processes import ProcessState
from lockstep.errors import RankAbsentError
from lockstep.runner.launcher import MARGIN_S, PRELOAD, loopback_store, rank_environment
from lockstep.runner.processes import OnMessage, Ranks
from lockstep.runner.ranks import EngineOptions
from lockstep.runner.worker import run_worker

_STOP_S = 10.0


class RankProcesses:
    """Ranks as processes of this host; `num_processes` of them send `ready` once in each epoch.

    Where they `can_survive`, they go on without those that die, as the front writes it into their `store`.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.num_processes, self.num_data_ranks = options.world_size, options.data_parallel_size
        self.can_survive = options.can_survive
        self.store = loopback_store()
        self._options, self._ending = options, False
        self._on_message: OnMessage
        self._ranks = Ranks(
            self.num_processes, run_worker, (options, self.store.port), self._hear, preload=PRELOAD,
            environment=lambda rank: rank_environment(rank, options.world_size), patience_s=options.deadline_s,
        )  # fmt: skip

    def start(self, on_message: OnMessage) -> None:
        """Start them. From then on `on_message(rank, message)` is called for each message, from any thread."""
        self._on_message = on_message
        self._ranks.__enter__()

    def send(self, data_rank: int, message: dict[str, Any]) -> None:
        """Send a message to all processes of a data-parallel rank."""
        size = self._options.tensor_parallel_size
        for process in self._ranks.processes[data_rank * size : (data_rank + 1) * size]:
            try:
                process.send(message)
            except RankAbsentError:
                if not self.can_survive:
                    raise
                process.kill()

    def check(self, is_ending: bool = False) -> None:
        """Raise `RankAbsentError` for ranks that are stopped, or kill them where the others can survive that.

        `is_ending` where the others have noticed, and wait.
        """
        limit_s = self._options.deadline_s
        for rank in self._ranks.stopped(limit_s / 2 if is_ending else limit_s + MARGIN_S):
            if self.can_survive:
                self.kill_one(rank)
                continue
            stopped = f"rank {rank} was stopped (process {self._ranks.processes[rank].pid})"
            raise RankAbsentError(f"{stopped} and did not go on within {limit_s:g} s", (rank,))

    def states(self) -> list[tuple[int, ProcessState]]:
        """Return each process and what the operating system says of it."""
        return [(process.pid, process.state()) for process in self._ranks.processes]

    def stop(self) -> None:
        """Let all ranks end, and wait for it."""
        self._ending = True
        for data_rank in range(self._options.data_parallel_size):
            self.send(data_rank, {"stop": True})
        until = time.monotonic() + _STOP_S
        for process in self._ranks.processes:
            process.exit_code(max(0.0, until - time.monotonic()))
        self.kill()

    def start_again(self, rank: int, first_epoch: int) -> None:
        """Start the process of a lost rank again; see `Member` for `first_epoch`."""
        self._ranks.start_again(rank, first_epoch)

    def kill_one(self, rank: int) -> None:
        """End a rank that is given up."""
        self._ranks.processes[rank].kill()

    def kill(self, _error: BaseException | None = None) -> None:
        """End all ranks now; from any thread, and as often as one likes."""
        self._ending = True
        self._ranks.kill()

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if not self._ending:
            self._on_message(rank, message)
