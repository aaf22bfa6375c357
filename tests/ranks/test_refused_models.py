"""Models that `parallelize` and `join` refuse by name: wrapped, split, offloaded, or no model at all."""

import pytest
import torch
import torch.distributed as dist

import lockstep
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("refused") / "tiny", num_layers=2, num_experts=4))


def offloaded_before(path):
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM

    messages = []
    for offload in (lambda model: model.to("meta"), lambda model: cpu_offload(model, torch.device("cpu"))):
        try:
            lockstep.parallelize(offload(AutoModelForCausalLM.from_pretrained(path)))
        except lockstep.ConfigurationError as error:
            messages.append(str(error))
    return messages


@pytest.mark.ranks(2)
def test_weights_that_are_not_there_cannot_be_spread(tiny):
    pytest.importorskip("accelerate")
    for messages in run_ranks(2, offloaded_before, tiny):
        assert len(messages) == 2
        assert all("model.embed_tokens.weight is on the meta device" in message for message in messages)


def whole_in_ddp(whole):
    return lockstep.parallelize(torch.nn.parallel.DistributedDataParallel(whole))


def whole_in_data_parallel(whole):
    return lockstep.parallelize(torch.nn.DataParallel(whole))


def whole_in_fully_shard(whole):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return lockstep.parallelize(fully_shard(whole, mesh=init_device_mesh("cpu", (dist.get_world_size(),))))


def in_a_pipeline(whole):
    from transformers import TextGenerationPipeline

    return lockstep.parallelize(TextGenerationPipeline(whole, tokenizer=None))


def joined_in_a_pipeline(whole):
    from transformers import TextGenerationPipeline

    with lockstep.join(TextGenerationPipeline(lockstep.parallelize(whole), tokenizer=None)):
        pass


def no_model(whole):
    return lockstep.parallelize("qwen")


REFUSED = {
    whole_in_ddp: "DistributedDataParallel waits for all ranks in every call",
    whole_in_data_parallel: "DataParallel waits for all ranks in every call",
    whole_in_fully_shard: "is split already (fully_shard, or Transformers' own parallelism)",
    in_a_pipeline: "is needed, got TextGenerationPipeline: pass its .model",
    joined_in_a_pipeline: "is needed, got TextGenerationPipeline: pass its .model",
    no_model: "is needed, got str: 'qwen'",
}


def refusals(path):
    from transformers import AutoModelForCausalLM

    found = {}
    for act in REFUSED:
        try:
            act(AutoModelForCausalLM.from_pretrained(path))
        except lockstep.ConfigurationError as error:
            found[act.__name__] = str(error)
    return found


@pytest.mark.ranks(2)
def test_what_cannot_be_spread_is_refused_by_its_name(tiny):
    for found in run_ranks(2, refusals, tiny):
        for act, wanted in REFUSED.items():
            assert wanted in found.get(act.__name__, "no error"), (act.__name__, found)
