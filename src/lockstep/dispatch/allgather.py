"""All ranks see all rows, compute their own experts on them, and sum: best where most rows go to most ranks anyway."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lockstep.dispatch.base import Abilities, DispatchHandle, check_experts, pairs_of_local_experts, sum_pairs
from lockstep.dispatch.collectives import DEADLINE_S, all_gatherv, reduce_scatterv


class AllGatherDispatcher:
    """Ragged all-gather, then ragged reduce-scatter. Two collectives per chunk, sizes known beforehand.

    Args:
        process_group: the expert-parallel ranks; left open.
        num_experts: experts of the layer over all ranks; the ranks must divide it.
        deadline_s: longest wait for any rank, in seconds.
    """

    name = "allgather"

    def __init__(self, process_group: dist.ProcessGroup, num_experts: int, *, deadline_s: float = DEADLINE_S) -> None:
        self.abilities = Abilities()
        self.num_experts = num_experts
        self.num_local_experts = check_experts(num_experts, process_group.size())
        self._group = process_group
        self._first_expert = process_group.rank() * self.num_local_experts
        self._deadline_s = deadline_s

    def dispatch(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, sizes: Sequence[int]
    ) -> DispatchHandle:
        """See `Dispatcher.dispatch`. Received rows are all ranks' rows in rank order, `[sum(sizes), hidden]`."""
        rows, ids, weights = all_gatherv([hidden_states, topk_ids, topk_weights], sizes, self._group, self._deadline_s)
        pairs = pairs_of_local_experts(ids, weights, self._first_expert, self.num_local_experts)
        return DispatchHandle(rows, *pairs, tuple(sizes))

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        rows = handle.hidden_states
        partial = sum_pairs(expert_output, handle.gather_index, handle.pair_weights, rows.shape[0])
        sums = partial.to(rows.dtype)
        return reduce_scatterv(sums, handle.sizes, self._group, self._deadline_s, host_waits=False)
