"""Which failures of ranks others survive, as whoever started them decides it. No processes here."""

import pytest
import torch.distributed as dist

from lockstep.coordination.membership import await_members, publish
from lockstep.errors import LockstepError, PeerFailedError, RankAbsentError
from lockstep.runner.failures import failure_of
from lockstep.runner.losses import Losses

DIED = {"failed": "died", "why": "its process was ended by signal 9 (SIGKILL)"}


def stopped(epoch=0):
    return failure_of(0, RankAbsentError("rank 1 absent", (1,))) | {"epoch": epoch}


@pytest.fixture
def killed():
    return []


@pytest.fixture
def losses(killed):
    return Losses(3, True, 60.0, killed.append, dist.HashStore())


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


def test_the_store_decides_once():
    store = dist.HashStore()
    assert publish(store, 1, (0, 2)) == (0, 2)
    assert publish(store, 1, (0, 1)) == (0, 2)
    assert await_members(store, 2, 1, 1.0) == (0, 2)
    with pytest.raises(RankAbsentError, match="rank 1 is no member of epoch 1: it was given up"):
        await_members(store, 1, 1, 1.0)
    with pytest.raises(LockstepError, match=r"rank 0: nobody has said within 0\.05 s who goes on in epoch 2"):
        await_members(store, 0, 2, 0.05)
