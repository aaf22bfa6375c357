"""The session by itself: ranks are threads over one board; steps are counted instead of run."""

import os
import signal
import threading
import time

import pytest

from lockstep.coordination.board import Board
from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.session import HeldBackInterrupt, Session
from lockstep.coordination.transports import SharedMemoryTransport
from lockstep.errors import ConfigurationError, LockstepError, PeerFailedError, TokenCountError
from lockstep.testing import Fault, InjectedFault, inject_into


class Steps:
    """Stands in for a model: what each rank ran, and a barrier in every step, as collectives are."""

    def __init__(self, num_ranks):
        self.ran = [[] for _ in range(num_ranks)]
        self.barrier = threading.Barrier(num_ranks, timeout=30)

    def run(self, rank, decision):
        self.ran[rank].append(decision.num_tokens_across_dp)
        self.barrier.wait()


def session(board, rank, steps, deadline_s=30.0, tensor_parallel_size=1, **options):
    transport = SharedMemoryTransport(board, rank)
    coordinator = Coordinator(
        transport=transport, rank=rank, deadline_s=deadline_s, tensor_parallel_size=tensor_parallel_size
    )
    dp_rank = rank // tensor_parallel_size
    return Session(coordinator, lambda decision: steps.run(rank, decision), data_parallel_rank=dp_rank, **options)


def run_scripts(scripts, **options):
    """Run `script(session, step)` of each rank in a thread; return what each returned or raised, and the steps."""
    board = Board.create(len(scripts))
    board.unlink()
    steps, outcomes = Steps(len(scripts)), [None] * len(scripts)

    def run(rank):
        def step(rows):
            decision = this.begin_step(rows)
            try:
                steps.run(rank, decision)
            finally:
                this.end_step()

        this = session(board, rank, steps, **options)
        try:
            with this:
                outcomes[rank] = scripts[rank](this, step)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(scripts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), outcomes
    return outcomes, steps.ran


def steps_of(count, rows=1, pause_s=0.0):
    def script(this, step):
        for _ in range(count):
            step(rows)
            time.sleep(pause_s)
        return count

    return script


def test_ranks_whose_scripts_meet_between_steps_come_together_again():
    """One is late once, by more than its grace: each runs a step alone, and from then on all steps are of both."""
    meet = threading.Barrier(2, timeout=30)

    def script(late_s):
        def run(this, step):
            time.sleep(late_s)
            for _ in range(4):
                step(1)
                meet.wait()

        return run

    _, ran = run_scripts([script(0.0), script(1.5)], grace_s=0.7)
    assert ran[0] == ran[1] == [(1, 0), (0, 1), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("counts", [(3, 3), (0, 5), (1, 0, 4), (0, 0)])
def test_every_rank_gets_its_steps_and_all_run_the_same(counts):
    outcomes, ran = run_scripts([steps_of(count, rank + 1) for rank, count in enumerate(counts)])
    assert outcomes == list(counts)
    assert all(steps == ran[0] for steps in ran)
    for rank, count in enumerate(counts):
        assert [step[rank] for step in ran[0]].count(rank + 1) == count


def test_ranks_that_step_together_stay_together():
    _, ran = run_scripts([steps_of(30), steps_of(30)], grace_s=0.5)
    assert ran[0] == [(1, 1)] * 30


def test_scripts_of_one_tensor_parallel_group_may_come_at_different_times():
    late = lambda this, step: (time.sleep(0.2), step(4))  # noqa: E731
    outcomes, ran = run_scripts([steps_of(1, 4), late], tensor_parallel_size=2)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes)
    assert ran[0] == ran[1] == [(4,)]


def test_a_rank_that_raises_ends_all_and_the_first_error_counts():
    def broken(this, step):
        step(1)
        raise KeyError("my script broke")

    outcomes, _ = run_scripts([steps_of(50, pause_s=0.002), broken, lambda this, step: None])
    assert isinstance(outcomes[1], KeyError)
    for rank in (0, 2):
        assert isinstance(outcomes[rank], PeerFailedError)
        assert outcomes[rank].rank == 1
        assert "KeyError: 'my script broke'" in str(outcomes[rank])


def test_a_script_that_goes_on_after_the_end_gets_the_same_error_again():
    def broken(this, step):
        raise ValueError("broke")

    def stubborn(this, step):
        errors = []
        while len(errors) < 3:
            try:
                step(1)
            except PeerFailedError as error:
                errors.append(error)
        assert errors[0] is errors[1] is errors[2]
        return "survived"

    outcomes, _ = run_scripts([stubborn, broken])
    assert isinstance(outcomes[0], PeerFailedError)  # leaving the block says it too


def test_an_error_before_an_agreement_is_announced():
    def broken(this, step):
        with inject_into(this.coordinator.peers, this.coordinator, Fault(1, 0, "agreement", "raise")):
            step(1)

    outcomes, _ = run_scripts([steps_of(100, pause_s=0.002), broken])
    assert isinstance(outcomes[1], InjectedFault)
    assert isinstance(outcomes[0], PeerFailedError)


def test_wrong_use_is_refused():
    def script(this, step):
        with pytest.raises(TokenCountError, match="got -1 on DP rank"):
            this.begin_step(-1)
        this.begin_step(0)
        with pytest.raises(RuntimeError, match="inside a step"):
            this.begin_step(0)
        this.end_step()
        with pytest.raises(ConfigurationError, match="entered once"):
            this.__enter__()

    outcomes, _ = run_scripts([script, script])
    assert outcomes == [None, None]


def test_idle_sessions_agree_seldom_and_answer_at_once():
    waits = []

    def worker(this, step):
        time.sleep(1.0)  # long enough for the pauses to have grown
        before = this.coordinator.step
        time.sleep(1.0)
        idle_agreements = this.coordinator.step - before
        for _ in range(10):
            time.sleep(0.2)
            started = time.monotonic()
            step(1)
            waits.append(time.monotonic() - started)
        return idle_agreements

    outcomes, _ = run_scripts([worker, lambda this, step: time.sleep(1)], grace_s=0.0)
    assert not isinstance(outcomes[0], BaseException)
    assert outcomes[0] < 40  # about ten: one in 0.1 s
    assert sorted(waits)[5] < 0.05  # some 2 ms, on a busy host more


# Ctrl-C


def test_ctrl_c_is_held_back_and_handed_on():
    held = HeldBackInterrupt()
    held.hold()
    held.hold()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        held.let_go()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    held.let_go()


def test_a_second_ctrl_c_is_not_held_back():
    held = HeldBackInterrupt()
    held.hold()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        held.let_go()


def test_an_ignored_ctrl_c_stays_ignored_and_other_threads_do_nothing():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        held = HeldBackInterrupt()
        held.hold()
        os.kill(os.getpid(), signal.SIGINT)
        held.let_go()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=HeldBackInterrupt().hold)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003, 0.01, 0.03])
def test_ctrl_c_at_any_moment_of_a_script_ends_both_sessions(delay_s):
    """The first rank's script is the main thread, as in a program; the signal comes out of the blue."""
    board = Board.create(2)
    board.unlink()
    steps = Steps(2)
    other = session(board, 1, steps)
    caught = []

    def run_other():
        try:
            with other:
                while True:
                    decision = other.begin_step(1)
                    steps.run(1, decision)
                    other.end_step()
        except LockstepError as error:
            caught.append(error)

    thread = threading.Thread(target=run_other, daemon=True)
    thread.start()
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
    mine = session(board, 0, steps)
    with pytest.raises(KeyboardInterrupt), mine:
        timer.start()
        while True:
            decision = mine.begin_step(1)
            try:
                steps.run(0, decision)
            finally:
                mine.end_step()
    thread.join(60)
    assert not thread.is_alive()
    assert [type(error) for error in caught] == [PeerFailedError]
    assert "KeyboardInterrupt" in str(caught[0])
