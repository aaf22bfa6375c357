"""A checkpoint that is wrong for one rank is an error on all of them: the same words, within seconds, no hang."""

import shutil
import time

import pytest
import torch
import torch.distributed as dist

from lockstep.errors import ConfigurationError
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks


def load(paths):
    rank = dist.get_rank()
    start = time.monotonic()
    try:
        load_pretrained(paths[rank], ep_rank=rank, ep_size=dist.get_world_size(), process_group=dist.group.WORLD)
    except ConfigurationError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("errors") / "tiny", num_layers=2)


def change_tensors(path, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def truncate(path):
    with (path / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)


def misshape_an_expert_of_rank_1(path):
    name = "model.layers.1.mlp.experts.7.up_proj.weight"

    def change(tensors):
        tensors[name] = torch.zeros(3, 64)

    change_tensors(path, change)


def lose_an_expert_of_rank_1(path):
    change_tensors(path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.6.down_proj.weight"))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "truncated"),
        (misshape_an_expert_of_rank_1, "model.layers.1.mlp.experts.gate_up_proj"),
        (lose_an_expert_of_rank_1, "but lack 'model.layers.1.mlp.experts.6.down_proj.weight'"),
        (lambda path: (path / "model.safetensors").unlink(), "no safetensors files"),
    ],
    ids=["truncated", "misshaped", "lost", "missing"],
)
@pytest.mark.parametrize("one_rank_only", [False, True], ids=["shared disk", "disk of rank 1"])
def test_the_same_error_on_every_rank(tiny, tmp_path, damage, words, one_rank_only):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    damage(broken)
    (first, first_s), (second, second_s) = run_ranks(2, load, [str(tiny if one_rank_only else broken), str(broken)])
    assert words in first and first == second
    assert max(first_s, second_s) < 10
    if one_rank_only:
        assert first.endswith("(seen on rank 1)")
