"""The ranks of `lockstep.Engine`: processes of this host, or, under torchrun, a thread beside the script."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from lockstep.coordination.processes import ProcessState
from lockstep.coordination.waits import join
from lockstep.errors import ConfigurationError, RankAbsentError
from lockstep.runner.launcher import PRELOAD, loopback_store, rank_environment
from lockstep.runner.losses import failure_of
from lockstep.runner.mailbox import ConnectionMailbox, Mailbox
from lockstep.runner.options import EngineOptions
from lockstep.runner.processes import OnMessage, Ranks
from lockstep.runner.ranks import Member, detokenizer_of, find_tokenizer, load_model, make_engine

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

        transformers_logging.disable_progress_bar()  # those of several ranks would overwrite each other
        member = Member(rank, options, port, options.start_timeout_s, mailbox.send, first_epoch)
        engines: list[Any] = []

        def serve(model: Any) -> None:
            mailbox.epoch = member.epoch
            _serve(model, options, mailbox, engines, member.was_asked_to_stop)

        member.work(serve)
        mailbox.send({"ended": True})
    except BaseException as error:
        mailbox.send(failure_of(rank, error))
    mailbox.flush(_LAST_WORDS_S)


def _serve(
    model: Any, options: EngineOptions, mailbox: Mailbox, engines: list[Any], ends_epoch: Callable[[], bool]
) -> None:
    """Say that this rank is ready, and serve requests with all ranks until it is told to stop."""
    from lockstep.runner.rank_loop import run_rank

    engine = make_engine(model, options, engines)
    detokenizer = detokenizer_of(find_tokenizer(options.model))
    mailbox.send({"ready": engine.about()})
    run_rank(engine, mailbox, detokenizer=detokenizer, ends_epoch=ends_epoch)


class OwnRank:
    """This process as a rank, with the methods of `RankProcesses`: a thread loads the model and steps with the others.

    Agreements watch over the other ranks.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.num_processes, self.num_data_ranks, self.can_survive, self.store = 1, 1, False, None
        self._options = options
        self._mailbox: Mailbox
        self._parallel: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lockstep-rank", daemon=True)

    def start(self, on_message: OnMessage) -> None:  # noqa: D102
        self._mailbox = Mailbox(lambda message: on_message(0, message))
        self._thread.start()

    def send(self, data_rank: int, message: dict[str, Any]) -> None:  # noqa: D102
        self._mailbox.deliver(message)

    def check(self, is_ending: bool) -> None:  # noqa: D102
        pass

    def kill_one(self, rank: int) -> None:  # noqa: D102
        raise NotImplementedError("under torchrun all ranks start again")

    def start_again(self, rank: int, first_epoch: int) -> None:  # noqa: D102
        raise NotImplementedError("under torchrun all ranks start again")

    def states(self) -> list[tuple[int, ProcessState]]:  # noqa: D102
        return [(os.getpid(), "alive")]

    def stop(self) -> None:
        """Wait until all ranks have been told to stop, as long as they live; raise what has ended this one."""
        self._mailbox.deliver({"stop": True})
        join(self._thread)
        if self._error is not None:
            raise self._error

    def kill(self, error: BaseException | None = None) -> None:
        """End this rank; the other ranks learn of it at the next agreement."""
        if not self._thread.is_alive():
            return
        failure = error or ConfigurationError("the engine of this rank was closed")
        self._mailbox.deliver({"fail": failure})
        self._thread.join(self._options.deadline_s)
        if self._thread.is_alive() and self._parallel is not None:
            self._parallel.coordinator.give_up(failure)

    def _run(self) -> None:
        try:
            from lockstep.models.parallel import parallel_of

            model = load_model(self._options)
            self._parallel = parallel_of(model)
            _serve(model, self._options, self._mailbox, [], lambda: False)
            if self._parallel is not None:
                self._parallel.close()
        except BaseException as error:
            self._error = error
            why = f"{type(error).__name__}: {error}"
            self._mailbox.send({"failed": type(error).__name__, "why": why, "error": error})
