"""Which replica of an expert takes a row: a fixed rule, applied on the device."""

import torch

from lockstep.dispatch.base import NO_EXPERT
from lockstep.moe.placement import Placement


class SlotTable:
    """One layer's placement on the device: the slot for each expert that a row has chosen.

    Few rows go to as few slots as possible, since reading an expert's weights costs as much as its rows: to the slot
    on this rank, else to the first. Many rows are spread: `(number of the row in the step + expert) % replicas`.
    """

    def __init__(self, placement: Placement, layer: int, rank: int, device: torch.device) -> None:
        replicas, per_rank = placement.replicas(layer), placement.num_slots_per_rank
        nearest = [next((slot for slot in slots if slot // per_rank == rank), slots[0]) for slots in replicas]
        most = max(map(len, replicas))
        # The last entry of each is that of `NO_EXPERT`, -1.
        padded = [(*slots, *[NO_EXPERT] * (most - len(slots))) for slots in replicas] + [(NO_EXPERT,) * most]
        self._nearest = torch.tensor([*nearest, NO_EXPERT], dtype=torch.int32, device=device)
        self._replicas = torch.tensor(padded, dtype=torch.int32, device=device)
        self._counts = torch.tensor([*map(len, replicas), 1], device=device)
        self._spreads = most > 1

    def slots(self, topk_ids: torch.Tensor, first_row: int, few_rows: bool) -> torch.Tensor:
        """Return each choice's slot, `[num_rows, top_k]`, int32; rows count from `first_row` over all ranks."""
        if few_rows or not self._spreads:
            return self._nearest[topk_ids]
        ids = topk_ids.long()
        rows = torch.arange(first_row, first_row + len(ids), device=ids.device)[:, None]
        return self._replicas[ids, (rows + ids) % self._counts[ids]]
