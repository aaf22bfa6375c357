"""Membership as a model: every interleaving of three ranks, two losses, and the launcher that decides who goes on.

The launcher's side is `Membership` itself. A rank is what `docs/how-to/survivors.md` says of it: it steps with the
members of its epoch, stops where one of them is gone, says so, and waits for the next. Messages to the launcher keep
their order, and come late. At any moment a rank may be killed or hang; one that hangs is given up when all others wait.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lockstep.coordination.membership import Membership

RANKS, LOSSES = 3, 2
NUM_TOKENS = (2, 1)  # of each request


class Rank(NamedTuple):
    """A rank: what it does, in which epoch, and how far it is.

    `arrived` steps have been begun, `done` are over. `requests` are those that it has, with the next position of each.
    """

    state: str = "works"  # works, waits, hangs, dead
    epoch: int = 0
    arrived: int = 0
    done: int = 0
    requests: tuple[tuple[int, int], ...] = ()
    unread: tuple[tuple, ...] = ()  # its messages that the launcher has not read


class World(NamedTuple):
    ranks: tuple[Rank, ...]
    epoch: int
    members: tuple[int, ...]
    dead: frozenset[int]
    stopped: frozenset[int]
    ledger: tuple[int, ...]  # tokens of each request that have come out
    published: tuple[tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]], ...]  # per epoch: members, assignments
    losses: int = 0

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
    return membership


def complete(world):
    return all(tokens == NUM_TOKENS[number] for number, tokens in enumerate(world.ledger))


def gone(rank, epoch):
    """Whether a rank does not work in an epoch any more; one that has not come to it yet is waited for."""
    return rank.state in ("dead", "hangs") or (rank.epoch == epoch and rank.state == "waits")


def rank_moves(world, number) -> Iterator[World]:
    """What a rank may do next by itself."""
    rank = world.ranks[number]
    if rank.state == "waits" and len(world.published) > rank.epoch + 1:
        members, given = world.published[rank.epoch + 1]
        assert number in members, "a rank that waits was left out, and lives"
        requests = tuple((request, at) for owner, request, at in given if owner == number)
        yield world.with_rank(number, state="works", epoch=rank.epoch + 1, arrived=0, done=0, requests=requests)
    if rank.state != "works":
        return
    members, given = world.published[rank.epoch]
    steps = max((NUM_TOKENS[request] - at for _, request, at in given), default=0)  # known to all by agreement
    others = [world.ranks[other] for other in members if other != number]
    if rank.arrived == rank.done:
        if rank.arrived < steps:
            yield world.with_rank(number, arrived=rank.arrived + 1)
    elif all(other.epoch == rank.epoch and other.arrived >= rank.arrived for other in others):
        left = tuple((request, at + 1) for request, at in rank.requests if at + 1 < NUM_TOKENS[request])
        tokens = (("tokens", rank.epoch, *rank.requests),) if rank.requests else ()
        yield world.with_rank(number, done=rank.arrived, requests=left, unread=rank.unread + tokens)
    # It looks at the others while it waits for them, and while it idles.
    if any(gone(other, rank.epoch) for other in others):
        yield world.with_rank(number, state="waits", unread=(*rank.unread, ("stopped", rank.epoch)))


def losses(world) -> Iterator[World]:
    """Any rank may be lost at any moment, as often as that is explored."""
    if world.losses == LOSSES:
        return
    for number, rank in enumerate(world.ranks):
        if rank.state in ("works", "waits"):
            lost = world._replace(losses=world.losses + 1)
            yield lost.with_rank(number, state="dead", unread=(*rank.unread, ("died",)))
            if rank.state == "works":
                yield lost.with_rank(number, state="hangs")


def launcher_moves(world, kind) -> Iterator[World]:
    """The launcher reads a message, or gives a rank up; when it can, it begins the next epoch."""
    for number, rank in enumerate(world.ranks):
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
    else:
        membership.stopped(number, *about)
    members, published = membership.next_members(), world.published
    if members:
        assert members != world.members, "an epoch ended, and nobody was lost"
        membership.begin(members)
        published = (*published, (members, assigned(members, world.ledger)))
    return world._replace(
        epoch=membership.epoch, members=membership.members, dead=frozenset(membership.dead),
        stopped=frozenset(membership.waiting), published=published,
    )  # fmt: skip


def check(world):
    at_work = {rank.epoch for rank in world.ranks if rank.state in ("works", "hangs")}
    assert len(at_work) <= 1, f"epochs {at_work} are at work"
    for number, rank in enumerate(world.ranks):
        if number not in world.members:
            assert rank.state == "dead", f"rank {number} is no member of epoch {world.epoch}, and {rank.state}"


def explore(kind=Membership):
    """Visit every world; return how many there are, and how many of these are ends."""
    first = first_world()
    seen, frontier, ends = {first}, [first], 0
    while frontier:
        world = frontier.pop()
        check(world)
        moves = [move for number in range(RANKS) for move in rank_moves(world, number)]
        moves += launcher_moves(world, kind)
        if not moves:
            alive = [number for number, rank in enumerate(world.ranks) if rank.state != "dead"]
            assert complete(world), f"rank {alive} waits for ever, and requests are lost: {world}"
            ends += 1
        for move in (*moves, *losses(world)):
            if move not in seen:
                seen.add(move)
                frontier.append(move)
    return len(seen), ends


def test_in_every_interleaving_no_request_is_lost_or_twice_and_nobody_waits_for_ever():
    worlds, ends = explore()
    print(f"{worlds} worlds, {ends} ends")
    assert worlds > 10_000 and ends > 100


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


@pytest.mark.parametrize(("kind", "said"), [(Hasty, "are at work"), (Patient, "waits for ever")])
def test_the_model_finds_what_is_wrong(kind, said):
    with pytest.raises(AssertionError, match=said):
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


def test_the_last_rank_leaves_nobody():
    membership = Membership(1)
    membership.died(0)
    assert membership.next_members() == ()
