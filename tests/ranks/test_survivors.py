"""`lockstep.Engine` loses ranks: the others go on, every request comes out once, and as one process has it."""

import os
import signal
import time

import pytest
from one_process import one_process, tokens_of

pytest.importorskip("transformers")


from lockstep import ConfigurationError, Engine, PeerFailedError, SamplingParams
from lockstep.models.tiny import make_tiny
from waiting import Heard, wait_for

LONG = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=30_000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("survivors") / "tiny", num_layers=2, num_experts=8))


@pytest.fixture(scope="module")
def alone(tiny):
    return one_process(tiny)


def lose(engine, rank, number=signal.SIGKILL):
    """End a rank, and return the seconds until the first token of the next epoch.

    An endless request runs meanwhile, so that the loss is in mid-run on a machine of any speed.
    """
    epoch, endless = engine.stats.epoch, Heard(1)
    engine.submit(endless, engine.read_requests([[7]], ENDLESS))
    endless.wait_for_more(1)
    os.kill(engine.ranks()[rank].pid, number)
    lost = time.monotonic()
    wait_for(lambda: engine.stats.epoch == epoch + 1 or endless.error)
    endless.wait_for_more(1)
    engine.abandon(endless)
    assert endless.error is None
    return time.monotonic() - lost


@pytest.mark.ranks(3)
@pytest.mark.parametrize(
    ("victims", "survive"), [((1, 0), 0), ((0, 2), 1)], ids=["a rank, then the first", "the first, then the last"]
)
def test_outputs_after_one_and_two_losses_are_those_of_one_process(tiny, alone, victims, survive):
    """Eight experts over 3, 2 and 1 ranks, none of which divides them but the last two."""
    prompts = [[n + 1, 2, 3] * (1 + n % 4) for n in range(9)]
    with Engine(tiny, data_parallel_size=3, deadline_s=60, survive=survive) as engine:
        heard = Heard(len(prompts))
        engine.submit(heard, engine.read_requests(prompts, LONG))
        heard.wait_for_more(60)
        outages = [lose(engine, victim) for victim in victims]
        for _ in prompts:
            assert heard.left.acquire(timeout=120) and heard.error is None
        assert [tuple(tokens) for tokens in heard.tokens] == [alone(prompt, 60) for prompt in prompts]
        (left,) = {0, 1, 2} - set(victims)
        assert [rank.state for rank in engine.ranks()] == ["alive" if rank == left else "gone" for rank in range(3)]
        again = list(engine.generate(prompts[:2], LONG))  # of one rank, which goes on to take requests
        assert tokens_of(again) == [alone(prompt, 60) for prompt in prompts[:2]]
        assert {output.rank for output in again} == {left}
        wait_for(lambda: engine.stats.unfinished_requests == 0)
        assert engine.stats.epoch == 2
        os.kill(engine.ranks()[left].pid, signal.SIGKILL)
        with pytest.raises(PeerFailedError, match=rf"rank {left} failed: .*SIGKILL"):
            list(engine.generate(prompts[:1], LONG))
    print("outages, s:", [round(outage, 2) for outage in outages])
    assert max(outages) < 60, "the deadline ended the wait, not the death"


@pytest.mark.ranks(3)
def test_a_rank_is_lost_while_the_others_begin_the_next_epoch(tiny, alone):
    """Whoever opens groups with it notices that later than a deadline of two seconds."""
    prompts = [[n + 1, 7] for n in range(5)]
    with Engine(tiny, data_parallel_size=3, deadline_s=2) as engine:
        heard = Heard(len(prompts))
        engine.submit(heard, engine.read_requests(prompts, LONG))
        heard.wait_for_more(30)
        os.kill(engine.ranks()[1].pid, signal.SIGKILL)
        wait_for(lambda: engine.stats.epoch == 1)
        os.kill(engine.ranks()[0].pid, signal.SIGKILL)
        for _ in prompts:
            assert heard.left.acquire(timeout=120) and heard.error is None
        assert [tuple(tokens) for tokens in heard.tokens] == [alone(prompt, 60) for prompt in prompts]


@pytest.mark.ranks(2)
def test_experts_are_not_read_from_another_checkpoint(tmp_path):
    path = make_tiny(tmp_path / "tiny", num_layers=1, num_experts=4)
    with Engine(str(path), data_parallel_size=2, deadline_s=10) as engine:
        outputs = engine.generate([[1, 2], [3]], ENDLESS)
        os.utime(path / "model.safetensors")  # somebody has written it anew
        os.kill(engine.ranks()[1].pid, signal.SIGKILL)
        with pytest.raises(ConfigurationError, match="tiny is not the checkpoint any more that the ranks have loaded"):
            list(outputs)


@pytest.mark.ranks(3)
def test_a_stopped_rank_is_given_up_after_the_deadline_and_killed(tiny, alone):
    prompts = [[n + 1, 5] for n in range(6)]
    with Engine(tiny, data_parallel_size=3, deadline_s=2) as engine:
        heard = Heard(len(prompts))
        engine.submit(heard, engine.read_requests(prompts, LONG))
        heard.wait_for_more(30)
        assert lose(engine, 2, signal.SIGSTOP) >= 2
        for _ in prompts:
            assert heard.left.acquire(timeout=120) and heard.error is None
        assert [tuple(tokens) for tokens in heard.tokens] == [alone(prompt, 60) for prompt in prompts]
        assert engine.ranks()[2].state == "gone"


@pytest.mark.ranks(3)
def test_lost_ranks_come_back_while_the_others_work(tiny, alone, caplog):
    """Rank 1 is killed and comes back; then rank 0 is, which rank 1 survives. A third loss is for good."""
    prompts, heard = [[n + 1, 2, 3] * (1 + n % 4) for n in range(9)], []
    with Engine(tiny, data_parallel_size=3, deadline_s=20, survive=1, restart_ranks=1) as engine:

        def submit():
            heard.append(Heard(len(prompts)))
            engine.submit(heard[-1], engine.read_requests(prompts, LONG))

        submit()
        for epoch, victim in ((2, 1), (4, 0)):
            lose(engine, victim)
            assert [rank.lost for rank in engine.ranks()] == [rank == victim for rank in range(3)]
            while engine.stats.epoch < epoch:  # requests come all the time
                submit()
                wait_for(lambda: sum(map(len, heard[-1].tokens)) > 250, 60)
            submit()
            assert [(rank.state, rank.lost) for rank in engine.ranks()] == [("alive", False)] * 3
        for call in heard:
            for _ in prompts:
                assert call.left.acquire(timeout=60) and call.error is None
            assert [tuple(tokens) for tokens in call.tokens] == [alone(prompt, 60) for prompt in prompts]
        assert {output.rank for output in engine.generate(prompts, LONG)} == {0, 1, 2}
        lose(engine, 1)
        assert len(list(engine.generate(prompts[:3], LONG))) == 3
        assert engine.stats.epoch == 5 and engine.ranks()[1].state == "gone"
    assert "rank 1 is back; going on with ranks 0, 1, 2" in caplog.text


@pytest.mark.ranks(2)
def test_a_rank_that_fails_while_it_comes_back_does_not_hurt_the_others(tmp_path, caplog):
    """The first process is killed while it starts, the second finds another checkpoint; there is no third."""
    path = make_tiny(tmp_path / "tiny", num_layers=1, num_experts=4)
    with Engine(str(path), data_parallel_size=2, deadline_s=20, restart_ranks=2) as engine:
        lost, heard = engine.ranks()[1].pid, Heard(1)
        engine.submit(heard, engine.read_requests([[7]], ENDLESS))
        os.kill(lost, signal.SIGKILL)
        wait_for(lambda: engine.ranks()[1].pid != lost)
        second = engine.ranks()[1].pid
        os.kill(second, signal.SIGSTOP)
        heard.wait_for_more(10)
        os.utime(path / "model.safetensors")  # somebody has written it anew
        os.kill(second, signal.SIGKILL)
        wait_for(lambda: "rank 1 could not come back" in caplog.text)
        assert "tiny is not the checkpoint any more that the ranks have loaded" in caplog.text
        wait_for(lambda: engine.ranks()[1].state == "gone")
        heard.wait_for_more(10)
        assert heard.error is None and engine.stats.epoch == 1
        assert engine.ranks()[1].pid not in (lost, second)
        engine.abandon(heard)
