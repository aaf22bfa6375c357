"""Send each row once to each rank that holds one of its experts: fewest bytes, but one extra exchange of counts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lockstep.dispatch.base import CollectiveDispatcher, DispatchHandle, Route
from lockstep.dispatch.collectives import all_to_allv, view_as


class _Sent(NamedTuple):
    """The row of each copy sent, ordered by destination, and the number of copies to and from each rank."""

    rows: torch.Tensor
    send_sizes: list[int]
    recv_sizes: list[int]


class AllToAllDispatcher(CollectiveDispatcher):
    """Ragged all-to-all: counts, rows, results. Rows arrive ordered by source and row; sums are in rank order."""

    name = "alltoall"

    def send_rows(
        self, route: Route, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Sent]:
        """See `CollectiveDispatcher.send_rows`."""
        needed, ones = ranks_needed(topk_ids, self.num_local_experts, self.num_ranks), [1] * self.num_ranks
        counts = needed.sum(dim=0)
        recv_sizes = self._exchange(route, counts[:, None], ones, ones)[:, 0].tolist() or [0] * self.num_ranks
        # Sorted by destination, then by row, for bitwise reproducible results. `nonzero` waits for the GPU, so it
        # comes after a wait that has a deadline.
        copies = needed.t().nonzero()[:, 1]
        sent = _Sent(copies, counts.tolist(), recv_sizes)
        # Ids and weights travel in the same message, as extra columns in the dtype of the hidden states.
        routing = torch.cat([topk_ids.to(torch.int32), topk_weights.float().view(torch.int32)], dim=1)[copies]
        hidden, columns = rows.shape[1], routing.shape[1] * 4 // rows.element_size()
        packed = rows.new_empty((len(copies), hidden + columns))
        torch.index_select(rows, 0, copies, out=packed[:, :hidden])
        packed[:, hidden:] = routing.view(rows.dtype)
        received = self._exchange(route, packed, sent.send_sizes, recv_sizes)
        ids, weights = view_as(received[:, hidden:], torch.int32).chunk(2, dim=1)
        return received[:, :hidden], ids, view_as(weights, torch.float32), sent

    def send_sums(self, sums: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `CollectiveDispatcher.send_sums`."""
        sent: _Sent = handle.own
        parts = self._exchange(handle.route, sums, sent.recv_sizes, sent.send_sizes, host_waits=False)
        total = parts.new_zeros((handle.num_rows, parts.shape[1]), dtype=torch.float32)
        both = torch.split(sent.rows, sent.send_sizes), torch.split(parts, sent.send_sizes)
        for rows, part in zip(*both, strict=True):
            # Rank by rank, each row at most once per rank: this fixes the order of additions, even on a GPU.
            total.index_add_(0, rows, part.float())
        return total.to(sums.dtype)

    def _exchange(
        self, route: Route, rows: torch.Tensor, send_sizes: list[int], recv_sizes: list[int], *, host_waits: bool = True
    ) -> torch.Tensor:
        if sum(route.sizes) == 0:  # agreed: no rank sends anything
            return rows[:0]
        return all_to_allv(rows, send_sizes, recv_sizes, self.process_group, self.deadline_s, host_waits=host_waits)


def ranks_needed(topk_ids: torch.Tensor, num_local_experts: int, num_ranks: int) -> torch.Tensor:
    """Return which ranks hold an expert of each row, `[num_rows, num_ranks]` bool; negative ids mean no expert."""
    owner = torch.div(topk_ids, num_local_experts, rounding_mode="floor")
    return (owner.unsqueeze(2) == torch.arange(num_ranks, device=topk_ids.device)).any(dim=1)


def expected_ranks_per_row(num_experts: int, top_k: int, num_ranks: int) -> float:
    """Return the expected number of ranks that hold a row's experts, if all experts are equally likely."""
    elsewhere = math.comb(num_experts - num_experts // num_ranks, top_k) / math.comb(num_experts, top_k)
    return num_ranks * (1 - elsewhere)
