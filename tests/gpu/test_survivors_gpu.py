"""Ranks on GPUs are killed or stopped in mid-run: the others go on, and every token is one process's choice."""

import os
import signal
import time

import pytest
import torch
from test_engine_gpu import misses

from lockstep import Engine, SamplingParams
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny
from many_ranks import ranks_for
from waiting import Heard

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NUM_RANKS = ranks_for(NUM_GPUS)
DEADLINE_S = 5.0
PARAMS = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True, logprobs=0)
PROMPTS = [[(7 * n + i) % 256 for i in range(3 + 11 * n)] for n in range(8)]
OPTIONS = {"device": "cuda", "deadline_s": DEADLINE_S, "max_model_len": 512, "max_num_seqs": 16}

pytestmark = [
    pytest.mark.gpu(2),
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}"),
    pytest.mark.timeout(200),
]


@pytest.fixture
def folder(tmp_path):
    return make_tiny(tmp_path / "tiny", num_layers=3, hidden_size=128, num_experts=8, dtype=torch.bfloat16)


def check(folder, prompts, found):
    """Every request has all of its tokens, as one process would draw them."""
    dtypes, device = (torch.bfloat16, torch.float32), torch.device("cuda", 0)
    wholes = [load_pretrained(str(folder), dtype=dtype, device=device) for dtype in dtypes]
    for outputs in found:
        assert [len(tokens) for tokens in outputs] == [PARAMS.max_tokens] * len(prompts)
        assert misses(wholes, prompts, outputs, exact=False) == 0


def generate(engine, prompts):
    """All outputs in order, as `check` takes them, and the ranks that they came from."""
    outputs = sorted(engine.generate(prompts, PARAMS), key=lambda output: output.index)
    return [[(token, 0.0) for token in output.token_ids] for output in outputs], {output.rank for output in outputs}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_others_go_on_with_every_request_and_its_right_tokens(folder, number):
    with Engine(folder, data_parallel_size=NUM_RANKS, survive=1, **OPTIONS) as engine:
        assert engine.about["graphs"], engine.about
        heard = Heard(len(PROMPTS))
        engine.submit(heard, engine.read_requests(PROMPTS, PARAMS))
        until = time.monotonic() + 30
        while len(heard.times) < 200 and time.monotonic() < until:
            time.sleep(0.0005)
        before = len(heard.times)
        assert 200 <= before < 2000
        os.kill(engine.ranks()[1].pid, number)
        lost = time.monotonic()
        for _ in PROMPTS:
            assert heard.left.acquire(timeout=90) and heard.error is None, heard.error
        assert engine.stats.epoch == 1 and engine.ranks()[1].lost
        gap = max(after - earlier for earlier, after in zip(heard.times, heard.times[1:], strict=False))
        print(f"{number!r}: {gap:.2f} s without a token, {time.monotonic() - lost:.2f} s to the end")
        again, ranks = generate(engine, PROMPTS)
        assert ranks == set(range(NUM_RANKS)) - {1}
    check(folder, PROMPTS, [[[(token, 0.0) for token in tokens] for tokens in heard.tokens], again])


def test_a_rank_that_comes_back_works_again(folder):
    with Engine(folder, data_parallel_size=NUM_RANKS, restart_ranks=1, dispatcher="allgather", **OPTIONS) as engine:
        before, _ = generate(engine, PROMPTS)
        os.kill(engine.ranks()[1].pid, signal.SIGKILL)
        until = time.monotonic() + 90
        while engine.stats.epoch < 2 and engine.error is None and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.error is None and engine.stats.epoch == 2
        again, ranks = generate(engine, PROMPTS)
        assert ranks == set(range(NUM_RANKS)) and not engine.ranks()[1].lost
    check(folder, PROMPTS, [before, again])
