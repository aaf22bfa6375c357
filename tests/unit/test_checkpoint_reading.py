"""Checkpoints whose files say one thing in two ways, or numbers in disguise: the right value, or an error by name."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from lockstep.errors import ConfigurationError
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny

EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("reading") / "tiny", num_layers=2)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def shards(tiny, tmp_path):
    """The checkpoint in several files, and the content of its index."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(path, max_shard_size="200KB")
    return path, json.loads((path / "model.safetensors.index.json").read_text())


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(path, match, ep_size=2):
    for ep_rank in range(ep_size):
        with pytest.raises(ConfigurationError, match=match):
            load_pretrained(path, ep_rank=ep_rank, ep_size=ep_size)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", [EXPERT, QUERY])
@pytest.mark.parametrize("with_scales", [False, True])
def test_quantised_weights_without_a_quantization_config(copy, dtype, name, with_scales):
    def change(tensors):
        tensors[name] = (tensors[name] * 100).to(dtype)
        if with_scales:
            tensors[f"{name}_scale_inv"] = torch.tensor([[0.00126]])

    rewrite(copy / "model.safetensors", change)
    refused(
        copy, rf"tensor '{name}' in .*model\.safetensors is quantised \(\w+\).*no quantization_config that says how"
    )


@pytest.mark.parametrize(
    "name",
    [
        # Scales whose weights came in a dtype that anybody may take for numbers.
        *(f"{weight}_{suffix}" for weight in (EXPERT, QUERY) for suffix in ("scale_inv", "scale", "packed")),
        "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.0.self_attn.q_proj.g_idx",
        "model.layers.0.self_attn.q_proj.weight.absmax",
        "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4",
        "model.layers.0.self_attn.q_proj.SCB",
        "model.layers.0.mlp.experts.gate_up_proj_blocks",
        "model.layers.0.self_attn.q_proj.input_scale",
        "model.layers.9.mlp.experts.3.up_proj.weight_scale_inv",
    ],
)
def test_what_is_left_of_a_quantisation(copy, name):
    rewrite(copy / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(
        copy, rf"tensor '.*{name.rsplit('.', 1)[1].split('_')[-1]}' of the files belongs to a quantisation|lack|make up"
    )


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.1.self_attn.q_proj.bias", r"Linear 'model\.layers\.1\.self_attn\.q_proj' of the model has no"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", r"'model\.layers\.0\.mlp\.gate' of the model has no such"),
        ("lm_head.lora_A", r"Linear 'lm_head' of the model has no such weight"),
        (
            "model.layers.0.self_attn.q_proj.lora_B.default.weight",
            r"Linear 'model\.layers\.0\.self_attn\.q_proj' of the",
        ),
        ("model.layers.0.mlp.experts.lora_A.weight", r"'model\.layers\.0\.mlp\.experts' of the model has no such"),
    ],
)
def test_a_weight_that_the_model_has_no_place_for(copy, name, part):
    rewrite(copy / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(copy, rf"tensor '{name}'.*{part}")


def test_a_module_that_the_model_lacks_is_left_out(copy):
    extra = {"mtp.layers.0.proj.weight": torch.ones(2), "model.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(copy / "model.safetensors", lambda tensors: tensors.update(extra))
    assert load_pretrained(copy).model.norm.weight.shape == (64,)


@pytest.mark.parametrize("name", [EXPERT, QUERY])
@pytest.mark.parametrize("stale_first", [False, True])
def test_a_stale_copy_in_another_file(shards, name, stale_first):
    path, index = shards
    files = sorted(set(index["weight_map"].values()))
    right = index["weight_map"][name]
    other = next(file for file in (files if stale_first else reversed(files)) if file != right)
    rewrite(path / other, lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    refused(path, rf"tensor '{name}' is in .* and in .*different values; the index names {right}: delete")


def test_an_equal_copy_in_another_file_is_the_right_value(shards):
    path, index = shards
    whole = load_pretrained(path)
    right = index["weight_map"][QUERY]
    other = next(file for file in sorted(set(index["weight_map"].values())) if file != right)
    value = load_file(path / right)[QUERY]
    rewrite(path / other, lambda tensors: tensors.update({QUERY: value}))
    assert torch.equal(load_pretrained(path).get_parameter(QUERY), whole.get_parameter(QUERY))


def test_a_tensor_that_the_index_does_not_name(shards):
    path, index = shards
    place = index["weight_map"].pop(QUERY)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, rf"{place} holds 1 tensors that model\.safetensors\.index\.json does not name, first '{QUERY}'")


def test_the_index_names_the_wrong_file(shards):
    path, index = shards
    right = index["weight_map"][QUERY]
    wrong = next(file for file in sorted(set(index["weight_map"].values())) if file != right)
    index["weight_map"][QUERY] = wrong
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, rf"{wrong} lacks 1 tensors of the index, first '{QUERY}'")


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", 3, None])
def test_an_index_that_leads_out_of_the_folder(shards, place):
    path, index = shards
    index["weight_map"][QUERY] = place
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, r"index\.json names .*which is no file of its folder")


def test_a_name_twice_in_an_index_or_a_header(shards, copy):
    path, index = shards
    text = json.dumps(index)
    (path / "model.safetensors.index.json").write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{QUERY}": "elsewhere.safetensors", ')
    )
    refused(path, rf"is not an index.*'{QUERY}' comes twice")
    file = copy / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + size])["lm_head.weight"]
    twice = f'{{"{QUERY}":{json.dumps(entry)},'.encode() + content[9 : 8 + size]
    twice += b" " * (-len(twice) % 8)
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + content[8 + size :])
    refused(copy, rf"no readable safetensors header.*'{QUERY}' comes twice")


def test_an_index_beside_a_single_file(shards, tiny):
    path, _ = shards
    shutil.copy(tiny / "model.safetensors", path)
    refused(
        path, r"has both model\.safetensors and model\.safetensors\.index\.json.*delete the one that is out of date"
    )


def test_other_files_beside_the_single_one_are_not_read(copy):
    rewrite(copy / "model.safetensors", lambda tensors: None)
    save_file({QUERY: torch.zeros(64, 64)}, copy / "consolidated.safetensors")
    assert load_pretrained(copy).get_parameter(QUERY).abs().max() > 0


def test_the_file_that_the_config_names(copy):
    config = json.loads((copy / "config.json").read_text())

    def name(file):
        (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": file}))

    expected = load_pretrained(copy).get_parameter(QUERY)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    name("weights.safetensors")
    assert torch.equal(load_pretrained(copy).get_parameter(QUERY), expected)
    name("absent.safetensors")
    refused(copy, r"absent\.safetensors is missing")
    name("../copy/weights.safetensors")
    refused(copy, r"config\.json names '\.\./copy/weights\.safetensors', which is no file of its folder")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("fp8", "model.layers.0.self_attn.q_proj.weight_scale_inv"),
        ("fp8", "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv"),
        ("mxfp4", "model.layers.0.mlp.experts.gate_up_proj_scales"),
    ],
)
def test_a_declared_quantisation_without_a_scale(tmp_path, kind, name):
    import test_quantised

    torch.manual_seed(0)
    getattr(test_quantised, kind)(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.pop(name))
    refused(tmp_path, rf"is quantised, but its scale '{name}' is missing")


def test_scales_of_activations_are_not_needed_for_dequantised_weights(tmp_path):
    from test_quantised import fp8

    torch.manual_seed(0)
    expected = fp8(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update({f"{name}.input_scale": torch.ones(1)}))
    weight = load_pretrained(tmp_path).get_parameter(f"{name}.weight")
    torch.testing.assert_close(weight.data, expected[f"{name}.weight"], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight"])
def test_integers_are_no_weights(copy, name, dtype):
    rewrite(copy / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(copy, rf"tensor '{name}' in .* is of type \w+, and the model needs floating-point numbers")


def test_weights_in_float64_are_no_quantisation(tiny, copy):
    def widen(tensors):
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})

    rewrite(copy / "model.safetensors", widen)
    weights = load_pretrained(tiny).state_dict()
    for name, weight in load_pretrained(copy, dtype="float32").state_dict().items():
        assert torch.equal(weight, weights[name])


def test_experts_with_a_gap_in_their_numbers(copy):
    later = EXPERT.replace(".7.", ".8.")
    rewrite(copy / "model.safetensors", lambda tensors: tensors.update({later: tensors.pop(EXPERT)}))
    refused(copy, rf"the files have tensor '{later}', but lack '{EXPERT}'")


@pytest.mark.parametrize("stale", [True, False])
def test_one_weight_under_two_names(tiny, copy, stale):
    short = QUERY.removeprefix("model.")
    rewrite(copy / "model.safetensors", lambda tensors: tensors.update({short: tensors[QUERY] * (0 if stale else 1)}))
    if stale:
        refused(copy, f"tensors '{QUERY}' and '{short}' are the same weight with different values")
    else:
        assert torch.equal(load_pretrained(copy).state_dict()[QUERY], load_pretrained(tiny).state_dict()[QUERY])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('"num_experts_per_tok": 1', r"config.json: 'num_experts_per_tok' comes twice"),
        (
            '"num_experts_per_tok": 99',
            "num_experts_per_tok must be in 1..8, the experts of .*, got 99",
        ),
        (  # Transformers' older versions refuse the first themselves
            '"architectures": [3], "num_experts_per_tok": 99',
            "num_experts_per_tok must be in 1..8|has no config.json that Transformers reads",
        ),
    ],
)
def test_configs_that_contradict_themselves(copy, change, says):
    config = (copy / "config.json").read_text().strip()
    if "99" in change:
        config = json.dumps({**json.loads(config), **json.loads(f"{{{change}}}")})
    else:
        config = config[:-1] + f", {change}}}"
    (copy / "config.json").write_text(config)
    refused(copy, says)


def test_a_folder_in_the_place_of_a_file(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    refused(copy, r"model\.safetensors is no file")
