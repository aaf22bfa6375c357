"""All ranks see all rows, compute their own experts on them, and sum: best where most rows go to most ranks anyway."""

import torch
import torch.distributed as dist

from lockstep.coordination.group_waits import DEADLINE_S
from lockstep.dispatch.base import CollectiveDispatcher, DispatchHandle, Route, pairs_of_local_experts, sum_pairs
from lockstep.dispatch.collectives import all_gatherv, reduce_scatterv


class AllGatherDispatcher(CollectiveDispatcher):
    """Ragged all-gather, then ragged reduce-scatter. Two collectives per chunk, sizes known beforehand.

    Args:
        process_group: the expert-parallel ranks; left open.
        num_experts: experts of the layer over all ranks; the ranks must divide it.
        deadline_s: longest wait for any rank, in seconds.
    """

    def __init__(self, process_group: dist.ProcessGroup, num_experts: int, *, deadline_s: float = DEADLINE_S) -> None:
        super().__init__("allgather", process_group.rank(), process_group.size(), num_experts)
        self._group = process_group
        self._deadline_s = deadline_s

    def dispatch(
        self,
        route: Route,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        num_tokens: torch.Tensor | None = None,
    ) -> DispatchHandle:
        """See `Dispatcher.dispatch`. Received rows are all ranks' rows in rank order, `[sum(sizes), hidden]`."""
        own = self._tokens(route, num_tokens, hidden_states, topk_ids, topk_weights)
        rows, ids, weights = all_gatherv(own, route.sizes, self._group, self._deadline_s)
        pairs = pairs_of_local_experts(ids, weights, self._first_expert, self.num_local_experts)
        return DispatchHandle(route, hidden_states.shape[0], rows, None, *pairs, pairs[0].shape[0])

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        rows = handle.hidden_states
        partial = sum_pairs(expert_output, handle.gather_index, handle.pair_weights, rows.shape[0]).to(rows.dtype)
        sums = reduce_scatterv(partial, handle.route.sizes, self._group, self._deadline_s, host_waits=False)
        return self._full(sums, handle.num_rows)
