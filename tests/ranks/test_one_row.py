"""One row in all: a slice of it counts as contiguous wherever it begins, and dtypes have to begin at their own size."""

import itertools

import pytest
import torch
import torch.distributed as dist

from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.choose import DispatcherOptions, make_dispatcher
from lockstep.moe.experts import LocalExperts
from lockstep.moe.reference import moe_reference
from lockstep.testing import MoEInputs, run_ranks

CASES = list(
    itertools.product(
        ("allgather", "alltoall"),
        ((1, 0), (0, 1), (1, 1)),
        (1, 2, 3, 5),
        (15, 16, 17),
        (torch.float32, torch.bfloat16),
        (torch.int32, torch.int64),
        (torch.float32, torch.bfloat16),
    )
)


def run_cases():
    rank, wrong = dist.get_rank(), []
    for case in CASES:
        backend, counts, top_k, hidden, dtype, ids_dtype, weights_dtype = case
        inputs = MoEInputs.make(counts, hidden, num_experts=8, top_k=top_k, hidden=hidden, dtype=dtype)
        weights = [weights.to(weights_dtype) for weights in inputs.topk_weights]
        local = slice(rank * 4, rank * 4 + 4)
        experts = LocalExperts.from_tensors(inputs.gate_up_proj[local], inputs.down_proj[local])
        expected = moe_reference(inputs.hidden_states, inputs.topk_ids, weights, inputs.gate_up_proj, inputs.down_proj)[
            rank
        ].float()
        try:
            shape = ExpertsShape(8, hidden, top_k, dtype)
            dispatcher = make_dispatcher(backend, dist.group.WORLD, shape, DispatcherOptions(deadline_s=5.0))
            ids = inputs.topk_ids[rank].to(ids_dtype)
            handle = dispatcher.dispatch(dispatcher.route(counts), inputs.hidden_states[rank], ids, weights[rank])
            rows = experts(handle.hidden_states, handle.gather_index, handle.tokens_per_expert)
            output = dispatcher.combine(rows, handle).float()
        except RuntimeError as error:  # on every rank: all of them received the row
            wrong.append((case, str(error)))
            continue
        limit = 1e-5 if dtype == torch.float32 else 3e-2
        if output.shape != expected.shape or not torch.allclose(output, expected, rtol=limit, atol=limit):
            wrong.append((case, "other values"))
    return wrong


@pytest.mark.ranks(2)
def test_every_dtype_width_and_backend():
    assert run_ranks(2, run_cases) == [[], []]
