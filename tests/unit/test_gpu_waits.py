"""Waits for a GPU end at the deadline, name who is missing, and end what still waits there. With GPUs stood in for."""

import os
import time
from types import SimpleNamespace

import pytest
import torch

from lockstep.coordination import groups
from lockstep.coordination.board import Board
from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.peers import Peers
from lockstep.coordination.processes import ProcessIdentity
from lockstep.coordination.transports import SharedMemoryTransport
from lockstep.coordination.waits import await_parked, await_work, wait_until, watch_group
from lockstep.dispatch.base import Abilities, ExpertsShape, Route
from lockstep.errors import PeerFailedError, RankAbsentError
from lockstep.metadata.config import ParallelConfig
from lockstep.moe.layer import MoELayer
from lockstep.moe.layers import MoELayers

pytestmark = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no POSIX shared memory on this system")
DEADLINE_S = 0.3


class Event:
    """Done after some seconds; None: never."""

    def __init__(self, seconds):
        self.until = time.monotonic() + seconds if seconds is not None else float("inf")

    def query(self):
        return time.monotonic() >= self.until

    is_completed = query

    def wait(self):
        pass


class Group:
    """A group of NCCL's."""

    group_name = "nccl of test_gpu_waits"
    rank = staticmethod(lambda: 0)

    def __init__(self):
        self.aborted = 0

    def _get_backend(self, device):
        return self

    def abort(self):
        self.aborted += 1


@pytest.fixture
def ranks(tmp_path):
    """Two ranks in step 7: rank 0 in combine of layer 3, rank 1 in its experts."""
    board = Board.create(2)
    board.unlink()
    for rank in range(2):
        board.register(rank)
    peers = [Peers(rank, 2, board=board) for rank in range(2)]
    for each, phase in zip(peers, (Phase.COMBINE, Phase.EXPERTS), strict=True):
        each.recorder.step, each.recorder.folder = 7, tmp_path
        each.mark(phase, 3)
    return SimpleNamespace(board=board, peers=peers)


class Dispatcher:
    """Finds out on the device what `check` raises."""

    name, abilities, num_experts, num_local_experts = "made up", Abilities(), 2, 1

    def __init__(self, check=lambda: None):
        self.check, self.waits_ended = check, 0

    def end_waits(self):
        self.waits_ended += 1

    def route(self, sizes, limit=None, *, capture=False):
        return Route(self.name, tuple(sizes), 16)


def step_of(ranks, event, check=lambda: None, deadline_s=DEADLINE_S):
    """Rank 0's side of a step that was issued, and ends on the device with the event."""
    group = Group()
    peers = ranks.peers[0]
    coordinator = Coordinator(transport=SharedMemoryTransport(ranks.board, 0), rank=0, peers=peers)
    config = ParallelConfig(2, 0)
    layer = MoELayer(None, Dispatcher(check), config, ExpertsShape(2, 8, 1))
    layers = MoELayers(
        [layer],
        coordinator=coordinator,
        deadline_s=deadline_s,
        abort=lambda: groups.abort([group], torch.device("cpu"), 0, timeout_s=0.2),
    )
    layers.end_step = lambda: event
    step = layers.begin([1, 1])
    step.replayed()
    return SimpleNamespace(step=step, coordinator=coordinator, group=group)


def test_what_is_done_in_time_is_waited_for():
    started = time.monotonic()
    wait_until(Event(0.1).query, 5.0)
    assert 0.1 <= time.monotonic() - started < 1.0
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        wait_until(Event(None).query, 0.2)


def test_a_check_ends_the_wait():
    def check():
        raise KeyError("a peer has gone")

    with pytest.raises(KeyError):
        wait_until(Event(None).query, 5.0, check)


def test_a_collective_whose_peer_never_comes_names_it(ranks):
    group = Group()
    watch_group(group, ranks.peers[0])
    try:
        with pytest.raises(RankAbsentError, match="rank 1 was last seen in experts of layer 3 in step 7") as caught:
            await_work(Event(None), "reduce_scatterv", group, DEADLINE_S, on_gpu=True)
    finally:
        watch_group(group, None)
    assert caught.value.absent_ranks == (1,)
    assert "reduce_scatterv did not end after 0.3" in str(caught.value)
    await_work(Event(0.05), "reduce_scatterv", group, DEADLINE_S, on_gpu=True)


@pytest.fixture
def combined(ranks):
    """`combined(event)`: rank 0's host went on after a combine that ends with the event."""
    group = Group()
    watch_group(group, ranks.peers[0])
    yield lambda event: await_work(event, "reduce_scatterv", group, DEADLINE_S, host_waits=False, on_gpu=True)
    watch_group(group, None)


def test_the_host_goes_on_after_combine_and_waits_once(ranks, combined):
    started = time.monotonic()
    for seconds in (0.1, 0.15, 0.2):  # of three layers
        combined(Event(seconds))
    assert time.monotonic() - started < 0.1
    await_parked(ranks.peers[0])
    assert 0.2 <= time.monotonic() - started < 1.0
    started = time.monotonic()
    await_parked(ranks.peers[0])
    assert time.monotonic() - started < 0.1


def test_a_wait_for_a_later_collective_is_one_for_those_before_it(ranks, combined):
    combined(Event(None))
    group = Group()
    watch_group(group, ranks.peers[0])
    await_work(Event(0.05), "all_gatherv", group, DEADLINE_S, on_gpu=True)
    watch_group(group, None)
    await_parked(ranks.peers[0])


def test_a_combine_that_never_ends_is_noticed_before_the_output_is_handed_on(ranks, combined):
    combined(Event(None))
    issued = step_of(ranks, Event(None))
    with pytest.raises(
        RankAbsentError, match=r"reduce_scatterv did not end after 0\.3.*rank 1 was last seen"
    ) as caught:
        issued.step.finish()
    assert caught.value.absent_ranks == (1,)
    assert not issued.coordinator.usable
    assert issued.group.aborted == issued.step.layers[0].dispatcher.waits_ended == 1


def test_without_peers_nobody_would_wait_later():
    with pytest.raises(RankAbsentError, match="rank 0: reduce_scatterv did not end"):
        await_work(Event(None), "reduce_scatterv", Group(), DEADLINE_S, host_waits=False, on_gpu=True)


def waits(issued):
    issued.step.finish()
    issued.step.wait()


def test_a_step_that_ends_is_no_error(ranks):
    for event in (Event(0.05), None):  # None: on a CPU
        issued = step_of(ranks, event)
        waits(issued)
        assert issued.coordinator.usable
        assert issued.group.aborted == 0


def test_the_host_goes_on_before_the_step_has_ended_on_the_device(ranks):
    started = time.monotonic()
    issued = step_of(ranks, Event(0.2))
    issued.step.finish()
    assert time.monotonic() - started < 0.1
    issued.step.wait()
    assert time.monotonic() - started >= 0.2


def test_a_step_that_never_ends_names_the_rank_and_ends_nccl(ranks):
    issued = step_of(ranks, Event(None))
    issued.step.finish()
    ranks.peers[0].mark(Phase.COMBINE, 3)
    started = time.monotonic()
    match = "step 7 did not end on the GPU.*rank 1 was last seen in experts"
    with pytest.raises(RankAbsentError, match=match) as caught:
        issued.step.wait()
    assert time.monotonic() - started < DEADLINE_S + 1
    assert caught.value.absent_ranks == (1,)
    assert not issued.coordinator.usable
    assert issued.group.aborted == 1
    with pytest.raises(RankAbsentError, match="rank 0 has given up"):  # and rank 1 learns it
        ranks.peers[1].check()


def test_a_process_that_is_gone_ends_the_wait_at_once(ranks):
    ranks.board.register(1, ProcessIdentity(2**22 + 1, *ProcessIdentity.own()[1:]))  # a process number that nobody has
    issued = step_of(ranks, Event(None), deadline_s=30.0)
    started = time.monotonic()
    with pytest.raises(RankAbsentError, match="is gone"):
        waits(issued)
    assert time.monotonic() - started < 1.0
    assert issued.group.aborted == 1


def test_what_a_kernel_has_noticed_is_raised_before_anybody_takes_the_results(ranks):
    def late():
        raise ranks.peers[0].absent("rank 1 did not come within 0.3 s", (1,))

    issued = step_of(ranks, Event(0.0), late)
    with pytest.raises(RankAbsentError, match=r"rank 1 did not come.*was last seen in experts of layer 3"):
        waits(issued)
    assert issued.group.aborted == 1


def test_anothers_reason_counts(ranks):
    ranks.peers[1].give_up("failed", "ValueError: broke", (1,))
    issued = step_of(ranks, Event(None))
    with pytest.raises(PeerFailedError, match="ValueError: broke"):
        waits(issued)
    assert issued.group.aborted == 1


def test_a_group_that_does_not_end_is_left_behind(ranks):
    issued = step_of(ranks, Event(None))
    issued.group.abort = lambda: time.sleep(60)
    with pytest.raises(RankAbsentError):
        waits(issued)
