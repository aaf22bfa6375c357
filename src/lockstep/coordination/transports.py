"""Transports: each sends a short record of every rank to all ranks, within a deadline."""

import contextlib
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol
from zlib import crc32

import torch
import torch.distributed as dist

from lockstep.coordination.board import EXCHANGE_BYTES, WORD_BYTES, Board
from lockstep.coordination.waits import SPIN_NS, Lookout, first_line, wait_for
from lockstep.coordination.wire import WIRE_BYTES, Wire, cut, decode_message, encode_message
from lockstep.errors import LockstepError

_MASK = 0xFFFFFFFF


class Transport(Protocol):
    """One exchange at a time among the ranks of a group; `can_watch` says whether `wanted` can tell."""

    num_ranks: int
    can_watch: bool = False

    def begin(self, wire: Wire) -> None:
        """Send this rank's record, at most `WIRE_BYTES`, and return at once."""

    def wait(self, timeout_s: float, check: Callable[[], object] | None = None) -> Sequence[Wire]:
        """Return every rank's record, `[ranks]`. May be called again after an interruption.

        `check` ends it by raising. `RanksMissing` or a `TimeoutError`: not all came. `ConnectionError`: a peer's broke.
        """

    def wanted(self) -> bool:
        """Return whether another rank has begun the next exchange; False if that is unknown."""
        return False


class RanksMissing(TimeoutError):
    """An exchange that did not end, with the ranks that have not sent anything."""

    def __init__(self, message: str, ranks_missing: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks_missing = ranks_missing


class ProcessGroupTransport(Transport):
    """Exchange over any torch process group: one all-gather of a few bytes, on NCCL through the current device."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.num_ranks = process_group.size()
        self._device = torch.device("cuda" if dist.get_backend(process_group) == "nccl" else "cpu")

    def begin(self, wire: Wire) -> None:
        """See `Transport`."""
        # Always the same length, so that even two unlike records can be told apart.
        padded = bytearray(wire.ljust(WIRE_BYTES, b"\0"))
        self._mine = torch.frombuffer(padded, dtype=torch.uint8).to(self._device)  # kept: the transfer reads it
        self._everyones = torch.empty(self.num_ranks, WIRE_BYTES, dtype=torch.uint8, device=self._device)
        try:
            self._work: dist.Work = dist.all_gather(
                list(self._everyones), self._mine, group=self.process_group, async_op=True
            )
        except RuntimeError as error:
            raise ConnectionError(f"the exchange could not be started: {first_line(error)}") from error

    def wait(self, timeout_s: float, check: Callable[[], object] | None = None) -> list[Wire]:
        """See `Transport`."""
        wait_for(self._work, timeout_s, check)
        received = bytearray(self._everyones.numel())
        torch.frombuffer(received, dtype=torch.uint8).copy_(self._everyones.flatten())
        return [cut(bytes(received[start : start + WIRE_BYTES])) for start in range(0, len(received), WIRE_BYTES)]


class SharedMemoryTransport:
    """Exchange through a board in shared memory, for ranks of one host, all of which have registered there.

    Each rank writes its record, then a word with the record's checksum and the number of the exchange: others take a
    record only if it fits that word. Two sets of slots alternate: a rank that writes exchange n + 2 has seen all of
    n + 1.
    """

    can_watch = True

    def __init__(self, board: Board, rank: int, lane: int = 0, sequence: int = 0) -> None:
        self.board, self.rank, self.num_ranks = board, rank, board.num_ranks
        # Where each rank's slot begins, `[parity][rank]`, in bytes.
        self._starts = [[board.exchange_offset(lane, parity, r) for r in range(board.num_ranks)] for parity in (0, 1)]
        # A rank that spins must not keep another from answering.
        self._spin_ns = SPIN_NS if board.cores_suffice() else 0
        self._sequence, self._slots = sequence, _slots(board.num_ranks, WIRE_BYTES)

    def begin(self, wire: Wire) -> None:
        """See `Transport`."""
        sequence = self._sequence = self._sequence + 1 & _MASK
        start = self._starts[sequence & 1][self.rank]
        self._slots = _slots(self.num_ranks, len(wire))
        self.board.bytes[start + WORD_BYTES : start + WORD_BYTES + len(wire)] = wire
        self.board.words[start // WORD_BYTES] = crc32(wire) << 32 | sequence

    def wait(self, timeout_s: float, check: Callable[[], object] | None = None) -> Sequence[Wire]:
        """See `Transport`."""
        received: Sequence[Wire] | None = self._take()
        if received is not None:
            return received
        lookout = Lookout(timeout_s, check, self._spin_ns)
        words, sequence = self.board.words, self._sequence
        awaited = [start // WORD_BYTES for start in self._starts[sequence & 1]]
        try:
            while received is None:
                lookout.pause()
                while awaited and words[awaited[-1]] & _MASK == sequence:
                    awaited.pop()
                if not awaited:
                    received = self._take()
                    if received is None and len(whole := self._whole()) == self.num_ranks:
                        received = list(whole.values())  # of unlike lengths: a message, or other fields
        except LockstepError:  # of `check`
            raise
        except TimeoutError as error:
            missing = sorted(set(range(self.num_ranks)) - self._whole().keys())
            raise RanksMissing(str(error), tuple(missing)) from None
        return received

    def _take(self) -> Sequence[Wire] | None:
        """Return all ranks' records, once all have come with the length of this rank's."""
        parts = self._slots.unpack_from(self.board.bytes, self._starts[self._sequence & 1][0])
        sequences, checksums, wires = parts[::3], parts[1::3], parts[2::3]
        whole = sequences.count(self._sequence) == self.num_ranks and tuple(map(crc32, wires)) == checksums
        return wires if whole else None

    def _whole(self) -> dict[int, Wire]:
        """Return the records that have come whole, of whatever length, by rank."""
        wires = {}
        for rank, start in enumerate(self._starts[self._sequence & 1]):
            wire = cut(bytes(self.board.bytes[start + WORD_BYTES : start + EXCHANGE_BYTES]))
            if self.board.words[start // WORD_BYTES] == crc32(wire) << 32 | self._sequence:
                wires[rank] = wire
        return wires

    def wanted(self) -> bool:
        """See `Transport`."""
        following = self._sequence + 1 & _MASK
        # This rank's own word there is of an earlier exchange.
        return any(self.board.words[start // WORD_BYTES] & _MASK == following for start in self._starts[following & 1])


@cache
def _slots(num_ranks: int, size: int) -> struct.Struct:
    """Layout of all ranks' slots: number and checksum, and a record of `size` bytes."""
    return struct.Struct("<" + num_ranks * f"II{size}s{EXCHANGE_BYTES - WORD_BYTES - size}x")


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
