"""Keys and values in pages: one pair of tensors per layer, a table of pages per request, a list of free pages."""

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
    """What one layer keeps of a token: heads, and the width of a head's key and of its value."""

    num_kv_heads: int
    head_dim: int
    value_dim: int


def page_bytes(shapes: Sequence[KVShape], dtype: torch.dtype) -> int:
    """Return the bytes that one page takes in all layers together."""
    return sum(PAGE_SIZE * s.num_kv_heads * (s.head_dim + s.value_dim) for s in shapes) * dtype.itemsize


@dataclass
class _KnownPage:
    """A page with the tokens of a prompt's beginning, which several requests may hold."""

    page: int
    token_ids: bytes  # of it; those of the pages before it were compared when it was remembered
    num_holders: int = 0  # requests that hold it


class KVCache:
    """The pages of one rank; with `num_pages` None a few at first, doubled when they run out (not with graphs).

    Pages are handed out and taken back on the host, at once; the table in device memory follows at `flush`, in the
    order of the stream. So a page may be given to another request while a step that reads it still runs.
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
            # Zeros, not garbage: a NaN in a value that no row may see would still spoil a product with a weight of 0.
            return torch.zeros(self.num_pages, PAGE_SIZE, num_kv_heads, dim, dtype=dtype, device=device)

        # Per layer, `[num_pages, PAGE_SIZE, num_kv_heads, head_dim or value_dim]`.
        self.key_pages = [pages(shape.num_kv_heads, shape.head_dim) for shape in shapes]
        self.value_pages = [pages(shape.num_kv_heads, shape.value_dim) for shape in shapes]
        # Pages of each row; entries beyond a request's pages mean nothing.
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
        """Pages that no request holds and that are not known."""
        return len(self._free)

    def grow(self, row: int, num_tokens: int) -> None:
        """Give a request the pages that `num_tokens` need, the step to come included; those that it has stay."""
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
        """Take all pages of a request back. Known ones stay known, and nobody writes to them."""
        for page in reversed(self._pages[row]):
            known = self._known_pages.get(page)
            if known is None:
                self._free.append(page)
            else:
                known.num_holders -= 1
        self._pages[row] = []

    def share(self, row: int, keys: Sequence[PageKey], token_ids: bytes) -> None:
        """Let a request without pages begin with known ones, which have to hold the same tokens, 4 bytes each."""
        for index, key in enumerate(keys):
            known = self._known[key]
            if known.token_ids != _page_of(token_ids, index):
                raise ConfigurationError(f"page {index} of a prompt has the key of a page with other tokens: {key!r}")
            known.num_holders += 1
            self._pages[row].append(known.page)
            self._changes[row * self._width + index] = known.page

    def remember(self, row: int, first: int, keys: Sequence[PageKey], token_ids: bytes) -> None:
        """Note that the step issued last has filled a prompt's pages from `first` on; equal known ones replace them."""
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
        """Free known pages that no request holds."""
        for key in keys:
            known = self._known[key]
            assert not known.num_holders
            del self._known[key]
            del self._known_pages[known.page]
            self._free.append(known.page)

    def workspace(self, num_heads: int, layer: int) -> DecodeWorkspace | None:
        """Return what `attend_decode` works in; layers of one shape share it, since they run one after another."""
        _, _, num_kv_heads, value_dim = self.value_pages[layer].shape
        key = num_heads, num_kv_heads, value_dim
        if key not in self._workspaces:
            device = self.block_table.device
            self._workspaces[key] = decode_workspace(self.block_table.shape[0], *key, device)
        return self._workspaces[key]

    def flush(self) -> None:
        """Bring the table in device memory up to date, in the order of the current stream."""
        if not self._changes:
            return
        changes = torch.tensor([list(self._changes), list(self._changes.values())], dtype=torch.int64)
        self._changes = {}
        if self.block_table.device.type == "cuda":
            changes = changes.pin_memory().to(self.block_table.device, non_blocking=True)
        self.block_table.view(-1).index_copy_(0, changes[0], changes[1].to(torch.int32))


def _page_of(token_ids: bytes, index: int) -> bytes:
    return token_ids[4 * PAGE_SIZE * index : 4 * PAGE_SIZE * (index + 1)]
