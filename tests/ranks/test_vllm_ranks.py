"""What vLLM's workers agree on before they use our exchange, and how they notice one that has stopped."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lockstep.integrations import vllm_exchange
from lockstep.integrations.vllm_exchange import Step, Watch
from lockstep.testing import run_ranks

DEADLINE_S = 4.0  # a busy machine may let a thread wait for a second


def agreement():
    rank, group = dist.get_rank(), dist.group.WORLD
    texts = vllm_exchange.gather_texts(f"rank {rank}" + "é" * rank, group)
    reason = vllm_exchange.agree("" if rank else "an old driver", group, torch.device("cpu"))
    nothing = vllm_exchange.agree("", group, torch.device("cpu"))
    return texts, reason, nothing


@pytest.mark.ranks(3)
def test_texts_arrive_whole_and_all_ranks_get_the_same_answer():
    for texts, reason, nothing in run_ranks(3, agreement):
        assert texts == ["rank 0", "rank 1é", "rank 2éé"]
        assert reason == "an old driver (on EP rank 0)"
        assert "cannot map each other's memory" in nothing  # a machine without GPUs


def one_stops():
    rank, group = dist.get_rank(), dist.group.WORLD
    beats = vllm_exchange.share_beats(group, rank)
    pids = [int(text) for text in vllm_exchange.gather_texts(str(os.getpid()), group)]
    step = Step()
    step.serving = True
    ended = []
    watch = Watch(step, beats, rank, DEADLINE_S, ended.append)
    watch.start()
    left = [path.name for path in Path("/dev/shm").glob("lockstep-vllm-*")]
    time.sleep(0.5)
    if rank == 0:
        os.kill(pids[2], signal.SIGSTOP)

    def step_that_waits():
        began = time.monotonic()
        while not ended and time.monotonic() - began < 30:
            time.sleep(0.05)
        return time.monotonic() - began

    took_s = step.within(step_that_waits) if rank < 2 else 0.0
    if rank == 0:
        time.sleep(2.0)  # rank 1 has seen it too
        os.kill(pids[2], signal.SIGCONT)
    dist.barrier(group)  # where rank 2 is when it is stopped
    return took_s, watch.look() if rank else "", sorted(vllm_exchange._told), left


@pytest.mark.ranks(3)
def test_a_rank_that_is_stopped_is_named_by_the_others_within_the_deadline_and_grace():
    results = run_ranks(3, one_stops)
    for rank in (0, 1):
        took_s, _, told, _ = results[rank]
        assert DEADLINE_S <= took_s < DEADLINE_S + Watch.GRACE_S + 3
        assert told == [f"EP rank 2 has been silent for 4 s while rank {rank} is in a step"]
    assert results[2][2] == []
