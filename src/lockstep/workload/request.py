"""A request: what arrives, when, and how long it will be."""

from __future__ import annotations

import random
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile
from math import ceil

from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import shown
from lockstep.workload.kv_pages import PAGE_SIZE, PageKey


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload."""

    request_id: int  # its place in the workload, from 0, in order of arrival; an engine may number otherwise
    arrival_s: float  # after the first request, >= 0, already divided by the rate scale
    num_prompt_tokens: int  # >= 1
    max_new_tokens: int  # >= 1; a request of a trace generates exactly this many, since end-of-sequence is ignored
    prompt: str | None = None  # the text; None where only its length is known
    block_ids: tuple[int, ...] = ()  # prompts whose first blocks have equal ids, >= 0, begin with the same tokens
    block_size: float = PAGE_SIZE  # tokens per block, > 0; a fraction where the lengths of a trace were scaled

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1 or self.max_new_tokens < 1 or not self.arrival_s >= 0:
            raise ConfigurationError(
                f"request {self.request_id}: num_prompt_tokens and max_new_tokens must be >= 1 and arrival_s >= 0, "
                f"got {self.num_prompt_tokens}, {self.max_new_tokens} and {self.arrival_s}"
            )

    @property
    def num_computed_tokens(self) -> int:
        """Rows that this request sends through the model: the prompt, and every generated token but the last."""
        return self.num_prompt_tokens + self.max_new_tokens - 1

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of prompt and output at their longest: what it may come to hold in the KV cache."""
        return self.num_prompt_tokens + self.max_new_tokens


def read_block_ids(name: str, value: object, error: type[Exception]) -> tuple[int, ...]:
    """Return a prompt's block ids as JSON has them (None for none), or raise `error` about `name`."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise error(f"{name} must be a list, got {shown(value, 60)}")
    for block_id in value:
        if type(block_id) is not int or not 0 <= block_id < 2**63:
            raise error(f"{name} must hold whole numbers in 0..2**63 - 1, got {shown(block_id, 60)}")
    return tuple(value)


def block_page_keys(request: Request) -> tuple[PageKey, ...]:
    """Return keys of a prompt's whole pages, each made of the ids of all blocks up to that of the page's last token."""
    chain: list[bytes] = []
    key = b""
    for block_id in request.block_ids:
        key = blake2b(key + block_id.to_bytes(8, "little"), digest_size=16).digest()
        chain.append(key)
    if not chain:
        return ()
    pages = range(request.num_prompt_tokens // PAGE_SIZE)
    blocks = (ceil(PAGE_SIZE * (page + 1) / request.block_size) - 1 for page in pages)
    return tuple((chain[block], page) for page, block in enumerate(takewhile(lambda block: block < len(chain), blocks)))


def random_prompt_ids(request: Request, vocab_size: int, seed: int) -> list[int]:
    """Return token ids for a request whose text is not known; pages with equal `block_page_keys` get equal ids."""
    ids: list[int] = []
    for key in block_page_keys(request):
        shared = random.Random(f"{seed} {key!r}")
        ids += [shared.randrange(vocab_size) for _ in range(PAGE_SIZE)]
    generator = random.Random(seed * 1_000_003 + request.request_id)
    return ids + [generator.randrange(vocab_size) for _ in range(request.num_prompt_tokens - len(ids))]
