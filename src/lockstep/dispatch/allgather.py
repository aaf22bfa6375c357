"""All ranks see all rows, compute their own experts on them, and sum: best where most rows go to most ranks anyway."""

import torch

from lockstep.dispatch.base import CollectiveDispatcher, DispatchHandle, Route, pairs_of_local_experts, sum_pairs
from lockstep.dispatch.collectives import all_gatherv, reduce_scatterv


class AllGatherDispatcher(CollectiveDispatcher):
    """Ragged all-gather, then ragged reduce-scatter. Two collectives per chunk, sizes known beforehand."""

    name = "allgather"

    def dispatch(
        self, route: Route, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
        num_tokens: torch.Tensor | None = None,
    ) -> DispatchHandle:  # fmt: skip
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
        return torch.nn.functional.pad(sums, (0, 0, 0, handle.num_rows - sums.shape[0]))
