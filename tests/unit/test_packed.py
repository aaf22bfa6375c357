"""Packed steps against plain `generate`, request by request: equal tokens, whatever runs side by side."""

import random

import pytest
import torch

pytest.importorskip("transformers")

from lockstep.errors import ConfigurationError, TokenCountError
from lockstep.models.packed import PackedEngine, top2_gap
from lockstep.models.tiny import make_tiny

MAX_NEW_TOKENS = 10


def tiny_gpt_oss(path):
    """Attention sinks, a window of 5 in every other layer, biases: all that the packed attention knows beside plain."""
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
    """Latent attention: the cache holds something else than keys and values, and the head sizes of the two differ."""
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

    path = tmp_path_factory.mktemp("packed")
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
    return loaded


def make_prompts(count=7):
    generator = random.Random(5)
    return [[generator.randrange(256) for _ in range(generator.choice([1, 2, 5, 9, 17, 30]))] for _ in range(count)]


def alone(model, prompt):
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, min_new_tokens=MAX_NEW_TOKENS,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def run(engine, prompts, seed, forced=None):
    """Requests that join and leave at random, prompts cut anywhere, in a random order within each step."""
    generator = random.Random(seed)
    waiting, running, outputs = list(enumerate(prompts)), {}, {}
    while waiting or running:
        while waiting and generator.random() < 0.6:
            index, prompt = waiting.pop(0)
            engine.add_request(index, prompt, MAX_NEW_TOKENS)
            running[index] = len(prompt)
        entries = []
        for index in generator.sample(list(running), k=len(running)):
            left = running[index]
            rows = generator.randint(1, left)
            if generator.random() < 0.8:
                entries.append((index, rows, rows == left))
        tokens = engine.step(entries)
        assert set(tokens) == set(engine.logits) == {index for index, _, samples in entries if samples}
        for index, rows, samples in entries:
            running[index] += -rows + samples
            if samples and len(engine.tokens(index)) == MAX_NEW_TOKENS:
                outputs[index] = engine.remove(index)
                del running[index]
    return [outputs[index] for index in range(len(prompts))]


def test_equal_tokens_to_each_request_alone(model):
    prompts = make_prompts()
    expected = [alone(model, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > len(prompts) // 2
    engine = PackedEngine(model)
    for seed in range(3):
        assert run(engine, prompts, seed) == expected


def test_one_forward_pass_per_step_with_only_its_rows(model):
    engine = PackedEngine(model)
    shapes = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(kwargs), with_kwargs=True)
    try:
        engine.add_request("a", [1, 2, 3, 4], 2)
        engine.add_request("b", [5], 2)
        assert engine.step([]) == {}
        engine.step([("a", 3, False), ("b", 1, True)])
        engine.step([("b", 1, True), ("a", 1, True)])
    finally:
        hook.remove()
    assert [entry["input_ids"].shape for entry in shapes] == [(1, 4), (1, 2)]
    assert [entry["position_ids"].tolist() for entry in shapes] == [[[0, 1, 2, 0]], [[1, 3]]]
    assert [entry["logits_to_keep"].tolist() for entry in shapes] == [[3], [0, 1]]


def test_a_step_in_which_nobody_samples(model):
    engine = PackedEngine(model)
    engine.add_request("a", [1, 2, 3], 1)
    assert engine.step([("a", 2, False)]) == {}


def test_teacher_forcing(model):
    prompt = make_prompts()[2]
    engine = PackedEngine(model)
    engine.add_request("free", prompt, 4)
    engine.add_request("forced", prompt, 4)
    first = engine.step([("free", len(prompt), True), ("forced", len(prompt), True)], forced_tokens={"forced": 7})
    assert first["free"] == first["forced"] != 7
    assert engine.tokens("forced") == [7]
    assert top2_gap(engine.logits["free"]) > 0
    engine.step([("forced", 1, True)])
    engine.add_request("again", [*prompt, 7], 1)
    engine.step([("again", len(prompt) + 1, True)])
    assert engine.tokens("again")[0] == engine.tokens("forced")[1]


def test_drawn_tokens_do_not_depend_on_what_runs_beside(model):
    prompts, outputs = make_prompts(3), []
    for beside in (False, True):
        engine = PackedEngine(model)
        engine.add_request("drawn", prompts[0], MAX_NEW_TOKENS, seed=3, temperature=1.0)
        others = [("other", len(prompts[1]), False)] if beside else []
        if beside:
            engine.add_request("other", [*prompts[1], 1], 1)
        engine.step([*others, ("drawn", len(prompts[0]), True)])
        for _ in range(MAX_NEW_TOKENS - 1):
            engine.step([("drawn", 1, True)])
        outputs.append(engine.remove("drawn"))
    assert outputs[0] == outputs[1]


def test_generate_still_works_beside_the_engine(model):
    prompts = make_prompts(2)
    expected = [alone(model, prompt) for prompt in prompts]
    PackedEngine(model)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert output[:, width:].tolist() == expected


def test_rows_that_are_not_there(model):
    engine = PackedEngine(model)
    engine.add_request("a", [1, 2, 3], 1)
    with pytest.raises(TokenCountError, match=r"'a' has 3 rows to compute, 4 were asked for"):
        engine.step([("a", 4, True)])
    with pytest.raises(TokenCountError, match=r"'a' cannot sample after 2 of its 3 rows"):
        engine.step([("a", 2, True)])
    with pytest.raises(TokenCountError, match=r"at most once"):
        engine.step([("a", 1, False), ("a", 1, False)])
    with pytest.raises(ConfigurationError, match=r"'a' is already there"):
        engine.add_request("a", [1], 1)
    with pytest.raises(ConfigurationError, match=r"'b' needs at least 1 prompt token and 1 new token, got 0 and 1"):
        engine.add_request("b", [], 1)
    engine.step([("a", 3, True)])
    with pytest.raises(TokenCountError, match=r"'a' has its 1 new tokens already"):
        engine.step([("a", 1, True)])


def test_a_model_with_recurrent_layers_is_named():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    with torch.device("meta"):
        model = Qwen3NextForCausalLM(Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, vocab_size=8))
    with pytest.raises(ConfigurationError, match=r"Qwen3NextForCausalLM has 'linear_attention' layers"):
        PackedEngine(model)
