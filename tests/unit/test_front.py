"""The front, with ranks that are no processes: what it does beside the events that come."""

import threading
import time

import torch.distributed as dist

from lockstep.engine.sampling_params import SamplingParams
from lockstep.runner.front import Front, NewRequest
from lockstep.runner.options import EngineOptions
from lockstep.runner.router import Router
from lockstep.workload.policies import SchedulerState


class SilentRanks:
    """Ranks that are ready, and never say anything more."""

    num_processes = num_data_ranks = 2
    can_survive = True

    def __init__(self):
        self.store = dist.HashStore()
        self.checked = threading.Event()

    def start(self, on_message):
        self.say = on_message
        for rank in range(2):
            on_message(rank, {"ready": {}, "epoch": 0})

    def check(self, is_ending):
        self.checked.set()

    def send(self, *_):
        pass

    stop = kill = kill_one = start_again = send


class Nobody:
    def on_error(self, error):
        pass


def test_stopped_ranks_are_looked_for_also_where_requests_come_all_the_time():
    """Each request is an event: a front that waits for a moment without one would never end a rank that is stopped."""
    ranks = SilentRanks()
    front = Front(ranks, lambda about: Router(2, "least-tokens"), EngineOptions("none", data_parallel_size=2))
    front.start()
    until = time.monotonic() + 10
    while not ranks.checked.is_set() and time.monotonic() < until:
        front.submit([(Nobody(), [NewRequest(0, [1], SamplingParams())])])
        time.sleep(0.01)
    front.close()
    assert ranks.checked.is_set()


def test_figures_after_a_loss_stand_at_the_numbers_that_ranks_had_from_the_start():
    ranks = SilentRanks()
    front = Front(ranks, lambda about: Router(2, "least-tokens"), EngineOptions("none", data_parallel_size=2))
    front.start()

    def step(rank, epoch, rows):
        counts = {
            "steps": 1,
            "rows": rows,
            "longest_rows": max(rows),
            "agreement_s": 0.0,
            "overrun_rows": 0,
            "preempted": 0,
        }
        state = SchedulerState(num_kv_tokens=64)
        said = {"tokens": [], "num_acted": 0, "counts": counts, "state": state, "rows": rows, "epoch": epoch}
        ranks.say(rank, said)

    def wait_for(condition):
        until = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < until, front.stats
            time.sleep(0.01)

    step(0, 0, [5, 7])
    ranks.say(0, {"failed": "died", "why": "signal 9"})
    ranks.say(1, {"failed": "PeerFailedError", "why": "rank 0", "epoch": 0})
    wait_for(lambda: front.stats.epoch == 1)
    assert front.stats.num_kv_tokens == [0, 0]
    step(1, 1, [3])
    wait_for(lambda: front.stats.rows == [5, 10])
    wait_for(lambda: front.stats.num_tokens_across_dp == [0, 3])
    front.close()
