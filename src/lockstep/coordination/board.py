"""Boards for the ranks' exchanges, places and last words: in shared memory, or in a store."""

import contextlib
import json
import logging
import mmap
import os
import re
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Callable, Set
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lockstep.coordination.flight_recorder import FlightRecorder
from lockstep.coordination.processes import ProcessIdentity, pid_namespace
from lockstep.coordination.waits import within
from lockstep.coordination.wire import WIRE_BYTES
from lockstep.errors import ConfigurationError

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)
T = TypeVar("T")

LANES = 2  # concurrent exchanges: agreements, and comparisons of collectives
WORD_BYTES = 8
EXCHANGE_BYTES = WORD_BYTES + WIRE_BYTES  # one rank's slot in one exchange
LAST_WORDS_BYTES = 2048

_PUBLISH_S = 0.5
_ROLL_CALL_S = 0.5
_STORE_S = 0.9
_FOLDER = "/dev/shm"
_NAME = re.compile(r"lockstep-(\d+)-(\d+)-[0-9a-f]{32}")
_GIVEN_UP = 0  # the header's only word
_HEADER_BYTES = 64
# Words of each rank before its last words.
_PID, _STARTED, _NAMESPACE, _PLACE, _PLACE_NS, _LAST_WORDS, _SPOILED, _CORES = range(8)
_STATUS_BYTES = 64
_RANK_BYTES = _STATUS_BYTES + LAST_WORDS_BYTES


class Board:
    """Shared memory of one host's ranks. It has a name until all have attached, and is freed with the last process."""

    def __init__(self, name: str, num_ranks: int, memory: mmap.mmap | bytearray) -> None:
        self.name = name
        self.num_ranks = num_ranks
        self.bytes = memoryview(memory)
        self.words = self.bytes.cast("Q")

    @classmethod
    def private(cls, num_ranks: int) -> "Board":
        """Return a board that no other process sees: nothing is known of the other ranks."""
        return cls("", num_ranks, bytearray(board_bytes(num_ranks)))

    @classmethod
    def create(cls, num_ranks: int) -> "Board":
        """Create a board, or raise an `OSError`; first remove incomplete boards left behind by killed processes."""
        if sys.byteorder != "little":
            raise OSError("boards need a little-endian machine")
        for path in Path(_FOLDER).glob("lockstep-*"):
            match = _NAME.fullmatch(path.name)
            if match and ProcessIdentity(int(match[2]), 0, int(match[1])).state() == "gone":
                with contextlib.suppress(OSError):
                    path.unlink()
        name = f"lockstep-{pid_namespace()}-{os.getpid()}-{secrets.token_hex(16)}"
        descriptor = os.open(f"{_FOLDER}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # Not ftruncate: a later write to memory that was never allocated would kill the process.
            os.posix_fallocate(descriptor, 0, board_bytes(num_ranks))
            return cls(name, num_ranks, mmap.mmap(descriptor, board_bytes(num_ranks)))
        except OSError:
            os.unlink(f"{_FOLDER}/{name}")
            raise
        finally:
            os.close(descriptor)

    @classmethod
    def attach(cls, name: str, num_ranks: int) -> "Board":
        """Open a board of this user on this host; `ConfigurationError` unless it is for `num_ranks` ranks."""
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name[:80]!r} is not the name of a board")
        descriptor = os.open(f"{_FOLDER}/{name}", os.O_RDWR | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.getuid() or status.st_size != board_bytes(num_ranks):
                raise ConfigurationError(
                    f"board {name} has owner {status.st_uid} and {status.st_size} bytes, expected {os.getuid()} and "
                    f"{board_bytes(num_ranks)} for {num_ranks} ranks"
                )
            return cls(name, num_ranks, mmap.mmap(descriptor, status.st_size))
        finally:
            os.close(descriptor)

    def unlink(self) -> None:
        """Remove the name; attached processes keep the memory. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{_FOLDER}/{self.name}")

    def register(self, rank: int, process: ProcessIdentity | None = None, cores: Set[int] | None = None) -> None:
        """Record a rank's process, by default this one, and the cores on which it may run."""
        base = _status(rank)
        pid, *rest = process or ProcessIdentity.own()
        cores = cores or os.sched_getaffinity(0)
        self.words[base + _STARTED], self.words[base + _NAMESPACE] = rest
        self.words[base + _CORES] = min(cores) + 1 << 32 | len(cores)
        self.words[base + _PID] = pid

    def cores_suffice(self) -> bool:
        """Return whether every rank can have a core of its own: enough shared cores, or disjoint ones."""
        entries = [self.words[_status(rank) + _CORES] for rank in range(self.num_ranks)]
        if 0 in entries:  # an unregistered rank
            return len(os.sched_getaffinity(0)) >= self.num_ranks
        many = min(entry & 0xFFFFFFFF for entry in entries) >= self.num_ranks
        return many or len({entry >> 32 for entry in entries}) == self.num_ranks

    def process(self, rank: int) -> ProcessIdentity:
        """Return a rank's process; number 0 before it has registered."""
        return ProcessIdentity(*self.words[_status(rank) + _PID : _status(rank) + _NAMESPACE + 1])

    def write_place(self, rank: int, place: int, now_ns: int) -> None:
        """Publish a rank's place and its start on the host's clock; time first, so that no place has an old time."""
        base = _status(rank)
        self.words[base + _PLACE_NS], self.words[base + _PLACE] = now_ns, place

    def place(self, rank: int) -> tuple[int, float]:
        """Return a rank's last published place, and how many seconds ago it came there."""
        place, since = self.words[_status(rank) + _PLACE], self.words[_status(rank) + _PLACE_NS]
        return place, max(0.0, (time.monotonic_ns() - since) / 1e9)

    def spoil(self, rank: int, step: int) -> None:
        """Mark a rank's results of a step, from -1, as invalid."""
        self.words[_status(rank) + _SPOILED] = step + 2

    def spoiled_step(self, rank: int) -> int:
        """Return the last step with invalid results of a rank, -2 for none."""
        return self.words[_status(rank) + _SPOILED] - 2

    @property
    def given_up(self) -> bool:
        """Whether any rank has said its last words."""
        return bool(self.words[_GIVEN_UP])

    def say_last_words(self, rank: int, message: bytes) -> None:
        """Publish why this rank stops, cut to `LAST_WORDS_BYTES`; only the first call counts."""
        base, message = _status(rank), message[:LAST_WORDS_BYTES]
        if self.words[base + _LAST_WORDS]:
            return
        start = base * 8 + _STATUS_BYTES
        self.bytes[start : start + len(message)] = message
        # Length and checksum in one word, so that a reader sees the whole message or nothing.
        self.words[base + _LAST_WORDS] = zlib.crc32(message) << 32 | len(message)
        self.words[_GIVEN_UP] = 1

    def last_words(self, rank: int) -> bytes | None:
        """Return why a rank has stopped, or None if it has not said so."""
        base = _status(rank)
        word, start = self.words[base + _LAST_WORDS], base * 8 + _STATUS_BYTES
        message = bytes(self.bytes[start : start + min(word & 0xFFFFFFFF, LAST_WORDS_BYTES)])
        return message if word and zlib.crc32(message) == word >> 32 else None

    def exchange_offset(self, lane: int, parity: int, rank: int) -> int:
        """Return where a rank's slot in the exchanges of one lane and parity begins, in bytes."""
        place = (lane * 2 + parity) * self.num_ranks + rank
        return _HEADER_BYTES + self.num_ranks * _RANK_BYTES + place * EXCHANGE_BYTES


def board_bytes(num_ranks: int) -> int:
    """Return the size of a board."""
    return _HEADER_BYTES + num_ranks * (_RANK_BYTES + 2 * LANES * EXCHANGE_BYTES)


def _status(rank: int) -> int:
    """Return the index of a rank's first word."""
    return (_HEADER_BYTES + rank * _RANK_BYTES) // 8


class StoreBoard:
    """Places and last words of ranks on several hosts, published late. A store that fails once is not asked again."""

    def __init__(self, store: "dist.Store", recorder: FlightRecorder) -> None:
        self._store = store
        self._recorder = recorder
        self._answers = True
        self._closed = threading.Event()
        threading.Thread(target=self._publish, name="lockstep-peers", daemon=True).start()

    def close(self) -> None:
        """Stop publishing where this rank is."""
        self._closed.set()

    def place(self, rank: int) -> tuple[int, float]:
        """Return a rank's last published place, 0 for none, and how many seconds ago it came there."""
        published = self._ask(lambda: self._read(self._key("place", rank)))
        place, since = json.loads(published or b"[0, 0]")
        return place, max(0.0, time.time() - since)

    def say_last_words(self, rank: int, message: bytes) -> None:
        """Publish why this rank stops."""
        self._ask(lambda: self._store.set(self._key("last words", rank), message.decode()))

    def last_words(self, rank: int) -> bytes | None:
        """Return why a rank has stopped, or None if it has not said so."""
        return self._ask(lambda: self._read(self._key("last words", rank)))

    def roll_call(self) -> tuple[int, ...]:
        """Return the ranks that do not answer now; those whose wait has also ended do."""
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
