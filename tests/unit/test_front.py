"""The front, with ranks that are no processes: what it does beside the events that come."""

import threading
import time

from lockstep.engine.sampling_params import SamplingParams
from lockstep.runner.front import Front, NewRequest
from lockstep.runner.ranks import EngineOptions
from lockstep.runner.router import Router


class SilentRanks:
    """Ranks that are ready, and never say anything more."""

    num_processes = num_data_ranks = 2
    can_survive, store = True, None

    def __init__(self):
        self.checked = threading.Event()

    def start(self, on_message):
        for rank in range(2):
            on_message(rank, {"ready": {}, "epoch": 0})

    def check(self, is_ending):
        self.checked.set()

    def send(self, *_):
        pass

    stop = kill = kill_one = send


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
        front.submit(Nobody(), [NewRequest(0, [1], SamplingParams())])
        time.sleep(0.01)
    front.close()
    assert ranks.checked.is_set()
