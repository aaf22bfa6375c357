"""Prefix pages in the engine of one rank: equal tokens with and without, and every page accounted for."""

import logging
import random

import pytest
import torch

pytest.importorskip("transformers")

from lockstep.engine.kv_cache import KVCache, KVShape
from lockstep.engine.rank_engine import RankEngine
from lockstep.engine.sampling_params import SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.models.tiny import make_tiny
from lockstep.workload import PAGE_SIZE, SchedulerConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    path = make_tiny(tmp_path_factory.mktemp("qwen"), num_layers=2)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make_prompts(seed=3, count=14):
    """Prompts that begin alike by none, one, two or three pages, some of them equal, some exactly whole pages long."""
    generator = random.Random(seed)
    pages = [[generator.randrange(256) for _ in range(PAGE_SIZE)] for _ in range(4)]
    prompts = []
    for index in range(count):
        kind = index % 7
        beginning = [pages[0], pages[1 + kind % 2], pages[3]][: (2, 3, 1, 2, 0, 3, 2)[kind]]
        end = [generator.randrange(256) for _ in range((5, 40, 0, 1, 30, 0, 70)[kind])]
        prompts.append([token for page in beginning for token in page] + end)
    return prompts


class Run:
    """An engine, step by step; after each one, its pages are those that the scheduler counts."""

    def __init__(self, model, **config):
        self.engine = RankEngine(model, SchedulerConfig(**config), max_model_len=400)
        self.tokens, self.cached, self.forgotten = {}, 0, 0

    def step(self):
        engine = self.engine
        for output in engine.step():
            assert output.position == len(self.tokens.setdefault(output.request_id, []))
            self.tokens[output.request_id].append(output.token_id)
        self.cached += sum(report.schedule.num_cached_tokens for report in engine.reports)
        self.forgotten += sum(len(report.schedule.forgotten) for report in engine.reports)
        engine.reports = []
        if engine.config.num_kv_pages is not None:
            scheduler = engine.scheduler
            assert engine.cache.num_free_pages == scheduler.num_free_pages - scheduler.pages.num_unheld

    def finish(self):
        while self.engine.has_unfinished:
            self.step()
        if self.engine.config.num_kv_pages is not None:
            assert self.engine.scheduler.num_free_pages == self.engine.config.num_kv_pages
        return self.tokens


def run_all(model, prompts, params, per_step=1, **config):
    run = Run(model, **config)
    for index, prompt in enumerate(prompts):
        run.engine.add(index, prompt, params[index % len(params)], seed=index)
        if index % per_step == 0:
            run.step()
    return run.finish(), run


GREEDY = [SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)]
LONG = [*GREEDY, SamplingParams(max_tokens=70, temperature=0, ignore_eos=True)]
DRAWN = [
    SamplingParams(max_tokens=9, temperature=0.8, repetition_penalty=1.2, ignore_eos=True),
    SamplingParams(max_tokens=75, temperature=0, presence_penalty=0.5, ignore_eos=True),
]


@pytest.mark.parametrize("params", [LONG, DRAWN], ids=["greedy", "drawn, with penalties"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kv_capacity_tokens": 40 * PAGE_SIZE},
        {"kv_capacity_tokens": 40 * PAGE_SIZE, "max_num_batched_tokens": 50, "max_num_seqs": 3},
        # Room for two or three requests: pages are forgotten, and requests that run out of them are preempted.
        {"kv_capacity_tokens": 7 * PAGE_SIZE, "max_num_batched_tokens": 90},
    ],
    ids=["no limit", "much room", "prompts in pieces", "few pages"],
)
def test_equal_tokens_with_and_without_prefix_pages(model, config, params):
    prompts = make_prompts()
    expected, without = run_all(model, prompts, params, **config, enable_prefix_caching=False)
    tokens, run = run_all(model, prompts, params, **config)
    assert tokens == expected
    assert without.cached == 0
    assert run.cached >= 5 * PAGE_SIZE
    if config.get("kv_capacity_tokens") == 7 * PAGE_SIZE:
        assert run.forgotten > 3
        assert run.engine.scheduler.num_preemptions > 0


def test_equal_tokens_where_all_requests_come_at_once(model):
    prompts = make_prompts()
    expected, _ = run_all(model, prompts, GREEDY, 99, kv_capacity_tokens=60 * PAGE_SIZE, enable_prefix_caching=False)
    tokens, _ = run_all(model, prompts, GREEDY, 99, kv_capacity_tokens=60 * PAGE_SIZE, max_num_batched_tokens=300)
    assert tokens == expected


def test_aborts_and_stops_give_references_back(model):
    prompts = make_prompts()
    expected, _ = run_all(model, prompts, GREEDY, enable_prefix_caching=False)
    stop = expected[3][4]
    run = Run(model, kv_capacity_tokens=9 * PAGE_SIZE, max_num_batched_tokens=80)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, stop_token_ids=[stop])
        run.engine.add(index, prompt, params)
        run.step()
        if index % 3 == 2:
            run.engine.abort(index - 1, missing_ok=True)  # waiting, in the middle of its prompt, or generating
    tokens = run.finish()
    for index, found in tokens.items():
        assert found == expected[index][: len(found)]
    assert sum(len(found) < 9 for found in tokens.values()) >= 3
    # What is still known is right: the same prompts once more.
    for index, prompt in enumerate(prompts):
        run.engine.add(100 + index, prompt, GREEDY[0])
    tokens = run.finish()
    assert [tokens[100 + index] for index in range(len(prompts))] == [expected[index] for index in range(len(prompts))]
    assert run.cached > 10 * PAGE_SIZE


def test_prefix_pages_are_off_for_sliding_windows_and_that_is_said_once(tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path, architecture="mixtral", num_layers=1)).eval()
    loaded.config.sliding_window = 6
    for layer in loaded.model.layers:
        layer.self_attn.sliding_window = 6
    with caplog.at_level(logging.WARNING, "lockstep"):
        _, run = run_all(loaded, make_prompts(), GREEDY)
    said = [record.getMessage() for record in caplog.records if "prefix caching" in record.getMessage()]
    told = "prefix caching is off: MixtralForCausalLM has layers with sliding windows, whose pages are not shared"
    assert said == [told]
    assert run.cached == 0
    assert run.engine.about()["enable_prefix_caching"] is False


def test_a_key_that_two_pages_have_is_an_error_and_no_wrong_token(model):
    run = Run(model, kv_capacity_tokens=9 * PAGE_SIZE)
    run.engine.page_keys_of = lambda ids: ("same",) * (len(ids) // PAGE_SIZE)
    run.engine.add(0, [1] * 70, GREEDY[0])
    run.step()
    run.engine.add(1, [2] * 70, GREEDY[0])
    with pytest.raises(ConfigurationError, match="page 0 of a prompt has the key of a page with other tokens: 'same'"):
        run.step()


def test_pages_of_the_cache_worked_by_hand():
    cache = KVCache([KVShape(1, 8, 8)], 5, 3, 200, torch.float32, torch.device("cpu"))
    ids = bytes(range(256)) * 3
    cache.grow(0, 150)
    cache.grow(1, 128)
    cache.remember(0, 0, ["a", "b"], ids)
    assert cache.num_free_pages == 0
    cache.remember(1, 0, ["a", "b"], ids)  # filled in the same step: its own two are free again
    assert cache.num_free_pages == 2
    cache.flush()
    assert cache.block_table[0, :3].tolist() == [0, 1, 2]
    assert cache.block_table[1, :2].tolist() == [0, 1]
    cache.release(0)
    assert cache.num_free_pages == 3
    cache.share(2, ["a"], ids[:256])
    cache.grow(2, 100)
    cache.release(1)
    assert cache.num_free_pages == 2
    cache.forget(["b"])
    assert cache.num_free_pages == 3
    with pytest.raises(AssertionError):
        cache.forget(["a"])  # row 2 holds it
    with pytest.raises(ConfigurationError, match="page 0 of a prompt has the key"):
        cache.share(1, ["a"], bytes(256))
