"""The ranks of `lockstep.Engine` as processes of this host: their start, end and main function."""

from __future__ import annotations

import logging
import time
from multiprocessing.connection import Connection
from typing import Any

from lockstep.coordination.processes import ProcessState
from lockstep.errors import RankAbsentError
from lockstep.runner.failures import failure_of
from lockstep.runner.launcher import PRELOAD, loopback_store, rank_environment
from lockstep.runner.mailbox import ConnectionMailbox
from lockstep.runner.member import Member
from lockstep.runner.options import EngineOptions
from lockstep.runner.processes import OnMessage, Ranks
from lockstep.runner.ranks import detokenizer_of, find_tokenizer, make_engine

_STOP_S = 10.0
_LAST_WORDS_S = 5.0


class RankProcesses(Ranks):
    """Ranks that send `ready` once in each epoch; where they `can_survive`, they go on without those that die."""

    def __init__(self, options: EngineOptions) -> None:
        self.num_processes, self.num_data_ranks = options.world_size, options.data_parallel_size
        self.can_survive = options.can_survive
        self.store = loopback_store()
        self._options = options
        self._on_message: OnMessage
        super().__init__(
            self.num_processes, _run_worker, (options, self.store.port),
            lambda rank, message: self._on_message(rank, message), preload=PRELOAD,
            environment=lambda rank: rank_environment(rank, options.world_size), patience_s=options.deadline_s,
        )  # fmt: skip

    def start(self, on_message: OnMessage) -> None:
        """Start them. From then on `on_message(rank, message)` is called for each message, from any thread."""
        self._on_message = on_message
        self.__enter__()

    def send(self, data_rank: int, message: dict[str, Any]) -> None:
        """Send a message to all processes of a data-parallel rank."""
        size = self._options.tensor_parallel_size
        for process in self.processes[data_rank * size : (data_rank + 1) * size]:
            try:
                process.send(message)
            except RankAbsentError:
                if not self.can_survive:
                    raise
                process.kill()

    def check(self, is_ending: bool) -> None:
        """See `Ranks.check_stopped`."""
        self.check_stopped(self._options.deadline_s, is_ending, self.can_survive)

    def states(self) -> list[tuple[int, ProcessState]]:
        """Return each process and its state according to the operating system."""
        return [(process.pid, process.state()) for process in self.processes]

    def stop(self) -> None:
        """Let all ranks end, and wait for it."""
        for data_rank in range(self._options.data_parallel_size):
            self.send(data_rank, {"stop": True})
        until = time.monotonic() + _STOP_S
        for process in self.processes:
            process.exit_code(max(0.0, until - time.monotonic()))
        self.kill()


def _run_worker(connection: Connection, rank: int, options: EngineOptions, port: int, first_epoch: int = 0) -> None:
    """Run one rank until it is told to stop. Ranks meet in the store at this port. See `Member` for `first_epoch`."""
    mailbox = ConnectionMailbox(connection)
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    try:
        from transformers.utils import logging as transformers_logging

        from lockstep.runner.rank_loop import run_rank

        transformers_logging.disable_progress_bar()  # those of several ranks would overwrite each other
        detokenizer = detokenizer_of(find_tokenizer(options.model))
        member = Member(rank, options, port, options.start_timeout_s, mailbox.send, first_epoch)
        engines: list[Any] = []

        def serve(model: Any) -> None:
            mailbox.epoch = member.epoch
            engine = make_engine(model, options, engines)
            mailbox.send({"ready": engine.about()})
            run_rank(engine, mailbox, detokenizer=detokenizer, ends_epoch=member.was_asked_to_stop)

        member.work(serve)
        mailbox.send({"ended": True})
    except BaseException as error:
        mailbox.send(failure_of(rank, error))
    mailbox.flush(_LAST_WORDS_S)
