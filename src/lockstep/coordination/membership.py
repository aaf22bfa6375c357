"""The ranks that work together in each epoch: decided by the launcher, in a store that outlives each rank.

An epoch has fixed members. It ends when one of them is lost: the others notice, stop, report it, and wait. It also ends
when a lost rank is back: the members are asked to stop between two steps. Once every member has reported or died, the
next epoch begins with the survivors and the ranks that are back. A rank that does neither is killed, so that two epochs
never work at once. Pure except for the functions that take a store.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lockstep.coordination.waits import first_line
from lockstep.errors import RankAbsentError

if TYPE_CHECKING:
    import torch.distributed as dist


class EpochEnded(Exception):
    """All members have stopped between two steps, since a rank is back."""


class Membership:
    """The launcher's view: the members of the current epoch, and those of the next.

    >>> membership = Membership(3)
    >>> membership.died(1), membership.stopped(0, epoch=0), membership.awaited
    (None, None, (2,))
    >>> membership.stopped(2, epoch=0), membership.next_members()
    (None, (0, 2))
    """

    def __init__(self, num_ranks: int) -> None:
        self.epoch = 0
        self.members: tuple[int, ...] = tuple(range(num_ranks))  # ranks that came back follow those that stayed
        self.dead: set[int] = set()  # members that have died
        self.waiting: set[int] = set()  # members that have stopped working, and wait for the next epoch
        self.back: set[int] = set()  # lost ranks that wait to enter the next epoch
        self.asked = False  # whether the members were asked to stop, for a rank that is back

    @property
    def is_ending(self) -> bool:
        """Whether a member of the present epoch has died, has stopped working in it, or was asked to."""
        return bool(self.dead or self.waiting or self.asked)

    @property
    def awaited(self) -> tuple[int, ...]:
        """Members that have neither died nor stopped working in the present epoch."""
        return tuple(rank for rank in self.members if rank not in self.dead | self.waiting)

    def died(self, rank: int) -> None:
        """A rank's process has ended: a member, or a rank that was about to come back."""
        self.back.discard(rank)
        if rank in self.members:
            self.dead.add(rank)

    def returned(self, rank: int) -> None:
        """A lost rank is back; it enters with the next epoch."""
        if rank not in self.members:
            self.back.add(rank)
            self.asked = True

    def stopped(self, rank: int, epoch: int) -> None:
        """A rank has stopped working in an epoch because of another rank, and waits for the next epoch."""
        if rank in self.members and epoch == self.epoch:
            self.waiting.add(rank)

    def next_members(self) -> tuple[int, ...] | None:
        """Return the members of the next epoch; None if it cannot begin yet."""
        if not self.is_ending or self.awaited:
            return None
        return (*(rank for rank in self.members if rank not in self.dead), *sorted(self.back))

    def begin(self, members: tuple[int, ...]) -> None:
        """The next epoch begins."""
        assert members == self.next_members()
        self.epoch, self.members = self.epoch + 1, members
        self.dead, self.waiting, self.back, self.asked = set(), set(), set(), False


def publish(store: dist.Store, epoch: int, members: Sequence[int]) -> tuple[int, ...]:
    """Write the members of an epoch, unless they are decided; return the decided ones."""
    return tuple(json.loads(store.compare_set(f"members/{epoch}", "", json.dumps(list(members)))))


def await_members(store: dist.Store, rank: int, epoch: int, timeout_s: float) -> tuple[int, ...]:
    """Return the members of an epoch, once they are decided."""
    key = f"members/{epoch}"
    try:
        store.wait([key], datetime.timedelta(seconds=timeout_s))
        return tuple(json.loads(store.get(key)))
    except RuntimeError as error:  # torch's DistStoreError is one
        text = f"rank {rank}: the members of epoch {epoch} were not decided within {timeout_s:g} s: {first_line(error)}"
        raise RankAbsentError(text, (rank,)) from None


def ask_to_stop(store: dist.Store, epoch: int) -> None:
    """Ask the members of an epoch to stop between two steps."""
    store.set(f"asked/{epoch}", "")


def asked_to_stop(store: dist.Store, epoch: int) -> bool:
    """Return whether the members of an epoch were asked to stop."""
    return store.check([f"asked/{epoch}"])
