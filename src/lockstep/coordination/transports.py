"""How records travel. A transport moves a few integers of each rank to all ranks, and knows when to give up."""

import contextlib
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist

from lockstep.coordination.board import EXCHANGE_BYTES, Board
from lockstep.coordination.waits import CHECK_S, SPIN_NS, first_line, pause, wait_for
from lockstep.coordination.wire import HEAD_BYTES, WORD_BYTES, WORDS, Alike, Wire, cut, decode_message, encode_message


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self, timeout_s: float, check: Callable[[], None] | None = None) -> Sequence[Wire]:
        """Return what every rank sent, `[ranks]`. After an interruption it may be called again.

        Args:
            timeout_s: longest wait, in seconds.
            check: called from time to time; ends the wait by raising.

        Raises:
            TimeoutError: they did not all come; `RanksMissing` names those that are known not to have come.
            ConnectionError: a peer's connection broke.
        """


class Transport(Protocol):
    """One exchange at a time among the ranks of a group.

    Attributes:
        num_ranks: of the group.
        can_watch: whether `wanted` can tell.
    """

    num_ranks: int
    can_watch: bool

    def begin(self, wire: Wire) -> Pending:
        """Send this rank's words, at most `WORDS`, and return at once."""

    def wanted(self) -> bool:
        """Return whether another rank has begun an exchange that this one has not; False where that is not known."""


class RanksMissing(TimeoutError):
    """An exchange that did not end, with the ranks that have not sent anything."""

    def __init__(self, message: str, ranks_missing: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks_missing = ranks_missing


class ProcessGroupTransport:
    """Exchange over any torch process group: one all-gather of a few integers, on NCCL through the current device."""

    can_watch = False

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.num_ranks = process_group.size()
        self._device = torch.device("cuda") if dist.get_backend(process_group) == "nccl" else torch.device("cpu")

    def begin(self, wire: Wire) -> "_PendingAllGather":
        """See `Transport`."""
        # Always the same length, so that even two unlike records can be told apart.
        words = bytearray(wire.ljust(WORD_BYTES * WORDS, b"\0"))
        mine = torch.frombuffer(words, dtype=torch.int64).to(self._device)
        everyones = torch.empty(self.num_ranks, WORDS, dtype=torch.int64, device=self._device)
        try:
            work = dist.all_gather(list(everyones), mine, group=self.process_group, async_op=True)
        except RuntimeError as error:
            raise ConnectionError(f"the exchange could not be started: {first_line(error)}") from error
        return _PendingAllGather(work, mine, everyones)

    def wanted(self) -> bool:
        """See `Transport`."""
        return False


@dataclass
class _PendingAllGather:
    _work: dist.Work
    _mine: torch.Tensor  # kept: the transfer reads it until it is done
    _everyones: torch.Tensor

    def wait(self, timeout_s: float, check: Callable[[], None] | None = None) -> list[Wire]:
        wait_for(self._work, timeout_s, check)
        return [cut(struct.pack(f"<{WORDS}q", *words)) for words in self._everyones.tolist()]


class SharedMemoryTransport:
    """Exchange through a board in shared memory, for ranks of one host.

    Each rank writes its words with the number of the exchange in the upper half of each, and looks until the words of
    all others carry the same number. Two sets of places take turns: a rank that writes the next exchange but one has
    seen all others in the next, so nobody reads the old one any more.

    All ranks have registered on the board; each kind of exchange that may be under way has a lane of it.
    """

    can_watch = True

    def __init__(self, board: Board, rank: int, lane: int = 0) -> None:
        self.board = board
        self.rank = rank
        self.num_ranks = board.num_ranks
        self._sequence = 0
        self._starts = [[board.exchange_offset(lane, parity, r) for r in range(board.num_ranks)] for parity in (0, 1)]
        self._others = [r for r in range(board.num_ranks) if r != rank]
        # A rank that looks without pause must not keep another from answering.
        self._spin_ns = SPIN_NS if board.cores_suffice() else 0
        self._shape: Callable[[int], _RecordShape] = cache(lambda size: _RecordShape(board.num_ranks, size))

    def begin(self, wire: Wire) -> "_PendingBoard":
        """See `Transport`."""
        sequence = self._sequence = self._sequence + 1 & _MASK
        size = len(wire)
        shape = self._shape(size)
        stamped = (int.from_bytes(wire, "little") | sequence * shape.stamp).to_bytes(size, "little")
        start = self._starts[sequence & 1][self.rank]
        self.board.bytes[start : start + size] = stamped
        return _PendingBoard(self, shape, sequence, wire[:HEAD_BYTES], stamped[:HEAD_BYTES])

    def wanted(self) -> bool:
        """See `Transport`."""
        following = self._sequence + 1 & _MASK
        words, starts = self.board.words, self._starts[following & 1]
        return any(words[starts[rank] >> 3] >> 32 == following for rank in self._others)


class _RecordShape:
    """What is worked out once for records of one size, from all ranks."""

    def __init__(self, num_ranks: int, size: int) -> None:
        self.size = size
        self.on_board = struct.Struct(num_ranks * f"{HEAD_BYTES}s{size - HEAD_BYTES}s{EXCHANGE_BYTES - size}x")
        self.body_bytes = num_ranks * (size - HEAD_BYTES)
        self.stamp = int.from_bytes(_ONE_ABOVE * (size // WORD_BYTES), "little")
        self.stamps = int.from_bytes(_ONE_ABOVE * (self.body_bytes // WORD_BYTES), "little")
        self.upper_halves = self.stamps * _MASK


@dataclass(slots=True)
class _PendingBoard:
    _transport: SharedMemoryTransport
    _shape: _RecordShape
    _sequence: int
    _own_head: bytes
    _stamped_head: bytes

    def wait(self, timeout_s: float, check: Callable[[], None] | None = None) -> Sequence[Wire]:
        received: Sequence[Wire] | None = self._take()
        if received is not None:
            return received
        started = time.monotonic_ns()
        deadline = started + int(timeout_s * 1e9)
        next_check = started + int(CHECK_S * 1e9)
        words, sequence = self._transport.board.words, self._sequence
        last_word = self._shape.size // WORD_BYTES - 1
        awaited = [start // WORD_BYTES + last_word for start in self._transport._starts[sequence & 1]]
        while True:
            now = time.monotonic_ns()
            slept = pause(now - started, self._transport._spin_ns)
            while awaited and words[awaited[-1]] >> 32 == sequence:
                awaited.pop()
            if not awaited or slept:
                received = self._take() or (self._take_all() if slept else None)
                if received is not None:
                    return received
            if now >= next_check:
                next_check = now + int(CHECK_S * 1e9)
                if check is not None:
                    check()
            if now >= deadline:
                missing = tuple(rank for rank, wire in enumerate(self._whole()) if wire is None)
                raise RanksMissing(f"no answer within {timeout_s:.3g} s", missing)

    def _take(self) -> Alike | None:
        """Return the records of all ranks, if all have come with this rank's head."""
        shape, transport = self._shape, self._transport
        parts = shape.on_board.unpack_from(transport.board.bytes, transport._starts[self._sequence & 1][0])
        if parts[::2].count(self._stamped_head) != transport.num_ranks:
            return None
        # All words at once: what is left in the upper halves is of an earlier exchange.
        words = int.from_bytes(b"".join(parts[1::2]), "little") ^ self._sequence * shape.stamps
        if words & shape.upper_halves:
            return None
        return Alike(self._own_head, words.to_bytes(shape.body_bytes, "little"), transport.num_ranks)

    def _take_all(self) -> Sequence[Wire] | None:
        """Return the records of all ranks whatever they are: if their heads differ, the ranks will say in what."""
        wires = [wire for wire in self._whole() if wire is not None]
        return wires if len(wires) == self._transport.num_ranks else None

    def _whole(self) -> list[Wire | None]:
        """Return each rank's record as far as it has come whole."""
        wires: list[Wire | None] = []
        for start in self._transport._starts[self._sequence & 1]:
            wire = cut(bytes(self._transport.board.bytes[start : start + WORD_BYTES * WORDS]))
            uppers = struct.unpack(f"<{len(wire) // 4}I", wire)[1::2]
            wires.append(wire if uppers.count(self._sequence) == len(uppers) else None)
        return wires


_MASK = 0xFFFFFFFF
_ONE_ABOVE = b"\0\0\0\0\1\0\0\0"  # a word with 1 in its upper half


def open_transport(process_group: dist.ProcessGroup, timeout_s: float) -> tuple[Transport, Board | None]:
    """Return the fastest transport that all ranks of a gloo group can use: shared memory if they share a host.

    Collective. Also returns the board that the transport is over, if it is.

    Raises:
        TimeoutError: a rank did not come.
        ConnectionError: a peer's connection broke.
    """
    transport, rank, board = ProcessGroupTransport(process_group), process_group.rank(), None
    try:
        if rank == 0:
            with contextlib.suppress(OSError):  # no shared memory here, or none left: the group does as well
                board = Board.create(transport.num_ranks)
        name = decode_message(transport.begin(encode_message(board.name.encode() if board else b"")).wait(timeout_s)[0])
        if rank != 0 and name:
            with contextlib.suppress(OSError, ValueError):  # another host, or a container with memory of its own
                board = Board.attach(name.decode(errors="replace"), transport.num_ranks)
        if board is not None:
            board.register(rank)
        votes = transport.begin(encode_message(b"yes" if board is not None else b"no")).wait(timeout_s)
    finally:
        if rank == 0 and board is not None:
            board.unlink()
    if board is not None and all(decode_message(vote) == b"yes" for vote in votes):
        return SharedMemoryTransport(board, rank), board
    return transport, None
