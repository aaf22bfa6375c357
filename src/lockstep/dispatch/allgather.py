"""Every rank receives all rows and runs its own experts on them: best when most rows go to most ranks anyway."""

import torch

from lockstep.dispatch.base import CollectiveDispatcher, DispatchHandle, Route
from lockstep.dispatch.collectives import all_gatherv, reduce_scatterv


class AllGatherDispatcher(CollectiveDispatcher):
    """Ragged all-gather, then ragged reduce-scatter: two collectives per chunk, with known sizes."""

    name = "allgather"

    def send_rows(
        self, route: Route, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """See `CollectiveDispatcher.send_rows`."""
        rows, ids, weights = all_gatherv(
            [rows, topk_ids, topk_weights], route.sizes, self.process_group, self.deadline_s
        )
        return rows, ids, weights, None

    def send_sums(self, sums: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `CollectiveDispatcher.send_sums`."""
        return reduce_scatterv(sums, handle.route.sizes, self.process_group, self.deadline_s, host_waits=False)
