"""A rank's KV cache as pages: how many are free, when decoding runs out of them, and cached prefixes of prompts.

Only whole pages of prompts are shared. Keys are made of token ids (`token_page_keys`) or block ids (`block_page_keys`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from hashlib import blake2b
from itertools import accumulate, takewhile

PAGE_SIZE = 64
"""Tokens in one page of KV cache."""
_NO_LIMIT = 2**50  # pages: more than any workload takes

PageKey = Hashable
"""Stands for the tokens of a page and of all pages before it: pages of prompts with equal keys have equal contents."""


def num_pages(num_tokens: int) -> int:
    """Return how many pages hold `num_tokens` tokens of one request."""
    return -(-num_tokens // PAGE_SIZE)


class KVPages:
    """The pages of one rank: how many are free, when decoding takes its next ones, and which are shared.

    A decoding request takes a page every `PAGE_SIZE` steps, always in the same residue of the step number: requests
    are counted by it, so that the step in which pages run out is found by one scan, however far away it is.

    Whole pages of prompts are known by their keys, and requests may share them. A known page that no request holds
    counts as free; with a limited `total` it is kept until its room is needed, the least recently used one going first.
    Requests let go of their last page first, so a page is never forgotten before one that continues it.
    """

    def __init__(self, total: int | None) -> None:
        self._is_limited = total is not None
        self.num_free = _NO_LIMIT if total is None else total
        self._takers = [0] * PAGE_SIZE  # by step % PAGE_SIZE: decoding requests that take a page in that step
        self._holders: dict[PageKey, int] = {}
        self._unheld: OrderedDict[PageKey, None] = OrderedDict()  # least recently used first
        self._forgotten: list[PageKey] = []
        self.version = 0  # changes whenever the answers of `num_known` or `num_held` may

    def needed(self, step: int) -> int:
        """Return how many pages the decoding requests take in `step`, if none joins or leaves before."""
        return self._takers[step % PAGE_SIZE]

    def take(self, count: int) -> None:
        """Use up free pages. If no others are left, known pages that nobody holds are forgotten."""
        assert count <= self.num_free
        self.num_free -= count
        while len(self._unheld) > self.num_free:
            key, _ = self._unheld.popitem(last=False)
            self._forgotten.append(key)
            self.version += 1

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

    @property
    def num_unheld(self) -> int:
        """Known pages that no request holds."""
        return len(self._unheld)

    def num_known(self, keys: Sequence[PageKey]) -> int:
        """Return how many of the first pages of a prompt are known."""
        return sum(1 for _ in takewhile(lambda key: key in self._holders or key in self._unheld, keys))

    def num_held(self, keys: Sequence[PageKey]) -> int:
        """Return how many of the first pages of a prompt are held by requests."""
        return sum(1 for _ in takewhile(self._holders.__contains__, keys))

    def hold(self, keys: Sequence[PageKey]) -> None:
        """Let one more request hold known pages."""
        self.version += bool(keys)
        for key in keys:
            if key in self._unheld:
                del self._unheld[key]
                self.num_free -= 1
            self._holders[key] = self._holders.get(key, 0) + 1

    def fill(self, keys: Sequence[PageKey]) -> None:
        """Note that a request has filled pages, which it now holds; duplicates of known pages are freed."""
        self.num_free += sum(key in self._holders or key in self._unheld for key in keys)
        self.hold(keys)

    def release(self, num_tokens: int, keys: Sequence[PageKey]) -> None:
        """Release a request's hold on the pages of `num_tokens` tokens, the first of which have these keys."""
        self.version += bool(keys)
        self.num_free += num_pages(num_tokens) - len(keys)
        for key in reversed(keys):
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self.num_free += 1
                if self._is_limited:
                    self._unheld[key] = None
                else:
                    self._forgotten.append(key)

    def take_forgotten(self) -> tuple[PageKey, ...]:
        """Return the pages forgotten since the last call, in that order."""
        forgotten, self._forgotten = tuple(self._forgotten), []
        return forgotten


def token_page_keys(token_ids: Sequence[int]) -> tuple[bytes, ...]:
    """Return the keys of a prompt's whole pages: each a hash of the key before it and of the page's token ids."""
    keys, key = [], b""
    for start in range(0, len(token_ids) - PAGE_SIZE + 1, PAGE_SIZE):
        page = array("I", token_ids[start : start + PAGE_SIZE]).tobytes()
        key = blake2b(key + page, digest_size=16).digest()
        keys.append(key)
    return tuple(keys)
