"""LoRA on attention and on experts, trained on the whole model: equal outputs on uneven ranks, however it got there."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

import lockstep
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

peft = pytest.importorskip("peft")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "peft.md"
IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
ATTENTION = ["q_proj", "v_proj"]
SMALL_GPT_OSS = transformers.GptOssConfig(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_local_experts=6,
    num_experts_per_tok=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, layer_types=["full_attention"] * 2,
)  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def whole_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def trained_adapter(path, folder, seed, rank=4):
    """An adapter of the whole model, with weights that training might have left."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=8, target_modules=ATTENTION, target_parameters=EXPERTS, lora_dropout=0.0
    )
    model = peft.get_peft_model(whole_model(path), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def case(request, tmp_path_factory):
    """Experts as `[out, in]`, and transposed ones with biases."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = str(folder / "tiny")
    if request.param == "gpt_oss":
        transformers.GptOssForCausalLM(SMALL_GPT_OSS).save_pretrained(tiny)
    else:
        make_tiny(tiny, num_layers=2, num_experts=6)
    return tiny, [trained_adapter(tiny, folder / f"adapter{seed}", seed, rank) for seed, rank in ((1, 4), (2, 3))]


# Each returns a model with the first adapter, spread over the ranks.


def spread_with_adapter(path, adapters):
    return lockstep.parallelize(peft.PeftModel.from_pretrained(whole_model(path), adapters[0]))


def adapter_onto_spread(path, adapters):
    return peft.PeftModel.from_pretrained(lockstep.from_pretrained(path), adapters[0])


def adapter_onto_spread_and_back_from_the_other(path, adapters):
    model = spread_with_adapter(path, adapters)
    model.load_adapter(adapters[1], "other")
    model.set_adapter("other")
    with lockstep.join(model):
        model(input_ids=IDS[:1])
    model.set_adapter("default")
    return model


def joined_before_it_had_one(path, adapters):
    model = lockstep.from_pretrained(path)
    with lockstep.join(model):
        model(input_ids=IDS[:1])
    return peft.PeftModel.from_pretrained(model, adapters[0])


def merged_before(path, adapters):
    return lockstep.parallelize(peft.PeftModel.from_pretrained(whole_model(path), adapters[0]).merge_and_unload())


def merged_in_place_before(path, adapters):
    model = peft.PeftModel.from_pretrained(whole_model(path), adapters[0])
    model.merge_adapter()
    return lockstep.parallelize(model)


def merged_when_spread(path, adapters):
    model = adapter_onto_spread(path, adapters)
    model.merge_adapter()
    return model


def merged_and_taken_off_when_spread(path, adapters):
    return adapter_onto_spread(path, adapters).merge_and_unload()


def merged_between_joins(path, adapters):
    model = spread_with_adapter(path, adapters)
    with lockstep.join(model):
        model(input_ids=IDS[:1])
    return model.merge_and_unload()


def merged_and_out_again(path, adapters):
    model = adapter_onto_spread(path, adapters)
    model.merge_adapter()
    with lockstep.join(model):
        model(input_ids=IDS[:1])
    model.unmerge_adapter()
    return model


WAYS = (
    spread_with_adapter, adapter_onto_spread, adapter_onto_spread_and_back_from_the_other, joined_before_it_had_one,
    merged_before, merged_in_place_before, merged_when_spread, merged_and_taken_off_when_spread, merged_between_joins,
    merged_and_out_again,
)  # fmt: skip


@torch.no_grad()
def outputs(path, adapters):
    """Each way's greatest difference from one process's PEFT model, and whether it generates the same."""
    rank = dist.get_rank()
    ids = IDS[rank : rank + 1, : 3 + rank]
    whole = peft.PeftModel.from_pretrained(whole_model(path), adapters[0]).eval()
    expected = whole(input_ids=ids).logits
    tokens = whole.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    moved = float((whole_model(path)(input_ids=ids).logits - expected).abs().max())
    found = {}
    for way in WAYS:
        try:
            model = way(path, adapters).eval()
            with lockstep.join(model):
                own = [model(input_ids=ids).logits for _ in range(rank)]  # rank 0 idles, rank 2 calls twice
                generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        except Exception as error:
            found[way.__name__] = f"{type(error).__name__}: {error}"
            continue
        error = max([float((logits - expected).abs().max()) for logits in own], default=0.0)
        same = torch.equal(generated, tokens)
        found[way.__name__] = (
            "equal" if error < 1e-4 * max(1.0, moved) and same else f"off by {error} of {moved}, {same}"
        )
    return found


@pytest.mark.ranks(3)
def test_every_way_gives_the_whole_model_s_outputs(case):
    for found in run_ranks(3, outputs, *case, deadline_s=200):
        assert found == {way.__name__: "equal" for way in WAYS}


def does_not_fit(model, adapters):
    config = peft.LoraConfig.from_pretrained(adapters[0])
    weights = peft.utils.load_peft_weights(adapters[0])
    model = peft.get_peft_model(model, config)
    cut = {name: weight[:7] if "experts" in name and "lora_A" in name else weight for name, weight in weights.items()}
    peft.set_peft_model_state_dict(model, cut)


def switched_inside(model, adapters):
    model = peft.PeftModel.from_pretrained(model, adapters[0])
    with lockstep.join(model):
        model(input_ids=IDS[:1])
        with model.disable_adapter():
            model(input_ids=IDS[:1])


def on_one_rank_only(model, adapters):
    model = peft.PeftModel.from_pretrained(model, adapters[0])
    if dist.get_rank() == 1:
        model.base_model.disable_adapter_layers()
    with lockstep.join(model):
        model(input_ids=IDS[:1])


def of_another_kind(model, adapters):
    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj_bias"], lora_dropout=0.0)
    with lockstep.join(peft.get_peft_model(model, config)):
        pass


REFUSED = {
    does_not_fit: ("has shape [7, ", "experts takes [24, "),
    switched_inside: ("experts were changed inside of join",),
    on_one_rank_only: ("ranks disagree about LoRA on experts", "rank 1: "),
    of_another_kind: ("was replaced by ParamWrapper", "take LoRA on gate_up_proj, up_proj, down_proj"),
}


def sentences(path, adapters, acts):
    found = {}
    for act in acts:
        model = lockstep.from_pretrained(path, deadline_s=20)
        try:
            act(model, adapters)
        except lockstep.LockstepError as error:
            found[act.__name__] = str(error)
    return found


@pytest.mark.ranks(3)
def test_what_does_not_fit_is_refused_by_a_sentence(case):
    acts = [act for act in REFUSED if act is not of_another_kind or "gpt_oss" in case[0]]  # the other has no biases
    for rank, found in enumerate(run_ranks(3, sentences, *case, acts, deadline_s=100)):
        for act in acts:
            for part in REFUSED[act]:
                assert part in found.get(act.__name__, "no error"), (act.__name__, rank, found)


def page_script(path, adapters):
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    prompts = [IDS[:1], IDS[1:2, :3], IDS[2:]]
    names = {"path": path, "adapter": adapters[0], "prompts": prompts[dist.get_rank() :: 2]}
    exec(compile(script, PAGE.name, "exec"), names)
    whole = peft.PeftModel.from_pretrained(whole_model(path), adapters[0]).eval()
    expected = [whole.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for ids in names["prompts"]]
    return [torch.equal(*pair) for pair in zip(names["outputs"], expected, strict=True)]


@pytest.mark.ranks(2)
def test_the_script_of_the_page(case):
    assert run_ranks(2, page_script, *case) == [[True, True], [True]]
