"""The MoE layer of all ranks in one process, written for readability; the fast layers are tested against it."""

from collections.abc import Sequence

import torch


def moe_reference(
    hidden_states: Sequence[torch.Tensor],
    topk_ids: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor],
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> list[torch.Tensor]:
    """Return what every rank must get, `[ranks][num_tokens of the rank, hidden]`; experts lie in contiguous shares."""
    num_ranks, num_experts = len(hidden_states), gate_up_proj.shape[0]
    experts_per_rank = num_experts // num_ranks
    outputs = []
    for rows, ids, weights in zip(hidden_states, topk_ids, topk_weights, strict=True):
        output = torch.zeros_like(rows)
        for token in range(rows.shape[0]):
            total = torch.zeros(rows.shape[1])
            for rank in range(num_ranks):
                # On the computing rank: this token's experts there, weighted, added in the order of their numbers.
                partial = torch.zeros(rows.shape[1])
                for expert in range(rank * experts_per_rank, (rank + 1) * experts_per_rank):
                    for choice in (ids[token] == expert).nonzero().flatten().tolist():
                        gate, up = (gate_up_proj[expert] @ rows[token]).chunk(2)
                        result = down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                        partial += weights[token, choice].float() * result.float()
                # One row per (token, rank) travels back in the model's dtype; the token's own rank adds in rank order.
                total += partial.to(rows.dtype).float()
            output[token] = total.to(rows.dtype)
        outputs.append(output)
    return outputs
