"""`auto` with a third backend of limited size, which stands in for the GPU one: what is chosen, cut, and refused."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist

from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.choose import AutoDispatcher, DispatcherOptions, register_dispatcher
from lockstep.dispatch.collective_dispatchers import AllGatherDispatcher, AllToAllDispatcher
from lockstep.dispatch.constants import PATH_VARIABLE, BackendConstants, DispatchConstants
from lockstep.errors import ConfigurationError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.testing import MoEInputs, run_ranks
from mapped import MappedDispatcher, stand_in

# Rows cost the same everywhere. Up to 18 chunks through the small one are cheaper than one all-gather.
CONSTANTS = DispatchConstants({"allgather": BackendConstants(100.0), "nvlink": BackendConstants(5.5)}, "made up")


def run_dispatcher():
    rank, shape = dist.get_rank(), ExpertsShape(8, 16, 2)
    small = MappedDispatcher(dist.group.WORLD, shape, DispatcherOptions(max_rows_per_rank=4))
    reference = AllGatherDispatcher(dist.group.WORLD, 8)
    auto = AutoDispatcher([reference, small], shape, CONSTANTS)
    plain = AutoDispatcher([reference, AllToAllDispatcher(dist.group.WORLD, 8)], shape)
    assert auto.route([4, 0]).captures
    assert not auto.route([5, 0]).captures  # goes in two chunks
    assert auto.route([80, 0]).backend == "allgather"  # 20 chunks would cost more
    assert not auto.route([80, 0]).captures  # the others would take the all-gather, which no graph has
    assert auto.route([4, 1], capture=True).backend == "nvlink"
    assert not plain.route([4, 0]).captures
    with pytest.raises(ConfigurationError, match="no backend here that a CUDA graph can capture"):
        plain.route([4, 0], capture=True)
    calls = []
    for counts in ([4, 1], [5, 1], [0, 3], [0, 0], [0, 90]):
        inputs = MoEInputs.make(counts, 1, num_experts=8, top_k=2, hidden=16)
        mine = (inputs.hidden_states[rank], inputs.topk_ids[rank], inputs.topk_weights[rank])
        expected = reference.dispatch(reference.route(counts), *mine)
        expected = reference.combine(expected.hidden_states[expected.gather_index], expected)
        route, output = auto.route(counts), torch.empty_like(mine[0])
        for chunk in ChunkPlan(counts, max_chunk_size_per_rank=route.chunk_size, rank=rank):
            span = slice(chunk.start, chunk.stop)
            handle = auto.dispatch(route.of_chunk(chunk.sizes), *(tensor[span] for tensor in mine))
            output[span] = auto.combine(handle.hidden_states[handle.gather_index], handle)
        assert torch.equal(output, expected)
        calls.append(small.calls)
    return calls


@pytest.mark.ranks(2)
def test_steps_go_to_the_small_backend_in_chunks_where_that_pays():
    assert run_ranks(2, run_dispatcher) == [[1, 3, 4, 4, 4]] * 2


def run_model(folder, other_constants):
    import os
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    import lockstep
    from lockstep.errors import RankMismatchError
    from lockstep.models import parallel

    rank, made = dist.get_rank(), stand_in()

    def make_small(process_group, shape, options):
        made.append(MappedDispatcher(process_group, shape, replace(options, max_rows_per_rank=4)))
        return made[-1]

    parallel.can_map = lambda everyones: len(everyones) == 2
    register_dispatcher("nvlink", make_small)
    path = Path(folder, f"constants{rank if other_constants else 0}.json")
    if rank == 0 or other_constants:
        backends = {**CONSTANTS.backends, "nvlink": BackendConstants(5.5 + rank)}
        path.write_text(json.dumps(asdict(DispatchConstants(backends, CONSTANTS.source))))
    dist.barrier()
    os.environ[PATH_VARIABLE] = str(path)

    def load(name):
        return lockstep.parallelize(
            AutoModelForCausalLM.from_pretrained(Path(folder, "tiny"), dtype=torch.bfloat16), dispatcher=name
        )

    model = load("auto")
    if other_constants:
        with pytest.raises(RankMismatchError, match="ranks disagree about dispatch constants: rank 0: made up"):
            lockstep.parallel_of(model).open()
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
