"""What tests need to be written for any number of GPUs of one host."""

from collections.abc import Sequence


def ranks_for(num_gpus: int) -> int:
    """Return how many ranks a host's GPUs take, a power of two that divides the experts: 2 for none, at most 8."""
    return max(ranks for ranks in (2, 4, 8) if ranks <= max(2, num_gpus))


def repeated(pattern: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Return an entry for each rank: those of `pattern`, again and again."""
    return tuple(pattern[rank % len(pattern)] for rank in range(ranks))
