"""Every rank takes part until all have finished, whatever its script does in between."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.step import StepDecision, StepRecord
from lockstep.coordination.waits import INTERRUPTIBLE_S, join
from lockstep.errors import ConfigurationError, LockstepError, RankAbsentError, TokenCountError

# After an agreement without work, the next one follows a pause that doubles up to the second figure. Where a rank can
# see that another one wants a step, pauses are longer: they end when it does, and only show that this rank is alive.
# Elsewhere, a script with work waits for the longest of these pauses.
_PAUSE_S = (0.0005, 0.008)
_WATCHED_PAUSE_S = 0.1
# How often a pause looks for such a rank: after this share of it, within these limits in seconds.
_LOOK_SHARE, _LOOK_S = 0.05, (0.0002, 0.002)


class Session:
    """All ranks go through steps together, each with its own work. A context manager, entered on every rank.

    The script of a rank runs steps with `begin_step` and `end_step`, as many as it likes. When it is not inside one,
    a thread of the session answers the other ranks' agreements with zero rows and runs `run_idle_step` for them. So
    no rank waits for one whose script tokenizes, sleeps, waits in a barrier of its own or has left the block early.
    Leaving the block waits until all ranks have left it.

    If the block is left by an exception, every other rank gets a `PeerFailedError` with its message, from its next step
    or at the end of its block. The session knows no model.

    Args:
        coordinator: how ranks agree. Left open: who made it closes its groups.
        run_idle_step: takes part in a step without rows of this rank; called from the session's thread.
        data_parallel_rank: whose count in the decision is this rank's.
        grace_s: how long after entering, after a step of its script, and once more after the first step that it idles
            behind that one, this rank waits for the script's next step before it takes part with zero rows, in seconds.
            It keeps together ranks that step together, and brings them together again; ranks that idle anyway do not
            wait.
    """

    def __init__(
        self, coordinator: Coordinator, run_idle_step: Callable[[StepDecision], None], *,
        data_parallel_rank: int, grace_s: float = 0.01,
    ) -> None:  # fmt: skip
        self.coordinator = coordinator
        self.error: BaseException | None = None
        self._run_idle_step = run_idle_step
        self._data_parallel_rank = data_parallel_rank
        self._grace_s = grace_s
        self._changed = threading.Condition()
        # All below is guarded by `_changed`. The thread that is the owner has the coordinator and the ranks' groups.
        self._owner: int | None = None
        self._scripts_waiting = 0
        self._finished = False  # this rank's script has left its block
        self._over = False
        self._failure: BaseException | None = None
        self._untold = False  # the other ranks do not know yet that this rank has finished or failed
        self._earliest_idle_step, self._idled = 0.0, True  # whether it has idled since its script's last step
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._ctrl_c = HeldBackInterrupt()

    def __enter__(self) -> "Session":
        if self._thread is not None:
            raise ConfigurationError("a session is entered once; make a new one")
        self._earliest_idle_step = time.monotonic() + self._grace_s
        self._thread = threading.Thread(target=self._take_part, name="lockstep-session", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _type: Any = None, exc: BaseException | None = None, _trace: Any = None) -> Literal[False]:
        assert self._thread is not None
        if exc is not None:
            self.fail(exc)
        with self._changed:
            self._finished = self._untold = True
            self._changed.notify_all()
        try:
            join(self._thread)
        except BaseException as error:  # Ctrl-C: tell the other ranks, for which one more wait must suffice
            self.fail(error)
            self._thread.join(self.coordinator.deadline_s)
            if self._thread.is_alive():
                self.coordinator.give_up(error)
            raise
        if exc is None and self.error is not None:
            raise self.error
        return False

    def begin_step(self, num_tokens: int) -> StepDecision:
        """Agree on the next step in which this rank's `num_tokens` rows are due, running idle steps until then.

        Blocks the session's thread until `end_step`, which must follow also where the step fails.

        Raises:
            TokenCountError: a negative count.
            PeerFailedError, RankAbsentError, RankMismatchError: see `Coordinator.agree`.
            RuntimeError: the session has ended, or the script is inside a step already.
        """
        if num_tokens < 0:
            raise TokenCountError(f"num_tokens must be >= 0, got {num_tokens} on DP rank {self._data_parallel_rank}")
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"process {os.getpid()} was forked from process {self._pid}, which is the rank: call the model there"
            )
        if self._owner == threading.get_ident():
            raise RuntimeError("a step was begun inside a step: call end_step() first")
        try:
            self._ctrl_c.hold()
            self._acquire_script_turn()
            pause_s, since = _PAUSE_S[0], time.monotonic()
            while True:
                decision, mine = self._walk(num_tokens, since)
                if mine:
                    return decision
                self._ctrl_c.let_go()  # between two agreements no rank waits for this one's rows
                if not decision.runs_step:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _PAUSE_S[1])
                self._ctrl_c.hold()
        except BaseException:
            if self._owner == threading.get_ident():
                self._release()
            self._ctrl_c.let_go()
            raise

    def end_step(self) -> None:
        """Leave the step that `begin_step` began. Ctrl-C that came during the step is raised here."""
        self._earliest_idle_step, self._idled = time.monotonic() + self._grace_s, False
        self._release()
        self._ctrl_c.let_go()

    def fail(self, error: BaseException) -> None:
        """Announce at the next agreement that this rank has failed; all sessions end there. The first error counts."""
        with self._changed:
            if self._failure is None and not self._over:
                self._failure, self._untold = error, True
            self._changed.notify_all()

    def break_off(self, error: BaseException | None) -> None:
        """End the session on this rank at once, unannounced; after an error its groups are in an unknown state."""
        with self._changed:
            if not self._over:
                self._over, self.error = True, error
                self.coordinator.peers.mark(Phase.LEFT)
            self._changed.notify_all()

    def _take_part(self) -> None:
        """The session's thread: steps with zero rows, until all ranks have finished."""
        watches = self.coordinator.transport.can_watch
        pause_s = _PAUSE_S[0]
        while self._acquire_idle_turn():
            try:
                decision, _ = self._walk(None)
                if not decision.unfinished:
                    self.break_off(None)
            except BaseException:  # it has ended the session, or will be announced
                continue
            finally:
                self._release()
            if decision.runs_step:
                pause_s = _PAUSE_S[0]
                if not self._idled:  # or ranks whose scripts meet between steps would stay one step apart forever
                    self._earliest_idle_step, self._idled = time.monotonic() + self._grace_s, True
            else:
                self._pause(pause_s, min(max(pause_s * _LOOK_SHARE, _LOOK_S[0]), _LOOK_S[1]) if watches else pause_s)
                pause_s = min(2 * pause_s, _WATCHED_PAUSE_S if watches else _PAUSE_S[1])

    def _pause(self, pause_s: float, look_s: float) -> None:
        """Wait for something to announce, another rank's step, or the end of the pause."""
        until, wanted = time.monotonic() + pause_s, self.coordinator.transport.wanted
        with self._changed:
            while not (self._over or self._scripts_waiting or self._untold or wanted()):
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return
                self._changed.wait(min(left_s, look_s))

    def _acquire_script_turn(self) -> None:
        with self._changed:
            self._scripts_waiting += 1
            try:
                while not (self._owner is None or self._over):
                    self._changed.wait(INTERRUPTIBLE_S)
            finally:
                self._scripts_waiting -= 1
            if self._over:
                raise self.error or RuntimeError("this session has ended")
            self._owner = threading.get_ident()

    def _acquire_idle_turn(self) -> bool:
        with self._changed:
            while not self._over:
                grace_s = 0.0 if self._finished else self._earliest_idle_step - time.monotonic()
                if self._owner is not None or self._scripts_waiting:
                    self._changed.wait()
                elif grace_s > 0:
                    self._changed.wait(grace_s)
                else:
                    self._owner = threading.get_ident()
                    return True
            return False

    def _release(self) -> None:
        with self._changed:
            self._owner = None
            self._changed.notify_all()

    def _walk(self, num_tokens: int | None, since: float = 0.0) -> tuple[StepDecision, bool]:
        """Agree on a step; return whether it is the script's own, of `num_tokens` rows. Take part in any other."""
        coordinator = self.coordinator
        try:
            with self._changed:
                failure, self._untold = self._failure, False
                record = StepRecord(num_tokens or 0, unfinished=bool(num_tokens) or not self._finished)
            if failure is not None:  # all ranks learn it here, and the session ends
                coordinator.fail(failure)
                raise failure
            decision = coordinator.agree(record)
            mine = decision.num_tokens_across_dp[self._data_parallel_rank] == num_tokens
            if decision.runs_step and not mine:
                try:
                    self._run_idle_step(decision)
                except Exception as error:
                    if not coordinator.usable:
                        raise
                    self.fail(error)  # this rank's experts broke while they ran for others: said at the next agreement
            if num_tokens is not None and not mine:
                self._check_sharers(decision, num_tokens, time.monotonic() - since)
            return decision, mine
        except BaseException as error:
            if coordinator.under_way and not isinstance(error, LockstepError):
                coordinator.give_up(error)  # the other ranks may be running a step unknown to this one
            # Other ranks know how an agreement failed, but not whether this rank's sharers are absent.
            known = isinstance(error, LockstepError) and not isinstance(error, RankAbsentError)
            ended = known or not coordinator.usable or error is self._failure
            (self.break_off if ended else self.fail)(error)
            raise

    def _check_sharers(self, decision: StepDecision, num_tokens: int, waited_s: float) -> None:
        """Raise if a rank that shares this rank's requests has left its block, or has called no model in time."""
        coordinator, size = self.coordinator, self.coordinator.tensor_parallel_size
        rows, unfinished = decision.column("num_tokens"), decision.column("unfinished")
        sharers = range(self._data_parallel_rank * size, (self._data_parallel_rank + 1) * size)
        missing = [rank for rank in sharers if not rows[rank]]
        left = [rank for rank in missing if not unfinished[rank]]
        if left or waited_s > coordinator.deadline_s:
            name = coordinator.peers.name
            numbers = tuple(name(rank) for rank in left or missing)
            how = "have left their block" if left else f"have not called the model for {coordinator.deadline_s:g} s"
            step = f"rank {name(coordinator.rank)}: a step of {num_tokens} rows cannot begin"
            raise RankAbsentError(f"{step}: ranks {list(numbers)}, which share its requests, {how}", numbers)


class HeldBackInterrupt:
    """Delays Ctrl-C while other ranks need this one to finish a step; a second Ctrl-C is not delayed."""

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._came = False

    def hold(self) -> None:
        """Begin to delay it. Idempotent."""
        handler = signal.getsignal(signal.SIGINT)  # none to call: the signal is ignored, or ends the process
        if self._handler is None and callable(handler) and threading.current_thread() is threading.main_thread():
            self._came = False
            signal.signal(signal.SIGINT, self._on_signal)  # raises if Ctrl-C has already come: nothing is held then
            self._handler = handler

    def let_go(self) -> None:
        """Deliver a delayed signal, and stop delaying."""
        handler = self._handler
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
            self._handler = None
            if self._came:
                handler(signal.SIGINT, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._came and self._handler is not None:
            self._handler(number, frame)
        self._came = True
