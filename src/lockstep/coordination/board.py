"""A board in shared memory on which the ranks of one host write what they say, where they are, and their last words.

No locks and no fences: every 8-byte word is written whole, and what belongs together carries a number that tells the
reader whether it is complete. A rank may be killed between any two words.
"""

import contextlib
import mmap
import os
import re
import secrets
import sys
import time
import zlib
from pathlib import Path

from lockstep.coordination.processes import ProcessIdentity, ProcessState, pid_namespace
from lockstep.errors import ConfigurationError

FOLDER = "/dev/shm"
LANES = 2
"""Exchanges that may be under way at the same time: agreements, and comparisons of collectives."""
EXCHANGE_BYTES = 512
"""Room for one rank's words in one exchange: 64 words of 8 bytes, each half payload, half sequence number."""
LAST_WORDS_BYTES = 2048

_NAME = re.compile(r"lockstep-(\d+)-(\d+)-[0-9a-f]{32}")
_MAGIC = 0x3144524F4142534C
_HEADER_BYTES = 64
_STATUS_BYTES = 64
_RANK_BYTES = _STATUS_BYTES + LAST_WORDS_BYTES
_PID, _STARTED, _NAMESPACE, _PLACE, _PLACE_NS, _LAST_WORDS, _SPOILED, _CORES = range(8)
GIVEN_UP_WORD = 2
"""Index in `Board.words` of the word that is 0 until any rank has said its last words."""


class Board:
    """The shared memory of the ranks of one host. Made by `create` on one rank and `attach` on the others.

    It has a name only until all ranks have attached: `unlink` it then, and the kernel frees it with its last process,
    however that ends.

    Attributes:
        name: of the file in `/dev/shm`.
        num_ranks: ranks that share it.
        bytes: all of it, for the exchanges of `SharedMemoryTransport`.
        words: the same as 64-bit words.
    """

    def __init__(self, name: str, num_ranks: int, memory: mmap.mmap) -> None:
        self.name = name
        self.num_ranks = num_ranks
        self.bytes = memoryview(memory)
        self.words = self.bytes.cast("Q")

    @classmethod
    def create(cls, num_ranks: int) -> "Board":
        """Make a board; boards that killed processes left behind half-made are removed.

        Raises:
            OSError: there is no shared memory, or not enough.
        """
        if sys.byteorder != "little":
            raise OSError("boards are written for machines whose lowest byte comes first")
        _remove_orphans()
        name = f"lockstep-{pid_namespace()}-{os.getpid()}-{secrets.token_hex(16)}"
        descriptor = os.open(f"{FOLDER}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # Not ftruncate: writing to memory that turns out not to be there would kill the process.
            os.posix_fallocate(descriptor, 0, board_bytes(num_ranks))
            board = cls(name, num_ranks, mmap.mmap(descriptor, board_bytes(num_ranks)))
        except OSError:
            os.unlink(f"{FOLDER}/{name}")
            raise
        finally:
            os.close(descriptor)
        board.words[1] = num_ranks
        board.words[0] = _MAGIC
        return board

    @classmethod
    def attach(cls, name: str, num_ranks: int) -> "Board":
        """Open a board that another process of this user made on this host.

        Raises:
            ConfigurationError: the name, owner, size or content is not that of a board of `num_ranks` ranks.
            OSError: there is no such board here.
        """
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name[:80]!r} is not the name of a board")
        descriptor = os.open(f"{FOLDER}/{name}", os.O_RDWR | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.getuid() or status.st_size != board_bytes(num_ranks):
                raise ConfigurationError(
                    f"board {name} has owner {status.st_uid} and {status.st_size} bytes, expected {os.getuid()} and "
                    f"{board_bytes(num_ranks)} for {num_ranks} ranks"
                )
            board = cls(name, num_ranks, mmap.mmap(descriptor, status.st_size))
        finally:
            os.close(descriptor)
        if board.words[0] != _MAGIC or board.words[1] != num_ranks:
            raise ConfigurationError(f"board {name} is not one of {num_ranks} ranks")
        return board

    def unlink(self) -> None:
        """Take the name away; who has attached keeps the memory. Twice is allowed."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{FOLDER}/{self.name}")

    def register(self, rank: int) -> None:
        """Write down which process this rank is, so that the others can tell whether it lives, and on which cores."""
        base = self._status(rank)
        own = ProcessIdentity.own()
        self.words[base + _STARTED], self.words[base + _NAMESPACE] = own.started, own.namespace
        cores = os.sched_getaffinity(0)
        self.words[base + _CORES] = min(cores) + 1 << 32 | len(cores)
        self.words[base + _PID] = own.pid

    def cores_suffice(self) -> bool:
        """Return whether every rank can have a core of its own: each may use many enough, or others than the rest."""
        entries = [self.words[self._status(rank) + _CORES] for rank in range(self.num_ranks)]
        if 0 in entries:  # a rank that has not registered
            return len(os.sched_getaffinity(0)) >= self.num_ranks
        many = min(entry & 0xFFFFFFFF for entry in entries) >= self.num_ranks
        return many or len({entry >> 32 for entry in entries}) == self.num_ranks

    def process(self, rank: int) -> ProcessIdentity:
        """Return a rank's process; number 0 before it has registered."""
        base = self._status(rank)
        return ProcessIdentity(*(self.words[base + word] for word in (_PID, _STARTED, _NAMESPACE)))

    def process_state(self, rank: int) -> ProcessState:
        """Return what the operating system says about a rank's process."""
        return self.process(rank).state()

    def place_words(self, rank: int) -> tuple[int, int]:
        """Return the indices in `words` of a rank's place and of the time, in ns of the host's clock, it was taken."""
        base = self._status(rank)
        return base + _PLACE, base + _PLACE_NS

    def place(self, rank: int) -> tuple[int, float]:
        """Return what a rank last wrote about its place, and how many seconds ago."""
        place, since = self.place_words(rank)
        return self.words[place], max(0.0, (time.monotonic_ns() - self.words[since]) / 1e9)

    def spoiled_word(self, rank: int) -> int:
        """Return the index in `words` of the last step whose results a rank has spoiled."""
        return self._status(rank) + _SPOILED

    def say_last_words(self, rank: int, message: bytes) -> None:
        """Publish why this rank stops; the first words count. Cut to `LAST_WORDS_BYTES`."""
        base = self._status(rank)
        if self.words[base + _LAST_WORDS]:
            return
        message = message[:LAST_WORDS_BYTES]
        start = base * 8 + _STATUS_BYTES
        self.bytes[start : start + len(message)] = message
        # Length and checksum in one word, so that a reader sees all of the message or none.
        self.words[base + _LAST_WORDS] = zlib.crc32(message) << 32 | len(message)
        self.words[GIVEN_UP_WORD] = 1

    def last_words(self, rank: int) -> bytes | None:
        """Return why a rank has stopped, or None if it has not said so."""
        base = self._status(rank)
        word = self.words[base + _LAST_WORDS]
        if not word:
            return None
        start = base * 8 + _STATUS_BYTES
        message = bytes(self.bytes[start : start + min(word & 0xFFFFFFFF, LAST_WORDS_BYTES)])
        return message if zlib.crc32(message) == word >> 32 else None

    def exchange_offset(self, lane: int, parity: int, rank: int) -> int:
        """Return where a rank's words of the exchanges of one lane and parity begin, in bytes."""
        place = (lane * 2 + parity) * self.num_ranks + rank
        return _HEADER_BYTES + self.num_ranks * _RANK_BYTES + place * EXCHANGE_BYTES

    def _status(self, rank: int) -> int:
        return (_HEADER_BYTES + rank * _RANK_BYTES) // 8


def board_bytes(num_ranks: int) -> int:
    """Return the size of a board."""
    return _HEADER_BYTES + num_ranks * (_RANK_BYTES + 2 * LANES * EXCHANGE_BYTES)


def _remove_orphans() -> None:
    """Remove boards whose maker was killed before all ranks had attached."""
    for path in Path(FOLDER).glob("lockstep-*"):
        match = _NAME.fullmatch(path.name)
        if match and ProcessIdentity(int(match[2]), 0, int(match[1])).state() == "gone":
            with contextlib.suppress(OSError):
                path.unlink()
