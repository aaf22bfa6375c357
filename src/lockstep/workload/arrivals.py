"""Which requests of a workload reach a rank, and when: integers only, with the same answer on every rank.

Ranks decide from the workload, which all have read, and from agreed `SchedulerState`s. A state is valid **after** the
step just planned, so it travels with that step's own agreement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import ceil

from lockstep.errors import ConfigurationError
from lockstep.workload.policies import LoadBalancer, SchedulerState
from lockstep.workload.request import Request
from lockstep.workload.schedule import SchedulerConfig


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
