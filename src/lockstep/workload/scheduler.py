"""Requests to ranks, and into each rank's steps: plain integers, no clock. The real run and the simulator use it.

A run loop uses one `WorkloadScheduler` per rank:

    scheduler = WorkloadScheduler(requests, config, num_ranks, rank)
    states = scheduler.initial_states()
    while not scheduler.done(states):                    # the same answer on every rank
        plan = scheduler.next_step(states)               # plan.entries: what this rank computes; may be empty
        ... agree on plan.num_tokens and scheduler.state(), one exchange ...
        ... run the step: every rank takes part, with zero rows where its plan is empty ...
        states = [the SchedulerState that each rank sent, in rank order]

Everything that one rank decides about another rests on `states`, which all ranks have agreed on, and on the workload,
which all ranks have read. A state describes its rank **after** the step that was just planned, so that it can travel
with the agreement of that very step, and nothing of the step needs to have been computed yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from lockstep.errors import ConfigurationError
from lockstep.workload.policies import LOAD_BALANCING, LoadBalancer, SchedulerState, prefills_run
from lockstep.workload.request import Request


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests become steps.

    Attributes:
        load_balancing: which rank gets an arriving request: `round-robin`; `least-tokens`, the rank with the fewest
            tokens still to be computed; `least-kv-cache`, the rank whose unfinished requests will hold the fewest
            tokens of KV cache. Ties go to the lowest rank.
        max_num_batched_tokens: most tokens of one rank in one step, >= 1. A longer prompt runs in several steps.
        max_num_seqs: most requests that one rank works on at a time, >= 1; never more than `max_num_batched_tokens`,
            so that every request that generates gets its token in every step.
        max_prefill_delay_steps: a prompt may be held this many steps, so that prompts of several ranks run in the same
            step (see `prefills_run`); 0 turns holding off.
        kv_capacity_tokens: tokens of KV cache that one rank has, >= 1; a request waits until prompt and output at their
            longest fit. None for no limit.
        seconds_per_step: how many seconds of the workload's arrival times pass per step, > 0. A run measured in steps
            repeats exactly, whatever the machine's speed.
    """

    load_balancing: str = "round-robin"
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_prefill_delay_steps: int = 0
    kv_capacity_tokens: int | None = None
    seconds_per_step: float = 0.05

    def __post_init__(self) -> None:
        if self.load_balancing not in LOAD_BALANCING:
            raise ConfigurationError(f"load_balancing must be one of {LOAD_BALANCING}, got {self.load_balancing!r}")
        for name, least in (("max_num_batched_tokens", 1), ("max_num_seqs", 1), ("max_prefill_delay_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.kv_capacity_tokens is not None and self.kv_capacity_tokens < 1:
            raise ConfigurationError(f"kv_capacity_tokens must be >= 1, got {self.kv_capacity_tokens}")
        if not 0 < self.seconds_per_step < float("inf"):
            raise ConfigurationError(f"seconds_per_step must be a number > 0, got {self.seconds_per_step}")

    def check_fits(self, requests: Iterable[Request]) -> None:
        """Raise if a request can never run because its KV cache exceeds a rank's.

        Raises:
            ConfigurationError: naming the request, what it needs and the limit.
        """
        limit = self.kv_capacity_tokens
        for request in requests:
            if limit is not None and request.num_kv_tokens > limit:
                raise ConfigurationError(
                    f"request {request.request_id} needs {request.num_kv_tokens} tokens of KV cache, more than "
                    f"kv_capacity_tokens={limit} of a rank: it could never run"
                )


class StepEntry(NamedTuple):
    """One request's part of a step.

    Attributes:
        request_id: the request.
        start: position of the first token, = tokens of it already in the KV cache.
        num_tokens: rows, >= 1: a piece of the prompt, or the one token generated last.
        is_prefill: whether the rows are of the prompt.
        samples: whether the last row's output is sampled into the next token. False only within a prompt.
        finishes: whether that token is the request's last.
    """

    request_id: int
    start: int
    num_tokens: int
    is_prefill: bool
    samples: bool
    finishes: bool


class StepPlan(NamedTuple):
    """What one rank computes in one step.

    Attributes:
        step: number of the step, from 0.
        entries: each request's part: those that generate first, in the order in which they began, then prompts.
        num_prefill_tokens: rows of prompts.
        num_decode_tokens: rows that generate; `num_tokens` is the sum of both.
        num_waiting: requests left in the queue.
        num_waiting_for_kv: of those, how many wait only because the KV cache is full (0, or all of them).
        prefills_held: whether prompts that could have run were held for other ranks.
        finished: ids of the requests whose last token is sampled in this step.
    """

    step: int
    entries: tuple[StepEntry, ...]
    num_prefill_tokens: int
    num_decode_tokens: int
    num_waiting: int
    num_waiting_for_kv: int
    prefills_held: bool
    finished: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of this rank in the step; 0 where it takes part idle."""
        return self.num_prefill_tokens + self.num_decode_tokens

    @property
    def prefill_context_tokens(self) -> int:
        """KV entries that the prompts' tokens attend to, themselves included, summed over these tokens."""
        return sum(e.num_tokens * (2 * e.start + e.num_tokens + 1) // 2 for e in self.entries if e.is_prefill)

    @property
    def decode_context_tokens(self) -> int:
        """The same of the tokens that generate; 0 where the entries were not listed."""
        return sum(e.start + 1 for e in self.entries if not e.is_prefill)


class RankScheduler:
    """One rank's queue, and the steps formed from it.

    Requests join and leave between steps (continuous batching). Requests that generate go first, one token each; what
    is left of the token budget goes to prompts in order of arrival, the last of them cut where the budget ends.
    Nothing is kept per step: a step in which no prompt runs and no request ends costs nothing, however many requests
    generate.

    Args:
        config: budget and limits.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._step = -1
        self._waiting: deque[tuple[Request, int]] = deque()  # with the step of arrival
        self._partial: Request | None = None  # the prompt that has begun and not ended: at most one
        self._partial_done = 0
        self._partial_arrival = 0
        self._decoding: dict[int, tuple[Request, int]] = {}  # with the step that ended its prompt
        self._ends: dict[int, list[int]] = {}  # step -> requests whose last token is sampled in it
        self._num_decoding = 0  # requests that generate in the step to come
        self._context_base = 0  # sum of (prompt - step that ended it) over these, see `counts`
        self._outstanding = 0
        self._kv_reserved = 0
        self._kv_queued = 0

    def add(self, request: Request, step: int) -> None:
        """Put a request into the queue before `step` is planned; it may run from that step on."""
        self._waiting.append((request, step))
        self._outstanding += request.num_computed_tokens
        self._kv_queued += request.num_kv_tokens

    def next_step(self, step: int, run_prefills: bool = True, list_entries: bool = True) -> StepPlan:
        """Plan a step and take it as done.

        Args:
            step: its number, above the last one's. A caller that only counts may leave out steps in which this rank
                does nothing but generate: no request ends in them, and prompts are held or there are none.
            run_prefills: the answer of `prefills_run`; False holds all prompts.
            list_entries: False leaves out the entries that generate, for callers that only count.
        """
        self._skip_to(step)
        entries = self._decode_entries(step) if list_entries else []
        num_decode = self._num_decoding
        self._outstanding -= num_decode
        num_prefill, held = 0, False
        if run_prefills:
            num_prefill = self._run_prefills(step, self._config.max_num_batched_tokens - num_decode, entries)
            self._outstanding -= num_prefill
        else:
            held = self._prompt_can_run()
        finished = tuple(self._ends.pop(step, ()))
        for request_id in finished:
            self._leave(request_id)
        num_waiting = num_waiting_for_kv = len(self._waiting)
        if not num_waiting or not self._has_seat() or self._kv_fits(self._waiting[0][0]):
            num_waiting_for_kv = 0
        return StepPlan(step, tuple(entries), num_prefill, num_decode, num_waiting, num_waiting_for_kv, held, finished)

    def finish_step(self, stopped: Iterable[int]) -> None:
        """Let requests leave before their last token, for an engine that heeds end-of-sequence.

        Call it once the planned step has run. Requests that reach `max_new_tokens` leave by themselves.

        Args:
            stopped: ids of requests that generate no more, or are aborted.

        Raises:
            ConfigurationError: if an id is not one of this rank's unfinished requests.
        """
        for request_id in stopped:
            if request_id in self._decoding:
                request, ended = self._decoding[request_id]
                last_step = ended + request.max_new_tokens - 1
                self._ends[last_step].remove(request_id)
                if not self._ends[last_step]:
                    del self._ends[last_step]
                self._outstanding -= last_step - self._step
                self._leave(request_id)
            elif self._partial is not None and self._partial.request_id == request_id:
                self._outstanding -= self._partial.num_computed_tokens - self._partial_done
                self._kv_reserved -= self._partial.num_kv_tokens
                self._partial = None
            else:
                for index, (request, _) in enumerate(self._waiting):
                    if request.request_id == request_id:
                        del self._waiting[index]
                        self._outstanding -= request.num_computed_tokens
                        self._kv_queued -= request.num_kv_tokens
                        break
                else:
                    raise ConfigurationError(f"request {request_id} is not an unfinished request of this rank")

    def state(self) -> SchedulerState:
        """Return what the other ranks need to know, as of after the step planned last."""
        wait = -1
        if self._partial is not None:
            wait = self._step + 1 - self._partial_arrival
        elif self._prompt_can_run():
            wait = self._step + 1 - self._waiting[0][1]
        return SchedulerState(self._outstanding, self._kv_reserved + self._kv_queued, self._num_decoding, wait)

    def counts(self) -> tuple[int, int, bool, int]:
        """Return what a simulation needs to carry on without visiting this rank.

        Returns:
            `num_decoding` of the coming step; KV tokens that these requests read, less `step * num_decoding`;
            whether there is a queue or a prompt that has begun; the arrival step of the first prompt that could run,
            or -1.
        """
        if self._partial is not None:
            return self._num_decoding, self._context_base, True, self._partial_arrival
        if not self._waiting:
            return self._num_decoding, self._context_base, False, -1
        arrival = self._waiting[0][1] if self._prompt_can_run() else -1
        return self._num_decoding, self._context_base, True, arrival

    def _skip_to(self, step: int) -> None:
        skipped = step - self._step - 1
        if skipped < 0:
            raise ConfigurationError(f"step must be above the last one, {self._step}, got {step}")
        if skipped:
            if not self._ends.keys().isdisjoint(range(self._step + 1, step)):
                raise ConfigurationError(f"step {min(self._ends)} may not be left out: a request ends in it")
            self._outstanding -= skipped * self._num_decoding
        self._step = step

    def _decode_entries(self, step: int) -> list[StepEntry]:
        entries = []
        for request, ended in self._decoding.values():
            position = request.num_prompt_tokens + step - ended - 1
            finishes = step - ended + 1 == request.max_new_tokens
            entries.append(StepEntry(request.request_id, position, 1, False, True, finishes))
        return entries

    def _run_prefills(self, step: int, budget: int, entries: list[StepEntry]) -> int:
        """Append the prompts' entries to `entries`; return their rows."""
        left = budget
        while left > 0:
            if self._partial is None:
                if not self._waiting or not self._prompt_can_run():
                    break
                self._partial, self._partial_arrival = self._waiting.popleft()
                self._partial_done = 0
                self._kv_queued -= self._partial.num_kv_tokens
                self._kv_reserved += self._partial.num_kv_tokens
            request, start = self._partial, self._partial_done
            num_tokens = min(left, request.num_prompt_tokens - start)
            left -= num_tokens
            ends = start + num_tokens == request.num_prompt_tokens
            finishes = ends and request.max_new_tokens == 1
            entries.append(StepEntry(request.request_id, start, num_tokens, True, ends, finishes))
            if ends:
                self._partial = None
                self._decoding[request.request_id] = (request, step)
                self._ends.setdefault(step + request.max_new_tokens - 1, []).append(request.request_id)
                self._num_decoding += 1
                self._context_base += request.num_prompt_tokens - step
            else:
                self._partial_done += num_tokens
        return budget - left

    def _prompt_can_run(self) -> bool:
        if self._partial is not None:
            return True
        return bool(self._waiting) and self._has_seat() and self._kv_fits(self._waiting[0][0])

    def _has_seat(self) -> bool:
        return self._num_decoding + (self._partial is not None) < self._max_num_seqs

    def _kv_fits(self, request: Request) -> bool:
        capacity = self._config.kv_capacity_tokens
        return capacity is None or self._kv_reserved + request.num_kv_tokens <= capacity

    def _leave(self, request_id: int) -> None:
        request, ended = self._decoding.pop(request_id)
        self._num_decoding -= 1
        self._context_base -= request.num_prompt_tokens - ended
        self._kv_reserved -= request.num_kv_tokens


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
        if not 0 <= rank < num_ranks:
            raise ConfigurationError(f"rank must be in 0..{num_ranks - 1}, got {rank}")
        config.check_fits(requests)
        self._config = config
        self._num_ranks = num_ranks
        self._rank = rank
        self._arrivals = deque((ceil(request.arrival_s / config.seconds_per_step), request) for request in requests)
        self._clock = 0  # virtual time in steps: runs ahead of the step number where all ranks were idle
        self._step = 0
        self._balancer = LoadBalancer(config.load_balancing, num_ranks)
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
        return not self._arrivals and not any(state.num_outstanding_tokens for state in states)

    @property
    def unfinished(self) -> bool:
        """Whether this rank has or may get more work after the step planned last."""
        return bool(self._arrivals) or self._scheduler.state().num_outstanding_tokens > 0

    def next_step(self, states: Sequence[SchedulerState]) -> StepPlan:
        """Plan this rank's next step.

        Where all ranks are idle, virtual time jumps to the next arrival instead of running empty steps.

        Args:
            states: every rank's `SchedulerState`, as agreed with the step before, `[num_ranks]`; `initial_states()`
                before the first.

        Returns:
            The plan of this rank; `num_tokens` is 0 where it takes part idle.
        """
        if len(states) != self._num_ranks:
            raise ConfigurationError(f"states must have one entry per rank, {self._num_ranks}, got {len(states)}")
        if self._arrivals and not any(state.num_outstanding_tokens for state in states):
            self._clock = max(self._clock, self._arrivals[0][0])
        arriving = []
        while self._arrivals and self._arrivals[0][0] <= self._clock:
            arriving.append(self._arrivals.popleft()[1])
        for request, rank in zip(arriving, self._balancer.assign(arriving, states), strict=True):
            if rank == self._rank:
                self._scheduler.add(request, self._step)
                self.assigned.append(request)
                self.arrival_steps[request.request_id] = self._step
        run_prefills = prefills_run(
            [state.prefill_wait_steps for state in states],
            [state.num_decoding for state in states],
            self._config.max_prefill_delay_steps,
        )
        plan = self._scheduler.next_step(self._step, run_prefills)
        self._step += 1
        self._clock += 1
        return plan

    def state(self) -> SchedulerState:
        """Return what this rank tells the others, as of after the step planned last."""
        return self._scheduler.state()

    def finish_step(self, stopped: Iterable[int]) -> None:
        """Let requests of this rank end before their last token; see `RankScheduler.finish_step`."""
        self._scheduler.finish_step(stopped)
