"""Dispatchers over collectives, which run eagerly: their common base, `allgather` and `alltoall`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lockstep.coordination.waits import DEADLINE_S
from lockstep.dispatch.base import Abilities, Dispatcher, DispatchHandle, Route, check_experts
from lockstep.dispatch.collectives import all_gatherv, all_to_allv, check_sizes, reduce_scatterv, view_as
from lockstep.errors import ConfigurationError


class CollectiveDispatcher(Dispatcher):
    """Base of dispatchers that run eagerly, with row counts known to the host: derive from it and move the rows.

    A subclass sets the class attribute `name` and writes `send_rows` and `send_sums`; it replaces `abilities` if it
    carries fewer dtypes. This class orders the pairs by expert, weights them, and sums those of each row.

    Args:
        process_group: the expert-parallel ranks.
        num_experts: over all ranks, which must divide it.
        deadline_s: longest wait for any rank, in seconds; the subclass must keep it.

    Attributes:
        abilities: what the backend can do; the default is all of `Abilities`' dtypes.
        rank: this rank in the group, of `num_ranks`.
        num_local_experts: experts per rank; expert `e` is on rank `e // num_local_experts`.

    Example:
        `examples/deepep_dispatcher.py` wraps another library's all-to-all.
    """

    def __init__(self, process_group: dist.ProcessGroup, num_experts: int, *, deadline_s: float = DEADLINE_S) -> None:
        self.process_group, self.deadline_s = process_group, deadline_s
        self.rank, self.num_ranks = process_group.rank(), process_group.size()
        self.abilities = Abilities()
        self.num_experts = num_experts
        self.num_local_experts = check_experts(num_experts, self.num_ranks)

    def route(self, sizes: Sequence[int], limit: int | None = None, *, capture: bool = False) -> Route:
        """See `Dispatcher.route`."""
        check_sizes("route", sizes, self.num_ranks)
        if capture:
            raise ConfigurationError(f"dispatcher {self.name!r} waits on the host, so it cannot be captured")
        return Route(self.name, tuple(sizes), limit or max(1, *sizes))

    def dispatch(
        self, route: Route, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
        num_tokens: torch.Tensor | None = None,
    ) -> DispatchHandle:  # fmt: skip
        """See `Dispatcher.dispatch`. The number of tokens was agreed, so it is not read from the device."""
        own = slice(route.sizes[self.rank] if num_tokens is not None else None)
        rows, ids, weights, sent = self.send_rows(route, hidden_states[own], topk_ids[own], topk_weights[own])
        # The pairs of this rank's experts, in the order of expert and row.
        local = ids.reshape(-1) - self.rank * self.num_local_experts
        position = ((local >= 0) & (local < self.num_local_experts)).nonzero().squeeze(1)
        position = position[torch.argsort(local[position], stable=True)]
        tokens_per_expert = torch.bincount(local[position], minlength=self.num_local_experts).to(torch.int32)
        expert_offsets = torch.nn.functional.pad(tokens_per_expert.cumsum(0, dtype=torch.int32), (1, 0))
        gather_index = (position // ids.shape[1]).to(torch.int32)
        return DispatchHandle(
            route, hidden_states.shape[0], rows, None, gather_index, tokens_per_expert, expert_offsets,
            weights.reshape(-1)[position].float(), position.shape[0], sent,
        )  # fmt: skip

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        rows = handle.hidden_states
        partial = sum_pairs(expert_output, handle.gather_index, handle.pair_weights, rows.shape[0]).to(rows.dtype)
        sums = self.send_sums(partial, handle)
        return torch.nn.functional.pad(sums, (0, 0, 0, handle.num_rows - sums.shape[0]))

    def send_rows(
        self, route: Route, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Send each row to the ranks of its experts. Collective.

        Args:
            route: of the chunk; `route.sizes` are the rows of every rank, zero included.
            rows: this rank's, `[route.sizes[rank], hidden]`.
            topk_ids: their global experts, `[rows, top_k]`, int32 or int64; `NO_EXPERT`, -1, for none.
            topk_weights: their routing weights, `[rows, top_k]`.

        Returns:
            The rows that arrived, `[received, hidden]`; their global expert ids and routing weights,
            `[received, top_k]`, where ids of other ranks' experts are ignored; and `DispatchHandle.own`.
        """
        raise NotImplementedError

    def send_sums(self, sums: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Send each received row's weighted sum over this rank's experts back to its source. Collective.

        Args:
            sums: `[received, hidden]`, in the dtype and the order of the rows that `send_rows` returned.
            handle: of the same dispatch.

        Returns:
            This rank's rows, each summed over all ranks in rank order in float32, `[rows, hidden]`.
        """
        raise NotImplementedError


def sum_pairs(
    expert_output: torch.Tensor, gather_index: torch.Tensor, pair_weights: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Sum each row's weighted pairs in the order of the experts, in float32, `[num_rows, hidden]`."""
    weighted = expert_output.float() * pair_weights.unsqueeze(1)
    total = weighted.new_zeros((num_rows, expert_output.shape[1]))
    if weighted.device.type == "cpu":
        return total.index_add_(0, gather_index, weighted)  # sequential on the CPU, atomics in any order on a GPU
    # Each row's pairs one after another: pass i adds the i-th pair of every row, so no two additions meet.
    order = torch.argsort(gather_index, stable=True)
    rows = gather_index[order]
    pairs_per_row = torch.bincount(rows, minlength=num_rows)
    start = torch.cumsum(pairs_per_row, 0) - pairs_per_row
    turn = torch.arange(len(rows), device=rows.device) - start[rows]
    for i in range(int(pairs_per_row.max()) if len(rows) else 0):
        chosen = turn == i
        total[rows[chosen]] += weighted[order[chosen]]
    return total


class AllGatherDispatcher(CollectiveDispatcher):
    """Every rank receives all rows, in two collectives of known sizes: best when most rows go to most ranks anyway."""

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


class _Sent(NamedTuple):
    """The row of each copy sent, ordered by destination, and the number of copies to and from each rank."""

    rows: torch.Tensor
    send_sizes: list[int]
    recv_sizes: list[int]


class AllToAllDispatcher(CollectiveDispatcher):
    """Sends each row once to each rank with one of its experts: fewest bytes, but one extra exchange of counts.

    Rows arrive ordered by source and row; sums are in rank order.
    """

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
