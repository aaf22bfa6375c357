"""Each rank's part of a checkpoint: the same weights as slices of the whole model, from any layout; errors by name."""

import json
import shutil

import pytest
import torch

from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import find_experts, shard_empty, shard_experts
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny
from lockstep.moe.placement import EMPTY, Placement

NUM_LAYERS, NUM_EXPERTS = 2, 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with one tensor per expert, as Qwen3-MoE's are, in one file; and its whole model."""
    from transformers import AutoModelForCausalLM

    path = make_tiny(tmp_path_factory.mktemp("loading") / "tiny", num_layers=NUM_LAYERS)
    return path, AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the checkpoint to be damaged."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def tensor_names(path):
    from safetensors import safe_open

    return [name for file in path.glob("*.safetensors") for name in safe_open(file, "pt").keys()]  # noqa: SIM118


def assert_is_part_of(model, whole_model, ep_rank, ep_size):
    own, all_weights = model.state_dict(), whole_model.state_dict()
    assert own.keys() == all_weights.keys()
    size = NUM_EXPERTS // ep_size
    for name, weight in own.items():
        expected = all_weights[name]
        if ".experts." in name:
            expected = expected[ep_rank * size : (ep_rank + 1) * size]
        assert type(weight) is torch.Tensor
        assert torch.equal(weight, expected.to(weight.dtype)), name
    assert all(module.num_experts == size for _, module in find_experts(model))


@pytest.mark.parametrize("ep_size", [1, 2, 8])
@pytest.mark.parametrize("layout", ["one tensor per expert", "fused", "many files"])
def test_each_rank_has_the_dense_weights_and_its_own_experts(whole, tmp_path, layout, ep_size):
    path, whole_model = whole
    if layout == "fused":
        path = tmp_path / "fused"
        whole_model.save_pretrained(path, save_original_format=False)
        assert any(name.endswith("experts.gate_up_proj") for name in tensor_names(path))
    elif layout == "many files":
        path = tmp_path / "many"
        whole_model.save_pretrained(path, max_shard_size="200KB")
        assert len(list(path.glob("*.safetensors"))) > 4
    else:
        assert any("experts.7.up_proj" in name for name in tensor_names(path))
    for ep_rank in {0, ep_size - 1}:
        model = load_pretrained(path, ep_rank=ep_rank, ep_size=ep_size)
        assert type(model) is type(whole_model)
        assert not model.training
        assert_is_part_of(model, whole_model, ep_rank, ep_size)


def test_a_model_in_memory_is_cut_in_place(whole):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole[0])
    for _, module in find_experts(model):
        shard_experts(module, (4, 5, 6, 7))
    assert_is_part_of(model, whole[1], 1, 2)
    stored = find_experts(model)[0][1].down_proj.untyped_storage().nbytes()
    assert stored == 4 * 64 * 64 * 4, "the other experts' memory is freed"


def test_the_dtype_can_be_chosen(whole):
    model = load_pretrained(whole[0], ep_rank=1, ep_size=2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_is_part_of(model, whole[1], 1, 2)


def test_hidden_states_are_still_recorded_after_the_class_is_put_back(whole):
    model = load_pretrained(whole[0])
    output = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert len(output.hidden_states) == NUM_LAYERS + 1


PLACEMENT = Placement(
    8, 3, ((0, 1, 2, EMPTY, 3, 4, 5, EMPTY, 6, 7, EMPTY, EMPTY), (7, 0, EMPTY, 2, 6, 5, 2, 7, 1, 3, 4, EMPTY))
)


@pytest.mark.parametrize("layout", ["one tensor per expert", "fused"])
@pytest.mark.parametrize("placement", [None, PLACEMENT])
def test_any_number_of_ranks_and_any_experts_in_their_slots(whole, tmp_path, layout, placement):
    path, whole_model = whole
    if layout == "fused":
        whole_model.save_pretrained(path := tmp_path / "fused", save_original_format=False)
    expected = [module for _, module in find_experts(whole_model)]
    for ep_rank in range(3):
        model = load_pretrained(path, ep_rank=ep_rank, ep_size=3, placement=placement)
        for layer, (_, module) in enumerate(find_experts(model)):
            slots = (placement or Placement.even(2, 8, 3)).slots_of(layer, ep_rank)
            assert module.num_experts == len(slots) == len(module.down_proj)
            for name in ("gate_up_proj", "down_proj"):
                weight, all_experts = getattr(module, name), getattr(expected[layer], name)
                for slot, expert in enumerate(slots):
                    wanted = torch.zeros_like(weight[slot]) if expert == EMPTY else all_experts[expert]
                    assert torch.equal(weight[slot], wanted), (ep_rank, layer, name, slot)


def test_a_rank_without_any_expert_of_a_layer(whole):
    model = load_pretrained(whole[0], ep_rank=9, ep_size=10)
    assert all(not module.down_proj.any() and len(module.down_proj) == 1 for _, module in find_experts(model))


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement.even(2, 8, 4), r"2 layers of 8 experts over 4 ranks does not fit 2 layers of 8 .* over 2"),
        (Placement.even(3, 8, 2), r"3 layers of 8 experts over 2 ranks does not fit 2 layers of 8"),
        (Placement.even(2, 16, 2), r"2 layers of 16 experts .* does not fit 2 layers of 8 \(model\.layers\.0\.mlp"),
    ],
)
def test_a_placement_of_another_model(whole, placement, message):
    with pytest.raises(ConfigurationError, match=message):
        load_pretrained(whole[0], ep_rank=0, ep_size=2, placement=placement)


def test_a_rank_that_is_none(whole):
    with pytest.raises(ConfigurationError, match=r"ep_rank 2 and ep_size 2"):
        load_pretrained(whole[0], ep_rank=2, ep_size=2)


def test_a_model_without_experts_is_named(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(ConfigurationError, match=r"LlamaForCausalLM has no MoE layer"):
        find_experts(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"LlamaForCausalLM has no MoE layer"):
        load_pretrained(tmp_path, ep_rank=0, ep_size=2)


def test_a_truncated_file(copy):
    file = copy / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 100)
    with pytest.raises(ConfigurationError, match=rf"model\.safetensors is truncated.*{size - 100} bytes.*says {size}"):
        load_pretrained(copy)
    with file.open("r+b") as stream:
        stream.truncate(20)
    with pytest.raises(ConfigurationError, match=r"truncated: 20 bytes"):
        load_pretrained(copy)


def test_a_missing_file(whole, tmp_path):
    whole[1].save_pretrained(tmp_path, max_shard_size="200KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(ConfigurationError, match=rf"{lost.name} is missing"):
        load_pretrained(tmp_path, ep_rank=0, ep_size=2)


def test_an_index_that_names_what_is_not_there(whole, tmp_path):
    whole[1].save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.extra"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=r"lacks 1 tensors of the index, first 'model\.norm\.extra'"):
        load_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConfigurationError, match=r"is not an index"):
        load_pretrained(tmp_path)


def rewrite(path, change):
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_a_missing_weight_is_never_made_up(copy, ep_rank):
    rewrite(copy, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ConfigurationError, match=r"lack 1 weights.*layers\.1\.self_attn\.q_proj\.weight"):
        load_pretrained(copy, ep_rank=ep_rank, ep_size=2)


def test_a_missing_expert(copy):
    rewrite(copy, lambda tensors: tensors.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        load_pretrained(copy, ep_rank=1, ep_size=2)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_weight_of_another_shape(copy, ep_size):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()

    rewrite(copy, change)
    with pytest.raises(ConfigurationError, match=r"'lm_head\.weight' has shape \[100, 64\].* needs \[259, 64\]"):
        load_pretrained(copy, ep_rank=0, ep_size=ep_size)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no checkpoint at .*absent"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match=r"no checkpoint 'someone/something'.*revision v1"):
        load_pretrained("someone/something", revision="v1", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        load_pretrained(tmp_path)


def test_other_formats_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"has no safetensors files; other formats are not read"):
        load_pretrained(copy)


def test_a_quantisation_that_is_not_undone_is_refused_by_name(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigurationError, match=r"quantised with 'gptq'; only mxfp4 and fp8"):
        load_pretrained(copy)


def test_a_hub_id_and_its_revision_from_the_offline_cache(whole, tmp_path):
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--tiny-moe"
    shutil.copytree(whole[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    model = load_pretrained(
        "someone/tiny-moe", ep_rank=1, ep_size=2, revision="v1", local_files_only=True, cache_dir=tmp_path
    )
    assert_is_part_of(model, whole[1], 1, 2)
    with pytest.raises(ConfigurationError, match=r"'someone/tiny-moe'.*revision v2"):
        load_pretrained("someone/tiny-moe", revision="v2", local_files_only=True, cache_dir=tmp_path)


def test_experts_are_split_where_the_weights_are_to_be():
    # A DTensor on a mesh of CPUs would take weights that were read to a GPU back to the CPU.
    module = torch.nn.Module()
    with torch.device("meta"):
        module.down_proj = torch.nn.Parameter(torch.empty(4, 3, 5))
    shard_empty(module, (2, 3), "cuda")
    assert module.down_proj.device_mesh.device_type == "cuda"
    assert module.down_proj.to_local().shape == (2, 3, 5)
