"""What one rank brings into one step, and the options by which requests become steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import check_int
from lockstep.workload.kv_pages import PAGE_SIZE, PageKey, num_pages
from lockstep.workload.policies import LOAD_BALANCING
from lockstep.workload.request import Request


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests become steps."""

    load_balancing: str = "round-robin"  # which rank gets a request: one of `LOAD_BALANCING`
    max_num_batched_tokens: int = 2048  # maximum tokens per rank and step, >= 1; longer prompts run in several steps
    # Maximum requests in progress per rank, >= 1; at most `max_num_batched_tokens`, so that all can generate in a step.
    max_num_seqs: int = 256
    max_prefill_delay_steps: int = 0  # maximum steps that a prompt is held, see `prefills_run`; 0 never holds
    # Tokens of KV cache per rank, in whole pages; prompts wait for free pages, decoding preempts. None for no limit.
    kv_capacity_tokens: int | None = None
    seconds_per_step: float = 0.05  # of the workload's arrival times, > 0
    # Whether whole pages at the beginning of prompts are computed once and shared. With a limited KV cache, pages that
    # no request holds are kept until their room is needed, the least recently used ones going first; else not at all.
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.load_balancing not in LOAD_BALANCING:
            raise ConfigurationError(f"load_balancing must be one of {LOAD_BALANCING}, got {self.load_balancing!r}")
        for name, least in (("max_num_batched_tokens", 1), ("max_num_seqs", 1), ("max_prefill_delay_steps", 0)):
            check_int(name, getattr(self, name), least)
        if self.kv_capacity_tokens is not None and self.kv_capacity_tokens < PAGE_SIZE:
            raise ConfigurationError(
                f"kv_capacity_tokens must be >= {PAGE_SIZE}, one page of the KV cache, got {self.kv_capacity_tokens}"
            )
        if not 0 < self.seconds_per_step < float("inf"):
            raise ConfigurationError(f"seconds_per_step must be a number > 0, got {self.seconds_per_step}")

    @property
    def num_kv_pages(self) -> int | None:
        """Whole pages of KV cache that one rank has; None for no limit."""
        return None if self.kv_capacity_tokens is None else self.kv_capacity_tokens // PAGE_SIZE

    def check_fits(self, requests: Iterable[Request]) -> None:
        """Raise a `ConfigurationError` that names a request which can never run: its KV cache exceeds a rank's."""
        limit = self.num_kv_pages
        for request in requests:
            needed = num_pages(request.num_kv_tokens)
            if limit is not None and needed > limit:
                told = f"{request.num_kv_tokens} tokens of KV cache, {needed} pages of {PAGE_SIZE}"
                most = f"the {limit} of kv_capacity_tokens={self.kv_capacity_tokens} of a rank"
                raise ConfigurationError(f"request {request.request_id} needs {told}, more than {most}")


class StepEntry(NamedTuple):
    """One request's part of a step."""

    request_id: int
    start: int  # position of the first token, = tokens in the KV cache; above 0 in a first entry with known pages
    num_tokens: int  # rows, >= 1: a piece of the prompt, or the one token generated last
    is_prefill: bool  # of the prompt. After a preemption, the tokens generated before it count as prompt
    samples: bool  # whether the last row's output is sampled into the next token; False only within a prompt
    finishes: bool  # whether that token is the request's last


class Schedule(NamedTuple):
    """What one rank brings into one step."""

    step: int  # from 0
    entries: tuple[StepEntry, ...]  # those that generate, in the order in which they were admitted; then prompts
    num_prefill_tokens: int  # rows of prompts
    num_decode_tokens: int  # rows that generate
    num_waiting: int  # requests left in the queue
    num_waiting_for_kv: int  # those of them that wait only because the KV cache is full: 0, or all of them
    prefills_held: bool  # whether prompts that could have run were held for other ranks
    finished: tuple[int, ...] = ()  # requests that sample their last token in it; their pages are free in the next step
    preempted: tuple[int, ...] = ()  # requests that lost their pages before it, in that order, to begin again
    prefill_context_tokens: int = 0  # KV entries that the prompts' tokens attend to, themselves included, summed up
    decode_context_tokens: int = 0  # the same of the tokens that generate
    prefix_hits: tuple[tuple[int, int], ...] = ()  # `(request id, tokens)` of prompts that begin behind known pages
    forgotten: tuple[PageKey, ...] = ()  # pages that are known no more, in that order; free from this step on

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of prompts that need no rows, because their pages were known."""
        return sum(tokens for _, tokens in self.prefix_hits)

    @property
    def num_tokens(self) -> int:
        """Rows of this rank in the step; 0 where it takes part idle."""
        return self.num_prefill_tokens + self.num_decode_tokens
