"""A rank's KV cache as a number of pages: how many are free, and when decoding runs out of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from itertools import accumulate

PAGE_SIZE = 64
"""Tokens in one page of KV cache."""

PageKey = Hashable
"""Stands for the tokens of a page and of all pages before it: pages of prompts with equal keys have equal contents."""


def num_pages(num_tokens: int) -> int:
    """Return how many pages hold `num_tokens` tokens of one request."""
    return -(-num_tokens // PAGE_SIZE)


class KVPages:
    """The free pages of one rank, `total` at first, and the steps in which its decoding requests take their next ones.

    A decoding request takes a page every `PAGE_SIZE` steps, always in the same residue of the step number: requests
    are counted by it, so that the step in which pages run out is found by one scan, however far away it is.
    """

    def __init__(self, total: int) -> None:
        self.num_free = total
        self._takers = [0] * PAGE_SIZE  # by step % PAGE_SIZE: decoding requests that take a page in that step

    def needed(self, step: int) -> int:
        """Return how many pages the decoding requests take in `step`, if none joins or leaves before."""
        return self._takers[step % PAGE_SIZE]

    def take(self, count: int) -> None:
        """Use up free pages."""
        assert count <= self.num_free
        self.num_free -= count

    def join(self, num_tokens: int, step: int) -> None:
        """Count a request as decoding from the next step on; it has `num_tokens` tokens in the cache after `step`."""
        self._takers[(step + 1 - num_tokens) % PAGE_SIZE] += 1

    def leave(self, num_tokens: int, step: int) -> None:
        """Stop counting a decoding request with `num_tokens` tokens in the cache after `step`; its pages stay taken."""
        self._takers[(step + 1 - num_tokens) % PAGE_SIZE] -= 1

    def needed_between(self, first: int, stop: int) -> int:
        """Return how many pages the decoding requests take in the steps `first..stop-1`."""
        cycles, rest = divmod(stop - first, PAGE_SIZE)
        return cycles * sum(self._takers) + sum(self._from(first)[:rest])

    def runs_out_at(self, step: int, spare: int) -> int | None:
        """Return the first step >= `step` in which more than `spare` pages are taken since; None if none decodes."""
        num_takers = sum(self._takers)
        if not num_takers:
            return None
        cycles, rest = divmod(spare, num_takers)
        return step + PAGE_SIZE * cycles + bisect_right(list(accumulate(self._from(step))), rest)

    def _from(self, step: int) -> list[int]:
        """The counts of `PAGE_SIZE` steps, that of `step` first."""
        first = step % PAGE_SIZE
        return self._takers[first:] + self._takers[:first]
