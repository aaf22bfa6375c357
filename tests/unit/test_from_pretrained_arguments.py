"""`from_pretrained` in the place of Transformers': each of its arguments is taken, handed on, or refused by name."""

import ast
import inspect
import shutil
import textwrap

import pytest
import torch

pytest.importorskip("transformers")

import lockstep
from lockstep.errors import ConfigurationError
from lockstep.models import arguments
from lockstep.models.arguments import read_arguments
from lockstep.models.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("arguments") / "tiny", num_layers=1, num_experts=4)


def names_that_transformers_takes():
    """Parameters of its `from_pretrained`, and what its body takes out of `kwargs`."""
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    names = set()
    for function in (PreTrainedModel.from_pretrained, _BaseAutoModelClass.from_pretrained):
        function = inspect.unwrap(getattr(function, "__func__", function))
        names |= {
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        }
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("pop", "get")
                and getattr(node.func.value, "id", "") in ("kwargs", "hub_kwargs")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                names.add(node.args[0].value)
    return names - {"cls", "pretrained_model_name_or_path"}


def test_every_argument_of_transformers_is_accounted_for():
    known = {
        *arguments.TAKEN,
        *arguments.HANDED_ON,
        *arguments.HUB,
        *arguments.WITHOUT_EFFECT,
        *arguments.REFUSED,
    }
    found = names_that_transformers_takes()
    assert {"dtype", "torch_dtype", "device_map", "gguf_file", "cache_dir"} <= found  # the reading itself works
    assert found <= known, found - known


@pytest.mark.parametrize(
    ("asked", "instead"),
    [
        ({"tp_plan": "auto"}, r"tp_plan='auto': pass tensor_parallel_size=N"),
        ({"tp_size": 2}, r"tp_size=2: pass tensor_parallel_size=N"),
        ({"load_in_4bit": True}, r"load_in_4bit=True: leave it out: checkpoints in mxfp4 and fp8"),
        ({"load_in_8bit": True}, r"load_in_8bit=True"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantization_config=.*leave it out: checkpoints in mxfp4"),
        ({"use_safetensors": False}, r"use_safetensors=False: only safetensors files are read"),
        ({"gguf_file": "model.gguf"}, r"gguf_file='model\.gguf': only safetensors"),
        ({"variant": "fp16"}, r"variant='fp16': copy the files"),
        ({"device_map": "balanced"}, r"device_map='balanced': each rank holds its weights on one device"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, r"device_map=.*one device"),
        ({"device_map": {"": "meta"}}, r"device_map={'': 'meta'}"),
        ({"device_map": "cuda:1", "device": "cpu"}, r"device='cpu' and device_map='cuda:1' contradict"),
        ({"max_memory": {0: "1GB"}}, r"max_memory=.*one device"),
        ({"offload_folder": "somewhere"}, r"offload_folder='somewhere'"),
        ({"state_dict": {}}, r"state_dict=\{\}: put the weights into a Transformers model"),
        ({"experts_implementation": "eager"}, r"experts_implementation='eager': the experts are run by Lockstep"),
        ({"ignore_mismatched_sizes": True}, r"ignore_mismatched_sizes=True.*random numbers"),
        ({"ignore_mismatched_sizes": 1}, r"ignore_mismatched_sizes=1"),
        ({"adapter_kwargs": {"revision": "x"}}, r"adapter_kwargs=.*with PEFT"),
        ({"use_kernels": True}, r"use_kernels=True"),
        ({"proxies": {"http": "x:1"}}, r"proxies=.*HTTPS_PROXY"),
        (
            {"dtype": torch.float32, "torch_dtype": "bfloat16"},
            r"dtype=torch\.float32 and torch_dtype='bfloat16' contra",
        ),
        ({"torch_dtype": torch.int8}, r"dtype must be a floating-point type of 16 bits or more, got torch\.int8"),
        ({"dtype": torch.float8_e4m3fn}, r"16 bits or more, got torch\.float8_e4m3fn"),
        ({"dtype": "half-ish"}, r"dtype must be a dtype of torch or 'auto', got 'half-ish'"),
        ({"atn_implementation": "eager"}, r"'atn_implementation', which neither.*did you mean 'attn_implementation'"),
        ({"num_expert_per_tok": 1}, r"nor Qwen3MoeConfig has; did you mean 'num_experts_per_tok'"),
        ({"subfolder": "absent"}, r"no checkpoint at .*absent"),
        ({"subfolder": "../other"}, r"subfolder must be a folder inside"),
        ({"config": "/nowhere/at/all"}, r"/nowhere/at/all has no config\.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused_by_name(tiny, asked, instead):
    with pytest.raises(ConfigurationError, match=instead):
        lockstep.from_pretrained(tiny, **asked)


@pytest.mark.parametrize(
    "asked",
    [
        {"torch_dtype": torch.bfloat16},
        {"torch_dtype": "bfloat16"},
        {"dtype": "auto", "torch_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "torch_dtype": "bfloat16"},
        {"dtype": None, "torch_dtype": "bfloat16"},
    ],
)
def test_the_older_name_of_the_dtype(tiny, asked):
    assert lockstep.from_pretrained(tiny, **asked).dtype is torch.bfloat16


# What lm-eval's `HFLM` passes.
LM_EVAL = {
    "revision": "main", "dtype": "float32", "trust_remote_code": False, "gguf_file": None, "subfolder": "",
    "device_map": {"": "cpu"}, "max_memory": None, "offload_folder": None, "quantization_config": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        LM_EVAL,
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu"), "device": "cpu"},
        {"device_map": {"": "cpu"}, "use_safetensors": True},
        {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}},
        {"cache_dir": "somewhere", "token": "secret", "force_download": False, "proxies": None},
        {"low_cpu_mem_usage": True, "weights_only": True, "_fast_init": True, "resume_download": None},
        {"load_in_4bit": False, "tp_plan": None, "adapter_kwargs": {}, "use_kernels": False, "variant": None},
        {"attn_implementation": "eager", "key_mapping": None, "disable_mmap": False},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_one_line_replaces_that_of_transformers(tiny, asked):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 2, 3]])
    expected = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=asked.get("attn_implementation"))(ids)
    torch.testing.assert_close(lockstep.from_pretrained(tiny, **asked)(ids).logits, expected.logits)


def test_arguments_reach_the_model(tiny, tmp_path):
    from transformers import AutoConfig, GenerationConfig

    assert lockstep.from_pretrained(tiny, attn_implementation="eager").config._attn_implementation == "eager"
    assert lockstep.from_pretrained(tiny, output_attentions=True, attn_implementation="eager").config.output_attentions
    generation = GenerationConfig(max_new_tokens=3)
    assert lockstep.from_pretrained(tiny, generation_config=generation).generation_config.max_new_tokens == 3
    model, info = lockstep.from_pretrained(tiny, output_loading_info=True)
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and not info["missing_keys"]
    config = AutoConfig.from_pretrained(tiny, num_experts_per_tok=1)
    for given in (config, str(tiny / "config.json"), tiny):
        model = lockstep.from_pretrained(tiny, config=given)
        assert model.config.num_experts_per_tok == (1 if given is config else 2)
    assert config.num_experts_per_tok == 1 and model.config is not config
    assert lockstep.from_pretrained(tiny, num_experts_per_tok=1).config.num_experts_per_tok == 1
    shutil.copytree(tiny, tmp_path / "outer" / "inner")
    assert lockstep.from_pretrained(tmp_path / "outer", subfolder="inner").config.num_hidden_layers == 1
    renamed = lockstep.from_pretrained(_renamed(tiny, tmp_path / "renamed"), key_mapping={"^base": "model"})
    assert torch.equal(renamed.model.norm.weight, model.model.norm.weight)


def _renamed(tiny, path):
    """The checkpoint with other names, as code from elsewhere may have them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, path)
    tensors = load_file(path / "model.safetensors")
    renamed = {name.replace("model.", "base.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_hub_id_gets_cache_dir_token_and_force_download(tiny, tmp_path, monkeypatch):
    seen = {}

    def snapshot_download(repository, **options):
        seen.update(options, repository=repository)
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    lockstep.from_pretrained("someone/tiny", cache_dir=tmp_path, token="secret", force_download=True, revision="v1")
    assert seen["repository"] == "someone/tiny" and seen["revision"] == "v1"
    assert (seen["cache_dir"], seen["token"], seen["force_download"]) == (tmp_path, "secret", True)


def test_a_gpu_by_its_number():
    assert read_arguments({"device_map": {"": 1}}).device == "cuda:1"
    assert read_arguments({"device_map": 0}).device == "cuda:0"
    assert read_arguments({"device_map": "auto"}).device is None
