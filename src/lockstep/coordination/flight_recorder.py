"""The last steps of each rank, kept for the day that one does not arrive, and what the others can know of it then."""

import contextlib
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.coordination.board import GIVEN_UP_WORD, Board
from lockstep.coordination.step import MESSAGE_BYTES, decode_message, encode_message, odd_ones_out
from lockstep.coordination.transports import ProcessGroupTransport, RanksMissing, SharedMemoryTransport, Transport
from lockstep.errors import LockstepError, PeerFailedError, RankAbsentError, RankMismatchError

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "LOCKSTEP_RECORDER_DIR"
"""Environment variable: where recorder files go; the system's temporary folder by default."""
FORMAT = "lockstep-flight-recorder-1"

_ROLL_CALL_S = 0.5
_PUBLISH_S = 0.5
_STORE_S = 0.9


class Phase(IntEnum):
    """Where in a step a rank is, in the order in which a step passes through them."""

    AGREEMENT = 1
    MODEL = 2
    DISPATCH = 3
    EXPERTS = 4
    COMBINE = 5
    END = 6
    LEFT = 7


_WORDS = {
    Phase.AGREEMENT: "at the agreement of step {step}",
    Phase.MODEL: "in the model's other layers in step {step}",
    Phase.DISPATCH: "in dispatch of layer {layer} in step {step}",
    Phase.EXPERTS: "in experts of layer {layer} in step {step}",
    Phase.COMBINE: "in combine of layer {layer} in step {step}",
    Phase.END: "in its script after step {step}",
    Phase.LEFT: "has left join() after step {step}",
}
_LAYER_BITS, _STEP_BITS = 16, 40


class FlightRecorder:
    """What this rank did last, published so that others can name it; and what the others did last.

    Ranks of one host publish on a board in shared memory, with every phase; others through a torch store, twice a
    second. Marking a phase costs about a microsecond.

    Args:
        rank: this rank.
        num_ranks: all ranks.
        board: of the ranks of one host, if all are on one.
        store: a torch store, used only where there is no board.
        epoch: of the groups; in file names and store keys.
        debug: compare `(operation, group, sizes)` of every collective over all ranks before it is issued.
        capacity: entries kept.

    Attributes:
        step: number of the present step.
        phase, layer: where in it this rank is.
        fingerprint: hash of all collectives noted so far.
        unfinished: waits for the last collective on this rank's GPU after which the host went on; None: there is none.
        on_mark: called with the recorder at every mark; for tests that break things on purpose.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        *,
        board: Board | None = None,
        store: "dist.Store | None" = None,
        epoch: int = 0,
        debug: bool = False,
        capacity: int = 512,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.epoch = epoch
        self.debug = debug
        self.step = -1
        self.phase = Phase.END
        self.layer = -1
        self.on_mark: Callable[[FlightRecorder], None] | None = None
        self.unfinished: Callable[[], None] | None = None
        self.fingerprint = 0
        self._spoiled_step = -2
        self._ring: deque[tuple[int, int, int, int, Any]] = deque(maxlen=capacity)
        self._board = board
        self._store = store if board is None else None
        self._file: Path | None = None
        self._said = False
        self._closed = threading.Event()
        self._comparisons: Transport | None = None
        if board is not None:
            self._comparisons = SharedMemoryTransport(board, rank, lane=1)
            self._place, self._place_ns = board.place_words(rank)
        elif store is not None:
            threading.Thread(target=self._publish, name="lockstep-recorder", daemon=True).start()

    def mark(self, phase: Phase, layer: int = -1, detail: Any = None) -> None:
        """Enter a phase of the present step.

        Args:
            phase: which.
            layer: number of the MoE layer, from 0; -1 outside of one.
            detail: kept in the ring: integers or short text.
        """
        now = time.monotonic_ns()
        self.phase, self.layer = phase, layer
        self._ring.append((now, self.step, phase, layer, detail))
        if self._board is not None:
            words = self._board.words
            words[self._place] = _pack_place(self.step, phase, layer)
            words[self._place_ns] = now
        if self.on_mark is not None:
            self.on_mark(self)

    def note(self, detail: Any) -> None:
        """Keep something that happened in the present phase."""
        self._ring.append((time.monotonic_ns(), self.step, 0, self.layer, detail))

    def collective(
        self, name: str, sizes: Sequence[int], group: "dist.ProcessGroup", deadline_s: float, on_cpu: bool
    ) -> None:
        """Note a collective that is about to be issued on all ranks, and compare it if `debug` is set.

        On the CPU of one host it is always compared: that costs little there, and gloo ends the process of a rank that
        receives more than it expects.

        Raises:
            RankMismatchError: the ranks are about to issue different collectives; on all ranks.
            RankAbsentError: a rank did not come to the comparison.
        """
        self.fingerprint = zlib.crc32(repr((name, tuple(sizes))).encode(), self.fingerprint)
        self.note((name, *sizes))
        if self.debug or (on_cpu and self._comparisons is not None):
            self._compare(name, sizes, group, deadline_s)

    @property
    def spoiled(self) -> bool:
        """Whether this rank's experts have failed in the present step."""
        return self._spoiled_step == self.step

    def spoil_step(self) -> None:
        """Say that what the others receive from this rank in this step is no result."""
        self._spoiled_step = self.step
        if self._board is not None:
            self._board.words[self._board.spoiled_word(self.rank)] = self.step + 1

    def spoiled_by(self) -> int | None:
        """Return another rank that has spoiled the present step, where ranks can see that."""
        if self._board is None:
            return None
        for rank in range(self.num_ranks):
            if rank != self.rank and self._board.words[self._board.spoiled_word(rank)] == self.step + 1:
                return rank
        return None

    def check_last_words(self) -> None:
        """Look whether another rank has given up; cheap enough for every agreement. Raises as `check`."""
        if self._board is not None and self._board.words[GIVEN_UP_WORD]:
            self.check()

    def check(self) -> None:
        """Look whether a rank that this one waits for will never come; called from time to time in every wait.

        Raises:
            PeerFailedError: another rank has raised in the middle of a step.
            RankAbsentError: another rank has given up waiting, or a rank's process is gone.
            RankMismatchError: another rank has found that the ranks differ.
        """
        if self._board is None:
            return
        for rank in range(self.num_ranks):
            if rank == self.rank:
                continue
            words = self._board.last_words(rank)
            if words is not None:
                raise self._after_last_words(rank, words)
            if self._board.process_state(rank) == "gone":
                # It may have said why just before it went.
                words = self._board.last_words(rank)
                if words is not None:
                    raise self._after_last_words(rank, words)
                doing = _WORDS[self.phase].format(step=self.step, layer=self.layer)
                raise self.absent(f"{doing} there is no use in waiting on", (rank,))

    def absent(self, waited_for: str, ranks: tuple[int, ...] = ()) -> LockstepError:
        """Return the error for a wait that did not end, naming who is missing and where each was last seen.

        Where another rank has given up before, it is that rank's reason that counts.

        The ring is written to a file, and the other ranks learn that this one has given up.

        Args:
            waited_for: what this rank waited for and how long.
            ranks: that are known not to have come; otherwise those that are behind this one are found out.
        """
        for rank in range(self.num_ranks if self._board is not None else 0):
            assert self._board is not None
            words = self._board.last_words(rank) if rank != self.rank else None
            if words is not None:
                return self._after_last_words(rank, words)
        alone = self._has_gone_on_alone()
        ranks = (self.rank,) if alone else ranks or self._missing_ranks()
        if alone:
            who = f"rank {self.rank} itself has left a collective out: all others still wait in one before"
        elif ranks:
            seen = "; ".join(f"rank {rank} {self.last_seen(rank)}" for rank in ranks)
            who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} absent: {seen}"
        else:
            who = "it could not be found out which rank is absent"
        message = f"rank {self.rank}: {waited_for}; {who}"
        self.give_up("absent", message, ranks)
        return RankAbsentError(f"{message}{self.file_note()}", ranks)

    def give_up(self, kind: str, message: str, ranks: Sequence[int] = ()) -> None:
        """Tell the others that this rank's groups are not used again and why; the first reason counts.

        Args:
            kind: `absent`, `failed` or `mismatch`: which error the others raise.
            message: for them.
            ranks: the ranks that are to blame.
        """
        if self._said:
            return
        self._said = True
        self.write_file(message)
        if self._board is not None:
            words = {"kind": kind, "ranks": list(ranks)[:64], "message": message[:1500]}
            self._board.say_last_words(self.rank, json.dumps(words).encode())

    def last_seen(self, rank: int) -> str:
        """Return what is known of a rank, to stand after its number: where it was, how long ago, whether it lives."""
        place: int | None = None
        ago = 0.0
        state = "unknown"
        if self._board is not None:
            state = self._board.process_state(rank)
            place, ago = self._board.place(rank)
        elif self._store is not None:
            with contextlib.suppress(RuntimeError, ValueError, TimeoutError):
                place, ago = self._published(rank)
        text = _place_text(place, ago) if place else "has not been seen"
        if state == "gone":
            return f"{text}; its process {self._board.pid(rank) if self._board else ''} is gone"
        return f"{text}; its process is {state}" if state != "unknown" else text

    def write_file(self, reason: str) -> Path | None:
        """Write the ring, and where each thread of this process stands, to a file; once per recorder.

        Returns:
            Its path, None if it could not be written.
        """
        if self._file is not None:
            return self._file
        header = {
            "format": FORMAT, "rank": self.rank, "num_ranks": self.num_ranks, "epoch": self.epoch, "pid": os.getpid(),
            "host": socket.gethostname(), "time": time.time(), "clock_ns": time.monotonic_ns(), "reason": reason,
        }  # fmt: skip
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = {
            names.get(ident, str(ident)): traceback.format_stack(frame)[-12:]
            for ident, frame in sys._current_frames().items()
        }
        lines = [json.dumps(header)]
        for now, step, phase, layer, detail in list(self._ring):
            lines.append(json.dumps({"ns": now, "step": step, "phase": int(phase), "layer": layer, "detail": detail}))
        lines.append(json.dumps({"stacks": stacks}))
        try:
            folder = os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir()
            # A name that nobody can foresee: the folder may be everyone's.
            descriptor, path = tempfile.mkstemp(".jsonl", f"lockstep-rank{self.rank}-epoch{self.epoch}-", folder)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            logger.warning("rank %d: the flight recorder could not be written: %s", self.rank, error)
            return None
        self._file = Path(path)
        return self._file

    def file_note(self) -> str:
        """Return where the ring was written, to stand at the end of a message."""
        return f"; the last steps of rank {self.rank}: {self._file}" if self._file is not None else ""

    def close(self) -> None:
        """Stop publishing."""
        self._closed.set()

    def _compare(self, name: str, sizes: Sequence[int], group: "dist.ProcessGroup", deadline_s: float) -> None:
        """Gather what each rank is about to issue, on the board or else on the group on which it would do so."""
        mine = f"{name}{list(sizes)} {_WORDS[self.phase].format(step=self.step, layer=self.layer)}"
        wire = encode_message(mine.encode()[:MESSAGE_BYTES])
        if self._comparisons is None or self._comparisons.num_ranks != group.size():
            self._comparisons = ProcessGroupTransport(group)
        try:
            received = self._comparisons.begin(wire).wait(deadline_s, self.check)
        except LockstepError:
            raise
        except (TimeoutError, ConnectionError) as error:
            ranks = error.ranks_missing if isinstance(error, RanksMissing) else ()
            raise self.absent(f"not all ranks came to {mine} within {deadline_s:g} s: {error}", ranks) from error
        if all(other == received[0] for other in received):
            return
        texts = [decode_message(other).decode(errors="replace") for other in received]
        listed = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(texts))
        message = f"the ranks are about to issue different collectives: {listed}{odd_ones_out(texts)}"
        self.give_up("mismatch", message)
        raise RankMismatchError(f"{message}{self.file_note()}")

    def _after_last_words(self, rank: int, words: bytes) -> LockstepError:
        """Turn another rank's last words into this rank's error."""
        kind, ranks, message = _parse_last_words(words, self.num_ranks)
        self.give_up(kind, message, ranks)
        if kind == "failed":
            blamed = ranks[0] if ranks else rank  # it may only pass on what another has said
            text = f"rank {self.rank} stops in step {self.step}: rank {blamed} raised {message}{self.file_note()}"
            return PeerFailedError(text, blamed, message)
        text = f"rank {self.rank}: rank {rank} has given up: {message}{self.file_note()}"
        return RankMismatchError(text) if kind == "mismatch" else RankAbsentError(text, ranks)

    def _missing_ranks(self) -> tuple[int, ...]:
        """Find out which ranks the others wait for."""
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        if self._board is None:
            return self._roll_call() if self._store is not None else ()
        states = {rank: self._board.process_state(rank) for rank in others}
        lost = tuple(rank for rank in others if states[rank] in ("gone", "stopped"))
        if lost:
            return lost
        mine = _order(_pack_place(self.step, self.phase, self.layer))
        places = {rank: _order(self._board.place(rank)[0]) for rank in others}
        behind = tuple(rank for rank in others if places[rank] < mine)
        # Nobody is behind: then somebody has gone on although this rank had not come.
        return behind or tuple(rank for rank in others if places[rank] > mine)

    def _has_gone_on_alone(self) -> bool:
        """Whether all others, two at least, stand in one and the same collective, which this rank has behind it."""
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        if self._board is None or len(others) < 2:
            return False
        places = {self._board.place(rank)[0] for rank in others}
        if len(places) > 1 or any(self._board.process_state(rank) in ("gone", "stopped") for rank in others):
            return False
        (place,) = places
        mine = _pack_place(self.step, self.phase, self.layer)
        return _unpack_place(place)[1] in (Phase.DISPATCH, Phase.COMBINE) and _order(place) < _order(mine)

    def _roll_call(self) -> tuple[int, ...]:
        """Ask through the store: all ranks that have ended their wait, or still publish, are there."""
        store = self._store
        assert store is not None
        keys = [f"roll/{self.epoch}/{self.step}/{rank}" for rank in range(self.num_ranks)]

        def call() -> tuple[int, ...]:
            store.set(keys[self.rank], "here")
            until = time.monotonic() + _ROLL_CALL_S
            while True:
                missing = tuple(rank for rank, key in enumerate(keys) if not store.check([key]))
                if not missing or time.monotonic() > until:
                    return missing
                time.sleep(0.02)

        try:
            return within(call, _STORE_S)
        except (RuntimeError, TimeoutError) as error:  # the store may have died with the rank that kept it
            logger.warning("rank %d: no roll call, the store does not answer: %s", self.rank, error)
            return ()

    def _publish(self) -> None:
        store = self._store
        assert store is not None
        wait_s = 0.0
        while not self._closed.wait(wait_s):
            wait_s = _PUBLISH_S
            last = self._ring[-1][0] if self._ring else time.monotonic_ns()
            place = _pack_place(self.step, self.phase, self.layer)
            ago = (time.monotonic_ns() - last) / 1e9
            try:
                store.set(f"place/{self.epoch}/{self.rank}", json.dumps([place, time.time() - ago]))
            except RuntimeError:
                return

    def _published(self, rank: int) -> tuple[int | None, float]:
        store = self._store
        assert store is not None
        key = f"place/{self.epoch}/{rank}"

        def read() -> bytes:
            return store.get(key) if store.check([key]) else b""

        place, since = json.loads(within(read, _STORE_S) or b"[null, 0]")
        return place, max(0.0, time.time() - since)


_recorders: dict[str, FlightRecorder] = {}


def watch_group(group: "dist.ProcessGroup", recorder: FlightRecorder | None) -> None:
    """Let the waits of a group's collectives be watched by a recorder; None ends it."""
    if recorder is None:
        _recorders.pop(group.group_name, None)
    else:
        _recorders[group.group_name] = recorder


def recorder_of(group: "dist.ProcessGroup") -> FlightRecorder | None:
    """Return the recorder that watches a group, if any does."""
    return _recorders.get(group.group_name)


def within(call: Callable[[], Any], seconds: float) -> Any:
    """Run a function that may hang, such as one that asks a store whose keeper is gone, and wait at most so long.

    Raises:
        TimeoutError: it did not return in time; it is left behind.
        Exception: what it raised.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, name="lockstep-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.3g} s")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value


def _pack_place(step: int, phase: Phase, layer: int) -> int:
    """Steps from -1 and layers from -1 share a word with the phase."""
    return phase << (_LAYER_BITS + _STEP_BITS) | (layer + 1 & 0xFFFF) << _STEP_BITS | step + 1 & (1 << _STEP_BITS) - 1


def _unpack_place(place: int) -> tuple[int, int, int]:
    """Return `(step, phase, layer)`."""
    step = (place & (1 << _STEP_BITS) - 1) - 1
    return step, place >> (_LAYER_BITS + _STEP_BITS), (place >> _STEP_BITS & 0xFFFF) - 1


def _order(place: int) -> tuple[int, int, int, int]:
    """A key by which places are ordered as ranks pass through them."""
    step, phase, layer = _unpack_place(place)
    if phase in (Phase.DISPATCH, Phase.EXPERTS, Phase.COMBINE):
        return step, 1, layer, phase
    return step, {0: 0, Phase.AGREEMENT: 0, Phase.MODEL: 1}.get(Phase(phase) if phase else 0, 2), layer, phase


def _place_text(place: int, ago: float) -> str:
    step, phase, layer = _unpack_place(place)
    if phase not in _WORDS:
        return f"was last seen {ago:.1f} s ago"
    words = _WORDS[Phase(phase)].format(step=step, layer=layer)
    return f"{words}, {ago:.1f} s ago" if phase == Phase.LEFT else f"was last seen {words}, {ago:.1f} s ago"


def _parse_last_words(words: bytes, num_ranks: int) -> tuple[str, tuple[int, ...], str]:
    """Read another rank's last words; whatever they are, something readable comes out."""
    try:
        parsed = json.loads(words)
        kind, ranks, message = str(parsed["kind"]), parsed["ranks"], str(parsed["message"])
        ranks = tuple(rank for rank in ranks if isinstance(rank, int) and 0 <= rank < num_ranks)
    except (ValueError, TypeError, KeyError):
        return "absent", (), words[:200].decode(errors="replace")
    return kind, ranks, message
