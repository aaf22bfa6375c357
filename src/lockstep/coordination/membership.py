"""Which ranks work together, from epoch to epoch: decided by whoever started them, in a store that outlives each rank.

An epoch has fixed members. It ends where one of them is lost: the others notice, stop, say so, and wait. When every
member has either said so or is dead, the next epoch begins with those that are left. A rank that neither says so nor
dies is killed, so that no two epochs are ever at work. Pure but for `publish` and `await_members`.
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


class Membership:
    """The view of whoever starts the ranks: the members of the present epoch, and who of them could begin the next.

    Attributes:
        epoch: number of the present one, from 0; epochs only grow.
        members: of the present epoch, ascending.
        dead: members that have died.
        waiting: members that have stopped working, and wait for the next epoch.

    Example:
        >>> membership = Membership(3)
        >>> membership.died(1), membership.stopped(0, epoch=0), membership.awaited
        (None, None, (2,))
        >>> membership.stopped(2, epoch=0), membership.next_members()
        (None, (0, 2))
    """

    def __init__(self, num_ranks: int) -> None:
        self.epoch = 0
        self.members: tuple[int, ...] = tuple(range(num_ranks))
        self.dead: set[int] = set()
        self.waiting: set[int] = set()

    @property
    def is_ending(self) -> bool:
        """Whether a member of the present epoch has died or stopped working in it."""
        return bool(self.dead or self.waiting)

    @property
    def awaited(self) -> tuple[int, ...]:
        """Members that have neither died nor stopped working in the present epoch."""
        return tuple(rank for rank in self.members if rank not in self.dead | self.waiting)

    def died(self, rank: int) -> None:
        """A rank's process has ended; of one that was lost before, that is no news."""
        if rank in self.members:
            self.dead.add(rank)

    def stopped(self, rank: int, epoch: int) -> None:
        """A rank has stopped working in an epoch, because of another one, and waits for the next."""
        if rank in self.members and epoch == self.epoch:
            self.waiting.add(rank)

    def next_members(self) -> tuple[int, ...] | None:
        """Return who is left for the next epoch; None where none may begin yet."""
        if not self.is_ending or self.awaited:
            return None
        return tuple(rank for rank in self.members if rank not in self.dead)

    def begin(self, members: tuple[int, ...]) -> None:
        """The next epoch begins."""
        assert members == self.next_members()
        self.epoch, self.members = self.epoch + 1, members
        self.dead, self.waiting = set(), set()


def publish(store: dist.Store, epoch: int, members: Sequence[int]) -> tuple[int, ...]:
    """Write who the members of an epoch are, unless that is decided; return what is."""
    return tuple(json.loads(store.compare_set(f"members/{epoch}", "", json.dumps(list(members)))))


def await_members(store: dist.Store, rank: int, epoch: int, timeout_s: float) -> tuple[int, ...]:
    """Return the members of an epoch once decided, or `RankAbsentError` where this rank is none, and must end."""
    key = f"members/{epoch}"
    try:
        store.wait([key], datetime.timedelta(seconds=timeout_s))
        members = tuple(json.loads(store.get(key)))
    except RuntimeError as error:  # torch's own, of which DistStoreError is one
        text = f"rank {rank}: nobody has said within {timeout_s:g} s who goes on in epoch {epoch}: {first_line(error)}"
        raise RankAbsentError(text, (rank,)) from None
    if rank not in members:
        raise RankAbsentError(f"rank {rank} is no member of epoch {epoch}: it was given up", (rank,))
    return members
