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
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.coordination.board import GIVEN_UP_WORD, Board
from lockstep.coordination.step import MESSAGE_BYTES, decode_message, encode_message, odd_ones_out
from lockstep.coordination.transports import ProcessGroupTransport, RanksMissing, SharedMemoryTransport, Transport
from lockstep.coordination.waits import within
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
    TENSOR_PARALLEL = 8
    MERGE = 9


_WORDS = {
    Phase.AGREEMENT: "at the agreement of step {step}",
    Phase.MODEL: "in the model's other layers in step {step}",
    Phase.DISPATCH: "in dispatch of layer {layer} in step {step}",
    Phase.EXPERTS: "in experts of layer {layer} in step {step}",
    Phase.COMBINE: "in combine of layer {layer} in step {step}",
    Phase.END: "in its script after step {step}",
    Phase.LEFT: "has left join() after step {step}",
    Phase.TENSOR_PARALLEL: "in a tensor-parallel exchange before MoE layer {layer} in step {step}",
    Phase.MERGE: "gathering what all ranks have written, after step {step}",
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
        processes: each rank's number in the whole start, `[num_ranks]`, for messages and errors; by default the same.

    Attributes:
        step, phase, layer: where this rank is.
        fingerprint: hash of all collectives noted so far.
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
        processes: Sequence[int] | None = None,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.processes = tuple(processes or range(num_ranks))
        self.epoch = epoch
        self.debug = debug
        self.step = -1
        self.phase = Phase.END
        self.layer = -1
        self.on_mark: Callable[[FlightRecorder], None] | None = None
        self.fingerprint = 0
        self._spoiled_step = -2
        self._others = [other for other in range(num_ranks) if other != rank]
        self._ring: deque[tuple[int, int, int, int, Any]] = deque(maxlen=capacity)
        self._board = board
        self._store: Any = store if board is None else None
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
        """Enter a phase of the present step, `layer` is -1 outside of MoE layers; `detail` is kept in the ring."""
        self._ring.append((self._publish_place(phase, layer), self.step, phase, layer, detail))
        if self.on_mark is not None:
            self.on_mark(self)

    def _publish_place(self, phase: Phase, layer: int) -> int:
        """Return the time of it."""
        now = time.monotonic_ns()
        self.phase, self.layer = phase, layer
        if self._board is not None:
            words = self._board.words
            words[self._place] = _pack_place(self.step, phase, layer)
            words[self._place_ns] = now
        return now

    @contextlib.contextmanager
    def in_exchange(self) -> Iterator[None]:
        """Say inside the block that this rank waits in a tensor-parallel exchange, and so is not who is late."""
        before = self.phase, self.layer
        layer = self.layer + 1 if self.phase in (Phase.DISPATCH, Phase.EXPERTS, Phase.COMBINE) else 0
        self._publish_place(Phase.TENSOR_PARALLEL, layer)
        try:
            yield
        finally:
            self._publish_place(*before)

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
        board = self._board
        if board is None:
            return None
        return next((rank for rank in self._others if board.words[board.spoiled_word(rank)] == self.step + 1), None)

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
        for rank in self._others:
            # A rank may say why just before it goes, so its words are read after its state.
            gone = self._board.process_state(rank) == "gone"
            words = self._board.last_words(rank)
            if words is not None:
                raise self._after_last_words(rank, words)
            if gone:
                raise self.absent(f"{self._doing} there is no use in waiting on", (rank,))

    def name(self, rank: int) -> int:
        """Return a rank's number in the whole start."""
        return self.processes[rank]

    def absent(self, waited_for: str, ranks: tuple[int, ...] = (), among: tuple[int, ...] = ()) -> LockstepError:
        """Return the error for a wait that did not end, naming who is missing and where each was last seen.

        Where another rank has given up before, it is that rank's reason that counts.

        The ring is written to a file, and the other ranks learn that this one has given up.

        Args:
            waited_for: what this rank waited for and how long.
            ranks: that are known not to have come; otherwise those that are behind this one are found out.
            among: the ranks that it waited for; all by default.
        """
        for rank, words in self._all_last_words():
            return self._after_last_words(rank, words)
        alone = self._has_gone_on_alone()
        ranks = (self.rank,) if alone else self._late_among(ranks) or self._missing_ranks(among)
        if alone:
            who = f"rank {self.name(self.rank)} itself has left a collective out: all others still wait in one before"
        elif ranks:
            seen = "; ".join(f"rank {self.name(rank)} {self.last_seen(rank)}" for rank in ranks)
            named = ", ".join(str(self.name(rank)) for rank in ranks)
            who = f"rank{'s' if len(ranks) > 1 else ''} {named} absent: {seen}"
        else:
            who = "it could not be found out which rank is absent"
        message = f"rank {self.name(self.rank)}: {waited_for}; {who}"
        self.give_up("absent", message, ranks)
        return RankAbsentError(f"{message}{self.file_note()}", tuple(map(self.name, ranks)))

    def give_up(self, kind: str, message: str, ranks: Sequence[int] = ()) -> None:
        """Tell the others that this rank's groups are not used again and why; the first reason counts.

        Args:
            kind: `absent`, `failed` or `mismatch`: which error the others raise.
            message: for them.
            ranks: the ranks that are to blame.
        """
        if self._said:
            return
        self.write_file(message)
        self._say_last_words(kind, message, ranks)

    def _say_last_words(self, kind: str, message: str, ranks: Sequence[int]) -> None:
        self._said = True
        words = {"kind": kind, "ranks": list(ranks)[:64], "message": message[:1500]}
        if self._board is not None:
            self._board.say_last_words(self.rank, json.dumps(words).encode())
        elif self._store is not None:
            with contextlib.suppress(RuntimeError, TimeoutError):
                key, text, store = f"last words/{self.epoch}/{self.rank}", json.dumps(words), self._store
                within(lambda: store.set(key, text), _STORE_S)

    def last_seen(self, rank: int) -> str:
        """Return what is known of a rank, to stand after its number: where it was, how long ago, whether it lives."""
        place, ago, process = 0, 0.0, ""
        if self._board is not None:
            process = self._board.process(rank).describe()
            place, ago = self._board.place(rank)
        elif self._store is not None:
            with contextlib.suppress(RuntimeError, ValueError, TimeoutError):
                place, ago = self._published(rank)
        return (_place_text(place, ago) if place else "has not been seen") + process

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
        entries = [
            dict(zip(("ns", "step", "phase", "layer", "detail"), entry, strict=True)) for entry in list(self._ring)
        ]
        try:
            folder = os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir()
            # A name that nobody can foresee: the folder may be everyone's.
            prefix = f"lockstep-rank{self.name(self.rank)}-epoch{self.epoch}-"
            descriptor, path = tempfile.mkstemp(".jsonl", prefix, folder)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in (header, *entries, {"stacks": stacks}))
        except OSError as error:
            logger.warning("rank %d: the flight recorder could not be written: %s", self.rank, error)
            return None
        self._file = Path(path)
        return self._file

    def file_note(self) -> str:
        """Return where the ring was written, to stand at the end of a message."""
        return f"; the last steps of rank {self.name(self.rank)}: {self._file}" if self._file is not None else ""

    def terminate(self) -> str:
        """Say last words because SIGTERM is about to end this process; return what a person should read, if anything.

        A ring is written only where something is wrong: a rank is gone, or it is not known whether one is.
        """
        if self._said or self._closed.is_set() or self.phase == Phase.LEFT:
            return ""
        board, others = self._board, self._others
        gone = tuple(rank for rank in others if board is not None and board.process_state(rank) == "gone")
        if gone or board is None or any(board.last_words(rank) for rank in others):
            return str(self.absent(f"SIGTERM came {self._doing}", gone))
        self._say_last_words("failed", f"SIGTERM: rank {self.name(self.rank)} was ended {self._doing}", (self.rank,))
        return ""

    def mute(self) -> None:
        """Publish nothing from now on: this is a process forked from the rank."""
        self._board = self._store = self._comparisons = None
        self._said = True
        self._closed.set()

    def close(self) -> None:
        """Stop publishing."""
        self._closed.set()

    @property
    def _doing(self) -> str:
        return _WORDS[self.phase].format(step=self.step, layer=self.layer)

    def _compare(self, name: str, sizes: Sequence[int], group: "dist.ProcessGroup", deadline_s: float) -> None:
        """Gather what each rank is about to issue, on the board or else on the group on which it would do so."""
        mine = f"{name}{list(sizes)} {self._doing}"
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
        listed = "; ".join(f"rank {self.name(rank)}: {other}" for rank, other in enumerate(texts))
        odd = odd_ones_out(texts, self.processes)
        message = f"the ranks are about to issue different collectives: {listed}{odd}"
        self.give_up("mismatch", message)
        raise RankMismatchError(f"{message}{self.file_note()}")

    def _after_last_words(self, rank: int, words: bytes) -> LockstepError:
        """Turn another rank's last words into this rank's error."""
        kind, ranks, message = _parse_last_words(words, self.num_ranks)
        self.give_up(kind, message, ranks)
        if kind == "failed":
            blamed = ranks[0] if ranks else rank  # it may only pass on what another has said
            stops = f"rank {self.name(self.rank)} stops in step {self.step}"
            text = f"{stops}: rank {self.name(blamed)} raised {message}{self.file_note()}"
            return PeerFailedError(text, self.name(blamed), message)
        text = f"rank {self.name(self.rank)}: rank {self.name(rank)} has given up: {message}{self.file_note()}"
        return RankMismatchError(text) if kind == "mismatch" else RankAbsentError(text, tuple(map(self.name, ranks)))

    def _all_last_words(self) -> list[tuple[int, bytes]]:
        """Return which other ranks have said why they stopped, and what."""
        board, store, said = self._board, self._store, {}
        if board is not None:
            said = {rank: board.last_words(rank) for rank in self._others}
        elif store is not None:
            keys = {rank: f"last words/{self.epoch}/{rank}" for rank in self._others}
            # Otherwise the roll call will say that the store does not answer.
            with contextlib.suppress(RuntimeError, TimeoutError):
                said = within(lambda: {r: store.get(key) for r, key in keys.items() if store.check([key])}, _STORE_S)
        return [(rank, words) for rank, words in said.items() if words is not None]

    def _late_among(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Leave out the ranks that wait for one that shares their requests, unless all of these do."""
        if self._board is None:
            return ranks
        phases = {rank: _unpack_place(self._board.place(rank)[0])[1] for rank in ranks}
        return tuple(rank for rank in ranks if phases[rank] != Phase.TENSOR_PARALLEL) or ranks

    def _missing_ranks(self, among: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Find out which ranks the others wait for."""
        others = [rank for rank in among or self._others if rank != self.rank]
        if self._board is None:
            missing = self._roll_call() if self._store is not None else ()
            return tuple(rank for rank in missing if rank in others) or missing
        lost = tuple(rank for rank in others if self._board.process_state(rank) in ("gone", "stopped"))
        if lost:
            return lost
        mine = _order(_pack_place(self.step, self.phase, self.layer))
        places = {rank: _order(self._board.place(rank)[0]) for rank in others}
        behind = self._late_among(tuple(rank for rank in others if places[rank] < mine))
        # Nobody is behind: then somebody has gone on although this rank had not come.
        return behind or tuple(rank for rank in others if places[rank] > mine)

    def _has_gone_on_alone(self) -> bool:
        """Whether all others, two at least, stand in one and the same collective, which this rank has behind it."""
        if self._board is None or len(self._others) < 2:
            return False
        places = {self._board.place(rank)[0] for rank in self._others}
        if len(places) > 1 or any(self._board.process_state(rank) in ("gone", "stopped") for rank in self._others):
            return False
        (place,) = places
        mine = _pack_place(self.step, self.phase, self.layer)
        return _unpack_place(place)[1] in (Phase.DISPATCH, Phase.COMBINE) and _order(place) < _order(mine)

    def _roll_call(self) -> tuple[int, ...]:
        """Ask through the store: all ranks that have ended their wait, or still publish, are there."""
        store = self._store
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
            return tuple(within(call, _STORE_S))
        except (RuntimeError, TimeoutError) as error:  # the store may have died with the rank that kept it
            logger.warning("rank %d: no roll call, the store does not answer: %s", self.rank, error)
            return ()

    def _publish(self) -> None:
        store = self._store
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

    def _published(self, rank: int) -> tuple[int, float]:
        store, key = self._store, f"place/{self.epoch}/{rank}"
        place, since = json.loads(within(lambda: store.get(key) if store.check([key]) else b"[0, 0]", _STORE_S))
        return place, max(0.0, time.time() - since)


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
    if phase == Phase.TENSOR_PARALLEL:  # after the layer before, ahead of this one's dispatch
        return step, 1, layer - 1, phase
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
