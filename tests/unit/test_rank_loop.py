"""What a rank does between steps: with the loop alone, in one process."""

import threading

import pytest

pytest.importorskip("transformers")

from lockstep.engine.rank_engine import RankEngine
from lockstep.engine.sampling_params import SamplingParams
from lockstep.models.tiny import make_tiny
from lockstep.runner.mailbox import Mailbox
from lockstep.runner.rank_loop import as_request, run_rank
from lockstep.workload import SchedulerConfig
from waiting import wait_for


class Captures:
    """Stands for the graphs that an engine on a GPU has still to capture, and notes when it was asked for one."""

    def __init__(self, engine, num_missing):
        self.engine, self.num_missing = engine, num_missing
        self.allowed, self.was_busy = threading.Semaphore(0), []

    def __call__(self):
        if not self.num_missing:
            return False
        self.was_busy.append(self.engine.has_unfinished)
        assert self.allowed.acquire(timeout=30)
        self.num_missing -= 1
        return True


def test_graphs_are_captured_while_nobody_waits(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / "tiny", num_layers=1)).eval()
    engine, said = RankEngine(model, SchedulerConfig(kv_capacity_tokens=256)), []
    engine.capture_ahead = captures = Captures(engine, num_missing=4)
    mailbox = Mailbox(said.append)
    rank = threading.Thread(target=run_rank, args=(engine, mailbox), daemon=True)
    rank.start()

    def tokens():
        return [token for message in said for token in message.get("tokens", ())]

    wait_for(lambda: len(captures.was_busy) == 1)
    mailbox.deliver({"add": [as_request(7, [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))]})
    captures.allowed.release()  # the request waits for the graph at hand, and for no other
    wait_for(lambda: len(tokens()) == 5)
    assert captures.num_missing == 3
    captures.allowed.release(10)
    wait_for(lambda: not captures.num_missing)
    assert not any(captures.was_busy)
    mailbox.deliver({"stop": True})
    rank.join(20)
    assert not rank.is_alive()
