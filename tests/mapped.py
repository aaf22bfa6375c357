"""What stands in on a CPU for the dispatcher that reads and writes peers' memory, and for its experts' kernels."""

from dataclasses import replace

import torch

from dispatch_rounds import round_to_fp8, undo_scales
from lockstep.dispatch.base import Abilities, Route
from lockstep.dispatch.choose import register_dispatcher
from lockstep.dispatch.collective_dispatchers import AllGatherDispatcher
from lockstep.moe.experts import LocalExperts


class MappedDispatcher(AllGatherDispatcher):
    """Leaves the counts to the device, rows in fp8 if so wished, takes so many rows at a time, like the GPU's."""

    def __init__(self, process_group, shape, options):
        super().__init__(process_group, shape.num_experts, deadline_s=options.deadline_s)
        self.name, self.fp8, self.calls, self.capacity = "nvlink", options.fp8, 0, options.max_rows_per_rank or 4096
        self.abilities = Abilities(max_rows_per_rank=self.capacity, counts_on_device=True)

    def route(self, sizes, limit=None, *, capture=False):
        chunk_size = min(limit or self.capacity, self.capacity)
        return Route(self.name, tuple(sizes), chunk_size, captures=max(sizes) <= chunk_size)

    def dispatch(self, *arguments):
        self.calls += 1
        handle = super().dispatch(*arguments)
        rows, scales = round_to_fp8(handle.hidden_states) if self.fp8 else (handle.hidden_states, None)
        return replace(handle, hidden_states=rows, scales=scales, num_pairs=None, own=handle)

    def combine(self, expert_output, handle):
        return super().combine(expert_output, handle.own)


def on_device(self, hidden_states, scales, gather_index, expert_offsets, rows_per_expert):
    """What the GPU's kernels compute, from scales and offsets that the host has not looked at."""
    assert (scales is None) == (hidden_states.dtype is torch.bfloat16)
    rows = undo_scales(hidden_states, scales).to(torch.bfloat16)
    return self(rows, gather_index, expert_offsets.diff())


def stand_in():
    """Let models of this process run by these, and return the list of dispatchers that will be made."""
    made = []

    def make(process_group, shape, options):
        made.append(MappedDispatcher(process_group, shape, options))
        return made[-1]

    register_dispatcher("nvlink", make, carries_fp8=True)
    LocalExperts.on_device = on_device
    return made
