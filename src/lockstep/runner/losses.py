"""The launcher's side of membership: which failures others survive, how long to wait, and who goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from lockstep.coordination.membership import Membership, publish
from lockstep.runner.failures import error_of, first_cause, is_echo

logger = logging.getLogger(__name__)


_ECHOES_S = 3.0  # how long a failure that may be another rank's doing waits for that one's own words


def patience_with(deadline_s: float) -> float:
    """Return how long a rank may take to say that it has stopped, where it waits so long for any other in a step.

    One that opens groups with a rank that has died notices it after five seconds, and computes before it does.
    """
    return max(deadline_s + 1.5, 12.0)


class Losses:
    """Lets ranks go on without those that are lost; where that is not possible, says whose fault it was.

    Args:
        num_ranks: that were started.
        can_survive: whether ranks can go on without others.
        patience_s: how long a rank may take to say that it has stopped, once one has.
        kill: ends a rank.
        store: in which ranks find who the members of an epoch are.
    """

    def __init__(
        self, num_ranks: int, can_survive: bool, patience_s: float, kill: Callable[[int], None], store: Any
    ) -> None:
        self.membership = Membership(num_ranks)
        self.can_survive = can_survive
        self._patience_s, self._kill, self._store = patience_s, kill, store
        self._failures: list[tuple[int, dict[str, Any]]] = []
        self._fatal: list[tuple[int, dict[str, Any]]] = []  # that nobody survives
        self._until = 0.0

    @property
    def cause_died(self) -> bool:
        """Whether the failure that the others follow from is a rank's death."""
        failures = self._fatal or self._failures
        return bool(failures) and first_cause(failures)[1]["failed"] == "died"

    def take(self, rank: int, message: dict[str, Any]) -> None:
        """Take a rank's failure in: others survive its death, and what follows from one, but no error of its own."""
        membership, died = self.membership, message["failed"] == "died"
        fatal = not self.can_survive or not (died or is_echo(message))
        if rank not in membership.members or (fatal and rank in dict(self._failures)):
            return  # it was given up, or has said why
        if not self._failures:
            self._until = time.monotonic() + (_ECHOES_S if fatal else self._patience_s)
        self._failures.append((rank, message))
        if fatal:
            self._fatal.append((rank, message))
        if died:
            self._kill(rank)  # which may live, with a device that is of no use
            membership.died(rank)
        elif is_echo(message) and (fatal or "epoch" in message):  # one without a model to go on with ends
            membership.stopped(rank, message.get("epoch", 0))

    def begin_epoch(self) -> tuple[int, ...] | None:
        """Begin the next epoch if every member of this one is dead or waits for it; kill whoever takes too long.

        Returns:
            Its members; None where none has begun. Nobody who is left, or nobody who was lost, is an error: the cause.
        """
        membership = self.membership
        if not self._failures:
            return None
        error = error_of(*first_cause(self._fatal or self._failures))
        too_late = time.monotonic() > self._until
        if self._fatal:
            if not all(is_echo(said) for _, said in self._fatal) or too_late or not membership.awaited:
                raise error
            return None
        if too_late:
            for rank in membership.awaited:
                self._kill(rank)
        members = membership.next_members()
        if members is None:
            return None
        if members in ((), membership.members):
            raise error
        logger.warning("%s; going on with rank%s %s", error, "s" * (len(members) > 1), ", ".join(map(str, members)))
        membership.begin(members)
        self._failures = []
        publish(self._store, membership.epoch, members)
        return members
