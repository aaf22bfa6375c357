"""The launcher's side of membership: failures and their cause, which are survived, who continues, who comes back."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

import lockstep.errors
from lockstep.coordination.meeting import Patience, Whereabouts
from lockstep.coordination.membership import Membership, ask_to_stop, publish
from lockstep.errors import LockstepError, PeerFailedError
from lockstep.runner.processes import rank_names

logger = logging.getLogger(__name__)

WHEREABOUTS = "members/whereabouts"
"""Where, in the launcher's store, ranks show progress while they read experts."""
_ECHOES_S = 3.0  # how long to wait for a rank's own words when other ranks have failed because of it
_BROKEN_DEVICE = "AcceleratorError"  # torch's: the device accepts no more work, for example after a device-side assert
_ECHOES = ("PeerFailedError", "RankAbsentError")


def failure_of(rank: int, error: BaseException) -> dict[str, Any]:
    """Return the message for a rank's failure; unexpected errors are logged with their traceback."""
    if isinstance(error, LockstepError | OSError):
        kind = type(error).__name__ if isinstance(error, LockstepError) else "OSError"
        return {"failed": kind, "why": str(error)}
    if type(error).__name__ == _BROKEN_DEVICE:
        return {"failed": "died", "why": f"its device failed: {error}"}
    logger.error("rank %d failed:\n%s", rank, "".join(traceback.format_exception(error)))
    return {"failed": type(error).__name__, "why": f"{type(error).__name__}: {error}"}


def first_cause(failures: list[tuple[int, dict[str, Any]]]) -> tuple[int, dict[str, Any]]:
    """Return the failure that caused the rest: a rank that only reports another rank's failure comes last.

    Example:
        >>> first_cause([(0, {"failed": "PeerFailedError", "why": "rank 1"}), (1, {"failed": "died", "why": "-9"})])
        (1, {'failed': 'died', 'why': '-9'})
    """
    return min(failures, key=lambda failure: _ECHOES.index(failure[1]["failed"]) + 1 if is_echo(failure[1]) else 0)


def is_echo(message: dict[str, Any]) -> bool:
    """Return whether a failure may be another rank's doing."""
    return message["failed"] in _ECHOES


def error_of(rank: int, message: dict[str, Any]) -> Exception:
    """Return what to raise for a rank's failure."""
    if isinstance(message.get("error"), LockstepError):
        return message["error"]
    if message["failed"] == "OSError":  # a full disk is no fault of the ranks
        return OSError(f"rank {rank}: {message['why']}")
    kind = getattr(lockstep.errors, message["failed"], None)
    if isinstance(kind, type) and issubclass(kind, LockstepError) and kind is not PeerFailedError:
        return kind(message["why"])
    return PeerFailedError(f"rank {rank} failed: {message['why']}", rank, message["why"])


def patience_with(deadline_s: float) -> float:
    """Return how long a rank may take to stop after another is lost, given the deadline of a step, both in seconds.

    At least 12 s: a rank that computes, and then opens groups with the lost one, notices the loss 5 s later.
    """
    return max(deadline_s + 1.5, 12.0)


class Losses:
    """Lets ranks continue without those that are lost, and with those that are back; otherwise raises the cause.

    Once an epoch is ending, each member has `patience_s` to say that it has stopped, counted from its last progress
    while it reads experts; then `kill(rank)` ends it. `start_again(rank, first_epoch)` is called up to `restart_ranks`
    times per rank.
    """

    def __init__(
        self, num_ranks: int, can_survive: bool, patience_s: float, kill: Callable[[int], None], store: Any,
        start_again: Callable[[int, int], None] | None = None, restart_ranks: int = 0,
    ) -> None:  # fmt: skip
        self.membership = Membership(num_ranks)
        self.can_survive = can_survive
        self.store, self._patience_s, self._kill, self._start_again = store, patience_s, kill, start_again
        self._failures: list[tuple[int, dict[str, Any]]] = []
        self._fatal: list[tuple[int, dict[str, Any]]] = []  # failures that end the run
        self._echoes_until_s = 0.0
        self._patience: Patience | None = None  # since the epoch is ending
        self._restarts = dict.fromkeys(range(num_ranks), restart_ranks)
        self._ended: set[int] = set()  # ranks without a process
        self._back: set[int] = set()  # members that were lost before this epoch

    @property
    def cause_died(self) -> bool:
        """Whether the original failure is a rank's death."""
        failures = self._fatal or self._failures
        return bool(failures) and first_cause(failures)[1]["failed"] == "died"

    def take(self, rank: int, message: dict[str, Any]) -> None:
        """Handle a rank's message: it is `back`, has `stopped` on request, or has `failed`."""
        membership = self.membership
        if "exit_code" in message:
            self._ended.add(rank)
        if "back" in message:
            membership.returned(rank)
            ask_to_stop(self.store, membership.epoch)
        elif "stopped" in message:
            membership.stopped(rank, message["stopped"])
        elif rank in membership.members:
            self._take_failure(rank, message)
        else:
            membership.died(rank)
            if message["failed"] != "died":
                logger.warning("rank %d could not come back: %s", rank, message["why"])
        if membership.is_ending and self._patience is None and self.store is not None:
            whereabouts = Whereabouts(dist.PrefixStore(WHEREABOUTS, self.store), -1)
            self._patience = Patience(whereabouts, self._patience_s)

    def _take_failure(self, rank: int, message: dict[str, Any]) -> None:
        """A death is survived, an echo of another rank's failure, and any failure of a rank that has just come back."""
        membership = self.membership
        died = message["failed"] == "died" or (rank in self._back and not is_echo(message))
        fatal = not self.can_survive or not (died or is_echo(message))
        if fatal and rank in dict(self._failures):
            return  # it has said why
        if not self._failures:
            self._echoes_until_s = time.monotonic() + _ECHOES_S
        self._failures.append((rank, message))
        if fatal:
            self._fatal.append((rank, message))
        if died:
            self._kill(rank)  # a process whose device has failed is still alive
            membership.died(rank)
        elif is_echo(message) and (fatal or "epoch" in message):  # without an epoch, it ends: it has no model
            membership.stopped(rank, message.get("epoch", 0))

    def begin_epoch(self) -> tuple[int, ...] | None:
        """Begin the next epoch if every member of this one is dead or waits for it, and return its members.

        If nobody is left, or nobody was lost, the cause is raised.
        """
        membership = self.membership
        self._start_lost_again()
        if self._fatal:
            waits = all(is_echo(said) for _, said in self._fatal) and membership.awaited
            if not waits or time.monotonic() > self._echoes_until_s:
                raise error_of(*first_cause(self._fatal))
            return None
        if self._patience is not None:
            for rank in self._patience.exhausted(membership.awaited):
                self._kill(rank)
        members = membership.next_members()
        if members is None:
            return None
        before, back = membership.members, sorted(membership.back)
        why = [str(error_of(*first_cause(self._failures)))] if self._failures else []
        if not members or (members == before and not membership.asked):
            raise error_of(*first_cause(self._failures))
        why += [f"rank {rank} is back" for rank in back]
        said = "; ".join(why) or "a rank that was back has ended"
        logger.warning("%s; going on with %s", said, rank_names(members))
        membership.begin(members)
        self._failures, self._patience, self._back = [], None, set(back)
        publish(self.store, membership.epoch, members)
        return members

    def _start_lost_again(self) -> None:
        for rank in sorted(self._ended.difference(self.membership.members)):
            self._ended.remove(rank)
            if self._restarts[rank] and self._start_again is not None:
                self._restarts[rank] -= 1
                logger.warning("rank %d: its process starts again; %d more times", rank, self._restarts[rank])
                try:
                    self._start_again(rank, self.membership.epoch + 1)
                except (LockstepError, OSError) as error:  # the other ranks continue without it
                    logger.warning("rank %d could not come back: %s", rank, error)
