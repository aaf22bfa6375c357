"""Transformers' own ways: its registry of expert parallelism, continuous batching, other classes of models."""

import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers.distributed import expert_parallel

import lockstep
from lockstep import extras
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "transformers.md"
HAS_REGISTRY = hasattr(expert_parallel, "EPImplementationInterface")
needs_registry = pytest.mark.skipif(not HAS_REGISTRY, reason="this Transformers has no registry")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("transformers") / "tiny", num_layers=2))


def prompts_of(rank):
    """Three on rank 0, one on rank 1, of unequal lengths."""
    return [torch.arange(3 + number)[None] for number in range(3)] if rank == 0 else [torch.arange(5)[None]]


def expected(path, prompts):
    whole = transformers.AutoModelForCausalLM.from_pretrained(path)
    return [whole.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for ids in prompts]


def page_script(path):
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    prompts = prompts_of(dist.get_rank())
    names = {"path": path, "prompts": prompts}
    exec(compile(script, PAGE.name, "exec"), names)
    return [torch.equal(*pair) for pair in zip(names["outputs"], expected(path, prompts), strict=True)]


@needs_registry
@pytest.mark.ranks(2)
def test_the_script_of_the_page(tiny):
    assert run_ranks(2, page_script, tiny, deadline_s=100) == [[True] * 3, [True]]


def with_tensor_parallelism(path):
    import lockstep.integrations.transformers

    config = transformers.distributed.DistributedConfig(tp_size=2, ep_size=2, ep_implementation="lockstep")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    messages = []
    for call in (lambda: model(input_ids=torch.tensor([[1, 2]])), lambda: lockstep.join(model).__enter__()):
        try:
            call()
        except Exception as error:
            messages.append(str(error))
    return messages


@needs_registry
@pytest.mark.ranks(2)
def test_outside_of_join_and_with_tensor_parallelism_it_says_so(tiny):
    for outside, split in run_ranks(2, with_tensor_parallelism, tiny, deadline_s=100):
        assert "call it inside lockstep.join(model)" in outside
        assert "is split over ranks that share their requests: leave tp_size out" in split


@pytest.mark.skipif(HAS_REGISTRY, reason="this Transformers has the registry")
def test_without_the_registry_the_import_says_what_is_needed():
    with pytest.raises(lockstep.ConfigurationError, match=r"5\.23 and 5\.24 have"):
        importlib.import_module("lockstep.integrations.transformers")


def batched(path):
    """Continuous batching, another number of requests on each rank."""
    prompts = prompts_of(dist.get_rank())
    model = lockstep.from_pretrained(path, attn_implementation="sdpa", deadline_s=20)
    settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default its cache takes most of the machine's memory, on each rank.
    cache = transformers.ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)
    inputs = [ids[0].tolist() for ids in prompts]
    with lockstep.join(model):
        answers = model.generate_batch(inputs, generation_config=settings, continuous_batching_config=cache)
    found = [answers[key].generated_tokens for key in sorted(answers, key=lambda key: int(key.rpartition("_")[2]))]
    return [
        tokens == whole[0, ids.shape[1] :].tolist()
        for tokens, whole, ids in zip(found, expected(path, prompts), prompts, strict=True)
    ]


@pytest.mark.ranks(2)
def test_continuous_batching_inside_join(tiny):
    assert run_ranks(2, batched, tiny, deadline_s=100) == [[True] * 3, [True]]


def classified(path):
    try:
        lockstep.from_pretrained(path)
    except lockstep.ConfigurationError as error:
        message = str(error)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = torch.arange(4 + dist.get_rank())[None]
    with torch.no_grad():
        scores = whole(input_ids=ids).logits
        model = lockstep.parallelize(transformers.AutoModelForSequenceClassification.from_pretrained(path))
        with lockstep.join(model):
            found = [model(input_ids=ids).logits for _ in range(1 + dist.get_rank())]
    return message, [torch.allclose(one, scores, atol=1e-5) for one in found]


@pytest.mark.ranks(2)
def test_a_model_that_does_not_generate_is_refused_and_can_be_spread_from_memory(tiny, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    for rank, (message, equal) in enumerate(run_ranks(2, classified, str(tmp_path), deadline_s=100)):
        assert (
            "holds a Qwen3MoeForSequenceClassification, and from_pretrained loads models that generate text" in message
        )
        assert equal == [True] * (1 + rank)


def warned(path):
    extras.NEWEST_TRIED["transformers"] = "5.0"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lockstep.from_pretrained(path)
    return [str(warning.message) for warning in caught if "tried" in str(warning.message)]


@pytest.mark.ranks(2)
def test_a_version_that_was_not_tried_gives_one_warning_on_one_rank(tiny):
    first, second = run_ranks(2, warned, tiny)
    wanted = f"transformers {transformers.__version__} is newer than 5.0, the newest that Lockstep was tried with"
    assert (first, second) == ([wanted], [])
