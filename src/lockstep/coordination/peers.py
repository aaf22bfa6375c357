"""What ranks know of each other: which are alive, where each is, and why one has given up."""

import contextlib
import functools
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lockstep.coordination.board import LAST_WORDS_BYTES, Board, StoreBoard
from lockstep.coordination.flight_recorder import IN_LAYER, FlightRecorder, Phase, place_order, place_text, unpack_place
from lockstep.coordination.step import odd_ones_out
from lockstep.coordination.transports import ProcessGroupTransport, RanksMissing, SharedMemoryTransport, Transport
from lockstep.coordination.wire import MESSAGE_BYTES, Wire, decode_message, encode_message
from lockstep.errors import LockstepError, PeerFailedError, RankAbsentError, RankMismatchError

if TYPE_CHECKING:
    import torch.distributed as dist

_DYING_S = 0.3  # longest time from a broken connection until its process is seen to have ended
_HANDLER_S = 1.0  # longest time for the main thread to run a signal's handler: it may be waiting inside torch


class Peers:
    """The other ranks of an epoch: where each is, whether it is alive, and its last words if it gives up.

    Ranks of one host publish on their `board`, in about a microsecond; others twice a second, in a `store`. `processes`
    are the ranks' numbers in the whole start; with `debug` every collective is compared before it is issued; `run`: see
    `FlightRecorder`.
    """

    def __init__(
        self, rank: int, num_ranks: int, *, board: Board | None = None, store: "dist.Store | None" = None,
        epoch: int = 0, debug: bool = False, processes: Sequence[int] | None = None, run: int = 0,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.num_ranks = num_ranks
        self.processes = tuple(processes or range(num_ranks))
        self.debug = debug
        self.recorder = FlightRecorder(rank, num_ranks, epoch, self.name(rank), run)
        self.on_mark: Callable[[Peers], None] | None = None
        self._others = [other for other in range(num_ranks) if other != rank]
        self._board, self._shared = board or Board.private(num_ranks), board is not None
        self._remote = StoreBoard(store, self.recorder) if board is None and store is not None else None
        self._comparisons: Transport | None = SharedMemoryTransport(board, rank, lane=1) if board is not None else None
        self.gave_up = ""  # why the ranks' groups are not used again
        self._silent = False  # has said its last words, or must not say any

    @property
    def _notices(self) -> Board | StoreBoard:
        return self._remote or self._board

    def name(self, rank: int) -> int:
        """Return a rank's number in the whole start."""
        return self.processes[rank]

    def mark(self, phase: Phase, layer: int = -1, detail: Any = None) -> None:
        """Enter a phase of the present step, `layer` is -1 outside of MoE layers; `detail` is kept in the ring."""
        now_ns = self.recorder.mark(phase, layer, detail)
        self._board.write_place(self.rank, self.recorder.place, now_ns)
        if self.on_mark is not None:
            self.on_mark(self)

    @contextlib.contextmanager
    def before_layer(self, phase: Phase) -> Iterator[None]:
        """Publish inside the block that this rank is in a phase before its next layer."""
        recorder = self.recorder
        before = recorder.phase, recorder.layer

        def publish(phase: Phase, layer: int) -> None:
            recorder.phase, recorder.layer = phase, layer
            self._board.write_place(self.rank, recorder.place, time.monotonic_ns())

        publish(phase, recorder.layer + 1 if before[0] in IN_LAYER else 0)
        try:
            yield
        finally:
            publish(*before)

    @property
    def spoiled(self) -> bool:
        """Whether this rank's experts have failed in the present step."""
        return self._board.spoiled_step(self.rank) == self.recorder.step

    def spoil_step(self) -> None:
        """Mark what other ranks receive from this rank in this step as invalid."""
        self._board.spoil(self.rank, self.recorder.step)

    def spoiled_by(self) -> int | None:
        """Return another rank that has spoiled the present step, as far as this one can see."""
        step = self.recorder.step
        return next((rank for rank in self._others if self._board.spoiled_step(rank) == step), None)

    def collective(
        self, name: str, sizes: Sequence[int], group: "dist.ProcessGroup", deadline_s: float, on_cpu: bool
    ) -> None:
        """Record a collective about to be issued; if ranks can compare them and they differ, raise on all ranks."""
        self.recorder.collective(name, sizes)
        if not (self.debug or (on_cpu and self._comparisons is not None)):
            return
        mine = f"{name}{list(sizes)} {self.recorder.doing}"
        if self._comparisons is None or self._comparisons.num_ranks != group.size():
            self._comparisons = ProcessGroupTransport(group)
        received = self.exchange(self._comparisons, encode_message(mine.encode()[:MESSAGE_BYTES]), deadline_s, mine)
        if any(other != received[0] for other in received):
            texts = [decode_message(other).decode(errors="replace") for other in received]
            listed = "; ".join(f"rank {name}: {text}" for name, text in zip(self.processes, texts, strict=True))
            odd = odd_ones_out(texts, self.processes)
            message = f"the ranks are about to issue different collectives: {listed}{odd}"
            self.give_up("mismatch", message)
            raise RankMismatchError(f"{message}{self.recorder.file_note()}")

    def exchange(self, transport: Transport, wire: Wire, deadline_s: float, what: str) -> Sequence[Wire]:
        """Send this rank's record and return all ranks', `[ranks]`; a wait that fails raises as `end_wait`."""
        started = time.perf_counter()
        try:
            transport.begin(wire)
            return transport.wait(deadline_s, self.check)
        except (LockstepError, TimeoutError, ConnectionError) as error:
            self.end_wait(what, started, deadline_s, error)

    def check_last_words(self) -> None:
        """Raise as `check` if another rank has given up; cheap enough for every agreement."""
        if self._board.given_up:
            self.check()

    def check(self) -> bool:
        """For every wait: raise if a rank has given up or is gone; return whether any rank compiles."""
        for rank in self._others:
            # A rank may say why just before it ends, so read its words after its state.
            gone = self._board.process(rank).state() == "gone"
            words = self._board.last_words(rank)
            if words is not None:
                raise self._after_last_words(rank, words)
            if gone:
                raise self.absent(f"stopped waiting {self.recorder.doing}", (rank,))
        return any(unpack_place(self._board.place(rank)[0])[1] == Phase.COMPILE for rank in self._others)

    def end_wait(
        self, what: str, started: float, deadline_s: float, error: Exception, among: Sequence[int] = ()
    ) -> NoReturn:
        """Raise the error of a wait that ended in `error`, see `absent`; `started` is of `time.perf_counter`."""
        if isinstance(error, LockstepError):  # another rank has ended it
            raise error
        if isinstance(error, ConnectionError) and self._shared:
            # The kernel closes a dying process's connections shortly before it reports the process as gone.
            known = time.monotonic() + _DYING_S
            while not self._in_state("gone") and not self._board.given_up and time.monotonic() < known:
                time.sleep(0.002)
        ranks = error.ranks_missing if isinstance(error, RanksMissing) else ()
        after = f"after {time.perf_counter() - started:.2f} s, deadline {deadline_s:g} s"
        raise self.absent(f"{what} did not end {after}: {error}", ranks, among) from error

    def absent(self, waited_for: str, ranks: Sequence[int] = (), among: Sequence[int] = ()) -> LockstepError:
        """Give up, and return the error of a failed wait: the missing ranks and where each was last seen.

        `ranks` are known to be missing; if empty, the error names the ranks behind this one among those waited for.
        """
        for rank in self._others:
            words = self._notices.last_words(rank)
            if words is not None:
                return self._after_last_words(rank, words)
        if self._has_gone_on_alone():
            missing: Sequence[int] = (self.rank,)
            who = f"rank {self.name(self.rank)} itself skipped a collective: all other ranks still wait in it"
        else:
            missing = self._late_among(ranks) or self._missing_ranks(among)
            seen = "; ".join(f"rank {self.name(rank)} {self.last_seen(rank)}" for rank in missing)
            named = ", ".join(str(self.name(rank)) for rank in missing)
            who = f"rank{'s' if len(missing) > 1 else ''} {named} absent: {seen}"
        if not missing:
            who = "the absent rank could not be identified"
        message, names = f"rank {self.name(self.rank)}: {waited_for}; {who}", tuple(map(self.name, missing))
        self.give_up("absent", message, names)
        return RankAbsentError(f"{message}{self.recorder.file_note()}", names)

    def give_up(self, kind: str, message: str, blamed: Sequence[int] = ()) -> None:
        """Tell the other ranks, once, why this rank's groups are not used again: `absent`, `failed` or `mismatch`."""
        self.gave_up = self.gave_up or message or kind
        if not self._silent:
            self.recorder.write_file(message)
            self._say_last_words(kind, message, blamed)

    def _say_last_words(self, kind: str, message: str, blamed: Sequence[int]) -> None:
        self._silent = True
        words, length = b"", 1500
        while not words or len(words) > LAST_WORDS_BYTES:  # escapes may make a message six times as long
            words = json.dumps({"kind": kind, "ranks": list(blamed)[:64], "message": message[:length]}).encode()
            length //= 2
        self._notices.say_last_words(self.rank, words)

    def _after_last_words(self, rank: int, words: bytes) -> LockstepError:
        """Turn another rank's last words into this rank's error, and pass them on."""
        try:
            said = json.loads(words)
            kind, message = str(said["kind"]), str(said["message"])
            blamed = tuple(number for number in said["ranks"] if isinstance(number, int) and number in self.processes)
        except (ValueError, TypeError, KeyError):
            kind, blamed, message = "absent", (), words[:200].decode(errors="replace")
        self.give_up(kind, message, blamed)
        own, note = self.name(self.rank), self.recorder.file_note()
        if kind == "failed":
            first = blamed[0] if blamed else self.name(rank)  # it may only pass on another rank's words
            text = f"rank {own} stops in step {self.recorder.step}: rank {first} raised {message}{note}"
            return PeerFailedError(text, first, message)
        text = f"rank {own}: rank {self.name(rank)} has given up: {message}{note}"
        return RankMismatchError(text) if kind == "mismatch" else RankAbsentError(text, blamed)

    def last_seen(self, rank: int) -> str:
        """Return a rank's last place, how long ago, and whether it lives, in words that follow its number."""
        return place_text(*self._notices.place(rank)) + self._board.process(rank).describe()

    def terminate(self) -> str:
        """Say last words because SIGTERM ends this process; return a message for the user if anything is wrong."""
        if self._silent or self.recorder.phase == Phase.LEFT:
            return self.gave_up  # its error may be on the way up through the script, and unseen yet
        gone = self._in_state("gone")
        if gone or not self._shared or self._board.given_up:
            return str(self.absent(f"SIGTERM came {self.recorder.doing}", gone))
        own = self.name(self.rank)
        self._say_last_words("failed", f"SIGTERM: rank {own} was ended {self.recorder.doing}", (own,))
        return ""

    def mute(self) -> None:
        """Publish nothing from now on: this is a process forked from the rank."""
        self.close()
        self._board, self._shared, self._remote, self._comparisons = Board.private(self.num_ranks), False, None, None

    def close(self) -> None:
        """Stop publishing: this rank's groups are closed."""
        self._silent, self.gave_up = True, ""
        if self._remote is not None:
            self._remote.close()

    def _in_state(self, *states: str, among: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the other ranks whose process is in one of these states, as far as this host knows."""
        others = self._others if among is None else among
        return tuple(rank for rank in others if self._board.process(rank).state() in states)

    def _late_among(self, ranks: Sequence[int]) -> Sequence[int]:
        """Leave out ranks that wait for a sharer of their requests, unless all of them do."""
        phases = {rank: unpack_place(self._board.place(rank)[0])[1] for rank in ranks}
        return [rank for rank in ranks if phases[rank] != Phase.TENSOR_PARALLEL] or ranks

    def _missing_ranks(self, among: Sequence[int]) -> Sequence[int]:
        """Return the ranks that all other ranks wait for."""
        others = [rank for rank in among or self._others if rank != self.rank]
        if not self._shared:
            missing = self._remote.roll_call() if self._remote is not None else ()
            return [rank for rank in missing if rank in others] or missing
        lost = self._in_state("gone", "stopped", among=others)
        if lost:
            return lost
        mine = place_order(self.recorder.place)
        places = {rank: place_order(self._board.place(rank)[0]) for rank in others}
        behind = self._late_among([rank for rank in others if places[rank] < mine])
        # No rank is behind, so one has continued although this rank had not come.
        return behind or [rank for rank in others if places[rank] > mine]

    def _has_gone_on_alone(self) -> bool:
        """Return whether all other ranks, at least two, are in one collective that this rank has passed."""
        places = {self._board.place(rank)[0] for rank in self._others}
        if len(self._others) < 2 or len(places) != 1 or self._in_state("gone", "stopped"):
            return False
        (place,) = places
        in_exchange = unpack_place(place)[1] in (Phase.DISPATCH, Phase.COMBINE)
        return in_exchange and place_order(place) < place_order(self.recorder.place)


# Last words before SIGTERM ends this process. Processes forked from the rank do not speak for it.
_peers_of_this_process: weakref.WeakSet[Peers] = weakref.WeakSet()
_lock = threading.Lock()
_installed = False


def speak_before_termination(peers: Peers) -> None:
    """Let SIGTERM end this process only after last words; an existing handler stays."""
    global _installed
    _peers_of_this_process.add(peers)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    signal.signal(signal.SIGTERM, _on_sigterm)
    if not _installed:
        _installed = True
        # The child begins with SIGTERM blocked: until it has forgotten, it would speak in the parent's name.
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
    _watch_signals()


def _on_sigterm(*_: object) -> None:
    _say()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _say() -> None:
    for peers in list(_peers_of_this_process) if _lock.acquire(blocking=False) else ():
        with contextlib.suppress(Exception):  # whatever fails here, the process ends
            text = peers.terminate()
            if text:
                os.write(2, f"{text}\n".encode(errors="replace"))


def _watch_signals() -> None:
    """Speak from another thread if the main thread does not get to run the handler."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:  # set by other software, such as asyncio
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)
        return

    def watch() -> None:
        while signal.SIGTERM not in os.read(reading, 1):
            pass
        time.sleep(_HANDLER_S)
        _say()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="lockstep-sigterm", daemon=True).start()


_hold = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})
_let_go = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget() -> None:
    """In a forked child: it is not a rank, whatever it inherits."""
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for peers in list(_peers_of_this_process):
        peers.mute()
    _peers_of_this_process.clear()
    _let_go()
