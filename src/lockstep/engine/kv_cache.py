"""Paged keys and values: a pair of tensors per layer, a table of each request's pages, a list of free pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lockstep.engine.attention import DecodeWorkspace, decode_workspace
from lockstep.errors import ConfigurationError
from lockstep.workload import PAGE_SIZE
from lockstep.workload.kv_pages import PageKey
from lockstep.workload.kv_pages import num_pages as num_pages_of

_FIRST_PAGES = 32  # of a cache that grows


class KVShape(NamedTuple):
    """What one layer stores per token: key heads, and the width of a head's key and value."""

    num_kv_heads: int
    head_dim: int
    value_dim: int


def page_bytes(shapes: Sequence[KVShape], dtype: torch.dtype) -> int:
    """Return the bytes of one page over all layers."""
    return sum(PAGE_SIZE * s.num_kv_heads * (s.head_dim + s.value_dim) for s in shapes) * dtype.itemsize


@dataclass
class _KnownPage:
    """A page of a prompt's prefix, which several requests may share."""

    page: int
    token_ids: bytes  # of this page; those of the pages before it were compared when it was remembered
    num_holders: int = 0  # requests that use it


class KVCache:
    """The pages of one rank. With `num_pages=None`, their number doubles when they run out (not with graphs).

    The host allocates and frees pages immediately; the table in device memory follows at `flush`, in stream order. So a
    page may be given to another request while a step that reads it still runs.
    """

    def __init__(
        self, shapes: Sequence[KVShape], num_pages: int | None, max_num_seqs: int, max_model_len: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        if num_pages is not None and num_pages < 1:
            raise ConfigurationError(f"the KV cache needs at least 1 page of {PAGE_SIZE} tokens, got {num_pages}")
        self._grows = num_pages is None
        self.num_pages = num_pages or _FIRST_PAGES

        def pages(num_kv_heads: int, dim: int) -> torch.Tensor:
            # Zeros, not garbage: a NaN in a value that no row sees would spoil even a product with a weight of 0.
            return torch.zeros(self.num_pages, PAGE_SIZE, num_kv_heads, dim, dtype=dtype, device=device)

        # Per layer, `[num_pages, PAGE_SIZE, num_kv_heads, head_dim or value_dim]`.
        self.key_pages = [pages(shape.num_kv_heads, shape.head_dim) for shape in shapes]
        self.value_pages = [pages(shape.num_kv_heads, shape.value_dim) for shape in shapes]
        # Pages of each row; entries beyond a request's pages are undefined.
        self._width = num_pages_of(max_model_len)
        self.block_table = torch.zeros(max_num_seqs, self._width, dtype=torch.int32, device=device)
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._pages: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._known: dict[PageKey, _KnownPage] = {}
        self._known_pages: dict[int, _KnownPage] = {}  # the same by page
        self._workspaces: dict[tuple[int, int, int], DecodeWorkspace | None] = {}
        self._changes: dict[int, int] = {}  # place in the table -> page

    @property
    def num_free_pages(self) -> int:
        """Pages that hold nothing: neither of a request nor of a known prefix."""
        return len(self._free)

    def grow(self, row: int, num_tokens: int) -> None:
        """Give a request the pages that its first `num_tokens` tokens need, besides those it has."""
        pages = self._pages[row]
        for index in range(len(pages), num_pages_of(num_tokens)):
            if not self._free and self._grows:
                self._double()
            elif not self._free:
                raise ConfigurationError(
                    f"row {row} needs page {index + 1} for {num_tokens} tokens, but all {self.num_pages} are in use"
                )
            page = self._free.pop()
            pages.append(page)
            self._changes[row * self._width + index] = page

    def _double(self) -> None:
        for pages in (self.key_pages, self.value_pages):
            for layer, old in enumerate(pages):
                pages[layer] = torch.cat([old, torch.zeros_like(old)])
        self._free = list(range(2 * self.num_pages - 1, self.num_pages - 1, -1))
        self.num_pages *= 2

    def release(self, row: int) -> None:
        """Free a request's pages. Known pages stay known, and are not written to."""
        for page in reversed(self._pages[row]):
            known = self._known_pages.get(page)
            if known is None:
                self._free.append(page)
            else:
                known.num_holders -= 1
        self._pages[row] = []

    def share(self, row: int, keys: Sequence[PageKey], token_ids: bytes) -> None:
        """Start a request with known pages, which must hold the same tokens, 4 bytes each."""
        for index, key in enumerate(keys):
            known = self._known[key]
            if known.token_ids != _page_of(token_ids, index):
                raise ConfigurationError(f"page {index} of a prompt has the key of a page with other tokens: {key!r}")
            known.num_holders += 1
            self._pages[row].append(known.page)
            self._changes[row * self._width + index] = known.page

    def remember(self, row: int, first: int, keys: Sequence[PageKey], token_ids: bytes) -> None:
        """Make a prompt's pages from `first` on known, which the last step filled; equal known ones replace them."""
        pages = self._pages[row]
        for index, key in enumerate(keys, first):
            known = self._known.get(key)
            if known is None:
                known = _KnownPage(pages[index], _page_of(token_ids, index))
                self._known[key] = self._known_pages[known.page] = known
            else:
                self._free.append(pages[index])
                pages[index] = known.page
                self._changes[row * self._width + index] = known.page
            known.num_holders += 1

    def forget(self, keys: Sequence[PageKey]) -> None:
        """Free known pages that no request uses."""
        for key in keys:
            known = self._known[key]
            assert not known.num_holders
            del self._known[key]
            del self._known_pages[known.page]
            self._free.append(known.page)

    def clear(self) -> None:
        """Free all pages, including known ones; no request may hold any."""
        self.forget(list(self._known))

    def workspace(self, num_heads: int, layer: int) -> DecodeWorkspace | None:
        """Return the workspace of `attend_decode`; layers of one shape share it, since they run one after another."""
        _, _, num_kv_heads, value_dim = self.value_pages[layer].shape
        key = num_heads, num_kv_heads, value_dim
        if key not in self._workspaces:
            device = self.block_table.device
            self._workspaces[key] = decode_workspace(self.block_table.shape[0], *key, device)
        return self._workspaces[key]

    def flush(self) -> None:
        """Update the table in device memory, on the current stream."""
        if not self._changes:
            return
        changes = torch.tensor([list(self._changes), list(self._changes.values())], dtype=torch.int64)
        self._changes = {}
        if self.block_table.device.type == "cuda":
            changes = changes.pin_memory().to(self.block_table.device, non_blocking=True)
        self.block_table.view(-1).index_copy_(0, changes[0], changes[1].to(torch.int32))


def _page_of(token_ids: bytes, index: int) -> bytes:
    return token_ids[4 * PAGE_SIZE * index : 4 * PAGE_SIZE * (index + 1)]
