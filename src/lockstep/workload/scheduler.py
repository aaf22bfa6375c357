"""Requests to ranks, and into each rank's steps: plain integers, no clock. The real run and the simulator use it.

A run loop uses one `WorkloadScheduler` per rank:

    scheduler = WorkloadScheduler(requests, config, num_ranks, rank)
    states = scheduler.initial_states()
    while not scheduler.done(states):                    # the same answer on every rank
        schedule = scheduler.next_step(states)           # schedule.entries: what this rank computes; may be empty
        ... agree on schedule.num_tokens and scheduler.state(), one exchange ...
        ... drop the keys of schedule.preempted ...
        ... run the step: every rank takes part, with zero rows where its schedule is empty ...
        states = [the SchedulerState that each rank sent, in rank order]

Everything that one rank decides about another rests on `states`, which all ranks have agreed on, and on the workload,
which all ranks have read. A state describes its rank **after** the step that was just planned, so that it can travel
with the agreement of that very step, and nothing of the step needs to have been computed yet.

An engine whose requests come from elsewhere uses a `RankScheduler` alone: `add`, `stop`, `next_step`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import ceil

from lockstep.errors import ConfigurationError
from lockstep.workload.policies import LoadBalancer, SchedulerState, prefills_run
from lockstep.workload.rank_scheduler import RankScheduler
from lockstep.workload.request import Request
from lockstep.workload.schedule import Schedule, SchedulerConfig


class Arrivals:
    """Which of a workload's requests reach one rank before each step: virtual or real time, and load balancing.

    Args:
        requests: the workload, in order of arrival, the same on every rank.
        config: the same on every rank.
        num_ranks: data-parallel ranks, >= 1.
        rank: this data-parallel rank.

    Attributes:
        left: whether requests have not arrived yet; the same on every rank.

    Raises:
        ConfigurationError: for a rank outside `0..num_ranks-1`, or a request that can never fit into a rank's KV cache.
    """

    def __init__(self, requests: Sequence[Request], config: SchedulerConfig, num_ranks: int, rank: int) -> None:
        if not 0 <= rank < num_ranks:
            raise ConfigurationError(f"rank must be in 0..{num_ranks - 1}, got {rank}")
        config.check_fits(requests)
        self._num_ranks = num_ranks
        self._rank = rank
        self._waiting = deque(requests)
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
        """Return the requests that this rank gets before the next step; call it once per step.

        Args:
            states: every rank's `SchedulerState`, as agreed with the step before, `[num_ranks]`.
            elapsed_s: age of the run, as agreed with the step before: requests up to it have arrived. None for virtual
                time, which passes by steps; where all ranks are idle, it jumps to the next arrival instead of running
                empty steps.
        """
        if len(states) != self._num_ranks:
            raise ConfigurationError(f"states must have one entry per rank, {self._num_ranks}, got {len(states)}")
        arriving = self._by_step(states) if elapsed_s is None else self._by_time(elapsed_s)
        ranks = self._balancer.assign(arriving, states)
        return [request for request, rank in zip(arriving, ranks, strict=True) if rank == self._rank]

    def _by_step(self, states: Sequence[SchedulerState]) -> list[Request]:
        if self._waiting and not any(state.num_outstanding_tokens for state in states):
            self._clock = max(self._clock, self._arrival_step())
        arriving = []
        while self._waiting and self._arrival_step() <= self._clock:
            arriving.append(self._waiting.popleft())
        self._clock += 1
        return arriving

    def _by_time(self, elapsed_s: float) -> list[Request]:
        arriving = []
        while self._waiting and self._waiting[0].arrival_s <= elapsed_s:
            arriving.append(self._waiting.popleft())
        return arriving

    def _arrival_step(self) -> int:
        return ceil(self._waiting[0].arrival_s / self._seconds_per_step)


class WorkloadScheduler:
    """The whole workload as one rank sees it: arrivals, load balancing, prefill alignment, and this rank's steps.

    See the module's text for the loop around it.

    Args:
        requests: the workload, in order of arrival, the same on every rank.
        config: the same on every rank.
        num_ranks: data-parallel ranks, >= 1.
        rank: this data-parallel rank.

    Raises:
        ConfigurationError: for a rank outside `0..num_ranks-1`, or a request that can never fit into a rank's KV cache.
    """

    def __init__(self, requests: Sequence[Request], config: SchedulerConfig, num_ranks: int, rank: int) -> None:
        self._arrivals = Arrivals(requests, config, num_ranks, rank)
        self._config = config
        self._num_ranks = num_ranks
        self._step = 0
        self._scheduler = RankScheduler(config)
        self.assigned: list[Request] = []
        """Requests given to this rank so far, in order of arrival."""
        self.arrival_steps: dict[int, int] = {}
        """The step in which each of them arrived, by request id: the first that it could have run in."""

    def initial_states(self) -> list[SchedulerState]:
        """Return what every rank knows before the first step: all ranks idle."""
        return [SchedulerState()] * self._num_ranks

    def done(self, states: Sequence[SchedulerState]) -> bool:
        """Return whether no rank has or will get work; the same on every rank."""
        return not self._arrivals.left and not any(state.num_outstanding_tokens for state in states)

    @property
    def unfinished(self) -> bool:
        """Whether this rank has or may get more work after the step planned last."""
        return self._arrivals.left or self._scheduler.state().num_outstanding_tokens > 0

    def next_step(self, states: Sequence[SchedulerState]) -> Schedule:
        """Plan this rank's next step.

        Where all ranks are idle, virtual time jumps to the next arrival instead of running empty steps.

        Args:
            states: every rank's `SchedulerState`, as agreed with the step before, `[num_ranks]`; `initial_states()`
                before the first.

        Returns:
            This rank's schedule; `num_tokens` is 0 where it takes part idle.
        """
        for request in self._arrivals.before_step(states):
            self._scheduler.add(request, self._step)
            self.assigned.append(request)
            self.arrival_steps[request.request_id] = self._step
        run_prefills = prefills_run(
            [state.prefill_wait_steps for state in states],
            [state.num_decoding for state in states],
            self._config.max_prefill_delay_steps,
        )
        schedule = self._scheduler.next_step(self._step, run_prefills)
        self._step += 1
        return schedule

    def state(self) -> SchedulerState:
        """Return what this rank tells the others, as of after the step planned last."""
        return self._scheduler.state()

    def stop(self, request_ids: Iterable[int]) -> None:
        """Let requests of this rank end before their last token; see `RankScheduler.stop`."""
        self._scheduler.stop(request_ids)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request has arrived at this rank and is unfinished."""
        return request_id in self._scheduler

    @property
    def num_free_pages(self) -> int | None:
        """Pages of this rank's KV cache that nobody holds after the step planned last; None for no limit."""
        return self._scheduler.num_free_pages

    @property
    def num_preemptions(self) -> int:
        """How often a request of this rank has been preempted so far."""
        return self._scheduler.num_preemptions
