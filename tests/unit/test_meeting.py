"""Ranks meet through a store: all or none, and who comes too late is in the next meeting."""

import random
import socket
import threading
import time

import pytest
import torch.distributed as dist

from lockstep.coordination.groups import find_group
from lockstep.coordination.meeting import MeetingPlace
from lockstep.errors import ConfigurationError, RankAbsentError


@pytest.fixture(params=["hash", "file", "tcp"])
def store(request, tmp_path):
    if request.param == "hash":
        return dist.HashStore()
    if request.param == "file":
        return dist.FileStore(str(tmp_path / "store"), 3)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet_all(store, num_ranks, waits, deadlines_s):
    """Each rank comes after its wait, a time or an event, as often as it has waits; what each got every time."""
    outcomes = [[] for _ in range(num_ranks)]

    def run(rank):
        place = MeetingPlace(store, rank, num_ranks)
        for wait, deadline_s in zip(waits[rank], deadlines_s[-len(waits[rank]) :], strict=True):
            wait() if callable(wait) else time.sleep(wait)
            try:
                outcomes[rank].append([facts["rank"] for facts in place.meet({"rank": rank}, deadline_s)])
            except RankAbsentError as error:
                outcomes[rank].append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def test_all_come_again_and_again(store):
    assert meet_all(store, 3, [[0.0] * 4] * 3, [20.0] * 4) == [[[0, 1, 2]] * 4] * 3


def test_who_does_not_come_is_named_and_who_comes_late_is_in_the_next_meeting(store):
    given_up = threading.Barrier(3, timeout=30)
    outcomes = meet_all(store, 3, [[0.0, given_up.wait]] * 2 + [[given_up.wait]], [0.6, 20.0])
    for rank in (0, 1):
        assert outcomes[rank][0].absent_ranks == (2,)
        assert "ranks [2] did not enter join() within 0.6 s" in str(outcomes[rank][0])
    assert [outcome[-1] for outcome in outcomes] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("seed", range(5))
def test_whoever_comes_when_a_meeting_is_complete_for_all_or_for_none(seed):
    rng = random.Random(seed)
    waits = [[rng.choice((0.0, 0.02, 0.1, 0.15)) for _ in range(6)] for _ in range(3)]
    outcomes = meet_all(dist.HashStore(), 3, waits, [0.1] * 6)
    met = [sum(isinstance(outcome, list) for outcome in mine) for mine in outcomes]
    assert met[0] == met[1] == met[2]


class StoppedStore:
    """A store whose keeper has been stopped."""

    def __getattr__(self, name):
        return lambda *_: threading.Event().wait()


class LostStore:
    def __getattr__(self, name):
        def lost(*_):
            raise RuntimeError("Broken pipe\nstack")

        return lost


def test_a_store_that_does_not_answer_ends_in_an_error_too():
    started = time.monotonic()
    with pytest.raises(RankAbsentError, match=r"did not answer within 0\.6 s: the process that keeps it"):
        MeetingPlace(StoppedStore(), 0, 2).meet({}, 0.1)
    assert time.monotonic() - started < 20
    with pytest.raises(RankAbsentError, match=r"does not answer: Broken pipe$"):
        MeetingPlace(LostStore(), 0, 2).meet({}, 0.1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"MASTER_ADDR": None}, "variable MASTER_ADDR must name a host, got ''"),
        ({"MASTER_ADDR": "no..host"}, "variable MASTER_ADDR must name a host, got 'no..host'"),
        ({"MASTER_PORT": None}, r"variable MASTER_PORT must be a number in 0\.\.65535, it is not set"),
        ({"MASTER_PORT": "70000"}, r"variable MASTER_PORT must be a number in 0\.\.65535, got '70000'"),
        ({"MASTER_PORT": "9" * 5000}, "variable MASTER_PORT must be a number"),
        ({"RANK": None}, r"variable RANK must be a number in 0\.\.1, it is not set"),
        ({"RANK": "2"}, r"variable RANK must be a number in 0\.\.1, got '2'"),
        ({"WORLD_SIZE": "two"}, "variable WORLD_SIZE must be a number >= 1, got 'two'"),
        ({"WORLD_SIZE": "٢"}, "variable WORLD_SIZE must be a number >= 1"),
    ],
)
def test_variables_that_say_nothing_are_named(changes, says, environment):
    good = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environment(**{**good, **changes})
    with pytest.raises(ConfigurationError, match=says):
        find_group(None)
    assert not dist.is_initialized()


def test_a_port_in_use_is_one_sentence(environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # As torchrun and srun set them; torchrun's agent has its own port, and says itself if that is in use.
        environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(ConfigurationError, match=rf"^the ranks could not meet at 127\.0\.0\.1:{port}: .*in use$"):
            find_group(None)
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [TimeoutError("no answer within 30.5 s"), dist.DistNetworkError("refused\nstack")])
@pytest.mark.parametrize(
    ("agent", "keeper", "absent"),
    [
        ("", "rank 0, which keeps the store at {},", (0,)),
        ("True", "the store at {}, which torchrun's agent keeps,", ()),
    ],
)
def test_a_silent_store_is_blamed_on_the_process_that_keeps_it(monkeypatch, environment, error, agent, keeper, absent):
    def silent(*_, **__):
        raise error

    monkeypatch.setattr(dist, "TCPStore", silent)
    environment(RANK=1, WORLD_SIZE=2, MASTER_ADDR="10.0.0.1", MASTER_PORT=29500, TORCHELASTIC_USE_AGENT_STORE=agent)
    with pytest.raises(RankAbsentError) as raised:
        find_group(None)
    why = str(error).partition("\n")[0]
    assert str(raised.value) == f"rank 1: {keeper.format('10.0.0.1:29500')} did not answer within 30 s: {why}"
    assert raised.value.absent_ranks == absent
