"""The one interface of all backends that bring tokens to their experts and back, and what each says of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lockstep.errors import ConfigurationError

NO_EXPERT = -1
"""In `topk_ids`: this row goes to no expert, and loads no rank."""


@dataclass(frozen=True)
class Abilities:
    """What a backend declares of itself. All take uneven rows, zero included, and give the same bits every time.

    Attributes:
        cuda_graph: dispatch and combine may be captured and replayed with other counts.
        dtypes: of the hidden states.
        max_rows_per_rank: most rows of one rank in one call; None where only memory limits it.
    """

    cuda_graph: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    max_rows_per_rank: int | None = None


@dataclass
class DispatchHandle:
    """What arrived at this rank, and what `combine` needs to send the results back.

    Attributes:
        hidden_states: received rows, each at most once, `[received, hidden]`.
        gather_index: the row of each (row, local expert) pair, pairs ordered by expert, `[pairs]`, int64.
        tokens_per_expert: pairs of each local expert, `[num_local_experts]`, int64.
        pair_weights: routing weight of each pair, `[pairs]`, float32.
        sizes: rows that each rank sent, `[ranks]`.
        state: the backend's own.
        backend: name of the backend that made it, where a dispatcher has several.
    """

    hidden_states: torch.Tensor
    gather_index: torch.Tensor
    tokens_per_expert: torch.Tensor
    pair_weights: torch.Tensor
    sizes: tuple[int, ...]
    state: Any = None
    backend: str = ""


class Dispatcher(Protocol):
    """Brings every row to the ranks that hold its experts, and the weighted sums back."""

    name: str
    abilities: Abilities
    num_experts: int
    num_local_experts: int

    def dispatch(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, sizes: Sequence[int]
    ) -> DispatchHandle:
        """Send this rank's rows to their experts' ranks. Collective.

        Args:
            hidden_states: `[sizes[rank], hidden]`.
            topk_ids: global expert of each row's choices, `[sizes[rank], top_k]`, int64; `NO_EXPERT` for none.
            topk_weights: their weights, `[sizes[rank], top_k]`.
            sizes: rows of every rank, `[ranks]`, equal on all ranks.
        """
        ...

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Send the results back: weighted, summed in rank order in float32, in this rank's row order. Collective.

        Args:
            expert_output: one row per pair, `[pairs, hidden]`, in the order of `handle.gather_index`, not weighted.
            handle: of the same dispatch.

        Returns:
            `[sizes[rank], hidden]`.
        """
        ...


def pairs_of_local_experts(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, first_expert: int, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """List the (row, expert) pairs that this rank computes, ordered by expert and then by row.

    Args:
        topk_ids: global experts of the received rows, `[received, top_k]`.
        topk_weights: their weights, `[received, top_k]`.
        first_expert: global number of this rank's first expert.
        num_local_experts: how many it holds.

    Returns:
        `gather_index [pairs]`, `tokens_per_expert [num_local_experts]`, `pair_weights [pairs]` in float32.
    """
    top_k = topk_ids.shape[1]
    local = topk_ids.reshape(-1) - first_expert
    position = ((local >= 0) & (local < num_local_experts)).nonzero().squeeze(1)
    expert = local[position]
    order = torch.argsort(expert, stable=True)
    position = position[order]
    tokens_per_expert = torch.bincount(expert, minlength=num_local_experts)
    return position // top_k, tokens_per_expert, topk_weights.reshape(-1)[position].float()


def sum_pairs(
    expert_output: torch.Tensor, gather_index: torch.Tensor, pair_weights: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Weight every pair and sum the pairs of each row in the order of the experts, in float32.

    Args:
        expert_output: `[pairs, hidden]`.
        gather_index: row of each pair, `[pairs]`.
        pair_weights: `[pairs]`.
        num_rows: rows of the result.

    Returns:
        `[num_rows, hidden]`, float32. The same inputs give the same bits.
    """
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


def check_experts(num_experts: int, num_ranks: int) -> int:
    """Return the experts per rank.

    Raises:
        ConfigurationError: if the ranks do not divide the experts.
    """
    if num_experts < 1 or num_experts % num_ranks:
        raise ConfigurationError(f"{num_experts} experts cannot be divided evenly among {num_ranks} ranks")
    return num_experts // num_ranks
