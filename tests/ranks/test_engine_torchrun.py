"""`lockstep.Engine` where the ranks are there already, as under torchrun: each brings prompts of its own."""

import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from one_process import one_process, tokens_of
from said import say, sleep_until_said

pytest.importorskip("transformers")

from lockstep import ConfigurationError, Engine, LockstepError, PeerFailedError, RankMismatchError, SamplingParams
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("torchrun") / "tiny", num_layers=2, num_experts=12))


@pytest.fixture(scope="module")
def alone(tiny):
    generate = one_process(tiny)
    return lambda prompt: generate(prompt, 10)


def prompts_of(rank, call):
    return [[rank + 1, call, 7 * place % 250] * (1 + place) for place in range(1 + (rank + call) % 3)]


def uneven_calls(path, calls):
    rank = dist.get_rank()
    outputs = []
    with Engine(path, deadline_s=20) as engine:
        assert engine.options.data_parallel_size == len(calls)
        for call in range(calls[rank]):
            outputs.append(list(engine.generate(prompts_of(rank, call), GREEDY)))
            if call == 0:
                time.sleep(0.3)  # a rank does other things in between
        if rank == 1:
            engine.generate([[1] * 5], SamplingParams(max_tokens=5000)).close()
    with pytest.raises(ConfigurationError, match="this engine is closed"):
        engine.generate([[1]])
    with Engine(path) as engine:  # once more in the same processes
        again = tokens_of(engine.generate([[9, 5]], GREEDY)) if rank == 0 else []
    assert {output.rank for call in outputs for output in call} <= {rank}
    return [tokens_of(call) for call in outputs], again, [one.request_id for call in outputs for one in call]


@pytest.mark.ranks(3)
def test_each_rank_calls_as_often_as_it_likes_with_what_it_has(tiny, alone):
    calls = (3, 5, 0)
    results = run_ranks(3, uneven_calls, tiny, calls)
    for rank, (outputs, again, _) in enumerate(results):
        assert outputs == [[alone(prompt) for prompt in prompts_of(rank, call)] for call in range(calls[rank])]
        assert again == ([alone([9, 5])] if rank == 0 else [])
    ids = [number for _, _, numbers in results for number in numbers]
    assert len(set(ids)) == len(ids)


def shared_requests(path):
    with Engine(path, tensor_parallel_size=2) as engine:
        first = list(engine.generate(prompts_of(0, 2), GREEDY))
        abandoned = engine.generate([[1, 2]], SamplingParams(max_tokens=2000, ignore_eos=True))
        second = list(engine.generate(prompts_of(1, 1), GREEDY))
        abandoned.close()
        third = list(engine.generate([[3]], GREEDY))
    return [tokens_of(outputs) for outputs in (first, second, third)]


@pytest.mark.ranks(2)
def test_ranks_that_share_requests_call_alike(tiny, alone):
    for outputs in run_ranks(2, shared_requests, tiny):
        assert outputs == [[alone(p) for p in prompts] for prompts in (prompts_of(0, 2), prompts_of(1, 1), [[3]])]


def shared_requests_that_differ(path, how):
    rank = dist.get_rank()
    with Engine(path, tensor_parallel_size=2, deadline_s=20) as engine:
        list(engine.generate([[1, 2]], GREEDY))
        prompts = [[1, 2, 3]] if rank == 0 or how == "parameters" else [[1, 2, 4]]
        params = SamplingParams(max_tokens=8 + rank, temperature=0) if how == "parameters" else GREEDY
        with pytest.raises(RankMismatchError) as caught:
            list(engine.generate(prompts, params))
    return str(caught.value)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("how", ["prompts", "parameters"])
def test_ranks_that_share_requests_and_call_otherwise_are_told(tiny, how):
    for said in run_ranks(2, shared_requests_that_differ, tiny, how):
        assert "ranks 0 to 1 share their requests, but were given different ones" in said


def shared_requests_out_of_step(path):
    """The ranks reach each line at other times, so that tokens have come on one of them and not on the other."""
    rank, outputs = dist.get_rank(), []
    with Engine(path, tensor_parallel_size=2) as engine:
        for call in range(4):
            time.sleep(0.15 * ((rank + call) % 2))
            left = engine.generate([[1], [2, call]], SamplingParams(max_tokens=6 + 30 * call, temperature=0))
            outputs.append(next(left).token_ids)
            time.sleep(0.15 * ((rank + call) % 2))
            left.close()
        outputs += tokens_of(engine.generate([[3]], GREEDY))
        engine.generate([[5]], SamplingParams(max_tokens=20, temperature=0))
        kept = engine.generate([[5]], SamplingParams(max_tokens=20, temperature=0))
        time.sleep(0.3 * rank)
    del kept
    return outputs[-1]


@pytest.mark.ranks(2)
def test_what_ranks_with_shared_requests_do_does_not_depend_on_when_tokens_come(tiny, alone):
    assert run_ranks(2, shared_requests_out_of_step, tiny) == [alone([3])] * 2


def leave_by_an_exception(path):
    rank = dist.get_rank()
    started = time.monotonic()
    try:
        with Engine(path, deadline_s=20) as engine:
            if rank == 1:
                sleep_until_said("generating")
                raise ValueError("no more of this")
            for _ in engine.generate([[1]], SamplingParams(max_tokens=2, temperature=0)):
                say("generating")
            if rank == 0:  # in the middle of a call; rank 2 waits at the end of its block
                list(engine.generate([[1]], SamplingParams(max_tokens=30_000, ignore_eos=True)))
    except (ValueError, LockstepError) as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return None


@pytest.mark.ranks(3)
def test_all_ranks_hear_of_a_script_that_raises(tiny):
    (name0, said0, _), (name1, said1, _), (name2, said2, _) = run_ranks(3, leave_by_an_exception, tiny)
    assert (name1, said1) == ("ValueError", "no more of this")
    for name, said in ((name0, said0), (name2, said2)):
        assert name == PeerFailedError.__name__ and "rank 1 raised ValueError: no more of this" in said


def wrong_sizes(path):
    said = []
    for options in (
        {"data_parallel_size": 3},
        {"tensor_parallel_size": 3},
        {"data_parallel_size": 2, "tensor_parallel_size": 2},
    ):
        with pytest.raises(ConfigurationError) as caught:
            Engine(path, **options)
        said.append(str(caught.value))
    return said


@pytest.mark.ranks(2)
def test_sizes_must_be_those_of_the_start(tiny):
    for said in run_ranks(2, wrong_sizes, tiny):
        assert "data_parallel_size is 3, but torchrun has started 2 ranks" in said[0]
        assert "tensor_parallel_size must divide the 2 ranks, got 3" in said[1]
        assert "data_parallel_size is 2, but torchrun has started 2 ranks" in said[2] and "set it to 1" in said[2]


SCRIPT = """
import os, sys, lockstep
with lockstep.Engine(sys.argv[1]) as engine:
    prompts = [[1, 2, 3]] * int(os.environ["RANK"])
    for output in engine.generate(prompts, lockstep.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)):
        print("rank", output.rank, "tokens", *output.token_ids)
"""


@pytest.mark.ranks(2)
def test_the_same_script_under_torchrun(tmp_path, tiny, alone):
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "script.py"), tiny],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["rank", "1", "tokens", *map(str, alone([1, 2, 3])[:3])]
