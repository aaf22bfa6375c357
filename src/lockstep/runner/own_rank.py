"""This process's rank of an engine under torchrun: a thread runs it beside the script."""

from __future__ import annotations

import os
import threading
from typing import Any

from lockstep.coordination.processes import ProcessState
from lockstep.errors import ConfigurationError
from lockstep.runner.mailbox import Mailbox
from lockstep.runner.options import EngineOptions
from lockstep.runner.processes import OnMessage


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
        self._thread.join()
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
            from lockstep.runner.rank_loop import run_rank
            from lockstep.runner.ranks import detokenizer_of, find_tokenizer, load_model, make_engine

            engine = make_engine(load_model(self._options), self._options, [])
            self._parallel = engine.parallel
            detokenizer = detokenizer_of(find_tokenizer(self._options.model))
            self._mailbox.send({"ready": engine.about()})
            run_rank(engine, self._mailbox, detokenizer=detokenizer)
            if engine.parallel is not None:
                engine.parallel.close()
        except BaseException as error:
            self._error = error
            why = f"{type(error).__name__}: {error}"
            self._mailbox.send({"failed": type(error).__name__, "why": why, "error": error})
