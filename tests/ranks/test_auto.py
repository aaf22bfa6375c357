"""`auto` with a third backend of limited size, which stands in for the GPU one: what is chosen, cut, and refused."""

import pytest
import torch
import torch.distributed as dist

from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.dispatch.base import Abilities
from lockstep.dispatch.choose import AutoDispatcher, captures
from lockstep.dispatch.constants import PATH_VARIABLE, BackendConstants, DispatchConstants
from lockstep.testing import MoEInputs, run_ranks

# Rows cost the same everywhere. Up to 18 chunks through the small one are cheaper than one all-gather.
CONSTANTS = DispatchConstants({"allgather": BackendConstants(100.0), "nvlink": BackendConstants(5.5)}, "made up")


class SmallDispatcher(AllGatherDispatcher):
    """Takes 4 rows of each rank at a time, and counts its calls."""

    name = "nvlink"

    def __init__(self, process_group, num_experts, **options):
        super().__init__(process_group, num_experts, **options)
        self.abilities = Abilities(cuda_graph=True, max_rows_per_rank=4)
        self.calls = 0

    def dispatch(self, *arguments):
        self.calls += 1
        return super().dispatch(*arguments)


def run_dispatcher():
    rank = dist.get_rank()
    small = SmallDispatcher(dist.group.WORLD, 8)
    auto = AutoDispatcher(dist.group.WORLD, 8, constants=CONSTANTS, mapped=small)
    plain = AutoDispatcher(dist.group.WORLD, 8)
    kind = (16, 2, torch.float32)
    assert captures(auto, [4, 0], *kind)
    assert not captures(auto, [5, 0], *kind)  # the others would take the all-gather, which no graph has
    assert not captures(plain, [4, 0], *kind)
    reference = AllGatherDispatcher(dist.group.WORLD, 8)
    calls = []
    for counts in ([4, 1], [5, 1], [0, 3], [0, 0]):
        inputs = MoEInputs.make(counts, 1, num_experts=8, top_k=2, hidden=16)
        mine = (inputs.hidden_states[rank], inputs.topk_ids[rank], inputs.topk_weights[rank])
        outputs = []
        for dispatcher in (auto, reference):
            handle = dispatcher.dispatch(*mine, counts)
            outputs.append(dispatcher.combine(handle.hidden_states[handle.gather_index], handle))
        assert torch.equal(*outputs)
        calls.append(small.calls)
    return calls


@pytest.mark.ranks(2)
def test_calls_go_to_the_small_backend_where_they_fit_it():
    assert run_ranks(2, run_dispatcher) == [[1, 1, 2, 3]] * 2


def run_model(folder, other_constants):
    import os
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    import lockstep
    from lockstep.errors import RankMismatchError
    from lockstep.models import parallel

    rank, made = dist.get_rank(), []

    def make_small(process_group, *, num_experts, deadline_s, max_rows_per_rank, **_):
        made.append(SmallDispatcher(process_group, num_experts, deadline_s=deadline_s))
        assert max_rows_per_rank == 4096
        return made[-1]

    parallel.can_map = lambda everyones: len(everyones) == 2
    parallel.make_mapped_dispatcher = make_small
    path = Path(folder, f"constants{rank if other_constants else 0}.json")
    if rank == 0 or other_constants:
        backends = {**CONSTANTS.backends, "nvlink": BackendConstants(5.5 + rank)}
        DispatchConstants(backends, CONSTANTS.source).save(path)
    dist.barrier()
    os.environ[PATH_VARIABLE] = str(path)

    def load(name):
        return lockstep.parallelize(
            AutoModelForCausalLM.from_pretrained(Path(folder, "tiny"), dtype=torch.bfloat16), dispatcher=name
        )

    model = load("auto")
    if other_constants:
        with pytest.raises(RankMismatchError, match="ranks disagree about dispatch constants: rank 0: made up"):
            model.__dict__["_lockstep_parallel"].open()
        return None

    def forward(model, num_tokens):
        with lockstep.join(model), torch.no_grad():  # rank 1 has nothing to run, so that there is one step for certain
            return model(input_ids=torch.arange(num_tokens)[None] + 65).logits if rank == 0 else None

    own = forward(model, 10)  # 3 chunks of 4 rows in each of 2 layers, which share the buffers
    counts = [made[0].calls]
    forward(model, 90)  # 23 chunks would cost more than one all-gather
    counts.append(made[0].calls)
    assert len(made) == 1
    expected = forward(load("allgather"), 10)
    if rank == 0:
        torch.testing.assert_close(own, expected, rtol=2e-2, atol=2e-2)
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lockstep.models.tiny import make_tiny

    folder = tmp_path_factory.mktemp("auto")
    make_tiny(folder / "tiny", num_layers=2)
    return folder


@pytest.mark.ranks(2)
def test_a_step_is_cut_to_the_faster_backends_size_where_that_pays(folder):
    assert run_ranks(2, run_model, str(folder), False) == [[6, 6]] * 2


@pytest.mark.ranks(2)
def test_ranks_with_other_constants_are_refused_before_a_step(folder):
    run_ranks(2, run_model, str(folder), True)
