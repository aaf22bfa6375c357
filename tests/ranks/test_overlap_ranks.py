"""A layer's chunks with two dispatches under way, over real ranks: the same bits, and all ranks call alike."""

import pytest
import torch
import torch.distributed as dist

from lockstep.coordination.forward_context import ForwardContext, set_forward_context
from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.dispatch.alltoall import AllToAllDispatcher
from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.config import ParallelConfig
from lockstep.metadata.dp_metadata import DPMetadata
from lockstep.moe.experts import LocalExperts
from lockstep.moe.layer import MoELayer
from lockstep.moe.overlap import Overlap, call_order
from lockstep.testing import MoEInputs, record_collectives, run_ranks

COUNTS = {2: [[7, 3], [0, 9], [5, 0], [1, 1]], 4: [[9, 0, 2, 5], [0, 0, 0, 6], [3, 3, 3, 3]]}


class Written:
    """A dispatcher that writes down its calls, and is told of the experts'."""

    def __init__(self, dispatcher, calls):
        self.dispatcher, self.calls = dispatcher, calls
        self.name, self.abilities = dispatcher.name, dispatcher.abilities
        self.num_experts, self.num_local_experts = dispatcher.num_experts, dispatcher.num_local_experts
        self.dispatched, self.combined = 0, 0

    def dispatch(self, *arguments):
        self.calls.append(("dispatch", self.dispatched))
        self.dispatched += 1
        return self.dispatcher.dispatch(*arguments)

    def combine(self, *arguments):
        self.calls.append(("combine", self.combined))
        self.combined += 1
        return self.dispatcher.combine(*arguments)


def run_cases(fails):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = ParallelConfig(ranks, rank)
    found = []
    for kind in (AllGatherDispatcher, AllToAllDispatcher):
        for counts in COUNTS[ranks]:
            inputs = MoEInputs.make(counts)
            per_rank = 8 // ranks
            local = slice(rank * per_rank, (rank + 1) * per_rank)
            calls, outputs, logs = [], [], []

            def experts(*arguments, calls=calls, local=local, inputs=inputs):
                number = sum(part == "experts" for part, _ in calls)
                calls.append(("experts", number))
                if fails and rank == 1 and number == 1:
                    raise ValueError("an expert broke")
                return LocalExperts.from_tensors(inputs.gate_up_proj[local], inputs.down_proj[local])(*arguments)

            plan = ChunkPlan(counts, max_chunk_size_per_rank=2, rank=rank)
            mine = (inputs.hidden_states[rank], inputs.topk_ids[rank], inputs.topk_weights[rank])
            for overlapped in (False, True):
                calls.clear()
                dispatcher = Written(kind(dist.group.WORLD, 8), calls)
                overlap = Overlap(Written(kind(dist.group.WORLD, 8), calls), torch.device("cpu"))
                layer = MoELayer(
                    experts, dispatcher, config, hidden_size=16, top_k=2, overlap=overlap if overlapped else None
                )
                context = ForwardContext(DPMetadata.make(config, counts[rank], counts), plan)
                with set_forward_context(context), record_collectives() as log:
                    try:
                        outputs.append(layer(*mine))
                    except ValueError as error:
                        outputs.append(str(error))
                assert layer.in_step
                logs.append(list(log))
            used = overlap.dispatcher if len(plan) > 1 else dispatcher
            assert used.dispatched == len(plan)
            equal = outputs[0] == outputs[1] if fails and isinstance(outputs[0], str) else None
            if equal is None:
                # What came back from broken experts is NaN, in the same places.
                equal = torch.equal(outputs[0].nan_to_num(7), outputs[1].nan_to_num(7))
            found.append((equal, len(plan), list(calls), logs[1]))
    return found


@pytest.mark.ranks(4)
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("fails", [False, True], ids=["", "an expert breaks"])
def test_with_two_dispatches_under_way_results_are_the_same_bits_and_ranks_call_alike(num_ranks, fails):
    results = run_ranks(num_ranks, run_cases, fails)
    for cases in zip(*results, strict=True):
        assert all(equal for equal, *_ in cases)
        _, num_chunks, calls, log = cases[0]
        assert calls == call_order(num_chunks, num_chunks > 1)
        for _, _, other_calls, other_log in cases[1:]:
            assert other_calls == calls
            assert other_log == log
    assert max(num_chunks for _, num_chunks, *_ in results[0]) >= 3
