"""How records travel. A transport moves a few integers of each rank to all ranks, and knows when to give up."""

import contextlib
import datetime
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from lockstep.coordination.board import Board
from lockstep.coordination.step import HEAD_WORDS, WORDS, Wire, Words, decode_message, encode_message, split

CHECK_S = 0.1
"""How often a wait looks whether the others are still there, in seconds."""

# A wait in shared memory looks without pause for the first time, gives way to other threads up to the second, and then
# sleeps between looks, longer and longer.
_SPIN_NS = 20_000
_YIELD_NS = 400_000
_SLEEP_S = (0.00002, 0.001)


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self, timeout_s: float, check: Callable[[], None] | None = None) -> Sequence[Wire]:
        """Return what every rank sent, `[ranks]`. After an interruption it may be called again.

        Args:
            timeout_s: longest wait, in seconds.
            check: called from time to time; ends the wait by raising.

        Raises:
            TimeoutError: they did not all come; `ranks_missing` names those that are known not to have come.
            ConnectionError: a peer's connection broke.
        """
        ...


class Transport(Protocol):
    """One exchange at a time among the ranks of a group.

    Attributes:
        num_ranks: of the group.
        can_watch: whether `wanted` can tell.
    """

    num_ranks: int
    can_watch: bool

    def begin(self, wire: Wire) -> Pending:
        """Send this rank's words, `HEAD_WORDS` and at most `WORDS` in all, of 32 bits, and return at once."""
        ...

    def wanted(self) -> bool:
        """Return whether another rank has begun an exchange that this one has not; False where that is not known."""
        ...


class RanksMissing(TimeoutError):
    """An exchange that did not end, with the ranks that have not sent anything, where that is known."""

    def __init__(self, message: str, ranks_missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks_missing = ranks_missing


class ProcessGroupTransport:
    """Exchange over a torch process group: one all-gather of a few integers.

    Args:
        process_group: any group; gloo exchanges on the CPU, NCCL through the current device.
    """

    can_watch = False

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.num_ranks = process_group.size()
        self._device = torch.device("cuda") if dist.get_backend(process_group) == "nccl" else torch.device("cpu")

    def begin(self, wire: Wire) -> "_PendingAllGather":
        """See `Transport`."""
        words = (*wire[0], *wire[1])
        # Always the same length, so that even two unlike records can be told apart.
        mine = torch.tensor([*words, *[0] * (WORDS - len(words))], dtype=torch.int64, device=self._device)
        everyones = torch.empty(self.num_ranks, WORDS, dtype=torch.int64, device=self._device)
        try:
            work = dist.all_gather(list(everyones), mine, group=self.process_group, async_op=True)
        except RuntimeError as error:
            raise ConnectionError(f"the exchange could not be started: {first_line(error)}") from error
        return _PendingAllGather(work, mine, everyones)

    def wanted(self) -> bool:
        """See `Transport`."""
        return False


class _PendingAllGather:
    def __init__(self, work: dist.Work, mine: torch.Tensor, everyones: torch.Tensor) -> None:
        self._work = work
        self._mine = mine  # kept: the transfer reads it until it is done
        self._everyones = everyones

    def wait(self, timeout_s: float, check: Callable[[], None] | None = None) -> list[Wire]:
        wait_for(self._work, timeout_s, check)
        return [split(words) for words in self._everyones.tolist()]


class SharedMemoryTransport:
    """Exchange through a board in shared memory, for ranks of one host.

    Each rank writes its words, each with the number of the exchange beside it, and looks until the words of all others
    carry the same number. Two sets of places take turns: a rank that writes the next exchange but one has seen all
    others in the next, so nobody reads the old one any more.

    Args:
        board: shared by all ranks.
        rank: this rank.
        lane: of the board; one for each kind of exchange that may be under way.
    """

    can_watch = True

    def __init__(self, board: Board, rank: int, lane: int = 0) -> None:
        self.board = board
        self.rank = rank
        self.num_ranks = board.num_ranks
        self._sequence = 0
        self._starts = [[board.exchange_offset(lane, parity, r) for r in range(board.num_ranks)] for parity in (0, 1)]
        self._others = [r for r in range(board.num_ranks) if r != rank]
        # With fewer cores than ranks a rank that looks without pause keeps another from answering.
        self._spin_ns = _SPIN_NS if len(os.sched_getaffinity(0)) >= board.num_ranks else 0
        self._bodies: dict[int, Words] = {}
        """Bodies that came before, by their bytes as one integer: few differ."""

    def begin(self, wire: Wire) -> "_PendingBoard":
        """See `Transport`."""
        sequence = self._sequence = self._sequence + 1 & _MASK
        count = len(wire[0]) + len(wire[1])
        payload = int.from_bytes(_QUADS[count].pack(*wire[0], *wire[1]), "little")
        raw = (payload | sequence * _TAGS[count]).to_bytes(8 * count, "little")
        start = self._starts[sequence & 1][self.rank]
        self.board.bytes[start : start + len(raw)] = raw
        return _PendingBoard(self, wire, raw, sequence)

    def wanted(self) -> bool:
        """See `Transport`."""
        following = self._sequence + 1 & _MASK
        words, starts = self.board.words, self._starts[following & 1]
        return any(words[starts[rank] >> 3] >> 32 == following for rank in self._others)


class _PendingBoard:
    __slots__ = ("_head", "_missing", "_raw_head", "_received", "_sequence", "_starts", "_stop", "_tags", "_transport")

    def __init__(self, transport: SharedMemoryTransport, wire: Wire, raw: bytes, sequence: int) -> None:
        self._transport = transport
        self._sequence = sequence
        self._starts = transport._starts[sequence & 1]
        self._head = wire[0]
        self._raw_head = raw[: 8 * HEAD_WORDS]
        self._stop = len(raw)
        self._tags = sequence * _TAGS[len(wire[1])]
        self._received: list[Wire] = [wire] * transport.num_ranks
        self._missing = transport._others

    def wait(self, timeout_s: float, check: Callable[[], None] | None = None) -> Sequence[Wire]:
        if self._look():
            return self._received
        started = time.monotonic_ns()
        deadline = started + int(timeout_s * 1e9)
        next_check = started + int(CHECK_S * 1e9)
        spin_until, yield_until = started + self._transport._spin_ns, started + _YIELD_NS
        sleep_s = _SLEEP_S[0]
        while True:
            now = time.monotonic_ns()
            if now >= spin_until:
                if now < yield_until:
                    os.sched_yield()  # also to other threads; a sleep of 0 would take 60 us, the kernel's timer slack
                else:
                    time.sleep(sleep_s)
                    sleep_s = min(1.3 * sleep_s, _SLEEP_S[1])
                    self._look_for_others()
            if self._look():
                return self._received
            if now >= next_check:
                next_check = now + int(CHECK_S * 1e9)
                if check is not None:
                    check()
            if now >= deadline:
                raise RanksMissing(f"no answer within {timeout_s:.3g} s", tuple(self._missing))

    def _look(self) -> bool:
        """Take the records that have come with this rank's head; return whether that is all."""
        data, starts, stop, tags = self._transport.board.bytes, self._starts, self._stop, self._tags
        raw_head, bodies = self._raw_head, self._transport._bodies
        missing = []
        for rank in self._missing:
            start = starts[rank]
            raw = data[start : start + stop].tobytes()
            if raw[: 8 * HEAD_WORDS] == raw_head:
                # What is left without the tags is the payload, if every word has the tag.
                payload = int.from_bytes(raw[8 * HEAD_WORDS :], "little") ^ tags
                body = bodies.get(payload)
                if body is None:
                    body = self._new_body(payload)
                if body is not None:
                    self._received[rank] = (self._head, body)
                    continue
            missing.append(rank)
        self._missing = missing
        return not missing

    def _new_body(self, payload: int) -> Words | None:
        count = self._stop // 8 - HEAD_WORDS
        words = _QUADS[count].unpack(payload.to_bytes(8 * count, "little"))
        if max(words) > _MASK:
            return None  # a word of an earlier exchange is still there
        bodies = self._transport._bodies
        if len(bodies) >= _MAX_CACHED_BODIES:
            bodies.clear()
        bodies[payload] = words
        return words

    def _look_for_others(self) -> None:
        """Take records with other heads too, of any length: then the ranks disagree, and will say about what."""
        for rank in list(self._missing):
            start = self._starts[rank]
            words = _QUADS[WORDS].unpack(self._transport.board.bytes[start : start + 8 * WORDS].tobytes())
            length = words[0] & 0xFFFF
            if HEAD_WORDS < length <= WORDS and all(word >> 32 == self._sequence for word in words[:length]):
                self._received[rank] = split([word & _MASK for word in words[:length]])
                self._missing = [other for other in self._missing if other != rank]


_MASK = 0xFFFFFFFF
_MAX_CACHED_BODIES = 4096
_QUADS = [struct.Struct(f"={count}Q") for count in range(WORDS + 1)]
_TAGS = [int.from_bytes(b"\0\0\0\0\1\0\0\0" * count, "little") for count in range(WORDS + 1)]


def open_transport(process_group: dist.ProcessGroup, timeout_s: float) -> tuple[Transport, Board | None]:
    """Return the fastest transport that all ranks of a group can use: shared memory if they share a host. Collective.

    Args:
        process_group: gloo; stays in use where there is no shared memory.
        timeout_s: longest wait for any rank, in seconds.

    Returns:
        The transport, and the board that it is over, if it is.

    Raises:
        TimeoutError: a rank did not come.
        ConnectionError: a peer's connection broke.
    """
    transport, rank, board = ProcessGroupTransport(process_group), process_group.rank(), None
    try:
        if rank == 0:
            try:
                board = Board.create(transport.num_ranks)
            except OSError:  # no shared memory here, or none left: the group does as well
                board = None
        name = decode_message(transport.begin(encode_message(board.name.encode() if board else b"")).wait(timeout_s)[0])
        if rank != 0 and name:
            try:
                board = Board.attach(name.decode(errors="replace"), transport.num_ranks)
            except (OSError, ValueError):  # another host, or a container with shared memory of its own
                board = None
        if board is not None:
            board.register(rank)
        votes = transport.begin(encode_message(b"yes" if board is not None else b"no")).wait(timeout_s)
    finally:
        if rank == 0 and board is not None:
            board.unlink()
    if board is not None and all(decode_message(vote) == b"yes" for vote in votes):
        return SharedMemoryTransport(board, rank), board
    return transport, None


def wait_for(work: dist.Work, timeout_s: float, check: Callable[[], None] | None = None) -> None:
    """Wait for a collective at most `timeout_s` seconds.

    Args:
        work: of an asynchronous collective.
        timeout_s: longest wait, in seconds.
        check: called every `CHECK_S` seconds; ends the wait by raising.

    Raises:
        TimeoutError: it did not end in time.
        ConnectionError: a peer's connection broke.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        # Slices, because Python sees Ctrl-C only between two waits. A slice that ends leaves the collective running.
        left_s = deadline - time.monotonic()
        try:
            work.wait(datetime.timedelta(seconds=min(max(left_s, 0.001), CHECK_S)))
            return
        except RuntimeError as error:
            message = first_line(error)
            timed_out = "imed out" in message or "imeout" in message
            if not timed_out:
                raise ConnectionError(f"a peer's connection broke ({message})") from error
            if work.is_completed():
                # It has come to its end since the slice ended: well, or by the group's own limit, which may come a
                # little before ours. Waiting once more says which, at once.
                with contextlib.suppress(RuntimeError):
                    work.wait()
                    return
                raise TimeoutError(f"no answer within {timeout_s:.3g} s") from error
            if left_s <= CHECK_S:
                raise TimeoutError(f"no answer within {timeout_s:.3g} s") from error
        if check is not None:
            check()


def first_line(error: BaseException) -> str:
    """Return an exception's message up to its first line break; C++ stack traces follow there."""
    return str(error).strip().split("\n", 1)[0]
