"""Which experts the members of each epoch hold, as ranks are lost and come back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lockstep.errors import ConfigurationError
from lockstep.moe.placement import Placement, check_slots


def widened(placement: Placement, num_lost: int) -> Placement:
    """Return a placement with empty slots that have room for the experts of `num_lost` lost ranks.

    Example:
        >>> widened(Placement.even(num_layers=1, num_experts=6, num_ranks=3), 1).physical_to_logical
        ((0, 1, -1, 2, 3, -1, 4, 5, -1),)
    """
    if not 0 <= num_lost < placement.num_ranks:
        raise ConfigurationError(f"survive must be in 0..{placement.num_ranks - 1}, one rank stays, got {num_lost}")
    fewest = check_slots(placement.num_experts, placement.num_ranks - num_lost)
    every_rank = range(placement.num_ranks)
    held = [[placement.experts_of(layer, rank) for rank in every_rank] for layer in range(placement.num_layers)]
    return Placement.of_ranks(placement.num_experts, held, max(fewest, placement.num_slots_per_rank))


def without_lost(placement: Placement, left: Sequence[int]) -> Placement:
    """Return the placement over the ranks `left`; each expert that none of them holds goes to the rank with the fewest.

    Example:
        >>> without_lost(Placement.even(num_layers=1, num_experts=6, num_ranks=3), [0, 2]).physical_to_logical
        ((0, 1, 2, 4, 5, 3),)
    """
    held = []
    for layer in range(placement.num_layers):
        ranks = [list(placement.experts_of(layer, rank)) for rank in left]
        for expert in sorted(set(range(placement.num_experts)).difference(*ranks)):
            min(ranks, key=len).append(expert)
        held.append(ranks)
    return Placement.of_ranks(placement.num_experts, held, placement.num_slots_per_rank)


def placement_of_epoch(first: Placement, epochs: Sequence[Sequence[int]]) -> Placement:
    """Return the placement of the latest epoch.

    While ranks are only lost, each member keeps its experts. When a rank comes back, every member returns to its
    initial experts, and the experts of ranks that are still lost are distributed again.

    Args:
        first: the placement of all ranks at the start.
        epochs: the members of each epoch so far, oldest first, as rank numbers of `first`.

    Example:
        >>> first = Placement.even(num_layers=1, num_experts=6, num_ranks=3)
        >>> placement_of_epoch(first, [(0, 2), (2,), (2, 0)]).physical_to_logical
        ((4, 5, 2, 0, 1, 3),)
    """
    everyone = tuple(range(first.num_ranks))
    placement, before = first, everyone
    for members in epochs:
        if not set(members) <= set(before):
            placement, before = first, everyone
        placement, before = without_lost(placement, [before.index(rank) for rank in members]), tuple(members)
    return placement


def to_read(layers: Sequence[Collection[int]], num_experts: int) -> Placement:
    """Return a placement whose first rank holds exactly these experts per layer, so that a loader reads no others."""
    most = max(1, *map(len, layers))
    held = []
    for wanted in layers:
        others = [expert for expert in range(num_experts) if expert not in wanted]
        held.append([sorted(wanted), *(others[at : at + most] for at in range(0, num_experts, most))])
    return Placement.of_ranks(num_experts, held, most)
