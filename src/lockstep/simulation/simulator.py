"""What would happen: the runtime's scheduler and policies over a workload, with a cost formula in place of tensors.

Ranks in whose step nothing happens but generating are not visited: their counts stand in arrays, one entry per rank,
and are advanced together. Only ranks with an arriving request, a running prompt or an ending request go through their
`RankScheduler`, the one of the real run. That the counts are those of the real run, step by step, is a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, nan
from typing import Any

import numpy as np

from lockstep.coordination.step_log import StepColumns
from lockstep.errors import ConfigurationError
from lockstep.simulation.cost import CostConstants
from lockstep.simulation.recorder import StepRecorder, filler_rows
from lockstep.simulation.step_table import StepTable, loss_figures
from lockstep.workload.policies import LoadBalancer
from lockstep.workload.request import Request
from lockstep.workload.scheduler import RankScheduler, SchedulerConfig, StepPlan

ROW_SHAPES = ("ragged", "dummy", "equal")
"""What a dispatcher makes of uneven rows: nothing; one dummy row for a rank with none left; the longest rank's rows
for all."""

_FEW_RANKS = 32
_MAX_RANKS = 100_000


@dataclass(frozen=True)
class SimulationConfig:
    """What is simulated.

    Attributes:
        num_ranks: data-parallel ranks, 1..100,000.
        scheduler: how requests become steps.
        cost: what a step costs.
        max_chunk_size: most rows that one rank sends at a time, >= 1; None for no limit.
        row_shapes: one of `ROW_SHAPES`.
        clock: `cost`: requests arrive as simulated time passes; `steps`: `scheduler.seconds_per_step` of the workload's
            time pass in every step, as in a real run.
        buffer_capacity_rows: rows that a rank's exchange buffers hold, >= `num_ranks`; None for no limit. A rank may
            get every row of a chunk, so the buffers need `num_ranks` times the chunk's size, and where they are smaller
            than that, so are the chunks. In bytes: rows x hidden size x bytes per value, for rows and results each.
    """

    num_ranks: int
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cost: CostConstants = field(default_factory=lambda: CostConstants.load("linear"))
    max_chunk_size: int | None = None
    row_shapes: str = "ragged"
    clock: str = "cost"
    buffer_capacity_rows: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= _MAX_RANKS:
            raise ConfigurationError(f"num_ranks must be in 1..{_MAX_RANKS}, got {self.num_ranks}")
        if self.max_chunk_size is not None and self.max_chunk_size < 1:
            raise ConfigurationError(f"max_chunk_size must be >= 1, got {self.max_chunk_size}")
        if self.row_shapes not in ROW_SHAPES:
            raise ConfigurationError(f"row_shapes must be one of {ROW_SHAPES}, got {self.row_shapes!r}")
        if self.clock not in ("cost", "steps"):
            raise ConfigurationError(f"clock must be 'cost' or 'steps', got {self.clock!r}")
        if self.buffer_capacity_rows is not None and self.buffer_capacity_rows < self.num_ranks:
            raise ConfigurationError(
                f"buffer_capacity_rows must be >= {self.num_ranks}, a row of each of {self.num_ranks} ranks, "
                f"got {self.buffer_capacity_rows}"
            )

    @property
    def chunk_size(self) -> int | None:
        """Most rows that one rank sends at a time: `max_chunk_size`, or what the buffers hold where that is less."""
        if self.buffer_capacity_rows is None:
            return self.max_chunk_size
        held = self.buffer_capacity_rows // self.num_ranks
        return held if self.max_chunk_size is None else min(held, self.max_chunk_size)


@dataclass
class SimulationResult:
    """What happened.

    Attributes:
        summary: figures by name, see `simulate`.
        steps: the step log, several steps added into one row where there are many.
        rank, queue_s, ttft_s, tpot_s: of each request, `[requests]`: the rank it ran on; seconds until it first ran;
        until
            its first token; per further token (NaN where there was none).
    """

    summary: dict[str, Any]
    steps: StepTable
    rank: np.ndarray
    queue_s: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray


def simulate(
    requests: Sequence[Request],
    config: SimulationConfig,
    step_log: StepColumns | None = None,
    on_progress: Callable[[float], None] | None = None,
    max_report_cells: int = 1_000_000,
) -> SimulationResult:
    """Simulate a workload to its end.

    Args:
        requests: in order of arrival.
        config: ranks, policies, cost.
        step_log: takes every step and rank, if given.
        on_progress: called now and then, and at the end, with the share of all rows that have been computed.
        max_report_cells: most cells (step x rank) of `SimulationResult.steps`; memory does not grow beyond them.

    Returns:
        The result. Its `summary` has `requests, ranks, steps, rank_steps, duration_s, real_tokens, tokens_per_s` (rows
        of prompts and output), `output_tokens_per_s, dummy_rows, padding_rows, lost_fraction, no_requests_fraction,
        lost` (see `loss_figures`), `per_rank` (`requests, real_rows, prefill_tokens, new_tokens`, each `[ranks]`),
        `ttft_s, tpot_s, queue_s` (each with `mean, p50, p99`), `kv_waits` (rank-steps in which requests waited only
        because the KV cache was full), `buffer_limited_steps` (steps in more chunks than asked for, because larger ones
        do not fit into the exchange buffers) and `held_rank_steps`.

    Raises:
        ConfigurationError: for a request that can never fit into a rank's KV cache.
    """
    config.scheduler.check_fits(requests)
    return _Simulation(requests, config, step_log, max_report_cells, on_progress).run()


class _Simulation:
    """The state of one simulation. Arrays have one entry per rank, or per request where they say so."""

    def __init__(
        self,
        requests: Sequence[Request],
        config: SimulationConfig,
        step_log: StepColumns | None,
        max_cells: int,
        on_progress: Callable[[float], None] | None,
    ) -> None:
        self.requests = requests
        self.config = config
        num_ranks = config.num_ranks
        self.schedulers = [RankScheduler(config.scheduler) for _ in range(num_ranks)]
        self.balancer = _LoadBalancerTwin(config.scheduler.load_balancing, num_ranks)
        # What the ranks that are not visited do: one row for each request that generates.
        self.decode = np.zeros(num_ranks, np.int64)
        self.context_base = np.zeros(num_ranks, np.int64)  # + step * decode = KV entries that these rows read
        self.decode_list = [0] * num_ranks if num_ranks <= _FEW_RANKS else None  # the same, where ranks are few
        self.context_list = [0] * num_ranks
        self.num_waiting = np.zeros(num_ranks, np.int64)
        self.total_decode = 0
        self.ends: dict[int, set[int]] = {}  # step -> ranks in which a request ends
        self.queued: set[int] = set()  # ranks with a queue, or with a prompt that has begun
        self.heads: dict[int, int] = {}  # rank -> arrival step of its first prompt, where that could run
        self.kv_waiting: set[int] = set()
        self.kv_waits = 0
        self.num_unfinished = 0
        self.index = {request.request_id: index for index, request in enumerate(requests)}
        # Lists, one entry per request: they are written one entry at a time, which arrays are slow at.
        self.rank_of: list[int] = []
        self.arrived_s = [request.arrival_s for request in requests]
        self.begun_s, self.first_s, self.last_s = ([nan] * len(requests) for _ in range(3))
        total_rows = sum(request.num_computed_tokens for request in requests)
        self.recorder = StepRecorder(
            num_ranks,
            config.cost,
            config.chunk_size,
            config.max_chunk_size,
            config.row_shapes,
            step_log,
            max_cells,
            # Only where the buffers are handed on: a step knows nothing of it.
            None if on_progress is None else lambda rows: on_progress(rows / total_rows),
        )

    def run(self) -> SimulationResult:
        config, cost, recorder, requests = self.config, self.config.cost, self.recorder, self.requests
        delay = config.scheduler.max_prefill_delay_steps
        in_steps = config.clock == "steps"
        arrivals = [
            ceil(request.arrival_s / config.scheduler.seconds_per_step) if in_steps else request.arrival_s
            for request in requests
        ]
        count = len(requests)
        following = 0  # the next request to arrive
        step = 0
        now_s = 0.0
        clock: float = 0
        chunk_size = config.chunk_size
        ragged = config.row_shapes == "ragged"
        while following < count or self.num_unfinished:
            run_prefills = self._prefills_run(step, delay)
            visited = self.ends.pop(step, _NONE)
            if following < count:
                if not self.num_unfinished and arrivals[following] > clock:
                    clock = arrivals[following]
                    now_s = now_s if in_steps else clock
                if arrivals[following] <= clock:
                    visited = visited | self._arrive(following, step, now_s, arrivals, clock)
                    following += len(self.arrived)
            if run_prefills and self.queued:
                visited = visited | self.queued

            slot = recorder.next_slot()
            recorder.decode[slot] = self.decode
            recorder.context_base[slot] = self.context_base
            num_tokens = self.total_decode
            plans = []
            prompts = []
            for rank in visited:
                plan = self.schedulers[rank].next_step(step, run_prefills, list_entries=False)
                plans.append((rank, plan))
                prefill = plan.num_prefill_tokens
                if prefill:
                    context = 0
                    for entry in plan.entries:  # prompts only: the others were not listed
                        context += entry.num_tokens * (2 * entry.start + entry.num_tokens + 1) // 2
                    prompts.append((rank, prefill, context))
                    num_tokens += prefill
                    recorder.prefill[slot, rank] = prefill
                    recorder.prefill_context[slot, rank] = context
            own_us, longest = self._longest(step, prompts)
            step_us = (
                cost.step_us
                + own_us
                + cost.chunk_us * (1 if chunk_size is None else -(-longest // chunk_size))
                + cost.row_us * longest
                + cost.experts_us(num_tokens if ragged else num_tokens + self._num_filler(prompts), config.num_ranks)
            )
            recorder.start_s[slot] = now_s
            recorder.duration_s[slot] = step_us * 1e-6
            started_s, now_s = now_s, now_s + step_us * 1e-6
            clock = clock + 1 if in_steps else now_s
            if not run_prefills:
                held = recorder.held[slot]
                for rank in self.heads:
                    held[rank] = True
                for rank, plan in plans:
                    held[rank] = plan.prefills_held
            self.balancer.computed(self.decode, prompts)
            for rank, plan in plans:
                self._after(rank, plan, step, started_s, now_s)
            if self.queued:
                recorder.num_waiting[slot] = self.num_waiting
                self.kv_waits += len(self.kv_waiting)
            step += 1
        recorder.flush()
        return self._result(step, now_s)

    def _prefills_run(self, step: int, delay: int) -> bool:
        """The twin of `prefills_run`, from what changed instead of all ranks' states."""
        if delay == 0 or self.total_decode == 0:
            return True
        heads = self.heads
        return bool(heads) and (len(heads) == self.config.num_ranks or step - min(heads.values()) >= delay)

    def _arrive(self, first: int, step: int, now_s: float, arrivals: Sequence[float], clock: float) -> set[int]:
        last = first + 1
        while last < len(arrivals) and arrivals[last] <= clock:
            last += 1
        self.arrived = self.requests[first:last]
        ranks = self.balancer.assign(self.arrived)
        self.rank_of += ranks
        if self.config.clock == "steps":
            self.arrived_s[first:last] = [now_s] * (last - first)
        for request, rank in zip(self.arrived, ranks, strict=True):
            self.schedulers[rank].add(request, step)
        self.num_unfinished += last - first
        return set(ranks)

    def _longest(self, step: int, prompts: Sequence[tuple[int, int, int]]) -> tuple[float, int]:
        """Return the longest rank's own time in us, and the most rows of any rank.

        Args:
            step: its number.
            prompts: `(rank, rows, context)` of the ranks that run prompts.
        """
        cost = self.config.cost
        token_us, decode_us = cost.token_us + cost.request_us, cost.decode_context_us  # of a row that generates
        if self.decode_list is not None:
            # A few ranks: arithmetic on a list is several times as fast as on an array.
            longest = max(self.decode_list)
            own_us = token_us * longest
            if decode_us:
                own_us = max(
                    token_us * decode + decode_us * (base + decode * step)
                    for decode, base in zip(self.decode_list, self.context_list, strict=True)
                )
        else:
            longest = int(self.decode.max())
            own_us = token_us * longest
            if decode_us:
                own_us = float(((token_us + decode_us * step) * self.decode + decode_us * self.context_base).max())
        for rank, prefill, context in prompts:
            decode = int(self.decode[rank])
            longest = max(longest, decode + prefill)
            own_us = max(
                own_us,
                token_us * decode
                + cost.token_us * prefill
                + decode_us * (int(self.context_base[rank]) + decode * step)
                + cost.prefill_context_us * context,
            )
        return own_us, longest

    def _num_filler(self, prompts: Sequence[tuple[int, int, int]]) -> int:
        """Return the dummy and padding rows of all ranks in this step."""
        tokens = self.decode.copy()
        for rank, prefill, _ in prompts:
            tokens[rank] += prefill
        return int(filler_rows(tokens[None], self.config.chunk_size, self.config.row_shapes).sum())

    def _after(self, rank: int, plan: StepPlan, step: int, started_s: float, now_s: float) -> None:
        """Take over what a visited rank's step has changed."""
        scheduler = self.schedulers[rank]
        for entry in plan.entries:  # prompts only
            index = self.index[entry.request_id]
            if entry.start == 0:
                self.begun_s[index] = started_s
            if entry.samples:
                self.first_s[index] = now_s
                if not entry.finishes:
                    self.ends.setdefault(step + self.requests[index].max_new_tokens - 1, set()).add(rank)
        for request_id in plan.finished:
            index = self.index[request_id]
            self.last_s[index] = now_s
            self.balancer.finished(rank, self.requests[index])
        self.num_unfinished -= len(plan.finished)
        decode, base, has_prompts, head = scheduler.counts()
        self.total_decode += decode - plan.num_decode_tokens
        self.decode[rank] = decode
        self.context_base[rank] = base
        if self.decode_list is not None:
            self.decode_list[rank] = decode
            self.context_list[rank] = base
        self.num_waiting[rank] = plan.num_waiting
        (self.queued.add if has_prompts else self.queued.discard)(rank)
        (self.kv_waiting.add if plan.num_waiting_for_kv else self.kv_waiting.discard)(rank)
        if head < 0:
            self.heads.pop(rank, None)
        else:
            self.heads[rank] = head

    def _result(self, num_steps: int, now_s: float) -> SimulationResult:
        recorder, requests = self.recorder, self.requests
        more = np.array([request.max_new_tokens - 1 for request in requests], np.float64)
        more[more == 0] = np.nan
        arrived_s, begun_s, first_s, last_s = map(np.array, (self.arrived_s, self.begun_s, self.first_s, self.last_s))
        ttft_s, tpot_s, queue_s = first_s - arrived_s, (last_s - first_s) / more, begun_s - arrived_s
        lost = recorder.lost()
        num_tokens = sum(request.num_prompt_tokens + request.max_new_tokens for request in requests)
        num_output = sum(request.max_new_tokens for request in requests)
        summary = {
            "requests": len(requests),
            "ranks": self.config.num_ranks,
            "steps": num_steps,
            "rank_steps": num_steps * self.config.num_ranks,
            "duration_s": now_s,
            "real_tokens": recorder.totals["real_rows"],
            "tokens_per_s": num_tokens / now_s if now_s else 0.0,
            "output_tokens_per_s": num_output / now_s if now_s else 0.0,
            "dummy_rows": recorder.totals["dummy_rows"],
            "padding_rows": recorder.totals["padding_rows"],
            **loss_figures(lost),
            "per_rank": self._per_rank(),
            "ttft_s": _percentiles(ttft_s),
            "tpot_s": _percentiles(tpot_s),
            "queue_s": _percentiles(queue_s),
            "kv_waits": self.kv_waits,
            "buffer_limited_steps": recorder.totals["buffer_limited"],
            "held_rank_steps": recorder.totals["held"],
        }
        return SimulationResult(summary, recorder.table(), np.array(self.rank_of, np.int32), queue_s, ttft_s, tpot_s)

    def _per_rank(self) -> dict[str, list[int]]:
        """What each rank got: every row of a request is computed on the rank that it was given to."""
        counts = {
            "requests": [1] * len(self.requests),
            "real_rows": [request.num_computed_tokens for request in self.requests],
            "prefill_tokens": [request.num_prompt_tokens for request in self.requests],
            "new_tokens": [request.max_new_tokens for request in self.requests],
        }
        found = {name: np.zeros(self.config.num_ranks, np.int64) for name in counts}
        for name, values in counts.items():
            np.add.at(found[name], np.array(self.rank_of, np.int64), np.array(values, np.int64))
        return {name: values.tolist() for name, values in found.items()}


_NONE: set[int] = set()


class _LoadBalancerTwin:
    """`LoadBalancer` over arrays: the load of each rank is kept up to date instead of read from its state."""

    def __init__(self, policy: str, num_ranks: int) -> None:
        self._policy = policy
        self._round_robin = LoadBalancer("round-robin", num_ranks) if policy == "round-robin" else None
        self._load = np.zeros(num_ranks, np.int64)

    def assign(self, requests: Sequence[Request]) -> list[int]:
        if self._round_robin is not None:
            return self._round_robin.assign(requests, ())
        ranks = []
        for request in requests:
            rank = int(self._load.argmin())  # the lowest of equal ranks, as there
            ranks.append(rank)
            by_tokens = self._policy == "least-tokens"
            self._load[rank] += request.num_computed_tokens if by_tokens else request.num_kv_tokens
        return ranks

    def computed(self, decode: np.ndarray, prompts: Sequence[tuple[int, int, int]]) -> None:
        if self._policy == "least-tokens":
            self._load -= decode
            for rank, prefill, _ in prompts:
                self._load[rank] -= prefill

    def finished(self, rank: int, request: Request) -> None:
        if self._policy == "least-kv-cache":
            self._load[rank] -= request.num_kv_tokens


def _percentiles(values: np.ndarray) -> dict[str, float]:
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    return {
        "mean": float(known.mean()),
        "p50": float(known[ceil(0.5 * len(known)) - 1]),
        "p99": float(known[ceil(0.99 * len(known)) - 1]),
    }
