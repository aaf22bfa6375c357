"""Experts held in fp8: kept as stored, made from 16 bits, read by their rank only, refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import lockstep
from lockstep.errors import ConfigurationError
from lockstep.models import transformers_internals as internals
from lockstep.models.experts_modules import find_experts
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny
from lockstep.moe.experts import LocalExperts
from lockstep.moe.fp8 import WEIGHTS, dequantise, dequantise_experts, is_fp8, quantise
from lockstep.moe.placement import Placement
from lockstep.moe.reference import moe_reference
from quantised import fp8, mxfp4

IDS = torch.arange(64)[None] % 60


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A checkpoint in the form of DeepSeek-V3 and Qwen3: 4 experts, 2 layers."""
    torch.manual_seed(0)
    fp8(path := tmp_path_factory.mktemp("blocks"))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("plain") / "tiny", num_layers=2, hidden_size=128, dtype=torch.bfloat16)


def copy_of(path, tmp_path, change):
    """Copy a checkpoint after `change(tensors by name, config)` has edited both in place."""
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_blocks_keep_four_significant_bits_and_their_largest_value():
    weight = torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(0))
    weight[0, :128, :128] = 0
    weight[1, 5, 7] = 100.0
    values, scales = quantise(weight)
    assert (values.dtype, scales.shape) == (torch.float8_e4m3fn, (3, 2, 3))
    back = dequantise(values, scales, torch.float32)
    assert back[1, 5, 7] == pytest.approx(100.0)
    assert torch.equal(back[0, :128, :128], torch.zeros(128, 128))
    largest = weight.unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).abs().amax((2, 4)) + 1e-9
    limit = weight.abs() / 16 + largest.repeat_interleave(128, 1).repeat_interleave(128, 2) * 2**-10 / 448 * 2
    assert bool(((back - weight).abs() <= limit).all())


@pytest.mark.parametrize(("wish", "stays"), [("auto", False), ("none", False), ("fp8", True)])
def test_blocks_stay_as_they_are_in_the_files(blocks, wish, stays):
    stored, model = load_file(blocks / "model.safetensors"), load_pretrained(blocks, quantize_experts=wish)
    for index, (_, module) in enumerate(find_experts(model)):
        assert is_fp8(module) is stays
        prefix = f"model.layers.{index}.mlp.experts"
        for expert in range(4 if stays else 0):
            gate_up = [stored[f"{prefix}.{expert}.{name}_proj.weight"] for name in ("gate", "up")]
            assert torch.equal(module.gate_up_proj[expert].view(torch.uint8), torch.cat(gate_up).view(torch.uint8))
            scales = stored[f"{prefix}.{expert}.down_proj.weight_scale_inv"]
            assert torch.equal(module.down_proj_scale_inv[expert], scales)
    dense = {weight.dtype for name, weight in model.named_parameters() if ".experts." not in name}
    assert dense == {torch.bfloat16}


def test_a_layer_whose_experts_are_all_here():
    gate_up, down = torch.randn(4, 2 * 128, 128), torch.randn(4, 128, 128)
    rows, ids = torch.randn(7, 128), torch.rand(7, 4).topk(2).indices
    weights = torch.rand(7, 2)
    expected = moe_reference([rows], [ids], [weights], gate_up, down)[0]
    experts = LocalExperts.from_tensors(gate_up, down)
    for kind in (torch.int64, torch.int32):
        torch.testing.assert_close(experts.alone(rows, ids.to(kind), weights), expected, rtol=1e-4, atol=1e-3)
    assert experts.alone(rows[:0], ids[:0], weights[:0]).shape == (0, 128)


def test_outputs_equal_those_of_dequantised_experts(blocks):
    expected = logits(load_pretrained(blocks, dtype=torch.float32))
    model = lockstep.from_pretrained(blocks, dtype=torch.float32, quantize_experts="fp8")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.generate(IDS[:, :9], max_new_tokens=4, do_sample=False).shape == (1, 13)
    for _, module in find_experts(whole := load_pretrained(blocks, dtype=torch.float32, quantize_experts="fp8")):
        dequantise_experts(module, torch.float32)
    assert torch.equal(logits(whole), expected)


@pytest.mark.parametrize("make", ["plain", "per tensor", "mixtral"])
def test_any_checkpoint_can_be_held_in_fp8(plain, blocks, tmp_path, make):
    if make == "per tensor":
        path = copy_of(blocks, tmp_path, per_tensor)
    elif make == "mixtral":
        path = make_tiny(tmp_path / "m", architecture="mixtral", num_layers=1, hidden_size=128, dtype=torch.float32)
    else:
        path = plain
    whole = dict(find_experts(load_pretrained(path, dtype=torch.float32)))
    for ep_size, ep_rank in ((1, 0), (2, 1), (2, 0)):
        model = load_pretrained(path, ep_rank=ep_rank, ep_size=ep_size, dtype=torch.float32, quantize_experts="fp8")
        for name, module in find_experts(model):
            for weight in ("gate_up_proj", "down_proj"):
                values, scales = getattr(module, weight), getattr(module, f"{weight}_scale_inv")
                own = getattr(whole[name], weight).chunk(ep_size)[ep_rank]
                assert (values.dtype, values.shape) == (torch.float8_e4m3fn, own.shape)
                apart = dequantise(values, scales, torch.float32) - own
                assert 0.01 < apart.norm() / own.norm() < 0.04 or make == "per tensor"
                assert apart.norm() / own.norm() < 0.04


def test_no_two_weights_are_in_16_bits_at_a_time(plain):
    modules, in_16_bits = set(), []

    def watch(module, name, parameter):
        """See a weight of experts before it is set, and so before it is rounded."""
        if name in WEIGHTS and parameter is not None and not parameter.is_meta and parameter.itemsize == 2:
            modules.add(module)
            held = [one for each in modules for one in each.parameters()]
            in_16_bits.append(sum(one.itemsize == 2 and not one.is_meta for one in held))

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(watch)
    try:
        load_pretrained(plain, quantize_experts="fp8")
    finally:
        handle.remove()
    assert in_16_bits == [0, 0, 0, 0]  # two layers of two weights


def per_tensor(tensors, config):
    """Give every fp8 weight one scale for all its values, as a number without a shape."""
    config["quantization_config"]["weight_block_size"] = None
    for number, name in enumerate([name for name in tensors if name.endswith("_scale_inv")]):
        tensors[name] = torch.tensor(0.001 * (1 + number % 5))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("ep_size", [1, 2, 3])
def test_scales_per_tensor_are_right_on_any_number_of_ranks(blocks, tmp_path, ep_size, shape):
    def change(tensors, config):
        per_tensor(tensors, config)
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].reshape(shape)

    path = copy_of(blocks, tmp_path, change)
    stored = load_file(path / "model.safetensors")
    placement = Placement.even(2, 4, ep_size)
    for ep_rank in range(ep_size):
        model = load_pretrained(path, ep_rank=ep_rank, ep_size=ep_size, placement=placement, dtype=torch.float32)
        for layer, (name, module) in enumerate(find_experts(model)):
            for slot, expert in enumerate(placement.slots_of(layer, ep_rank)):
                if expert >= 0:
                    key = f"{name}.{expert}.down_proj.weight"
                    expected = stored[key].float() * stored[f"{key}_scale_inv"]
                    torch.testing.assert_close(module.down_proj[slot], expected)


def test_blocks_may_end_within_a_dense_weight(blocks, tmp_path):
    """576 rows in blocks of 128, as in DeepSeek-V3: 4.5 blocks, and so 5 scales."""
    name = "model.layers.0.self_attn.q_proj.weight"

    def change(tensors, config):
        config["head_dim"] = 48  # q_proj has 192 rows then: one block and a half
        for layer in range(2):
            prefix = f"model.layers.{layer}.self_attn"
            for part, rows in (("q_proj", 192), ("k_proj", 96), ("v_proj", 96)):
                key = f"{prefix}.{part}.weight"
                tensors[key] = tensors[key][:rows]
            tensors[f"{prefix}.o_proj.weight"] = tensors[f"{prefix}.o_proj.weight"][:, :192]
            for part in ("q_norm", "k_norm"):
                tensors[f"{prefix}.{part}.weight"] = tensors[f"{prefix}.{part}.weight"][:48]

    path = copy_of(blocks, tmp_path, change)
    stored = load_file(path / "model.safetensors")
    assert stored[f"{name}_scale_inv"].shape == (2, 2)
    loaded = load_pretrained(path, dtype=torch.float32).state_dict()[name]
    torch.testing.assert_close(loaded, dequantise(stored[name], stored[f"{name}_scale_inv"], torch.float32))


def test_a_rank_reads_values_and_scales_of_its_own_experts_only(blocks, monkeypatch):
    from transformers import core_model_loading

    read = []
    internals.part_of_experts(torch.empty(4, 1, 1, device="meta"), [0], "cpu")  # so that the loader's reading is ours
    operation = core_model_loading.DtensorShardOperation
    shard = operation.shard_tensor

    def counted(self, source, tensor_idx=None, device=None, dtype=None):
        part = shard(self, source, tensor_idx, device, dtype)
        read.append((source.get_dtype(), part is not None))
        return part

    monkeypatch.setattr(operation, "shard_tensor", counted)
    load_pretrained(blocks, ep_rank=1, ep_size=2, quantize_experts="fp8")
    # 2 layers with 4 experts of 3 weights, each with its scales: this rank reads half of them.
    assert sorted(set(read)) == [("F32", False), ("F32", True), ("F8_E4M3", False), ("F8_E4M3", True)]
    assert {kind: read.count(kind) for kind in set(read)} == dict.fromkeys(set(read), 12)


@pytest.fixture
def nothing_loads(monkeypatch):
    """Let it be an error if a checkpoint passes all checks and is loaded."""
    monkeypatch.setattr(internals, "sharding_class", None)


@pytest.mark.parametrize("wish", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("shape", r"scale '(\S+experts\.3\.up_proj)\.weight_scale_inv' in \S+ has shape \[2, 1\]: tensor '\1\.weight'"),
        ("missing", r"tensor '\S+experts\.3\.up_proj\.weight' in \S+ is quantised, but its scale '\S+' is missing"),
        ("method", r"is quantised with 'awq'; only mxfp4 and fp8 are undone on load"),
    ],
)
def test_bad_scales_are_refused_before_loading(blocks, tmp_path, nothing_loads, wish, change, says):
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"

    def spoil(tensors, config):
        if change == "shape":
            tensors[name] = tensors[name].T.reshape(2, 1)
        elif change == "missing":
            del tensors[name]
        else:
            config["quantization_config"]["quant_method"] = "awq"

    path = copy_of(blocks, tmp_path, spoil)
    with pytest.raises(ConfigurationError, match=says):
        load_pretrained(path, quantize_experts=wish)


def test_sizes_that_blocks_do_not_divide_are_refused_by_name(tmp_path, nothing_loads):
    path = make_tiny(tmp_path / "tiny", num_layers=1, hidden_size=192)
    with pytest.raises(ConfigurationError, match=r"experts\.0\.down_proj\.weight' in \S+ has shape \[192, 192\]"):
        load_pretrained(path, quantize_experts="fp8")


@pytest.mark.parametrize(("kernels_there", "stays"), [(True, True), (False, False)])
def test_by_default_blocks_stay_where_kernels_read_them(blocks, monkeypatch, kernels_there, stays):
    monkeypatch.setattr("lockstep.models.loading.kernels_read_fp8", lambda device: kernels_there)
    assert {is_fp8(module) for _, module in find_experts(load_pretrained(blocks))} == {stays}


def test_experts_that_stay_in_16_bits_are_refused_by_name(tmp_path):
    mxfp4(tmp_path)
    with pytest.raises(ConfigurationError, match="quantize_experts"):
        load_pretrained(tmp_path, quantize_experts="fp8")
    with pytest.raises(ConfigurationError, match=r"quantize_experts must be one of auto, fp8, none, got 'int8'"):
        load_pretrained(tmp_path, quantize_experts="int8")


def test_a_cast_and_a_save_are_refused_by_name(plain, tmp_path):
    model = lockstep.from_pretrained(plain, quantize_experts="fp8")
    logits(model)
    with pytest.raises(ConfigurationError, match="experts in fp8 are not saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"held in fp8, were cast to torch\.float32"):
        logits(model.float())


def test_memory_of_a_30b_model_on_one_card():
    """Qwen3-30B-A3B, in GiB: weights in bfloat16, with experts in fp8, and the layer that prompts write in bfloat16."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from lockstep.models.experts_modules import expect_fp8

    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    in_bf16 = sum(weight.nbytes for weight in model.parameters())
    modules = [module for _, module in find_experts(model)]
    workspace = max(2 * module.gate_up_proj.numel() for module in modules)  # one layer's, by `many_rows_experts`
    for module in modules:
        expect_fp8(module)
    in_fp8 = sum(weight.nbytes for weight in model.parameters())
    assert [f"{size / 2**30:.1f}" for size in (in_bf16, in_fp8, workspace)] == ["56.9", "29.9", "0.8"]
