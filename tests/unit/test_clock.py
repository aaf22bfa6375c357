"""A run's clock: it never goes back, all ranks agree on what has arrived, and idle ranks sleep."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.coordination.step import decide
from lockstep.engine.rank_engine import EngineRecord
from lockstep.errors import ConfigurationError
from lockstep.runner.clock import RunClock, expected_duration
from lockstep.workload import Arrivals, Request, SchedulerConfig, SchedulerState

DAY = 86_400


class FakeTime:
    """A clock that passes only where somebody sleeps, or the test says so."""

    def __init__(self, now=0.0):
        self.now = now
        self.slept = []

    def read(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def clock(self, **options):
        return RunClock(read=self.read, sleep=self.sleep, **options)


def test_a_clock_that_goes_backwards_stands_still():
    time = FakeTime(50.0)
    clock = time.clock()
    time.now = 53.0
    assert clock.elapsed_ms() == 3000
    time.now = 10.0  # 43 s back
    assert clock.elapsed_ms() == 3000
    time.now = 11.0  # and on from there
    assert clock.elapsed_ms() == 4000
    # A moment is told in the present reading of the clock: latencies are differences to it.
    assert time.now - clock.moment(2.5) == 1.5


def test_a_rank_behind_catches_up_and_one_ahead_stays():
    time = FakeTime()
    clock = time.clock()
    time.now = 1.0
    clock.catch_up(1500)
    assert clock.elapsed_ms() == 1500
    clock.catch_up(200)
    assert clock.elapsed_ms() == 1500
    time.now = 2.0
    assert clock.elapsed_ms() == 2500


def test_after_a_restart_the_clock_goes_on():
    time = FakeTime(7.0)
    clock = time.clock(started_s=100.0)
    time.now = 8.0
    assert clock.elapsed_s() == 101.0
    assert clock.moment(99.0) == 6.0


def test_waits_are_short_and_reach_the_arrival():
    time = FakeTime()
    clock = time.clock()
    while clock.elapsed_ms() / 1000 < 10.0:
        clock.wait_for(10.0, longest_s=7.5)
    assert max(time.slept) <= 0.25  # the other ranks' deadline is far off
    assert len(time.slept) <= 42  # four agreements a second: nobody spins
    assert 10.0 <= time.now < 10.01
    clock.wait_for(3.0, longest_s=7.5)
    assert len(time.slept) <= 42  # nothing to wait for
    clock.wait_for(100.0, longest_s=0.05)
    assert time.slept[-1] == 0.05


def test_elapsed_time_travels_in_the_record_and_the_maximum_counts():
    records = [EngineRecord(elapsed_ms=5), EngineRecord(elapsed_ms=12), EngineRecord(elapsed_ms=3)]
    assert decide(records).values["elapsed_ms"] == 12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=20).map(sorted),
    st.lists(st.floats(0, 0.4), min_size=1, max_size=4),
    st.lists(st.floats(-0.2, 0.3), min_size=1, max_size=30),
)
def test_all_ranks_give_out_each_request_once_and_not_before_its_time(arrivals, skews, passing):
    """Ranks that start apart, whose steps take any time and whose clocks may go back."""
    requests = [Request(i, arrival_s, 3, 1) for i, arrival_s in enumerate(arrivals)]
    num_ranks = len(skews)
    times = [FakeTime(-skew) for skew in skews]
    clocks = [time.clock() for time in times]
    for time, skew in zip(times, skews, strict=True):
        time.now += skew
    queues = [Arrivals(requests, SchedulerConfig(), num_ranks, rank) for rank in range(num_ranks)]
    idle, agreed_ms, given_out = [SchedulerState()] * num_ranks, 0, []
    for step in range(1000):
        if not queues[0].left:
            break
        assert len({queue.next_arrival_s for queue in queues}) == 1
        for rank, (queue, clock) in enumerate(zip(queues, clocks, strict=True)):
            for request in queue.before_step(idle, agreed_ms / 1000):
                assert request.arrival_s <= agreed_ms / 1000
                assert clock.moment(request.arrival_s) <= times[rank].now  # no latency is negative
                given_out.append(request.request_id)
        for rank, (time, clock) in enumerate(zip(times, clocks, strict=True)):
            time.now += passing[(step + rank) % len(passing)]
            if queues[rank].left:
                clock.wait_for(queues[rank].next_arrival_s, 7.5)
        agreed_ms = max(agreed_ms, *[clock.elapsed_ms() for clock in clocks])
        for clock in clocks:
            clock.catch_up(agreed_ms)
    assert sorted(given_out) == list(range(len(requests)))


def test_virtual_time_takes_no_notice_of_real_time():
    requests = [Request(0, 0.0, 1, 1), Request(1, 1000.0, 1, 1)]
    arrivals = Arrivals(requests, SchedulerConfig(), 1, 0)
    assert arrivals.next_arrival_s == 0.0
    assert [r.request_id for r in arrivals.before_step([SchedulerState()])] == [0]
    assert arrivals.next_arrival_s == 1000.0
    assert [r.request_id for r in arrivals.before_step([SchedulerState()])] == [1]  # idle: it jumps
    assert arrivals.next_arrival_s is None
    with pytest.raises(ConfigurationError, match="one entry per rank, 1, got 2"):
        arrivals.before_step([SchedulerState()] * 2, 0.0)


def test_the_duration_is_said_beforehand():
    def said(*arrivals):
        return expected_duration([Request(i, arrival_s, 1, 1) for i, arrival_s in enumerate(arrivals)])

    told = "--clock wall: the last request arrives after {}, so the run takes at least that long"
    assert said(0.0) == told.format("0.0 s")
    assert said(0.0, 12.25) == told.format("12.2 s")
    assert said(0.0, 3000.0, 6000.0) == told.format("1 h 40 min")
    assert said(0.0, 3.0, 3 * DAY, 3 * DAY + 60) == (
        told.format("3 d 1 min") + "; ranks wait 3 d before request 2. --rate-scale shortens all gaps"
    )
