"""The protocol of sessions, explored exhaustively for two and three ranks, with the code's own `decide`.

A model of `Session` over a board with two places per rank: scripts that want steps, threads that take part for them,
finish, failure, death, lateness, restart with new groups. Every interleaving is visited. Checked in every state:

- ranks that run a step run the same one: same number, same counts, in the same epoch;
- a rank that brings rows is joined by all, and gets the step that it asked for unless somebody has failed;
- a session ends well only when all scripts have finished;
- nobody waits for ever: some rank can always move, without any deadline if no rank is dead, late or has given up;
- from every state a state can be reached in which all have finished, and without faults there is no other end;
- no place is overwritten that somebody has still to read.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from lockstep.coordination.step import StepRecord, decide

FREE, POSTED, STEP, JOINED, OVER, ERROR, DEAD = "free", "posted", "step", "joined", "over", "error", "dead"
ENDED = (OVER, ERROR, DEAD)
FAILURE = "a message in place of a record"


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank: steps its script has still to run, and where its session is."""

    left: int
    mode: str = FREE
    number: int = 0  # of the agreement it is at
    asked: int = 0  # rows that it has posted
    counts: tuple = ()  # of the step it is in
    finished: bool = False
    failing: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """All ranks, what stands on the board by parity and rank, and the faults that may still happen."""

    ranks: tuple
    said: tuple  # [2][ranks] of (number, record) or None
    joined: tuple  # [2][ranks] of (number, counts) or None
    raises: int
    kills: int
    lates: int
    broken: bool = False  # somebody has given up, is dead, or late: deadlines may pass in this epoch


@dataclass(frozen=True)
class Setting:
    steps: tuple
    tensor_parallel_size: int = 1
    raises: int = 0
    kills: int = 0
    lates: int = 0
    deadlines: bool = True  # waits have them
    rule: Callable = decide  # how what all ranks said becomes one decision


def explore(setting):
    """Return all states with the states that follow each."""
    size = len(setting.steps)
    nothing = ((None,) * size,) * 2
    start = State(
        tuple(Rank(left) for left in setting.steps), nothing, nothing,
        setting.raises, setting.kills, setting.lates,
    )  # fmt: skip
    moves = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        following = [normal(other) for other in successors(state, setting)]
        moves[state] = following
        for other in following:
            if other not in moves:
                moves[other] = None
                queue.append(other)
    return moves


def successors(state, setting):
    for index, rank in enumerate(state.ranks):
        yield from moves_of(state, setting, index, rank)
    if all(rank.mode in ENDED for rank in state.ranks) and not all(rank.mode == OVER for rank in state.ranks):
        # All ranks, a dead one as a new process, meet again and open new groups. Work that is done stays done.
        nothing = ((None,) * len(state.ranks),) * 2
        ranks = tuple(Rank(rank.left) for rank in state.ranks)
        yield replace(state, ranks=ranks, said=nothing, joined=nothing, broken=False)


def moves_of(state, setting, index, rank):
    def with_rank(changed, **others):
        ranks = (*state.ranks[:index], changed, *state.ranks[index + 1 :])
        return replace(state, ranks=ranks, **others)

    if rank.mode not in ENDED and state.kills:
        yield with_rank(replace(rank, mode=DEAD), kills=state.kills - 1, broken=True)
    if rank.mode == FREE:
        yield from moves_of_free(state, setting, index, rank, with_rank)
    elif rank.mode == POSTED:
        said = state.said[rank.number % 2]
        if all(entry is not None and entry[0] == rank.number for entry in said):
            yield with_rank(after_agreement(rank, index, setting, [record for _, record in said], state))
        yield from give_up(state, rank, setting, with_rank)
    elif rank.mode == STEP:
        if state.raises and not rank.failing:  # the model raises; the rank takes part all the same
            yield with_rank(replace(rank, failing=True), raises=state.raises - 1)
        others = [entry for entry in state.joined[rank.number % 2] if entry is not None and entry[0] == rank.number]
        assert all(entry[1] == rank.counts for entry in others), "ranks run different steps"
        yield with_rank(replace(rank, mode=JOINED), joined=put(state.joined, state, index, rank.number, rank.counts))
    elif rank.mode == JOINED:
        if all(entry is not None and entry[0] == rank.number for entry in state.joined[rank.number % 2]):
            ran = rank.counts[index // setting.tensor_parallel_size] > 0
            yield with_rank(replace(rank, mode=FREE, number=rank.number + 1, left=rank.left - ran, counts=(), asked=0))
        yield from give_up(state, rank, setting, with_rank)


def moves_of_free(state, setting, index, rank, with_rank):
    def say(rows):
        unfinished = rows > 0 or not rank.finished
        record = FAILURE if rank.failing else StepRecord(rows, unfinished)
        posted = replace(rank, mode=POSTED, asked=0 if rank.failing else rows)
        return with_rank(posted, said=put(state.said, state, index, rank.number, record))

    if rank.left and not rank.failing:
        yield say(1 + index // setting.tensor_parallel_size)  # the script wants a step
    yield say(0)  # the session's thread takes part
    if not rank.left and not rank.finished:
        yield with_rank(replace(rank, finished=True))
    if state.raises and not rank.failing and not rank.finished:  # the script raises between two steps
        yield with_rank(replace(rank, failing=True), raises=state.raises - 1)


def after_agreement(rank, index, setting, records, state):
    if FAILURE in records:
        return replace(rank, mode=ERROR)
    decision = setting.rule(records, setting.tensor_parallel_size)
    if setting.tensor_parallel_size == 1:
        assert decision.num_tokens_across_dp[index] == rank.asked, "a rank did not get the step that it asked for"
    if decision.runs_step:
        return replace(rank, mode=STEP, counts=decision.num_tokens_across_dp)
    if not decision.unfinished:
        assert all(other.finished or other.mode == DEAD for other in state.ranks), "ended before all had finished"
        return replace(rank, mode=OVER)
    return replace(rank, mode=FREE, number=rank.number + 1, asked=0)


def give_up(state, rank, setting, with_rank):
    """The deadline passes: because a rank cannot come any more, or, once in a while, because one is only late."""
    if not setting.deadlines:
        return
    gone = ERROR if rank.mode in (POSTED, JOINED) else rank.mode
    if state.broken or any(other.mode in (ERROR, DEAD) for other in state.ranks):
        yield with_rank(replace(rank, mode=gone), broken=True)
    elif state.lates:
        yield with_rank(replace(rank, mode=gone), lates=state.lates - 1, broken=True)


def put(board, state, index, number, value):
    """Write on the board; what is overwritten must have been read by all that will ever read it."""
    old = board[number % 2][index]
    if old is not None and old[0] < number:
        for other in state.ranks:
            unread = other.mode in (POSTED, JOINED, STEP, FREE) and other.number <= old[0]
            assert not unread, "a place was overwritten before all had read it"
    row = (*board[number % 2][:index], (number, value), *board[number % 2][index + 1 :])
    return (row, board[1]) if number % 2 == 0 else (board[0], row)


def normal(state):
    """Count agreements from the hindmost rank's on, so that idle ranks walk in circles. Parities stay."""
    living = [rank.number for rank in state.ranks if rank.mode not in ENDED]
    shift = (min(living) if living else 0) // 2 * 2
    first = (min(living) if living else 0) - 2

    def shifted(board):
        return tuple(
            tuple((e[0] - shift, e[1]) if e is not None and e[0] > first else None for e in row) for row in board
        )

    if not shift:
        return state
    ranks = tuple(replace(rank, number=max(0, rank.number - shift)) for rank in state.ranks)
    return replace(state, ranks=ranks, said=shifted(state.said), joined=shifted(state.joined))


SETTINGS = {
    "two ranks, two steps each": Setting((2, 2)),
    "two ranks, one has nothing to do": Setting((0, 3)),
    "two ranks that share their requests": Setting((2, 2), tensor_parallel_size=2),
    "two ranks, failure and restart": Setting((1, 2), raises=1),
    "two ranks, death and restart": Setting((2, 1), kills=1),
    "two ranks, one late": Setting((2, 1), lates=1),
    "two ranks, failure, death and lateness": Setting((1, 0), raises=1, kills=1, lates=1),
    "three ranks": Setting((1, 0, 1)),
    "three ranks, failure": Setting((1, 0, 0), raises=1),
    "three ranks, death": Setting((1, 0, 0), kills=1),
    "three ranks, one late": Setting((1, 0, 0), lates=1),
}
LARGE_SETTINGS = {
    "two ranks, everything once": Setting((1, 1), raises=1, kills=1, lates=1),
    "three ranks, uneven": Setting((1, 0, 2)),
    "three ranks, two at work, failure": Setting((1, 0, 1), raises=1),
    "three ranks, two at work, death": Setting((1, 0, 1), kills=1),
    "three ranks, two at work, one late": Setting((1, 0, 1), lates=1),
}
"""Names as in docs/benchmarks/faults.md, which also has the numbers of states. `make soak` runs the large ones."""


def check(setting):
    """Explore and check; return the numbers of states and moves."""
    moves = explore(setting)
    for state, following in moves.items():
        done = all(rank.mode == OVER for rank in state.ranks)
        assert following or done, f"nobody can move: {state}"
        if done:
            assert all(rank.left == 0 for rank in state.ranks), "ended with work left"
    # Backwards from the good ends: whatever has happened, the run can still end well.
    before = {}
    for state, following in moves.items():
        for other in following:
            before.setdefault(other, []).append(state)
    ends = [state for state in moves if all(rank.mode == OVER for rank in state.ranks)]
    seen, queue = set(ends), deque(ends)
    while queue:
        for state in before.get(queue.popleft(), ()):
            if state not in seen:
                seen.add(state)
                queue.append(state)
    assert len(seen) == len(moves), f"{len(moves) - len(seen)} states from which the run cannot end"
    return len(moves), sum(map(len, moves.values()))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_interleaving(name):
    states, _ = check(SETTINGS[name])
    assert states > 10


def only_the_first_rank_counts(records, tensor_parallel_size):
    return decide([records[0], *[StepRecord(unfinished=r.unfinished) for r in records[1:]]], tensor_parallel_size)


def nobody_says_unfinished(records, tensor_parallel_size):
    return decide([StepRecord(record.num_tokens) for record in records], tensor_parallel_size)


@pytest.mark.parametrize(
    ("rule", "message"),
    [(only_the_first_rank_counts, "did not get the step"), (nobody_says_unfinished, "ended before all had finished")],
)
def test_the_search_finds_rules_that_do_not_work(rule, message):
    with pytest.raises(AssertionError, match=message):
        check(Setting((1, 2), rule=rule))


def test_the_search_finds_ranks_that_wait_for_ever():
    # Without deadlines a death leaves the others waiting.
    with pytest.raises(AssertionError, match="nobody can move"):
        check(Setting((1, 1), kills=1, deadlines=False))
