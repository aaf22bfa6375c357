"""Transports of records: each moves a few integers of each rank to all ranks, within a deadline."""

import contextlib
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist

from lockstep.coordination.board import EXCHANGE_BYTES, Board
from lockstep.coordination.waits import SPIN_NS, Lookout, first_line, wait_for
from lockstep.coordination.wire import HEAD_BYTES, WORD_BYTES, WORDS, Alike, Wire, cut, decode_message, encode_message
from lockstep.errors import LockstepError

_MASK = 0xFFFFFFFF
_ONE_ABOVE = b"\0\0\0\0\1\0\0\0"  # a word with 1 in its upper half


class Transport(Protocol):
    """One exchange at a time among the ranks of a group; `can_watch` says whether `wanted` can tell."""

    num_ranks: int
    can_watch: bool = False

    def begin(self, wire: Wire) -> None:
        """Send this rank's words, at most `WORDS`, and return at once."""

    def wait(self, timeout_s: float, check: Callable[[], object] | None = None) -> Sequence[Wire]:
        """Return what every rank has sent, `[ranks]`. After an interruption it may be called again.

        `check` ends it by raising. `RanksMissing` or a `TimeoutError`: not all came. `ConnectionError`: a peer's broke.
        """

    def wanted(self) -> bool:
        """Return whether another rank has begun an exchange that this one has not; False where that is not known."""
        return False


class RanksMissing(TimeoutError):
    """An exchange that did not end, with the ranks that have not sent anything."""

    def __init__(self, message: str, ranks_missing: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks_missing = ranks_missing


class ProcessGroupTransport(Transport):
    """Exchange over any torch process group: one all-gather of a few integers, on NCCL through the current device."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.num_ranks = process_group.size()
        self._device = torch.device("cuda" if dist.get_backend(process_group) == "nccl" else "cpu")

    def begin(self, wire: Wire) -> None:
        """See `Transport`."""
        # Always the same length, so that even two unlike records can be told apart.
        words = bytearray(wire.ljust(WORD_BYTES * WORDS, b"\0"))
        self._mine = torch.frombuffer(words, dtype=torch.int64).to(self._device)  # kept: the transfer reads it
        self._everyones = torch.empty(self.num_ranks, WORDS, dtype=torch.int64, device=self._device)
        try:
            self._work: dist.Work = dist.all_gather(
                list(self._everyones), self._mine, group=self.process_group, async_op=True
            )
        except RuntimeError as error:
            raise ConnectionError(f"the exchange could not be started: {first_line(error)}") from error

    def wait(self, timeout_s: float, check: Callable[[], object] | None = None) -> list[Wire]:
        """See `Transport`."""
        wait_for(self._work, timeout_s, check)
        return [cut(struct.pack(f"<{WORDS}q", *words)) for words in self._everyones.tolist()]


class SharedMemoryTransport:
    """Exchange through a board in shared memory, for ranks of one host, all of which have registered there.

    Each rank writes its words with the number of the exchange in the upper half of each, and polls until the words of
    all other ranks carry it. Two sets of slots alternate: a rank that writes exchange n + 2 has seen all of n + 1.
    """

    can_watch = True

    def __init__(self, board: Board, rank: int, lane: int = 0, sequence: int = 0) -> None:
        self.board, self.rank, self.num_ranks = board, rank, board.num_ranks
        # Where each rank's words begin, `[parity][rank]`, in bytes.
        self._starts = [[board.exchange_offset(lane, parity, r) for r in range(board.num_ranks)] for parity in (0, 1)]
        # A rank that spins must not keep another from answering.
        self._spin_ns = SPIN_NS if board.cores_suffice() else 0
        self._sequence, self._wire, self._stamped = sequence, b"", b""
        self._shape: Callable[[int], _RecordShape] = cache(lambda size: _RecordShape(board.num_ranks, size))

    def begin(self, wire: Wire) -> None:
        """See `Transport`."""
        sequence = self._sequence = self._sequence + 1 & _MASK
        size, start = len(wire), self._starts[sequence & 1][self.rank]
        stamps = sequence * self._shape(size).stamp
        self._wire, self._stamped = wire, (int.from_bytes(wire, "little") | stamps).to_bytes(size, "little")
        self.board.bytes[start : start + size] = self._stamped

    def wait(self, timeout_s: float, check: Callable[[], object] | None = None) -> Sequence[Wire]:
        """See `Transport`."""
        received: Sequence[Wire] | None = self._take()
        if received is not None:
            return received
        lookout = Lookout(timeout_s, check, self._spin_ns)
        words, sequence, starts = self.board.words, self._sequence, self._starts[self._sequence & 1]
        awaited = [(start + len(self._wire)) // WORD_BYTES - 1 for start in starts]  # each rank's last word
        try:
            while received is None:
                slept = lookout.pause()
                while awaited and words[awaited[-1]] >> 32 == sequence:
                    awaited.pop()
                if slept or not awaited:
                    received = self._take()
                if slept and received is None and len(whole := self._whole()) == self.num_ranks:
                    received = list(whole.values())  # their heads differ: the ranks will report the difference
        except LockstepError:  # of `check`
            raise
        except TimeoutError as error:
            missing = sorted(set(range(self.num_ranks)) - self._whole().keys())
            raise RanksMissing(str(error), tuple(missing)) from None
        return received

    def _take(self) -> Alike | None:
        """Return the records of all ranks, if all have come with this rank's head."""
        shape, sequence = self._shape(len(self._wire)), self._sequence
        parts = shape.on_board.unpack_from(self.board.bytes, self._starts[sequence & 1][0])
        if parts[::2].count(self._stamped[:HEAD_BYTES]) != self.num_ranks:
            return None
        # All words at once: what is left in the upper halves is of an earlier exchange.
        words = int.from_bytes(b"".join(parts[1::2]), "little") ^ sequence * shape.stamps
        if words & shape.upper_halves:
            return None
        return Alike(self._wire[:HEAD_BYTES], words.to_bytes(shape.body_bytes, "little"), self.num_ranks)

    def _whole(self) -> dict[int, Wire]:
        """Return the records that have come whole, whatever they are, by rank."""
        wires = {}
        for rank, start in enumerate(self._starts[self._sequence & 1]):
            wire = cut(bytes(self.board.bytes[start : start + WORD_BYTES * WORDS]))
            uppers = struct.unpack(f"<{len(wire) // 4}I", wire)[1::2]
            if uppers.count(self._sequence) == len(uppers):
                wires[rank] = wire
        return wires

    def wanted(self) -> bool:
        """See `Transport`."""
        following = self._sequence + 1 & _MASK
        # This rank's own words there are of an earlier exchange.
        return any(self.board.words[start // WORD_BYTES] >> 32 == following for start in self._starts[following & 1])


class _RecordShape:
    """Precomputed layout of all ranks' records of one size."""

    def __init__(self, num_ranks: int, size: int) -> None:
        self.on_board = struct.Struct(num_ranks * f"{HEAD_BYTES}s{size - HEAD_BYTES}s{EXCHANGE_BYTES - size}x")
        self.body_bytes = num_ranks * (size - HEAD_BYTES)
        self.stamp = int.from_bytes(_ONE_ABOVE * (size // WORD_BYTES), "little")
        self.stamps = int.from_bytes(_ONE_ABOVE * (self.body_bytes // WORD_BYTES), "little")
        self.upper_halves = self.stamps * _MASK


def open_transport(process_group: dist.ProcessGroup, timeout_s: float) -> tuple[Transport, Board | None]:
    """Return a gloo group's transport, and its board: shared memory if all ranks share a host. Collective."""
    transport, rank, board = ProcessGroupTransport(process_group), process_group.rank(), None
    try:
        if rank == 0:
            with contextlib.suppress(OSError):  # no shared memory here, or none left: fall back to the group
                board = Board.create(transport.num_ranks)
        transport.begin(encode_message(board.name.encode() if board else b""))
        name = decode_message(transport.wait(timeout_s)[0])
        if rank != 0 and name:
            with contextlib.suppress(OSError, ValueError):  # another host, or a container with memory of its own
                board = Board.attach(name.decode(errors="replace"), transport.num_ranks)
        if board is not None:
            board.register(rank)
        transport.begin(encode_message(b"yes" if board is not None else b"no"))
        votes = transport.wait(timeout_s)
    finally:
        if rank == 0 and board is not None:
            board.unlink()
    if board is not None and all(decode_message(vote) == b"yes" for vote in votes):
        return SharedMemoryTransport(board, rank), board
    return transport, None
