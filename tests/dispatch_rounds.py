"""One round of dispatch and combine with made-up experts, checked against a plain computation of the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.dispatch.base import NO_EXPERT, DispatchHandle


@dataclass(frozen=True)
class Round:
    """What every rank brings to one dispatch; the same on every rank that makes it with the same arguments.

    Attributes:
        hidden_states: `[ranks][num_tokens, hidden]` bfloat16.
        topk_ids: `[ranks][num_tokens, top_k]` int32, distinct within a row, some rows with `NO_EXPERT` among them.
        topk_weights: `[ranks][num_tokens, top_k]` float32.
        num_experts: of all ranks.
    """

    hidden_states: list[torch.Tensor]
    topk_ids: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    num_experts: int

    @classmethod
    def make(
        cls,
        counts: Sequence[int],
        *,
        num_experts: int,
        top_k: int,
        hidden: int,
        seed: int,
        device: torch.device | str = "cpu",
        zipf: float = 0.0,
        missing: float = 0.0,
    ) -> Round:
        """Make a round from a seed.

        Args:
            counts: tokens of every rank; 0 is allowed.
            num_experts: of all ranks.
            top_k: experts per token, at most `num_experts`.
            hidden: size of a row.
            seed: of the generator; ranks must draw on the same kind of device to get the same round.
            device: where to make it.
            zipf: expert e is chosen in proportion to `(e + 1) ** -zipf`; 0 is uniform.
            missing: share of choices replaced by `NO_EXPERT`.
        """
        generator = torch.Generator(device).manual_seed(seed)
        favour = -zipf * torch.log(torch.arange(1, num_experts + 1, device=device).float())
        rows, ids, weights = [], [], []
        for count in counts:
            rows.append(torch.randn(count, hidden, generator=generator, device=device).to(torch.bfloat16))
            # Adding Gumbel noise to log-weights and taking the largest draws without replacement.
            uniform = torch.rand(count, num_experts, generator=generator, device=device).clamp_(1e-9, 1 - 1e-7)
            choice = torch.topk(favour - torch.log(-torch.log(uniform)), top_k, dim=-1).indices.to(torch.int32)
            dropped = torch.rand(count, top_k, generator=generator, device=device) < missing
            ids.append(choice.masked_fill(dropped, NO_EXPERT))
            weights.append(torch.rand(count, top_k, generator=generator, device=device) + 0.1)
        return cls(rows, ids, weights, num_experts)

    def scale(self, expert: torch.Tensor) -> torch.Tensor:
        """Return what the made-up expert multiplies its rows by."""
        return 1.0 + expert.float() / self.num_experts


def round_to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows as they are sent in fp8: each run of 128 values by a scale that makes its largest 448, e4m3's largest.

    Args:
        rows: `[rows, hidden]`.

    Returns:
        float8_e4m3fn values `[rows, hidden]`, and float32 scales `[rows, ceil(hidden / 128)]`.
    """
    num_rows, hidden = rows.shape
    grouped = torch.nn.functional.pad(rows.float(), (0, -hidden % 128)).view(num_rows, -1, 128)
    largest = grouped.abs().amax(-1)
    # Multiplied as by the kernel: divided, values halfway between two others may fall to the other side.
    scales = torch.where(largest > 0, largest * (1 / 448), 1.0)
    values = (grouped * (1 / scales)[..., None]).to(torch.float8_e4m3fn)
    return values.view(num_rows, -1)[:, :hidden], scales


def undo_scales(rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Return rows in float32, times fp8's scales where there are any, `[rows, hidden]`."""
    if scales is None:
        return rows.float()
    return rows.float() * scales.repeat_interleave(128, dim=1)[:, : rows.shape[1]]


def made_up_experts(this: Round, handle: DispatchHandle, rank: int, num_ranks: int) -> torch.Tensor:
    """Return each pair's row times its expert's scale, `[pairs or capacity, hidden]` bfloat16, NaN beyond the pairs."""
    per_rank = this.num_experts // num_ranks
    counts = handle.tokens_per_expert.long()
    pairs = int(counts.sum())
    experts = torch.arange(per_rank, device=counts.device).repeat_interleave(counts) + rank * per_rank
    rows = undo_scales(handle.hidden_states, handle.scales)[handle.gather_index[:pairs].long()]
    output = torch.full(
        (handle.gather_index.shape[0], rows.shape[1]), float("nan"), dtype=torch.bfloat16, device=rows.device
    )
    output[:pairs] = (rows * this.scale(experts)[:, None]).to(torch.bfloat16)
    return output


def check_dispatch(this: Round, handle: DispatchHandle, rank: int, num_ranks: int, capacity: int) -> None:
    """Check every pair of a dispatch whose slots are `source * capacity + token`.

    Raises:
        AssertionError: naming the rank and what is wrong.
    """
    per_rank = this.num_experts // num_ranks
    ids = torch.cat([i.reshape(-1) for i in this.topk_ids]).long()
    weights = torch.cat([w.reshape(-1) for w in this.topk_weights])
    slots = torch.cat(
        [
            (source * capacity + torch.arange(i.shape[0], device=i.device)).repeat_interleave(i.shape[1])
            for source, i in enumerate(this.topk_ids)
        ]
    )
    mine = (ids // per_rank == rank) & (ids >= 0)
    expected = torch.bincount(ids[mine] - rank * per_rank, minlength=per_rank)
    got = handle.tokens_per_expert.long()
    if not torch.equal(expected, got):
        raise AssertionError(f"rank {rank}: tokens per expert {got.tolist()}, expected {expected.tolist()}")
    pairs = int(expected.sum())
    key = ids[mine] * (num_ranks * capacity) + slots[mine]
    order = torch.argsort(key)
    experts = torch.arange(per_rank, device=got.device).repeat_interleave(got) + rank * per_rank
    got_key = experts * (num_ranks * capacity) + handle.gather_index[:pairs].long()
    got_order = torch.argsort(got_key)
    if not torch.equal(key[order], got_key[got_order]):
        raise AssertionError(f"rank {rank}: the pairs name other slots than were sent")
    if not torch.equal(weights[mine][order], handle.pair_weights[:pairs][got_order]):
        raise AssertionError(f"rank {rank}: the pairs' weights are not those that were sent")
    sent = torch.cat(this.hidden_states).float()
    starts = torch.tensor([0, *(len(h) for h in this.hidden_states)], device=sent.device).cumsum(0)
    used = torch.unique(slots[mine])
    rows, truth = (
        undo_scales(handle.hidden_states, handle.scales)[used],
        sent[starts[used // capacity] + used % capacity],
    )
    # fp8 e4m3 keeps 3 bits after the first: half a step is 1/16 of a value, and 2**-10 of the largest below normals.
    limit = 0.0 if handle.scales is None else truth.abs() / 16 + truth.abs().amax(1, keepdim=True) / 400
    if not bool(((rows - truth).abs() <= limit).all()):
        raise AssertionError(f"rank {rank}: received rows differ by {float((rows - truth).abs().max())}")


def check_combine(this: Round, output: torch.Tensor, rank: int, num_ranks: int, fp8: bool = False) -> None:
    """Check a combined result of `made_up_experts`.

    Raises:
        AssertionError: naming the rank and the largest difference.
    """
    per_rank = this.num_experts // num_ranks
    hidden, ids, weights = this.hidden_states[rank].float(), this.topk_ids[rank].long(), this.topk_weights[rank]
    expected, size = torch.zeros_like(hidden), torch.zeros_like(hidden)
    for peer in range(num_ranks):
        factor = torch.where((ids // per_rank == peer) & (ids >= 0), weights * this.scale(ids), 0.0).sum(1)
        expected += hidden * factor[:, None]
        size += (hidden * factor[:, None]).abs()
    limit = size * (1 / 40 if not fp8 else 1 / 12) + (0.0 if not fp8 else size.amax(1, keepdim=True) / 200)
    difference = (output.float() - expected).abs()
    if not bool((difference <= limit + 1e-30).all()):  # NaN is not within any limit
        bad = ~(difference <= limit + 1e-30)
        raise AssertionError(
            f"rank {rank}: {int(bad.sum())} of {bad.numel()} results are off, in tokens "
            f"{torch.nonzero(bad.any(1)).flatten().tolist()[:8]}, by up to {float(difference.max())}"
        )
