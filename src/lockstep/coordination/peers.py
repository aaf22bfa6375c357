"""What a rank knows of the others and they of it: who lives, where each is, why one has given up."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.coordination.board import GIVEN_UP_WORD, Board
from lockstep.coordination.flight_recorder import FlightRecorder, Phase, place_order, place_text, unpack_place
from lockstep.coordination.step import odd_ones_out
from lockstep.coordination.transports import ProcessGroupTransport, RanksMissing, SharedMemoryTransport, Transport
from lockstep.coordination.waits import within
from lockstep.coordination.wire import MESSAGE_BYTES, decode_message, encode_message
from lockstep.errors import LockstepError, PeerFailedError, RankAbsentError, RankMismatchError

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

_ROLL_CALL_S = 0.5
_PUBLISH_S = 0.5
_STORE_S = 0.9


class Peers:
    """The other ranks: where each is and whether it lives; and the last words of a rank that gives up.

    Ranks of one host publish on a board in shared memory, with every phase; others through a torch store, twice a
    second. Marking a phase costs about a microsecond.

    Args:
        rank: this rank.
        num_ranks: all ranks.
        board: of the ranks of one host, if all are on one.
        store: a torch store, used only where there is no board.
        epoch: of the groups; in file names and store keys.
        debug: compare `(operation, group, sizes)` of every collective over all ranks before it is issued.
        capacity: entries that the recorder keeps.
        processes: each rank's number in the whole start, `[num_ranks]`, for messages and errors; by default the same.

    Attributes:
        recorder: keeps what this rank does.
        on_mark: called with these peers at every mark; for tests that break things on purpose.
    """

    def __init__(
        self, rank: int, num_ranks: int, *, board: Board | None = None, store: "dist.Store | None" = None,
        epoch: int = 0, debug: bool = False, capacity: int = 512, processes: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.num_ranks = num_ranks
        self.processes = tuple(processes or range(num_ranks))
        self.epoch = epoch
        self.debug = debug
        self.recorder = FlightRecorder(rank, num_ranks, epoch=epoch, process=self.name(rank), capacity=capacity)
        self.on_mark: Callable[[Peers], None] | None = None
        self._spoiled_step = -2
        self._others = [other for other in range(num_ranks) if other != rank]
        self._board = board
        self._store: Any = store if board is None else None
        self._said = False
        self._closed = threading.Event()
        self._comparisons: Transport | None = None
        if board is not None:
            self._comparisons = SharedMemoryTransport(board, rank, lane=1)
            self._place, self._place_ns = board.place_words(rank)
        elif store is not None:
            threading.Thread(target=self._publish, name="lockstep-peers", daemon=True).start()

    def mark(self, phase: Phase, layer: int = -1, detail: Any = None) -> None:
        """Enter a phase of the present step, `layer` is -1 outside of MoE layers; `detail` is kept in the ring."""
        self._publish_place(self.recorder.mark(phase, layer, detail))
        if self.on_mark is not None:
            self.on_mark(self)

    def _publish_place(self, now: int) -> None:
        if self._board is not None:
            words = self._board.words
            words[self._place] = self.recorder.place
            words[self._place_ns] = now

    @contextlib.contextmanager
    def in_exchange(self) -> Iterator[None]:
        """Say inside the block that this rank waits in a tensor-parallel exchange, and so is not who is late."""
        recorder = self.recorder
        before = recorder.phase, recorder.layer
        in_layer = recorder.phase in (Phase.DISPATCH, Phase.EXPERTS, Phase.COMBINE)
        recorder.phase, recorder.layer = Phase.TENSOR_PARALLEL, recorder.layer + 1 if in_layer else 0
        self._publish_place(time.monotonic_ns())
        try:
            yield
        finally:
            recorder.phase, recorder.layer = before
            self._publish_place(time.monotonic_ns())

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
        self.recorder.collective(name, sizes)
        if self.debug or (on_cpu and self._comparisons is not None):
            self._compare(name, sizes, group, deadline_s)

    @property
    def spoiled(self) -> bool:
        """Whether this rank's experts have failed in the present step."""
        return self._spoiled_step == self.recorder.step

    def spoil_step(self) -> None:
        """Say that what the others receive from this rank in this step is no result."""
        self._spoiled_step = self.recorder.step
        if self._board is not None:
            self._board.words[self._board.spoiled_word(self.rank)] = self.recorder.step + 1

    def spoiled_by(self) -> int | None:
        """Return another rank that has spoiled the present step, where ranks can see that."""
        board = self._board
        if board is None:
            return None
        now = self.recorder.step + 1
        return next((rank for rank in self._others if board.words[board.spoiled_word(rank)] == now), None)

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
                raise self.absent(f"{self.recorder.doing} there is no use in waiting on", (rank,))

    def name(self, rank: int) -> int:
        """Return a rank's number in the whole start."""
        return self.processes[rank]

    def absent(self, waited_for: str, ranks: tuple[int, ...] = (), among: tuple[int, ...] = ()) -> LockstepError:
        """Return the error for a wait that did not end, naming who is missing and where each was last seen.

        Where another rank has given up before, it is that rank's reason that counts. The ring is written to a file, and
        the other ranks learn that this one has given up.

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
        return RankAbsentError(f"{message}{self.recorder.file_note()}", tuple(map(self.name, ranks)))

    def give_up(self, kind: str, message: str, ranks: Sequence[int] = ()) -> None:
        """Tell the others that this rank's groups are not used again and why; the first reason counts.

        `kind` says which error the others raise: `absent`, `failed` or `mismatch`; `ranks` are to blame.
        """
        if self._said:
            return
        self.recorder.write_file(message)
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
        return (place_text(place, ago) if place else "has not been seen") + process

    def terminate(self) -> str:
        """Say last words because SIGTERM is about to end this process; return what a person should read, if anything.

        A ring is written only where something is wrong: a rank is gone, or it is not known whether one is.
        """
        if self._said or self._closed.is_set() or self.recorder.phase == Phase.LEFT:
            return ""
        board, others = self._board, self._others
        gone = tuple(rank for rank in others if board is not None and board.process_state(rank) == "gone")
        if gone or board is None or any(board.last_words(rank) for rank in others):
            return str(self.absent(f"SIGTERM came {self.recorder.doing}", gone))
        message = f"SIGTERM: rank {self.name(self.rank)} was ended {self.recorder.doing}"
        self._say_last_words("failed", message, (self.rank,))
        return ""

    def mute(self) -> None:
        """Publish nothing from now on: this is a process forked from the rank."""
        self._board = self._store = self._comparisons = None
        self._said = True
        self._closed.set()

    def close(self) -> None:
        """Stop publishing."""
        self._closed.set()

    def _compare(self, name: str, sizes: Sequence[int], group: "dist.ProcessGroup", deadline_s: float) -> None:
        """Gather what each rank is about to issue, on the board or else on the group on which it would do so."""
        mine = f"{name}{list(sizes)} {self.recorder.doing}"
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
        raise RankMismatchError(f"{message}{self.recorder.file_note()}")

    def _after_last_words(self, rank: int, words: bytes) -> LockstepError:
        """Turn another rank's last words into this rank's error."""
        kind, ranks, message = _parse_last_words(words, self.num_ranks)
        self.give_up(kind, message, ranks)
        if kind == "failed":
            blamed = ranks[0] if ranks else rank  # it may only pass on what another has said
            stops = f"rank {self.name(self.rank)} stops in step {self.recorder.step}"
            text = f"{stops}: rank {self.name(blamed)} raised {message}{self.recorder.file_note()}"
            return PeerFailedError(text, self.name(blamed), message)
        text = f"rank {self.name(self.rank)}: rank {self.name(rank)} has given up: {message}{self.recorder.file_note()}"
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
        phases = {rank: unpack_place(self._board.place(rank)[0])[1] for rank in ranks}
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
        mine = place_order(self.recorder.place)
        places = {rank: place_order(self._board.place(rank)[0]) for rank in others}
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
        mine = self.recorder.place
        return unpack_place(place)[1] in (Phase.DISPATCH, Phase.COMBINE) and place_order(place) < place_order(mine)

    def _roll_call(self) -> tuple[int, ...]:
        """Ask through the store: all ranks that have ended their wait, or still publish, are there."""
        store = self._store
        keys = [f"roll/{self.epoch}/{self.recorder.step}/{rank}" for rank in range(self.num_ranks)]

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
            place, ago = self.recorder.place, (time.monotonic_ns() - self.recorder.last_ns) / 1e9
            try:
                store.set(f"place/{self.epoch}/{self.rank}", json.dumps([place, time.time() - ago]))
            except RuntimeError:
                return

    def _published(self, rank: int) -> tuple[int, float]:
        store, key = self._store, f"place/{self.epoch}/{rank}"
        place, since = json.loads(within(lambda: store.get(key) if store.check([key]) else b"[0, 0]", _STORE_S))
        return place, max(0.0, time.time() - since)


def _parse_last_words(words: bytes, num_ranks: int) -> tuple[str, tuple[int, ...], str]:
    """Read another rank's last words; whatever they are, something readable comes out."""
    try:
        parsed = json.loads(words)
        kind, ranks, message = str(parsed["kind"]), parsed["ranks"], str(parsed["message"])
        ranks = tuple(rank for rank in ranks if isinstance(rank, int) and 0 <= rank < num_ranks)
    except (ValueError, TypeError, KeyError):
        return "absent", (), words[:200].decode(errors="replace")
    return kind, ranks, message
