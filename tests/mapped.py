"""What stands in on a CPU for the dispatcher that reads and writes peers' memory, and for its experts' kernels."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from dispatch_rounds import round_to_fp8, undo_scales
from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.models import parallel
from lockstep.moe.experts import LocalExperts


class MappedDispatcher(AllGatherDispatcher):
    """Leaves the counts to the device, rows in fp8 if so wished, like the GPU's."""

    name = "nvlink"

    def __init__(self, process_group, num_experts, fp8, **options):
        super().__init__(process_group, num_experts)
        self.fp8, self.options, self.calls = fp8, options, 0

    def dispatch(self, *arguments):
        self.calls += 1
        handle = super().dispatch(*arguments)
        rows, scales = round_to_fp8(handle.hidden_states) if self.fp8 else (handle.hidden_states, None)
        offsets = torch.cat([torch.zeros(1), handle.tokens_per_expert.cumsum(0)]).to(torch.int32)
        state = SimpleNamespace(expert_offsets=offsets, scales=scales, sent=handle)
        return replace(handle, hidden_states=rows, state=state)

    def combine(self, expert_output, handle):
        return super().combine(expert_output, handle.state.sent)


def on_device(self, hidden_states, scales, gather_index, expert_offsets, rows_per_expert):
    """What the GPU's kernels compute, from scales and offsets that the host has not looked at."""
    assert (scales is None) == (hidden_states.dtype is torch.bfloat16)
    rows = undo_scales(hidden_states, scales).to(torch.bfloat16)
    return self(rows, gather_index, expert_offsets.diff().long())


def stand_in():
    """Let models of this process run by these, and return the list of dispatchers that will be made."""
    made = []

    def make(process_group, *, num_experts, fp8=False, **options):
        made.append(MappedDispatcher(process_group, num_experts, fp8, **options))
        return made[-1]

    parallel.make_mapped_dispatcher = make
    LocalExperts.on_device = on_device
    return made
