"""The model made on the spot: a real checkpoint in which the experts decide the tokens."""

import pytest
import torch

from lockstep.errors import ConfigurationError
from lockstep.models.tiny import ARCHITECTURES, byte_tokenizer, make_tiny

NUM_REQUESTS, NUM_TOKENS = 20, 12


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / request.param, architecture=request.param)


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def greedy(model):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 256, (NUM_REQUESTS, 16), generator=generator)
    kwargs = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
    with torch.no_grad():
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **kwargs)
    return tokens[:, 16:]


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def test_the_experts_decide_the_tokens(checkpoint):
    model = load(checkpoint)
    expected = greedy(model)
    assert len(expected.unique(dim=0)) > NUM_REQUESTS // 2, "outputs that are all alike would prove nothing"
    with torch.no_grad():
        for experts in experts_of(model):  # another expert answers for each
            experts.gate_up_proj.copy_(experts.gate_up_proj.roll(1, 0))
            experts.down_proj.copy_(experts.down_proj.roll(1, 0))
    changed = (greedy(model) != expected).any(dim=1).float().mean()
    assert changed >= 0.9, f"permuting the experts changed {changed:.0%} of the requests"
    with torch.no_grad():
        for experts in experts_of(model):
            experts.down_proj.zero_()
    changed = (greedy(model) != expected).any(dim=1).float().mean()
    assert changed >= 0.9, f"zeroing the experts changed {changed:.0%} of the requests"


def test_one_expert_of_one_layer_is_noticed(checkpoint):
    model = load(checkpoint)
    expected = greedy(model)
    with torch.no_grad():
        experts_of(model)[0].down_proj[0].zero_()
    assert (greedy(model) != expected).any(dim=1).float().mean() >= 0.3


def test_same_seed_same_checkpoint(tmp_path):
    one, other, third = (
        load(make_tiny(tmp_path / str(i), seed=seed, num_layers=1)).state_dict() for i, seed in enumerate((3, 3, 4))
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)


def test_making_a_model_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    make_tiny(tmp_path, num_layers=1)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("text", ["plain", "  two  spaces and\nlines\t", "Größe 東京 🚀 e\u0301", "", "\x00\x7f"])
def test_any_text_comes_back(checkpoint, text):
    from transformers import AutoTokenizer

    for tokenizer in (AutoTokenizer.from_pretrained(checkpoint), byte_tokenizer()):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, r"one of qwen3_moe, mixtral, got 'gpt2'"),
        ({"hidden_size": 20}, r"multiple of 16, >= 16, got 20"),
        ({"num_experts_per_token": 9}, r"in 1\.\.8, got 9"),
        ({"num_layers": 0}, r">= 1, got 0 and 8"),
    ],
)
def test_bad_sizes_are_named(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        make_tiny(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
