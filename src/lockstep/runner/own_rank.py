"""The rank of an engine that this process is, under torchrun: a thread runs it beside the script."""

from __future__ import annotations

import queue
import threading
from typing import Any

from lockstep.coordination.processes import ProcessState
from lockstep.errors import ConfigurationError
from lockstep.runner.rank_processes import OnMessage
from lockstep.runner.ranks import EngineOptions
from lockstep.runner.worker import take_all


class OwnRank:
    """This process as a rank: a thread loads the model and steps with the other ranks, whatever the script does."""

    def __init__(self, options: EngineOptions) -> None:
        self.num_processes = 1
        self._options = options
        self._mailbox: _QueueMailbox
        self._parallel: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, on_message: OnMessage) -> None:
        """See `Ranks`."""
        self._mailbox = _QueueMailbox(on_message)
        self._thread = threading.Thread(target=self._run, name="lockstep-rank", daemon=True)
        self._thread.start()

    def send(self, data_rank: int, message: dict[str, Any]) -> None:
        """See `Ranks`."""
        self._mailbox.received.put(message)

    def check(self) -> None:
        """See `Ranks`; the other ranks are seen to by agreements."""

    def states(self) -> list[ProcessState]:
        """See `Ranks`."""
        return ["alive"]

    def stop(self) -> None:
        """See `Ranks`: waits until all ranks have been told to stop, as long as they live.

        Raises:
            LockstepError: what has ended this rank, if anything has.
        """
        self._mailbox.received.put({"stop": True})
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error

    def kill(self, error: BaseException | None = None) -> None:
        """See `Ranks`: the other ranks hear of it at the next agreement."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        failure = error or ConfigurationError("the engine of this rank was closed")
        self._mailbox.received.put({"fail": failure})
        thread.join(self._options.deadline_s)
        if thread.is_alive() and self._parallel is not None:
            self._parallel.coordinator.give_up(failure)

    def _run(self) -> None:
        from lockstep.runner.rank_loop import run_rank
        from lockstep.runner.ranks import detokenizer_of, find_tokenizer, make_engine

        try:
            engine = make_engine(self._options)
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


class _QueueMailbox:
    def __init__(self, on_message: OnMessage) -> None:
        self.received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._on_message = on_message

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        return take_all(self.received, timeout_s)

    def send(self, message: dict[str, Any]) -> None:
        self._on_message(0, message)
