"""The engine of one rank against plain `generate`, request by request: equal tokens, whatever runs side by side."""

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

MAX_TOKENS = 10
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)


def tiny_gpt_oss(path):
    """Attention sinks, a window of 5 in every other layer, biases: all that attention over pages knows beside plain."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=5,
        initializer_range=0.15, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    model.save_pretrained(path)
    return path


def tiny_deepseek(path):
    """Latent attention: keys and values have other widths."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=259, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, initializer_range=0.15, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "mixtral, window of 6", "gpt_oss", "deepseek_v3"])
def model(request, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("engine")
    name, _, window = request.param.partition(", window of ")
    if name == "gpt_oss":
        tiny_gpt_oss(path)
    elif name == "deepseek_v3":
        tiny_deepseek(path)
    else:
        make_tiny(path, architecture=name, num_layers=3)
    loaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    if window:
        loaded.config.sliding_window = int(window)
        for layer in loaded.model.layers:
            layer.self_attn.sliding_window = int(window)
    return loaded


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path_factory.mktemp("qwen"), num_layers=2)).eval()


def make_prompts(count=7, lengths=(1, 2, 5, 9, 17, 30, 70)):
    generator = random.Random(5)
    return [[generator.randrange(256) for _ in range(lengths[index % len(lengths)])] for index in range(count)]


def alone(model, prompt, count=MAX_TOKENS):
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def make_engine(model, **config):
    return RankEngine(model, SchedulerConfig(**config), max_model_len=256)


def finish(engine, seen=None):
    """Run to the end; tokens by request."""
    tokens = {} if seen is None else seen
    while engine.has_unfinished:
        for output in engine.step():
            assert output.position == len(tokens.setdefault(output.request_id, []))
            tokens[output.request_id].append(output.token_id)
    return tokens


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        # Two requests of 70 + 10 tokens take two pages each: only one of them fits beside others.
        {"max_num_batched_tokens": 33, "kv_capacity_tokens": 3 * PAGE_SIZE},
    ],
    ids=["all at once", "few rows", "few pages"],
)
def test_equal_tokens_to_each_request_alone(model, config):
    prompts = [*make_prompts(), *make_prompts(2, (60, 62))]
    expected = [alone(model, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > len(prompts) // 2
    engine = make_engine(model, **config)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, GREEDY)
    tokens = finish(engine)
    assert [tokens[index] for index in range(len(prompts))] == expected
    assert sum(report.overrun_rows for report in engine.reports) == 0  # an end by max_tokens is known before


def test_requests_that_join_while_others_run(model):
    prompts = make_prompts()
    expected = [alone(model, prompt) for prompt in prompts]
    engine, tokens = make_engine(model, max_num_batched_tokens=32), {}
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, GREEDY)
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)
    finish(engine, tokens)
    assert [tokens[index] for index in range(len(prompts))] == expected


def test_a_preempted_request_is_computed_again(qwen):
    prompts = make_prompts(3, (62, 61, 60))  # each needs its second page within four tokens
    expected = [alone(qwen, prompt) for prompt in prompts]
    engine = make_engine(qwen, kv_capacity_tokens=4 * PAGE_SIZE)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, GREEDY)
    tokens = finish(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [tokens[index] for index in range(3)] == expected


def test_every_page_comes_back(qwen):
    engine = make_engine(qwen, kv_capacity_tokens=4 * PAGE_SIZE)
    for index, prompt in enumerate(make_prompts(6, (62, 61, 60, 3))):
        engine.add(index, prompt, GREEDY)
    finish(engine)
    assert engine.cache.num_free_pages == engine.cache.num_pages == 4


def test_drawn_tokens_do_not_depend_on_what_runs_beside_or_on_preemption(qwen):
    prompts = make_prompts(3, (62, 61, 60))
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, top_p=0.9, ignore_eos=True)

    def run(indices, **config):
        engine = make_engine(qwen, **config)
        for index in indices:
            engine.add(index, prompts[index], params, seed=index)
        return finish(engine), engine.scheduler.num_preemptions

    alone_, _ = run([2])
    together, preemptions = run([0, 1, 2], kv_capacity_tokens=4 * PAGE_SIZE)
    assert preemptions and together[2] == alone_[2]
    other_seed = make_engine(qwen)
    other_seed.add(0, prompts[2], params, seed=3)
    assert finish(other_seed)[0] != alone_[2]


def test_a_stop_token_ends_a_request_and_costs_one_row(qwen):
    prompt = make_prompts(1, (9,))[0]
    free = alone(qwen, prompt)
    stop = next(token for index, token in enumerate(free) if index >= 2 and token not in free[:index])
    engine = make_engine(qwen)
    engine.add(0, prompt, SamplingParams(max_tokens=MAX_TOKENS, temperature=0, stop_token_ids=[stop], ignore_eos=True))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [output.token_id for output in outputs] == free[: free.index(stop) + 1]
    assert [output.finish_reason for output in outputs] == [None] * free.index(stop) + ["stop"]
    assert sum(report.overrun_rows for report in engine.reports) == 1
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_a_stop_token_that_is_the_last_token_anyway(qwen):
    prompt = make_prompts(1, (9,))[0]
    free = alone(qwen, prompt, 3)
    assert free[2] not in free[:2] and free[1] not in free[:1]
    for stop in (free[2], free[1]):  # in the last step, and while the last step is under way
        engine = make_engine(qwen)
        engine.add(0, prompt, SamplingParams(max_tokens=3, temperature=0, stop_token_ids=[stop], ignore_eos=True))
        assert finish(engine)[0] == free[: free.index(stop) + 1]
        assert not engine.has_unfinished and engine.cache.num_free_pages == engine.cache.num_pages


def test_an_abort_in_every_phase(qwen):
    prompts = make_prompts(4, (20, 9, 9, 9))
    expected = alone(qwen, prompts[1])
    for steps in range(8):
        engine = make_engine(qwen, max_num_batched_tokens=12, max_num_seqs=2)
        for index, prompt in enumerate(prompts):
            engine.add(index, prompt, GREEDY)
        tokens = {}
        for _ in range(steps):
            for output in engine.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
        for gone in (0, 3):
            engine.abort(gone)
            before = len(tokens.get(gone, []))
            tokens.setdefault(gone, [None] * before)
        finish(engine, tokens)
        assert tokens[1] == expected and len(tokens[2]) == MAX_TOKENS
        assert len(tokens[0]) < MAX_TOKENS and len(tokens[3]) < MAX_TOKENS
        assert engine.cache.num_free_pages == engine.cache.num_pages
    with pytest.raises(ConfigurationError, match=r"request 0 is not an unfinished request"):
        engine.abort(0)


def test_the_host_plans_a_step_before_it_knows_the_tokens_of_the_one_before(qwen):
    engine = make_engine(qwen)
    engine.add(0, [1, 2, 3], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    assert engine.step() == []  # step 0 is issued
    assert [output.position for output in engine.step()] == [0]  # step 1 is issued, then the token of step 0 is read
    assert [output.position for output in engine.step()] == [1]
    assert [(output.position, output.finish_reason) for output in engine.step()] == [(2, "length")]
    assert not engine.has_unfinished


def test_logprobs(qwen):
    prompt = make_prompts(1, (9,))[0]
    engine = make_engine(qwen)
    engine.add(0, prompt, SamplingParams(max_tokens=3, temperature=0, logprobs=2, ignore_eos=True))
    engine.add(1, prompt, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    mine = [output for output in outputs if output.request_id == 0]
    ids = torch.tensor([prompt + [output.token_id for output in mine]])
    with torch.no_grad():
        expected = qwen(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for output, row in zip(mine, expected, strict=True):
        assert output.logprob == pytest.approx(float(row[output.token_id]), abs=1e-4)
        assert [token for token, _ in output.top_logprobs] == row.topk(2).indices.tolist()
    assert all(output.logprob is None for output in outputs if output.request_id == 1)


def test_generate_still_works_beside_the_engine(model):
    prompts = make_prompts(2)
    expected = [alone(model, prompt) for prompt in prompts]
    make_engine(model)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert output[:, width:].tolist() == expected


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, r"request 5 has no tokens"),
        ([259], 1, r"request 5 has token 259, but the model's embedding has 259 entries"),
        ([3, -1], 1, r"request 5 has token -1"),
        ([1] * 250, 7, r"request 5 has 250 tokens and max_tokens is 7, together more than the context of 256"),
        ([1] * 120, 10, r"request 5 has 120 tokens and max_tokens is 10, together more than the 2 pages of 64 tokens"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_nothing_is_lost(qwen, prompt, max_tokens, message):
    good = make_prompts(1, (9,))[0]
    engine = make_engine(qwen, kv_capacity_tokens=2 * PAGE_SIZE)
    engine.add(0, good, GREEDY)
    engine.step()
    with pytest.raises(ConfigurationError, match=message):
        engine.add(5, prompt, SamplingParams(max_tokens=max_tokens))
    with pytest.raises(ConfigurationError, match=r"request 0 is there already"):
        engine.add(0, good, GREEDY)
    assert finish(engine)[0] == alone(qwen, good)


def test_a_model_with_recurrent_layers_is_named():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    with torch.device("meta"):
        model = Qwen3NextForCausalLM(Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, vocab_size=8))
    with pytest.raises(ConfigurationError, match=r"Qwen3NextForCausalLM has 'linear_attention' layers"):
        make_engine(model)


def test_memory_that_cannot_be_shared_out(qwen):
    with pytest.raises(ConfigurationError, match=r"gpu_memory_utilization must be in \(0, 1\], got 1.5"):
        RankEngine(qwen, SchedulerConfig(), gpu_memory_utilization=1.5)


def test_pages_go_to_rows_and_come_back():
    cache = KVCache([KVShape(1, 4, 4)], 3, 2, 256, torch.float32, torch.device("cpu"))
    cache.grow(1, PAGE_SIZE + 1)
    cache.flush()
    assert cache.num_free_pages == 1
    assert cache.block_table[1, :2].tolist() == [0, 1]
    cache.grow(1, PAGE_SIZE + 5)  # fits into the pages that it has
    assert cache.num_free_pages == 1
    with pytest.raises(ConfigurationError, match=r"row 0 needs page 2 for 100 tokens, but all 3 are in use"):
        cache.grow(0, 100)
    cache.release(1)
    cache.release(0)
    assert cache.num_free_pages == 3


def test_a_cache_without_a_size_grows_and_keeps_what_it_holds():
    cache = KVCache([KVShape(1, 4, 4)], None, 2, 10**6, torch.float32, torch.device("cpu"))
    first = cache.num_pages
    cache.grow(0, PAGE_SIZE * first)
    cache.key_pages[0][:] = 7.0
    cache.grow(1, 1)
    assert cache.num_pages == 2 * first
    assert bool((cache.key_pages[0][:first] == 7.0).all())


def test_a_longer_context_than_the_models_is_refused(qwen):
    with pytest.raises(ConfigurationError, match="max_model_len must be at most the model's context of 32768"):
        RankEngine(qwen, SchedulerConfig(), max_model_len=32769)


def test_an_engine_says_what_was_chosen(qwen):
    about = make_engine(qwen, kv_capacity_tokens=130).about()
    assert (about["max_model_len"], about["kv_capacity_tokens"]) == (256, 128)  # whole pages
    assert (about["dispatcher"], about["dtype"], about["device"]) == (None, "float32", "cpu")
    assert (about["graphs"], about["graphs_note"]) == (False, "they need a GPU")
