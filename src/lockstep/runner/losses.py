"""The launcher's side of membership: which failures others survive, how long to wait, and who goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from lockstep.coordination.membership import Membership, publish
from lockstep.runner.failures import error_of, first_cause, is_echo

logger = logging.getLogger(__name__)


class Losses:
    """Lets ranks go on without those that are lost.

    Args:
        num_ranks: that were started.
        patience_s: how long a rank may take to say that it has stopped, once one has.
        kill: ends a rank.
        store: in which ranks find who the members of an epoch are.
    """

    def __init__(self, num_ranks: int, patience_s: float, kill: Callable[[int], None], store: Any) -> None:
        self.membership = Membership(num_ranks)
        self._patience_s, self._kill, self._store = patience_s, kill, store
        self._failures: list[tuple[int, dict[str, Any]]] = []
        self._until = 0.0

    def take(self, rank: int, message: dict[str, Any]) -> bool:
        """Take a rank's failure in; return whether the others may survive it, as its death or what follows from one."""
        if rank not in self.membership.members:  # it was given up
            return True
        if message["failed"] != "died" and not is_echo(message):
            return False
        if not self.membership.is_ending:
            self._until = time.monotonic() + self._patience_s
        if message["failed"] == "died":
            self._kill(rank)  # which may live, with a device that is of no use
            self.membership.died(rank)
        else:
            self.membership.stopped(rank, message["epoch"])
        self._failures.append((rank, message))
        return True

    def begin_epoch(self) -> tuple[int, ...] | None:
        """Begin the next epoch if every member of this one is dead or waits for it; kill whoever takes too long.

        Returns:
            Its members; None where none has begun. Nobody who is left, or nobody who was lost, is an error: the cause.
        """
        membership = self.membership
        if membership.is_ending and time.monotonic() > self._until:
            for rank in membership.awaited:
                self._kill(rank)
        members = membership.next_members()
        if members is None:
            return None
        error = error_of(*first_cause(self._failures))
        if members in ((), membership.members):
            raise error
        logger.warning("%s; going on with rank%s %s", error, "s" * (len(members) > 1), ", ".join(map(str, members)))
        membership.begin(members)
        self._failures = []
        publish(self._store, membership.epoch, members)
        return members
