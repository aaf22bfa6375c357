"""examples/deepep_dispatcher.py over a stand-in for DeepEP, not DeepEP itself: the same bits as the all-to-all."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lockstep
from deepep_stand_in import install
from lockstep.dispatch.base import NO_EXPERT
from lockstep.errors import ConfigurationError
from lockstep.models.tiny import make_tiny
from lockstep.moe.reference import moe_reference
from lockstep.testing import MoEInputs, run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepep_dispatcher.py"
NUM_EXPERTS = 8
COUNTS = {2: [[3, 1], [0, 5], [0, 0]], 4: [[3, 1, 4, 2], [5, 0, 0, 7], [40, 1, 1, 1]]}


def register():
    install()
    runpy.run_path(str(EXAMPLE))


def exchange(top_k):
    register()
    rank, shape = dist.get_rank(), lockstep.ExpertsShape(NUM_EXPERTS, 64, top_k, torch.bfloat16)
    backends = [lockstep.make_dispatcher(name, dist.group.WORLD, shape) for name in ("deepep", "alltoall")]
    num_local, outcomes = backends[0].num_local_experts, []
    for seed, counts in enumerate(COUNTS[dist.get_world_size()]):
        inputs = MoEInputs.make(counts, seed, num_experts=NUM_EXPERTS, top_k=top_k, hidden=64, dtype=torch.bfloat16)
        for ids in inputs.topk_ids:
            ids[2::3] = NO_EXPERT
        local = slice(rank * num_local, (rank + 1) * num_local)
        experts = lockstep.LocalExperts.from_tensors(inputs.gate_up_proj[local], inputs.down_proj[local])
        outputs = []
        for backend in backends:
            handle = backend.dispatch(
                backend.route(counts),
                inputs.hidden_states[rank],
                inputs.topk_ids[rank].int(),
                inputs.topk_weights[rank],
            )
            output = experts(handle.hidden_states, handle.gather_index, handle.tokens_per_expert)
            outputs.append(backend.combine(output, handle))
        assert torch.equal(*outputs), counts
        whole = moe_reference(
            [rows[ids[:, 0] >= 0] for rows, ids in zip(inputs.hidden_states, inputs.topk_ids, strict=True)],
            [ids[ids[:, 0] >= 0] for ids in inputs.topk_ids],
            [weights[ids[:, 0] >= 0] for weights, ids in zip(inputs.topk_weights, inputs.topk_ids, strict=True)],
            inputs.gate_up_proj, inputs.down_proj,
        )[rank].float()  # fmt: skip
        real = outputs[0][inputs.topk_ids[rank][:, 0] >= 0].float()
        outcomes.append(whole.numel() == 0 or float((real - whole).abs().max() / whole.abs().max()) < 2e-2)
    return outcomes


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("num_ranks", "top_k"), [(2, 2), (4, 1), (4, 3)])
def test_uneven_and_idle_ranks_get_the_bits_of_the_all_to_all(num_ranks, top_k):
    assert all(all(outcomes) for outcomes in run_ranks(num_ranks, exchange, top_k))


def generate(path, name):
    register()
    model = lockstep.from_pretrained(path, dispatcher=name, dtype=torch.bfloat16)
    prompt = torch.arange(1, 6)[None]
    with lockstep.join(model):
        return [
            model.generate(prompt + number, max_new_tokens=6, do_sample=False).tolist()
            for number in range(3 if dist.get_rank() == 0 else 1)
        ]


@pytest.mark.ranks(2)
def test_a_model_generates_through_it_on_uneven_ranks(tmp_path):
    path = str(make_tiny(tmp_path / "tiny", num_layers=2))
    through = run_ranks(2, generate, path, "deepep")
    assert [len(texts) for texts in through] == [3, 1]
    assert through == run_ranks(2, generate, path, "alltoall")


def load_in_float32(path):
    register()
    model = lockstep.from_pretrained(path, dispatcher="deepep", dtype=torch.float32)
    with pytest.raises(ConfigurationError, match="'deepep' cannot carry"), lockstep.join(model):
        pass


@pytest.mark.ranks(2)
def test_rows_in_float32_are_refused_by_name(tmp_path):
    run_ranks(2, load_in_float32, str(make_tiny(tmp_path / "tiny", num_layers=2)))
