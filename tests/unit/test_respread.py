"""Which epochs continue with what the layers have on the device: a decision that all members must make alike."""

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")

from lockstep.coordination.groups import parallel_config
from lockstep.models.huggingface import attach
from lockstep.models.loading import load_pretrained
from lockstep.models.options import ParallelOptions
from lockstep.models.parallel import ModelParallel, parallel_of
from lockstep.models.respread import Respreader
from lockstep.models.tiny import make_tiny
from lockstep.moe.placement import Placement
from lockstep.moe.survivors import placement_of_epoch


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_an_epoch_with_a_rank_that_comes_back_starts_afresh(tmp_path, group, monkeypatch):
    # Every expert of rank 2 has a replica, so that no slot of rank 0 changes in any epoch.
    first = Placement.of_ranks(4, [[[0, 1, 2], [2, 3, 0], [1, 3]]], 3)
    monkeypatch.setattr(ModelParallel, "can_go_on", lambda parallel, placement: True)
    path, options = str(make_tiny(tmp_path / "tiny", num_layers=1, num_experts=4)), ParallelOptions()
    respreader = Respreader(path, options, dist.HashStore())
    model = load_pretrained(path, ep_rank=0, ep_size=3, placement=first)
    attach(ModelParallel(model, parallel_config(group, 1), group, options))
    epochs, goes_on = [], []
    for members in [(0, 1, 2), (0, 1), (0, 1, 2), (0, 1)]:
        epochs.append(members)
        respreader.spread(model, placement_of_epoch(first, epochs), members)
        goes_on.append(parallel_of(model).goes_on)
    assert goes_on == [False, True, False, True]
