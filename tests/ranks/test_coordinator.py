"""Agreements of real ranks, over gloo and in shared memory: mismatch, failure, absence, short deadlines."""

import os
import time

import pytest
import torch.distributed as dist
from said import say, sleep_until_said

from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.groups import Start
from lockstep.coordination.peers import Peers
from lockstep.coordination.step import StepRecord
from lockstep.coordination.transports import ProcessGroupTransport, SharedMemoryTransport, open_transport
from lockstep.errors import LockstepError
from lockstep.testing import run_ranks


def coordinator(shared, deadline_s=20.0, **options):
    """A coordinator of all ranks on groups of its own."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(num_ranks)))
    transport, board = open_transport(group, 20.0)
    assert isinstance(transport, SharedMemoryTransport)
    store = None
    if not shared:
        transport, board = ProcessGroupTransport(group), None
        store = dist.PrefixStore(group.group_name, Start(dist.group.WORLD).store)
    peers = Peers(rank, num_ranks, board=board, store=store, epoch=options.get("epoch", 0))
    return Coordinator(transport=transport, rank=rank, deadline_s=deadline_s, peers=peers, **options)


def outcome(call):
    try:
        return call()
    except LockstepError as error:
        return error


def agreements(shared):
    rank = dist.get_rank()
    agree = coordinator(shared)
    plain = [agree.agree(StepRecord(10 * step + rank)).num_tokens_across_dp for step in range(5)]
    negative = outcome(lambda: agree.agree(StepRecord(-1)))
    return plain, str(negative), agree.agree(StepRecord(rank)).num_tokens_across_dp


def mismatch(shared):
    rank = dist.get_rank()
    said = []
    for options in ({"fingerprint": 5 + (rank == 1)}, {"epoch": int(rank == 2)}):
        other = coordinator(shared, **options)
        error = outcome(lambda other=other: other.agree(StepRecord(rank)))
        again = outcome(lambda other=other: other.agree(StepRecord(rank)))
        said.append((type(error).__name__, str(error).split(";")[:2], type(again).__name__, other.usable))
    return said


def failure(shared):
    rank = dist.get_rank()
    agree = coordinator(shared)
    agree.agree(StepRecord(rank))
    if rank == 2:
        error = agree.fail(ValueError("tensor of wrong shape ✗ " * 40))
    else:
        error = outcome(lambda: agree.agree(StepRecord(1)))
    still = agree.agree(StepRecord(rank)).num_tokens_across_dp  # the ranks are in step, so the group is usable
    return type(error).__name__, str(error), getattr(error, "rank", None), getattr(error, "peer_message", None), still


def absence(shared, deadline_s, folder):
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    rank = dist.get_rank()
    agree = coordinator(shared, 20.0)
    for _ in range(3):
        agree.agree(StepRecord(rank))
    agree.deadline_s = deadline_s
    if rank == 1:
        agree.peers.mark(Phase.EXPERTS, layer=17)
        sleep_until_said(0, 2)
        late = outcome(lambda: agree.agree(StepRecord(1)))
        return type(late).__name__, str(late), getattr(late, "absent_ranks", None), 0.0, agree.usable
    if not shared:
        time.sleep(0.6)  # so that every rank has told the store where it is
    started = time.monotonic()
    error = outcome(lambda: agree.agree(StepRecord(rank)))
    seconds = time.monotonic() - started
    say(rank)
    again = outcome(lambda: agree.agree(StepRecord(rank)))
    assert "not used again" in str(again)
    return type(error).__name__, str(error), getattr(error, "absent_ranks", None), seconds, agree.usable


@pytest.mark.ranks(3)
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_agreements_one_after_another(shared):
    for plain, negative, counts in run_ranks(3, agreements, shared):
        assert plain == [(10 * step, 10 * step + 1, 10 * step + 2) for step in range(5)]
        assert "num_tokens must be >= 0, got -1 on rank" in negative
        assert counts == (0, 1, 2)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_a_mismatch_is_named_on_all_ranks_before_any_data_moves(shared):
    results = run_ranks(3, mismatch, shared)
    assert results[0] == results[1] == results[2]
    name, said, again, usable = results[0][0]
    assert (name, again, usable) == ("RankMismatchError", "RankAbsentError", False)
    assert said == [
        "ranks disagree about fingerprint: rank 0: 5, rank 1: 6, rank 2: 5", " rank 1 differs from the others"
    ]  # fmt: skip
    assert results[0][1][1][0] == "ranks disagree about epoch: rank 0: 0, rank 1: 0, rank 2: 1"


@pytest.mark.ranks(3)
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_a_failure_reaches_the_others_with_its_message(shared):
    results = run_ranks(3, failure, shared)
    for rank in (0, 1):
        name, text, failed, message, still = results[rank]
        assert (name, failed, still) == ("PeerFailedError", 2, (0, 1, 2))
        assert text.startswith(f"rank {rank} stops at step 1: rank 2 raised ValueError: tensor of wrong shape ✗")
        assert len(message) > 600
    assert results[2][0] == "NoneType"  # the rank that failed raises its own error


@pytest.mark.ranks(3)
@pytest.mark.parametrize(("shared", "deadline_s"), [(True, 0.1), (True, 1.0), (False, 1.0)])
def test_an_absent_rank_is_named_with_where_it_was_last_seen(tmp_path, shared, deadline_s):
    results = run_ranks(3, absence, shared, deadline_s, str(tmp_path))
    for rank in (0, 2):
        name, text, absent, seconds, usable = results[rank]
        assert (name, absent, usable) == ("RankAbsentError", (1,), False)
        assert "rank 1 was last seen in experts of layer 17 in step 2," in text
        assert not shared or "its process is alive" in text or "has given up" in text
        assert seconds < deadline_s + 1
        path = text.rsplit(": ", 1)[1]
        assert os.path.dirname(path) == str(tmp_path)
        assert os.path.exists(path)
    assert results[1][0] == "RankAbsentError"  # and the late rank is added to nothing
