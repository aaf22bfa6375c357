"""Experts held in fp8, over ranks: equal outputs, placements, lost ranks, the command line, refusals."""

import json
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from command import Command
from one_process import greedy, tokens_of

import lockstep
from lockstep import ConfigurationError, Engine, SamplingParams
from lockstep.models.experts_modules import find_experts, slots_held
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny
from lockstep.moe.fp8 import dequantise_experts, is_fp8
from lockstep.moe.placement import Placement
from lockstep.testing import run_ranks
from quantised import fp8

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("fp8") / "tiny", num_layers=2, hidden_size=128))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    torch.manual_seed(0)
    fp8(path := tmp_path_factory.mktemp("blocks"))
    return str(path)


def dequantised(path):
    """The whole model, its experts rounded to fp8 and back, for Transformers to run."""
    model = load_pretrained(path, dtype=torch.float32, quantize_experts="fp8")
    for _, module in find_experts(model):
        dequantise_experts(module, torch.float32)
    return model


def generate(path, placed):
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    placement = Placement.even(2, 4, num_ranks)
    if placed == "replicas":
        placement = Placement.of_ranks(4, [[[0, 1, 2], [3, 2]], [[1, 0], [2, 3, 1]]], 3)
    model = lockstep.from_pretrained(path, dtype=torch.float32, quantize_experts="fp8", placement=placement)
    for _, module in find_experts(model):
        assert is_fp8(module)
        assert len(module.down_proj) == len(module.down_proj_scale_inv) == len(slots_held(module)[0])
    prompt = list(range(3, 10 + 5 * rank))
    with lockstep.join(model):
        tokens = greedy(model, prompt, 6 + 4 * rank)
    return tokens == greedy(dequantised(path), prompt, 6 + 4 * rank), tokens


@pytest.mark.ranks(3)
@pytest.mark.parametrize(("num_ranks", "placed"), [(2, "even"), (2, "replicas"), (3, "even")])
def test_ranks_generate_what_one_process_does(blocks, num_ranks, placed):
    results = run_ranks(num_ranks, generate, blocks, placed)
    assert [equal for equal, _ in results] == [True] * num_ranks, results


@pytest.mark.ranks(3)
def test_the_engine_goes_on_without_a_lost_rank(tiny):
    prompts = [[5 + number, 17, 44] for number in range(6)]
    whole = dequantised(tiny)
    expected = [greedy(whole, prompt, 40) for prompt in prompts]
    with Engine(
        tiny, data_parallel_size=3, dtype="float32", quantize_experts="fp8", survive=1, deadline_s=10
    ) as engine:
        assert tokens_of(engine.generate(prompts, GREEDY)) == expected
        os.kill(engine.ranks()[1].pid, signal.SIGKILL)
        until = time.monotonic() + 60
        while engine.stats.epoch == 0 and time.monotonic() < until:
            assert tokens_of(engine.generate(prompts, GREEDY)) == expected
        assert tokens_of(engine.generate(prompts, GREEDY)) == expected
        assert [rank.state for rank in engine.ranks()] == ["alive", "gone", "alive"]


@pytest.mark.ranks(2)
def test_run_verifies_experts_in_fp8(tiny, tmp_path):
    arguments = ["run", "--model", tiny, "--dtype", "float32", "--quantize-experts", "fp8", "--requests", "6"]
    assert Command(*arguments, "--max-new-tokens", "8", "--out", tmp_path / "run").wait(120) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["verified"] is True


def cast_and_state_dict(path):
    model = lockstep.from_pretrained(path, dtype=torch.bfloat16, quantize_experts="fp8")
    messages = []
    with pytest.raises(ConfigurationError) as caught:
        model.state_dict()["model.layers.0.mlp.experts.down_proj"].float()
    messages.append(str(caught.value))
    model.to(torch.float32)
    with pytest.raises(ConfigurationError) as caught, lockstep.join(model):
        pass
    return [*messages, str(caught.value)]


@pytest.mark.ranks(2)
def test_a_cast_and_a_state_dict_are_refused(blocks):
    for state_dict, cast in run_ranks(2, cast_and_state_dict, blocks):
        assert "holds only its rank's experts" in state_dict
        assert "held in fp8, were cast to torch.float32" in cast


def unlike(path):
    model = lockstep.from_pretrained(path, quantize_experts="fp8" if dist.get_rank() else "none")
    with pytest.raises(lockstep.RankMismatchError) as caught, lockstep.join(model):
        pass
    return str(caught.value)


@pytest.mark.ranks(2)
def test_ranks_with_other_experts_are_refused(blocks):
    says = "ranks disagree about dtype of experts: rank 0: torch.bfloat16, rank 1: torch.float8_e4m3fn"
    assert run_ranks(2, unlike, blocks) == [says] * 2


def compiled(path):
    model = lockstep.from_pretrained(path, dtype=torch.float32, quantize_experts="fp8")
    ids = torch.arange(20 + dist.get_rank())[None]
    with lockstep.join(model), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = torch.compile(model, backend="eager")(input_ids=ids, use_cache=False).logits
    return float((found - expected).abs().max())


@pytest.mark.ranks(2)
def test_a_compiled_model(blocks):
    assert max(run_ranks(2, compiled, blocks, deadline_s=120)) < 1e-4


def adapted(path):
    peft = pytest.importorskip("peft")
    model = lockstep.from_pretrained(path, dtype=torch.float32, quantize_experts="fp8")
    attention = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    with lockstep.join(peft.get_peft_model(model, attention)) as joined, torch.no_grad():
        joined(input_ids=torch.arange(9)[None])
    experts = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"], r=4)
    try:
        with lockstep.join(peft.get_peft_model(model, experts)):
            return "no error"
    except ConfigurationError as error:
        return str(error)


@pytest.mark.ranks(2)
def test_adapters_of_experts_are_refused_others_are_not(blocks):
    pytest.importorskip("peft")
    for says in run_ranks(2, adapted, blocks):
        assert "adapters of experts need 16 or 32 bits" in says
