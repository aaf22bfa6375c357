"""Uneven inputs for all ranks from one seed, so that every rank can check itself against the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def uneven_counts(num_ranks: int, seed: int, largest: int = 20) -> list[int]:
    """Return uneven token counts from a seed, `[num_ranks]`: zeros, ones and counts up to `largest` are among them."""
    choices = torch.tensor([0, 0, 1, 2, 3, largest // 2, largest])
    picks = torch.randint(len(choices), (num_ranks,), generator=torch.Generator().manual_seed(seed))
    counts: list[int] = choices[picks].tolist()
    return counts


@dataclass(frozen=True)
class MoEInputs:
    """Every rank's inputs of an MoE layer, and the weights of all experts.

    Attributes:
        hidden_states: `[ranks][num_tokens, hidden]`.
        topk_ids: `[ranks][num_tokens, top_k]`, int64, distinct within a row.
        topk_weights: `[ranks][num_tokens, top_k]`, float32, positive, summing to 1.
        gate_up_proj: `[num_experts, 2 * intermediate, hidden]`.
        down_proj: `[num_experts, hidden, intermediate]`.
    """

    hidden_states: list[torch.Tensor]
    topk_ids: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    @classmethod
    def make(
        cls, counts: Sequence[int], seed: int = 0, *, num_experts: int = 8, top_k: int = 2, hidden: int = 16,
        intermediate: int = 24, dtype: torch.dtype = torch.float32,
    ) -> "MoEInputs":  # fmt: skip
        """Make inputs from a seed, the same on every rank that passes the same arguments. Counts may be 0."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        rows, ids, weights = [], [], []
        for count in counts:
            rows.append(normal(count, hidden).to(dtype))
            top = torch.topk(torch.softmax(normal(count, num_experts), dim=-1), top_k, dim=-1)
            ids.append(top.indices)
            weights.append(top.values / top.values.sum(dim=-1, keepdim=True))
        gate_up = (normal(num_experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype)
        down = (normal(num_experts, hidden, intermediate) / intermediate**0.5).to(dtype)
        return cls(rows, ids, weights, gate_up, down)
