"""Which failures of ranks others survive, as whoever started them decides it. No processes here."""

import datetime
import time

import pytest
import torch.distributed as dist

from lockstep.coordination.groups import abandon_groups
from lockstep.coordination.meeting import Whereabouts
from lockstep.coordination.membership import asked_to_stop, await_members, publish
from lockstep.errors import LockstepError, PeerFailedError, RankAbsentError
from lockstep.runner.losses import WHEREABOUTS, Losses, failure_of

DIED = {"failed": "died", "why": "its process was ended by signal 9 (SIGKILL)", "exit_code": -9}


def stopped(epoch=0):
    return failure_of(0, RankAbsentError("rank 1 absent", (1,))) | {"epoch": epoch}


@pytest.fixture
def killed():
    return []


@pytest.fixture
def started():
    return []


@pytest.fixture
def losses(killed, started):
    again = lambda rank, first_epoch: started.append((rank, first_epoch))  # noqa: E731
    return Losses(3, True, 60.0, killed.append, dist.HashStore(), again, restart_ranks=2)


def test_the_others_go_on_once_all_of_them_have_stopped(losses, killed, caplog):
    for rank, message in ((1, DIED), (0, stopped())):
        losses.take(rank, message)
        assert losses.begin_epoch() is None
    losses.take(2, stopped())
    assert losses.begin_epoch() == (0, 2)
    assert "rank 1 failed: its process was ended by signal 9 (SIGKILL); going on with ranks 0, 2" in caplog.text
    assert killed == [1]


def test_who_does_not_say_that_it_has_stopped_is_killed_and_its_death_awaited(killed):
    losses = Losses(3, True, 0.0, killed.append, dist.HashStore())
    losses.take(1, DIED)
    losses.take(0, stopped())
    assert losses.begin_epoch() is None and killed == [1, 2]
    losses.take(2, DIED)
    assert losses.begin_epoch() == (0,)


def test_an_error_of_a_rank_is_no_loss(losses):
    losses.take(2, DIED)
    losses.take(0, stopped())
    losses.take(1, failure_of(1, ValueError("of the model")))
    with pytest.raises(PeerFailedError, match="rank 1 failed: ValueError: of the model"):
        losses.begin_epoch()


def test_where_no_loss_is_survived_the_cause_is_awaited_and_comes_before_its_echoes(killed):
    losses = Losses(2, False, 60.0, killed.append, None)
    losses.take(0, stopped())
    assert losses.begin_epoch() is None
    losses.take(1, DIED)
    with pytest.raises(PeerFailedError, match=r"rank 1 failed: .*SIGKILL"):
        losses.begin_epoch()
    losses = Losses(2, False, 60.0, killed.append, None)
    for rank in range(2):
        losses.take(rank, stopped())
        losses.take(rank, {"failed": "died", "why": "its process ended with exit code 0"})  # after what it said
    with pytest.raises(RankAbsentError, match="rank 1 absent"):
        losses.begin_epoch()


class AcceleratorError(RuntimeError):
    """As torch names it."""


def test_a_rank_whose_device_is_broken_is_lost_and_killed(losses, killed):
    losses.take(1, failure_of(1, AcceleratorError("CUDA error: device-side assert triggered")))
    assert killed == [1] and losses.membership.is_ending


def test_where_nobody_is_left_the_first_cause_is_raised(losses):
    losses.take(1, DIED)
    losses.take(0, stopped())
    losses.take(2, DIED)
    assert losses.begin_epoch() == (0,)
    losses.take(0, DIED)
    with pytest.raises(PeerFailedError, match=r"rank 0 failed: .*SIGKILL"):
        losses.begin_epoch()


def test_ranks_that_end_while_they_load_wait_for_no_epoch_and_are_not_the_cause(losses):
    losses.take(1, DIED)
    for rank in (0, 2):
        losses.take(rank, failure_of(rank, PeerFailedError("rank 1 is gone", 1, "gone")))
    assert losses.begin_epoch() is None
    for rank in (0, 2):
        losses.take(rank, {"failed": "died", "why": "its process ended with exit code 0"})
    with pytest.raises(PeerFailedError, match=r"rank 1 failed: .*SIGKILL"):
        losses.begin_epoch()


def test_an_epoch_that_ends_without_a_loss_is_an_error(losses):
    for rank in range(3):
        losses.take(rank, stopped())
    with pytest.raises(RankAbsentError, match="rank 1 absent"):
        losses.begin_epoch()


@pytest.fixture
def without_rank_1(losses):
    """Rank 1 is lost, and its process was started again."""
    for rank, message in ((1, DIED), (0, stopped()), (2, stopped())):
        losses.take(rank, message)
    assert losses.begin_epoch() == (0, 2)
    assert losses.begin_epoch() is None
    return losses


def test_a_lost_rank_is_started_again_and_enters_behind_the_others_once_they_have_stopped(
    without_rank_1, started, killed, caplog
):
    losses = without_rank_1
    assert started == [(1, 2)]
    losses.take(1, {"back": True})
    assert asked_to_stop(losses.store, 1) and not asked_to_stop(losses.store, 0)
    for rank in (0, 2):
        assert losses.begin_epoch() is None
        losses.take(rank, {"stopped": 1})
    assert losses.begin_epoch() == (0, 2, 1)
    assert "rank 1 is back; going on with ranks 0, 1, 2" in caplog.text
    assert killed == [1]  # at its loss


def test_a_rank_is_started_again_a_few_times_and_ends_nobody_where_it_fails(without_rank_1, started, caplog):
    losses = without_rank_1
    for failure in (failure_of(1, LockstepError("another checkpoint")), None):
        if failure is not None:
            losses.take(1, failure)
        losses.take(1, DIED)
        assert losses.begin_epoch() is None
    assert started == [(1, 2), (1, 2)]
    assert "rank 1 could not come back: another checkpoint" in caplog.text


def test_a_rank_that_ends_before_it_enters_leaves_the_others_as_they_were(without_rank_1, caplog):
    losses = without_rank_1
    losses.take(1, {"back": True})
    losses.take(0, {"stopped": 1})
    losses.take(1, DIED)
    losses.take(2, {"stopped": 1})
    assert losses.begin_epoch() == (0, 2)
    assert "a rank that was back has ended; going on with ranks 0, 2" in caplog.text


def test_an_error_of_a_rank_that_has_just_come_back_is_its_loss(without_rank_1, killed):
    losses = without_rank_1
    losses.take(1, {"back": True})
    for rank in (0, 2):
        losses.take(rank, {"stopped": 1})
    assert losses.begin_epoch() == (0, 2, 1)
    losses.take(1, failure_of(1, ValueError("of its device")))
    for rank in (0, 2):
        losses.take(rank, stopped(2))
    assert losses.begin_epoch() == (0, 2)
    assert killed == [1, 1]


def test_a_rank_that_reads_experts_is_waited_for_as_long_as_it_comes_on(killed):
    losses = Losses(3, True, 0.2, killed.append, dist.HashStore())
    reader = Whereabouts(dist.PrefixStore(WHEREABOUTS, losses.store), 2)
    reader.enter("reading experts")
    losses.take(1, DIED)
    losses.take(0, stopped())
    for beat in range(1, 8):
        reader.enter("reading experts", beat)
        assert losses.begin_epoch() is None
        time.sleep(0.11)
    assert killed == [1]
    until = time.monotonic() + 10
    while killed != [1, 2]:
        assert losses.begin_epoch() is None and time.monotonic() < until
        time.sleep(0.05)


def test_a_rank_whose_group_did_not_open_names_the_next_one_as_a_new_process_does():
    try:
        with pytest.raises(RuntimeError):
            limit = datetime.timedelta(seconds=0.1)
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=limit)
        abandon_groups()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert dist.group.WORLD.group_name == "0"
    finally:
        abandon_groups()


def test_the_store_decides_once():
    store = dist.HashStore()
    assert publish(store, 1, (0, 2)) == (0, 2)
    assert publish(store, 1, (0, 1)) == (0, 2)
    assert await_members(store, 2, 1, 1.0) == (0, 2)
    with pytest.raises(LockstepError, match=r"rank 0: the members of epoch 2 were not decided within 0\.05 s"):
        await_members(store, 0, 2, 0.05)
