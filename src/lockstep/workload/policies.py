"""Decisions that all ranks make alike: which requests arrive, which rank gets them, and whether prompts run.

Ranks decide from the workload, which all have read, and from agreed `SchedulerState`s. A state is valid **after** the
step just planned, so it travels with that step's own agreement.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from lockstep.errors import ConfigurationError
from lockstep.workload.request import Request

if TYPE_CHECKING:
    from lockstep.workload.schedule import SchedulerConfig

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


class Arrivals:
    """Hands one rank its requests of a workload before each step, by arrival time and load balancing."""

    def __init__(self, requests: Sequence[Request], config: SchedulerConfig, num_ranks: int, rank: int) -> None:
        if not 0 <= rank < num_ranks:
            raise ConfigurationError(f"rank must be in 0..{num_ranks - 1}, got {rank}")
        config.check_fits(requests)
        self._num_ranks = num_ranks
        self._rank = rank
        self._waiting = deque(requests)
        self.num_tokens_left = sum(request.num_computed_tokens for request in requests)  # rows of those to come
        self._seconds_per_step = config.seconds_per_step
        self._clock = 0  # virtual time in steps: runs ahead of the step number where all ranks were idle
        self._balancer = LoadBalancer(config.load_balancing, num_ranks)

    @property
    def left(self) -> bool:
        """Whether requests have not arrived yet; the same on every rank."""
        return bool(self._waiting)

    @property
    def next_arrival_s(self) -> float | None:
        """When the next request arrives; the same on every rank. None where all have arrived."""
        return self._waiting[0].arrival_s if self._waiting else None

    def before_step(self, states: Sequence[SchedulerState], elapsed_s: float | None = None) -> list[Request]:
        """Return the requests that this rank gets before the next step.

        `states` are those of all ranks, agreed with the step before; `elapsed_s` is the age of the run. None means
        virtual time, which passes by steps and jumps to the next arrival when all ranks are idle.
        """
        if len(states) != self._num_ranks:
            raise ConfigurationError(f"states must have one entry per rank, {self._num_ranks}, got {len(states)}")
        if elapsed_s is None and self._waiting and not any(state.num_outstanding_tokens for state in states):
            self._clock = max(self._clock, self._arrival_step(self._waiting[0]))
        arriving = []
        while self._waiting and self._has_come(self._waiting[0], elapsed_s):
            arriving.append(self._waiting.popleft())
        self._clock += 1
        self.num_tokens_left -= sum(request.num_computed_tokens for request in arriving)
        ranks = self._balancer.assign(arriving, states)
        return [request for request, rank in zip(arriving, ranks, strict=True) if rank == self._rank]

    def _has_come(self, request: Request, elapsed_s: float | None) -> bool:
        return self._arrival_step(request) <= self._clock if elapsed_s is None else request.arrival_s <= elapsed_s

    def _arrival_step(self, request: Request) -> int:
        return ceil(request.arrival_s / self._seconds_per_step)
