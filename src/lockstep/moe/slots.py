"""Which replica of an expert takes a row: a fixed rule, applied on the device."""

from collections.abc import Sequence

import torch

from lockstep.dispatch.base import NO_EXPERT
from lockstep.moe.placement import Placement


class SlotTable:
    """One layer's placement on the device: the slot for each expert that a row has chosen, seen from a `rank`.

    Few rows go to as few slots as possible, since reading an expert's weights costs as much as its rows: to the slot
    on this rank, else to the first. Many rows are spread: `(number of the row in the step + expert) % replicas`.
    """

    def __init__(self, placement: Placement, layer: int, rank: int, device: torch.device) -> None:
        most = max(map(len, placement.replicas(layer)))
        # The last entry of each is that of `NO_EXPERT`, -1.
        shape = placement.num_experts + 1, most
        self._nearest = torch.empty(shape[0], dtype=torch.int32, device=device)
        self._replicas = torch.empty(shape, dtype=torch.int32, device=device)
        self._counts = torch.empty(shape[0], dtype=torch.int64, device=device)
        self._spreads = most > 1
        self.follow(placement, layer, rank, range(placement.num_ranks))

    def follow(self, placement: Placement, layer: int, rank: int, places: Sequence[int]) -> None:
        """Switch to another placement, also in captured graphs; rank r has the slots of the rank at `places[r]`."""
        per_rank, most = placement.num_slots_per_rank, self._replicas.shape[1]
        own = range(rank * per_rank, (rank + 1) * per_rank)
        replicas = placement.replicas(layer)
        nearest = [next((slot for slot in slots if slot in own), slots[0]) for slots in replicas]
        padded = [(*slots, *[NO_EXPERT] * (most - len(slots))) for slots in replicas] + [(NO_EXPERT,) * most]
        places_of = torch.tensor(
            [*(place * per_rank + slot for place in places for slot in range(per_rank)), NO_EXPERT]
        )
        self._nearest.copy_(places_of[torch.tensor([*nearest, NO_EXPERT])])
        self._replicas.copy_(places_of[torch.tensor(padded)])
        self._counts.copy_(torch.tensor([*map(len, replicas), 1]))

    def slots(self, topk_ids: torch.Tensor, first_row: int, few_rows: bool) -> torch.Tensor:
        """Return each choice's slot, `[num_rows, top_k]`, int32; rows count from `first_row` over all ranks."""
        if few_rows or not self._spreads:
            return self._nearest[topk_ids]
        ids = topk_ids.long()
        rows = torch.arange(first_row, first_row + len(ids), device=ids.device)[:, None]
        return self._replicas[ids, (rows + ids) % self._counts[ids]]
