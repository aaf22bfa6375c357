"""Ranks on GPUs are killed or stopped in mid-run: the others go on, and every token is one process's choice."""

import os
import signal
import threading
import time

import pytest
import torch
from test_engine_gpu import misses

from lockstep import Engine, SamplingParams
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny
from many_ranks import ranks_for

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NUM_RANKS = ranks_for(NUM_GPUS)
DEADLINE_S = 5.0
PARAMS = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True, logprobs=0)

pytestmark = [
    pytest.mark.gpu(2),
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}"),
    pytest.mark.timeout(200),
]


class Heard:
    def __init__(self, num_requests):
        self.tokens, self.times, self.error = [[] for _ in range(num_requests)], [], None
        self.left = threading.Semaphore(0)

    def on_token(self, entry, delta):
        assert len(entry.checker.token_ids) == len(self.tokens[entry.index]) + 1  # one more, none twice
        self.tokens[entry.index].append((entry.checker.token_ids[-1], 0.0))
        self.times.append(time.monotonic())
        if delta.finish_reason is not None:
            self.left.release()

    def on_error(self, error):
        self.error = error
        for _ in self.tokens:
            self.left.release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_others_go_on_with_every_request_and_its_right_tokens(tmp_path, number):
    folder = make_tiny(tmp_path / "tiny", num_layers=3, hidden_size=128, num_experts=8, dtype=torch.bfloat16)
    prompts = [[(7 * n + i) % 256 for i in range(3 + 11 * n)] for n in range(8)]
    options = {"device": "cuda", "survive": 1, "deadline_s": DEADLINE_S, "max_model_len": 512, "max_num_seqs": 16}
    with Engine(folder, data_parallel_size=NUM_RANKS, **options) as engine:
        assert engine.about["graphs"], engine.about
        heard = Heard(len(prompts))
        engine.submit(heard, engine.read_requests(prompts, PARAMS))
        until = time.monotonic() + 30
        while len(heard.times) < 200 and time.monotonic() < until:
            time.sleep(0.0005)
        before = len(heard.times)
        assert 200 <= before < 2000
        os.kill(engine.ranks()[1].pid, number)
        lost = time.monotonic()
        for _ in prompts:
            assert heard.left.acquire(timeout=90) and heard.error is None, heard.error
        assert engine.stats.epoch == 1 and engine.ranks()[1].lost
        gap = max(after - earlier for earlier, after in zip(heard.times, heard.times[1:], strict=False))
        print(f"{number!r}: {gap:.2f} s without a token, {time.monotonic() - lost:.2f} s to the end")
        again = list(engine.generate(prompts, PARAMS))  # by the ranks that are left
        assert {output.rank for output in again} == set(range(NUM_RANKS)) - {1}
    dtypes, device = (torch.bfloat16, torch.float32), torch.device("cuda", 0)
    wholes = [load_pretrained(str(folder), dtype=dtype, device=device) for dtype in dtypes]
    assert [len(tokens) for tokens in heard.tokens] == [300] * len(prompts)
    assert misses(wholes, prompts, heard.tokens, exact=False) == 0
    second = [[(token, 0.0) for token in output.token_ids] for output in sorted(again, key=lambda one: one.index)]
    assert misses(wholes, prompts, second, exact=False) == 0
