"""Membership as a model: every interleaving of three ranks, two losses, their returns, and the launcher that decides.

The launcher's side is `Membership` itself. A rank is what `docs/how-to/survivors.md` says of it: it steps with the
members of its epoch, stops where one of them is gone, says so, and waits for the next. Messages to the launcher keep
their order, and come late. At any moment a rank may be killed or hang; one that hangs is given up when all others wait.
A lost rank may be started again: it says that it is back, and waits for an epoch of which it is a member. The first
member may see at any step that the launcher has asked for the end of the epoch; all members know in that same step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lockstep.coordination.membership import Membership

RANKS, LOSSES, RETURNS = 3, 2, 2
NUM_TOKENS = (2, 1)  # of each request


class Rank(NamedTuple):
    """A rank: what it does, in which epoch, and how far it is.

    `arrived` steps have been begun, `done` are over. `requests` are those that it has, with the next position of each.
    """

    state: str = "works"  # works, waits, hangs, dead, back
    epoch: int = 0
    arrived: int = 0
    done: int = 0
    requests: tuple[tuple[int, int], ...] = ()
    unread: tuple[tuple, ...] = ()  # its messages that the launcher has not read
    last: int = 0  # the step after which it wants the epoch to end, 0 for none


class World(NamedTuple):
    ranks: tuple[Rank, ...]
    epoch: int
    members: tuple[int, ...]
    dead: frozenset[int]
    stopped: frozenset[int]
    ledger: tuple[int, ...]  # tokens of each request that have come out
    published: tuple[tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]], ...]  # per epoch: members, assignments
    losses: int = 0
    returns: int = 0
    back: frozenset[int] = frozenset()
    asked: bool = False  # the members of the present epoch are to stop

    def with_rank(self, number, **changes):
        ranks = list(self.ranks)
        ranks[number] = ranks[number]._replace(**changes)
        return self._replace(ranks=tuple(ranks))


def assigned(members, ledger):
    """Which rank goes on with which unfinished request, from which position."""
    unfinished = [number for number, tokens in enumerate(ledger) if tokens < NUM_TOKENS[number]]
    return tuple((members[place % len(members)], number, ledger[number]) for place, number in enumerate(unfinished))


def first_world():
    members, ledger = tuple(range(RANKS)), (0,) * len(NUM_TOKENS)
    given = assigned(members, ledger)
    ranks = tuple(Rank(requests=tuple((n, at) for rank, n, at in given if rank == number)) for number in members)
    return World(ranks, 0, members, frozenset(), frozenset(), ledger, ((members, given),))


def membership_of(world, kind):
    membership = kind(RANKS)
    membership.epoch, membership.members = world.epoch, world.members
    membership.dead, membership.waiting = set(world.dead), set(world.stopped)
    membership.back, membership.asked = set(world.back), world.asked
    return membership


def complete(world):
    return all(tokens == NUM_TOKENS[number] for number, tokens in enumerate(world.ledger))


def gone(rank, epoch):
    """Whether a rank does not work in an epoch any more; one that has not come to it yet is waited for."""
    return rank.state in ("dead", "hangs") or (rank.epoch == epoch and rank.state == "waits")


def rank_moves(world, number) -> Iterator[World]:
    """What a rank may do next by itself."""
    rank = world.ranks[number]
    if rank.state in ("waits", "back") and len(world.published) > rank.epoch + 1:
        members, given = world.published[rank.epoch + 1]
        assert number in members or rank.state == "back", "a rank that waits was left out, and lives"
        requests = tuple((request, at) for owner, request, at in given if owner == number)
        enters = {"state": "works", "arrived": 0, "done": 0, "requests": requests, "last": 0}
        yield world.with_rank(number, epoch=rank.epoch + 1, **(enters if number in members else {}))
    if rank.state != "works":
        return
    members, given = world.published[rank.epoch]
    steps = max((NUM_TOKENS[request] - at for _, request, at in given), default=0)  # known to all by agreement
    others = [world.ranks[other] for other in members if other != number]
    first = world.ranks[members[0]]
    last = first.last if first.epoch == rank.epoch else 0
    if rank.arrived == rank.done:
        if rank.arrived < max(steps, last):  # the last one may have no rows
            yield world.with_rank(number, arrived=rank.arrived + 1)
        if number == members[0] and world.asked and rank.epoch == world.epoch:
            yield world.with_rank(number, arrived=rank.arrived + 1, last=rank.arrived + 1)
    elif all(other.epoch == rank.epoch and other.arrived >= rank.arrived for other in others):
        left = tuple((request, at + 1) for request, at in rank.requests if at + 1 < NUM_TOKENS[request])
        said = (("tokens", rank.epoch, *rank.requests),) if rank.requests else ()
        if rank.arrived == last:
            yield world.with_rank(number, state="waits", unread=(*rank.unread, *said, ("stopped", rank.epoch)))
        else:
            yield world.with_rank(number, done=rank.arrived, requests=left, unread=rank.unread + said)
    # It looks at the others while it waits for them, and while it idles.
    if any(gone(other, rank.epoch) for other in others):
        yield world.with_rank(number, state="waits", unread=(*rank.unread, ("stopped", rank.epoch)))


def losses(world) -> Iterator[World]:
    """Any rank may be lost at any moment, as often as that is explored."""
    if world.losses == LOSSES:
        return
    for number, rank in enumerate(world.ranks):
        if rank.state in ("works", "waits", "back"):
            lost = world._replace(losses=world.losses + 1)
            yield lost.with_rank(number, state="dead", unread=(*rank.unread, ("died",)))
            if rank.state == "works":
                yield lost.with_rank(number, state="hangs")


def launcher_moves(world, kind) -> Iterator[World]:
    """The launcher reads a message, starts or gives up a rank; when it can, it begins the next epoch."""
    for number, rank in enumerate(world.ranks):
        if rank.state == "dead" and not rank.unread and number not in world.members and world.returns < RETURNS:
            started = Rank("back", world.epoch, unread=(("back",),))
            yield world._replace(returns=world.returns + 1).with_rank(number, **started._asdict())
        if rank.unread:
            (what, *about), *later = rank.unread
            yield take(world.with_rank(number, unread=tuple(later)), number, what, about, kind)
    membership = membership_of(world, kind)
    awaited = membership.awaited if membership.is_ending else ()
    if awaited and all(world.ranks[number].state == "hangs" for number in awaited):
        for number in awaited:
            rank = world.ranks[number]
            world = world.with_rank(number, state="dead", unread=(*rank.unread, ("died",)))
        yield world


def take(world, number, what, about, kind):
    membership = membership_of(world, kind)
    if what == "tokens":
        epoch, *tokens = about
        ledger = list(world.ledger)
        for request, at in tokens if epoch == world.epoch else ():
            assert at == ledger[request], f"token {at} of request {request} after {ledger[request]}"
            ledger[request] += 1
        world = world._replace(ledger=tuple(ledger))
    elif what == "died":
        membership.died(number)
    elif what == "back":
        membership.returned(number)
    else:
        membership.stopped(number, *about)
    members, published = membership.next_members(), world.published
    if members:
        assert members != world.members or world.asked, "an epoch ended, and nobody was lost"
        membership.begin(members)
        published = (*published, (members, assigned(members, world.ledger)))
    return world._replace(
        epoch=membership.epoch, members=membership.members, dead=frozenset(membership.dead),
        stopped=frozenset(membership.waiting), published=published, back=frozenset(membership.back),
        asked=membership.asked,
    )  # fmt: skip


def check(world):
    at_work = {rank.epoch for rank in world.ranks if rank.state in ("works", "hangs")}
    assert len(at_work) <= 1, f"epochs {at_work} are at work"
    for number, rank in enumerate(world.ranks):
        if number not in world.members:
            assert rank.state in ("dead", "back"), f"rank {number}, no member of epoch {world.epoch}, {rank.state}"


def explore(kind=Membership):
    """Visit every world; return how many there are, and those of them that are ends."""
    first = first_world()
    seen, frontier, ends = {first}, [first], []
    while frontier:
        world = frontier.pop()
        check(world)
        moves = [move for number in range(RANKS) for move in rank_moves(world, number)]
        moves += launcher_moves(world, kind)
        if not moves:
            waiting = [number for number, rank in enumerate(world.ranks) if rank.state in ("waits", "back")]
            assert complete(world) and not waiting, f"rank {waiting} waits for ever, or requests are lost: {world}"
            ends.append(world)
        for move in (*moves, *losses(world)):
            if move not in seen:
                seen.add(move)
                frontier.append(move)
    return len(seen), ends


def test_in_every_interleaving_no_request_is_lost_or_twice_and_nobody_waits_for_ever():
    worlds, ends = explore()
    print(f"{worlds} worlds, {len(ends)} ends")
    assert worlds > 100_000 and len(ends) > 100
    assert {(len(end.members), end.losses) for end in ends} == {(3, 0), (3, 1), (3, 2)}  # all are back


class Hasty(Membership):
    """Begins the next epoch as soon as somebody has died."""

    def next_members(self):
        left = tuple(rank for rank in self.members if rank not in self.dead)
        return left if self.dead else None


class Patient(Membership):
    """Waits for the dead as well."""

    @property
    def awaited(self):
        return tuple(rank for rank in self.members if rank not in self.waiting)


class Hospitable(Membership):
    """Lets a rank that is back enter at once."""

    def next_members(self):
        return (*self.members, *self.back) if self.back else super().next_members()


class Deaf(Membership):
    """Does not ask the members to stop for a rank that is back."""

    def returned(self, rank):
        self.back.add(rank)


@pytest.mark.parametrize("kind", [Hasty, Patient, Hospitable, Deaf])
def test_the_model_finds_what_is_wrong(kind):
    with pytest.raises(AssertionError, match=r"are at work|waits for ever"):
        explore(kind)


def test_what_is_no_news():
    membership = Membership(3)
    membership.stopped(1, epoch=1)
    assert not membership.is_ending
    membership.died(2)
    membership.stopped(0, epoch=0)
    membership.stopped(1, epoch=0)
    assert membership.next_members() == (0, 1)
    membership.begin((0, 1))
    membership.died(2)
    membership.stopped(0, epoch=0)
    assert (membership.epoch, membership.is_ending, membership.next_members()) == (1, False, None)


def test_a_rank_that_is_back_enters_behind_those_that_stayed():
    membership = Membership(3)
    for rank in (1, 2):
        membership.stopped(rank, epoch=0)
    membership.died(0)
    membership.begin((1, 2))
    membership.returned(0)
    membership.returned(1)  # which is a member
    assert (membership.is_ending, membership.awaited, membership.next_members()) == (True, (1, 2), None)
    for rank in (2, 1):
        membership.stopped(rank, epoch=1)
    membership.begin((1, 2, 0))
    assert (membership.epoch, membership.is_ending) == (2, False)


def test_the_last_rank_leaves_nobody():
    membership = Membership(1)
    membership.died(0)
    assert membership.next_members() == ()
