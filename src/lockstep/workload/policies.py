"""Decisions that all ranks make alike from agreed values: which rank gets a request, and whether prompts run."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from lockstep.errors import ConfigurationError
from lockstep.workload.request import Request

LOAD_BALANCING = ("round-robin", "least-tokens", "least-kv-cache")
"""In turns; to the rank with the fewest tokens left to compute; to the rank whose unfinished requests will hold the
fewest tokens in the KV cache. Ties go to the lowest rank."""


class SchedulerState(NamedTuple):
    """What a rank tells the other ranks about its scheduler: four integers, valid after the step just planned."""

    # Rows that its unfinished requests still need, those in the queue included; 0 is idle. Rows that a preemption makes
    # necessary again are added when it happens.
    num_outstanding_tokens: int = 0
    # Tokens of KV cache that these requests will hold at their longest: a load, which may exceed the capacity.
    num_kv_tokens: int = 0
    # Requests that will generate a token in the next step. If pages run out in it, those admitted last will not.
    num_decoding: int = 0
    # Steps since the arrival of its first prompt that is not done and could run in the next step, whether it has begun,
    # was preempted, or neither; -1 where none could run.
    prefill_wait_steps: int = -1


def prefills_run(prefill_wait_steps: Sequence[int], num_decoding: Sequence[int], max_prefill_delay_steps: int) -> bool:
    """Decide, for all ranks alike, whether prompts run in the next step: one rank's prompt holds up all ranks.

    They run when one arrived `max_prefill_delay_steps` or more steps ago (0 never holds), when every rank has one, or
    when no rank generates. The wait counts from arrival, so a queue that grows turns holding off.
    """
    if max_prefill_delay_steps == 0 or not any(num_decoding):
        return True
    return max(prefill_wait_steps) >= max_prefill_delay_steps or min(prefill_wait_steps) >= 0


class LoadBalancer:
    """Assigns arriving requests to ranks by one of `LOAD_BALANCING`, identically on every rank."""

    def __init__(self, policy: str, num_ranks: int) -> None:
        if num_ranks < 1:
            raise ConfigurationError(f"num_ranks must be >= 1, got {num_ranks}")
        self._policy = policy
        self._num_ranks = num_ranks
        self._next = 0

    def assign(self, requests: Sequence[Request], states: Sequence[SchedulerState]) -> list[int]:
        """Return each arriving request's rank, from the agreed states of all ranks."""
        by_tokens = self._policy == "least-tokens"
        loads = [state.num_outstanding_tokens if by_tokens else state.num_kv_tokens for state in states]
        return self.assign_by_load(requests, loads)

    def assign_by_load(self, requests: Sequence[Request], loads: Sequence[int]) -> list[int]:
        """Return each arriving request's rank; every request counts towards the load that the next one sees."""
        if self._policy == "round-robin":
            first = self._next
            self._next = (first + len(requests)) % self._num_ranks
            return [(first + index) % self._num_ranks for index in range(len(requests))]
        lightest = [(load, rank) for rank, load in enumerate(loads)]
        heapq.heapify(lightest)
        ranks = []
        for request in requests:
            load, rank = lightest[0]
            ranks.append(rank)
            added = request.num_computed_tokens if self._policy == "least-tokens" else request.num_kv_tokens
            heapq.heapreplace(lightest, (load + added, rank))
        return ranks
