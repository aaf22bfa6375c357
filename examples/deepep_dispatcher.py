"""MoE exchange over DeepEP's `Buffer` in normal mode, within one host or across hosts, as the dispatcher "deepep".

    import deepep_dispatcher  # registers it; on every rank
    model = lockstep.from_pretrained(path, dispatcher="deepep", dtype=torch.bfloat16)

Written against the sources of DeepEP 2.1.0, which keeps the `Buffer` of 1.2. It has run on CPUs with a stand-in
of the same signatures (tests/deepep_stand_in.py), but never with DeepEP itself.
"""

from typing import Any

import deep_ep
import torch
import torch.distributed as dist

import lockstep
from lockstep.dispatch.base import NO_EXPERT


class DeepEPDispatcher(lockstep.CollectiveDispatcher):
    """Each row once to each rank that holds one of its experts; sums come back in rank order, in float32.

    DeepEP's own time limit applies to a missing rank; `deadline_s` has no effect inside its kernels.
    """

    name = "deepep"

    def __init__(self, process_group: dist.ProcessGroup, shape: lockstep.ExpertsShape) -> None:
        super().__init__(process_group, shape.num_experts)
        self.abilities = lockstep.Abilities(dtypes=(torch.bfloat16,))
        row_bytes = shape.hidden_size * torch.bfloat16.itemsize
        configs = [
            get(self.num_ranks) for get in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config)
        ]
        self._buffer = deep_ep.Buffer(
            process_group,
            num_nvl_bytes=max(config.get_nvl_buffer_size_hint(row_bytes, self.num_ranks) for config in configs),
            num_rdma_bytes=max(config.get_rdma_buffer_size_hint(row_bytes, self.num_ranks) for config in configs),
        )

    def send_rows(
        self, route: lockstep.Route, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """See `CollectiveDispatcher.send_rows`."""
        if len(rows) == 0:  # send one row to no expert: UCCL's `Buffer`, of the same interface, refuses empty tensors
            rows, topk_ids, topk_weights = (
                each.new_full((1, each.shape[1]), value)
                for each, value in ((rows, 0), (topk_ids, NO_EXPERT), (topk_weights, 0))
            )
        topk_idx = topk_ids.to(deep_ep.topk_idx_t).contiguous()
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(
            topk_idx, self.num_experts
        )
        received, local_ids, weights, _, handle, _ = self._buffer.dispatch(
            rows.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights.float().contiguous(),
        )
        # DeepEP numbers this rank's experts from 0 and gives -1 for all others, which is NO_EXPERT too.
        ids = torch.where(local_ids < 0, NO_EXPERT, local_ids + self.rank * self.num_local_experts)
        return received, ids, weights, handle

    def send_sums(self, sums: torch.Tensor, handle: lockstep.DispatchHandle) -> torch.Tensor:
        """See `CollectiveDispatcher.send_sums`."""
        summed, _, _ = self._buffer.combine(sums, handle.own)
        return summed[: handle.route.sizes[self.rank]]


lockstep.register_dispatcher("deepep", lambda group, shape, options: DeepEPDispatcher(group, shape))
