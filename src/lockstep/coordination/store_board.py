"""What the ranks of several hosts say of themselves, in a torch store: as on a board, but late, and while it lives."""

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from lockstep.coordination.flight_recorder import FlightRecorder
from lockstep.coordination.processes import ProcessIdentity
from lockstep.coordination.waits import within

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)
T = TypeVar("T")

_PUBLISH_S = 0.5
_ROLL_CALL_S = 0.5
_STORE_S = 0.9


class StoreBoard:
    """Places and last words of an epoch's ranks. A store that has once not answered is not asked again."""

    def __init__(self, store: "dist.Store", recorder: FlightRecorder) -> None:
        self._store = store
        self._recorder = recorder
        self._answers = True
        self._closed = threading.Event()
        threading.Thread(target=self._publish, name="lockstep-peers", daemon=True).start()

    def close(self) -> None:
        """Stop publishing where this rank is."""
        self._closed.set()

    def process(self, _rank: int) -> ProcessIdentity:
        """Return that nothing is known of a rank's process."""
        return ProcessIdentity(0, 0, 0)

    def place(self, rank: int) -> tuple[int, float]:
        """Return what a rank last published of its place, 0 for nothing, and how many seconds ago it came there."""
        try:
            place, since = json.loads(self._ask(lambda: self._read(self._key("place", rank))) or b"[0, 0]")
            return int(place), max(0.0, time.time() - since)
        except (ValueError, TypeError):
            return 0, 0.0

    def say_last_words(self, rank: int, message: bytes) -> None:
        """Publish why this rank stops."""
        self._ask(lambda: self._store.set(self._key("last words", rank), message.decode()))

    def last_words(self, rank: int) -> bytes | None:
        """Return why a rank has stopped, or None if it has not said so."""
        return self._ask(lambda: self._read(self._key("last words", rank)))

    def roll_call(self) -> tuple[int, ...]:
        """Return the ranks that do not answer now: all that have ended their wait too are there."""
        what, store, own = f"roll/{self._recorder.step}", self._store, self._recorder.rank
        keys = [self._key(what, rank) for rank in range(self._recorder.num_ranks)]

        def call() -> tuple[int, ...]:
            store.set(keys[own], "here")
            until = time.monotonic() + _ROLL_CALL_S
            while True:
                missing = tuple(rank for rank, key in enumerate(keys) if not store.check([key]))
                if not missing or time.monotonic() > until:
                    return missing
                time.sleep(0.02)

        return self._ask(call) or ()

    def _key(self, what: str, rank: int) -> str:
        return f"{what}/{self._recorder.epoch}/{rank}"

    def _read(self, key: str) -> bytes | None:
        return self._store.get(key) if self._store.check([key]) else None

    def _ask(self, call: Callable[[], T]) -> T | None:
        """Ask the store; it may have died with the rank that kept it."""
        if self._answers:
            try:
                return within(call, _STORE_S)
            except (RuntimeError, TimeoutError) as error:
                self._answers = False
                logger.warning("rank %d: the store does not answer: %s", self._recorder.rank, error)
        return None

    def _publish(self) -> None:
        wait_s = 0.0
        while not self._closed.wait(wait_s):
            wait_s = _PUBLISH_S
            entry = json.dumps([self._recorder.place, time.time() - self._recorder.idle_s])
            try:
                self._store.set(self._key("place", self._recorder.rank), entry)
            except RuntimeError:
                return
