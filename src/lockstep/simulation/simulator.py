"""The simulator: the runtime's scheduler and policies over a workload, with a cost formula in place of tensors.

Ranks that only generate in a step are not visited: their counts advance together, in arrays. Only ranks with an
arriving, ending or preempted request, or a running prompt, go through the `RankScheduler` of real runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import ceil, isnan, nan

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.simulation.config import SimulationConfig, SimulationResult, Stop
from lockstep.simulation.sink import StepSink, TakesColumns, filler_rows, num_chunks
from lockstep.steplog.table import loss_figures
from lockstep.workload.policies import LoadBalancer
from lockstep.workload.rank_scheduler import RankScheduler
from lockstep.workload.request import Request
from lockstep.workload.schedule import Schedule
from lockstep.workload.synthetic import percentile

_FEW_RANKS = 32


def simulate(
    requests: Sequence[Request], config: SimulationConfig, step_log: TakesColumns | None = None,
    on_progress: Callable[[float], None] = lambda share: None, max_report_cells: int = 1_000_000,
    stops: Mapping[int, Stop] | None = None, buffer_cells: int = 400_000,
) -> SimulationResult:  # fmt: skip
    """Simulate a workload, in order of arrival, to its end; `on_progress` receives the share of rows done.

    Memory does not grow beyond a report of `max_report_cells` and buffers of `buffer_cells` (step x rank). `stops` are
    the requests of a recorded run that ended before their last token, by id, see `read_replay`.
    """
    config.scheduler.check_fits(requests)
    total_rows = sum(request.num_computed_tokens for request in requests)  # without those that are preempted
    sink = StepSink(
        config, step_log, max_report_cells, buffer_cells, lambda rows: on_progress(min(1.0, rows / total_rows))
    )
    return _Simulation(requests, config, sink, stops or {}).run()


class _Simulation:
    """The state of one simulation. Arrays have one entry per rank; lists of seconds one per request."""

    def __init__(
        self, requests: Sequence[Request], config: SimulationConfig, sink: StepSink, stops: Mapping[int, Stop]
    ) -> None:
        self.requests, self.config, self.sink = requests, config, sink
        num_ranks = config.num_ranks
        self.schedulers = [RankScheduler(config.scheduler) for _ in range(num_ranks)]
        self.balancer = LoadBalancer(config.scheduler.load_balancing, num_ranks)
        # What the ranks that are not visited do: one row for each request that generates.
        self.decode, self.num_waiting = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
        self.context_base = np.zeros(num_ranks, np.int64)  # + step * decode = KV entries that these rows read
        self.outstanding_base = np.zeros(num_ranks, np.int64)  # - step * decode = outstanding tokens before the step
        self.kv_tokens = np.zeros(num_ranks, np.int64)  # of unfinished requests, at their longest
        self.decode_list = [0] * num_ranks if num_ranks <= _FEW_RANKS else None  # the same, where ranks are few
        self.context_list = [0] * num_ranks
        self.total_decode = 0
        self.ends: defaultdict[int, set[int]] = defaultdict(set)  # step -> ranks in which a request ends
        self.pages_are_limited = config.scheduler.num_kv_pages is not None
        self.page_visits: defaultdict[int, set[int]] = defaultdict(set)  # step -> ranks to visit because of their pages
        self.page_step: dict[int, int | None] = {}  # rank -> the only one of these steps that still counts
        self.heads: dict[int, int] = {}  # rank -> arrival step of its first prompt, where that could run
        self.queued: set[int] = set()  # ranks with waiting requests, and those whose requests wait for pages only
        self.kv_waiting: set[int] = set()
        self.kv_waits = self.num_unfinished = 0
        self.index = {request.request_id: index for index, request in enumerate(requests)}
        # With stops, every rank is visited in every step: only the entry of its row shows that a token is dropped.
        self.has_stops = bool(stops)
        kept = {request_id: stop.num_new_tokens for request_id, stop in stops.items()}
        self.num_kept = [kept.get(request.request_id, request.max_new_tokens) for request in requests]
        self.stops_before: defaultdict[int, list[int]] = defaultdict(list)
        for request_id, stop in stops.items():
            if stop.step is not None:
                self.stops_before[stop.step].append(self.index[request_id])
        in_steps, per_step = config.clock == "steps", config.scheduler.seconds_per_step
        self.arrivals = [ceil(item.arrival_s / per_step) if in_steps else item.arrival_s for item in requests]
        self.clock: float = 0  # of the arrivals: simulated seconds or steps
        self.now_s = 0.0
        # Lists, since they are written one entry at a time, which is slow in arrays.
        self.rank_of: list[int] = []  # of each request that has arrived
        self.arrived_s = [request.arrival_s for request in requests]
        self.begun_s, self.first_s, self.last_s = ([nan] * len(requests) for _ in range(3))

    def run(self) -> SimulationResult:
        config, cost, sink = self.config, self.config.cost, self.sink
        in_steps, chunk_size = config.clock == "steps", config.chunk_size
        rank_of, arrivals, count = self.rank_of, self.arrivals, len(self.arrivals)
        step = 0
        while len(rank_of) < count or self.num_unfinished:
            run_prefills = self._prefills_run(step)
            visited = self.ends.pop(step, set())
            if step in self.page_visits:
                visited.update(rank for rank in self.page_visits.pop(step) if self.page_step[rank] == step)
            if len(rank_of) < count and (arrivals[len(rank_of)] <= self.clock or not self.num_unfinished):
                visited |= self._arrive(step)
            if run_prefills:  # other ranks with prompts have to wait for a seat or for pages
                visited.update(self.heads)
            if self.has_stops:
                self._stop(step)
                visited.update(range(config.num_ranks))

            slot = sink.next_slot()
            sink.cells["decode_tokens"][slot] = self.decode
            sink.cells["decode_context_tokens"][slot] = self.context_base
            schedules = [(rank, self._visit(rank, step, slot, run_prefills)) for rank in visited]
            own_us, longest, num_rows = self._work(step, schedules)
            chunks = 1 if chunk_size is None else num_chunks(longest, chunk_size)
            step_us = cost.step_time_us(own_us, longest, num_rows, chunks, config.num_ranks)
            started_s = sink.start_s[slot] = self.now_s
            sink.duration_s[slot] = step_us * 1e-6
            self.now_s += step_us * 1e-6
            self.clock = self.clock + 1 if in_steps else self.now_s
            if not run_prefills:
                sink.cells["prefills_held"][slot, list(self.heads)] = True
                for rank, schedule in schedules:
                    sink.cells["prefills_held"][slot, rank] = schedule.prefills_held
            for rank, schedule in schedules:
                self._after(rank, schedule, slot, started_s)
            if self.queued:
                sink.cells["num_waiting"][slot] = self.num_waiting
                self.kv_waits += len(self.kv_waiting)
            step += 1
        sink.flush()
        for before, (index, *_) in self.stops_before.items():
            told = f"cannot stop before step {before}: the last step is {step - 1}"
            raise ConfigurationError(f"request {self.requests[index].request_id} {told}")
        return self._result(step)

    def _prefills_run(self, step: int) -> bool:
        """Decide as `prefills_run` does, from incremental state instead of all ranks' states."""
        delay, heads = self.config.scheduler.max_prefill_delay_steps, self.heads
        if delay == 0 or self.total_decode == 0:
            return True
        return bool(heads) and (len(heads) == self.config.num_ranks or step - min(heads.values()) >= delay)

    def _arrive(self, step: int) -> set[int]:
        """Assign the requests that are due, or if none is the next ones; return their ranks."""
        first = last = len(self.rank_of)
        in_steps = self.config.clock == "steps"
        if self.arrivals[first] > self.clock:
            self.clock = self.arrivals[first]
            self.now_s = self.now_s if in_steps else self.clock
        while last < len(self.arrivals) and self.arrivals[last] <= self.clock:
            last += 1
        policy = self.config.scheduler.load_balancing
        loads = self.outstanding_base - step * self.decode if policy == "least-tokens" else self.kv_tokens
        ranks = self.balancer.assign_by_load(self.requests[first:last], loads.tolist())
        self.rank_of += ranks
        if in_steps:
            self.arrived_s[first:last] = [self.now_s] * (last - first)
        for request, rank in zip(self.requests[first:last], ranks, strict=True):
            self.schedulers[rank].add(request, step)
        self.num_unfinished += last - first
        return set(ranks)

    def _stop(self, step: int) -> None:
        for index in self.stops_before.pop(step, ()):
            request_id = self.requests[index].request_id
            if index >= len(self.rank_of):
                raise ConfigurationError(f"request {request_id} cannot stop before step {step}: it comes later")
            self.schedulers[self.rank_of[index]].stop((request_id,))
            self.num_unfinished -= 1

    def _visit(self, rank: int, step: int, slot: int, run_prefills: bool) -> Schedule:
        """Plan the step of a rank that may do more than generate."""
        cells = self.sink.cells
        schedule = self.schedulers[rank].next_step(step, run_prefills, list_entries=self.has_stops)
        if schedule.preempted or self.has_stops:  # requests that generated have left before this very step
            decode, context = schedule.num_decode_tokens, schedule.decode_context_tokens
            self._set_decode(rank, decode, context - step * decode)
            cells["decode_tokens"][slot, rank] = decode
            cells["decode_context_tokens"][slot, rank] = context - step * decode
            cells["preempted"][slot, rank] = len(schedule.preempted)
        if schedule.prefix_hits:
            cells["cached_tokens"][slot, rank] = schedule.num_cached_tokens
        if schedule.num_prefill_tokens:
            cells["prefill_tokens"][slot, rank] = schedule.num_prefill_tokens
            cells["prefill_context_tokens"][slot, rank] = schedule.prefill_context_tokens
        return schedule

    def _work(self, step: int, schedules: Sequence[tuple[int, Schedule]]) -> tuple[float, int, int]:
        """Return the longest rank's own time in us, the most rows of any rank, and the rows of all with fillers."""
        cost, config = self.config.cost, self.config
        token_us, decode_us = cost.token_us + cost.request_us, cost.decode_context_us  # of a row that generates
        if self.decode_list is not None:
            # With few ranks, arithmetic on a list is several times as fast as on an array.
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
        num_rows = self.total_decode
        for _, schedule in schedules:
            if schedule.num_prefill_tokens:
                rows, decode = schedule.num_tokens, schedule.num_decode_tokens
                num_rows += schedule.num_prefill_tokens
                longest = max(longest, rows)
                contexts = schedule.decode_context_tokens, schedule.prefill_context_tokens
                own_us = max(own_us, cost.own_us(rows, decode, *contexts))
        if config.row_shapes != "ragged":
            tokens = self.decode.copy()
            for rank, schedule in schedules:
                tokens[rank] += schedule.num_prefill_tokens
            num_rows += int(filler_rows(tokens[None], config.chunk_size, config.row_shapes).sum())
        return own_us, longest, num_rows

    def _set_decode(self, rank: int, decode: int, base: int) -> None:
        self.total_decode += decode - int(self.decode[rank])
        self.decode[rank] = decode
        self.context_base[rank] = base
        if self.decode_list is not None:
            self.decode_list[rank] = decode
            self.context_list[rank] = base

    def _after(self, rank: int, schedule: Schedule, slot: int, started_s: float) -> None:
        """Update the counts and times with a visited rank's step."""
        scheduler, step = self.schedulers[rank], schedule.step
        for entry in schedule.entries:  # of prompts only, if there are no stops
            index = self.index[entry.request_id]
            if isnan(self.begun_s[index]):  # not after a preemption
                self.begun_s[index] = started_s
            if entry.samples:
                request, num_kept = self.requests[index], self.num_kept[index]
                num_sampled = entry.start + entry.num_tokens + 1 - request.num_prompt_tokens
                if num_sampled == 1 and num_kept:
                    self.first_s[index] = self.now_s
                if num_sampled == num_kept:
                    self.last_s[index] = self.now_s
                if num_sampled > num_kept:
                    self.sink.cells["overrun_rows"][slot, rank] += 1
                if entry.is_prefill and not entry.finishes:
                    self.ends[step + request.max_new_tokens - num_sampled].add(rank)
        for request_id in schedule.finished:
            index = self.index[request_id]
            if self.num_kept[index] == self.requests[index].max_new_tokens:
                self.last_s[index] = self.now_s
        self.num_unfinished -= len(schedule.finished)
        state = scheduler.state()
        self._set_decode(rank, state.num_decoding, scheduler.decode_context_base)
        if self.config.scheduler.load_balancing != "round-robin":
            self.outstanding_base[rank] = state.num_outstanding_tokens + (step + 1) * state.num_decoding
            self.kv_tokens[rank] = state.num_kv_tokens
        self.num_waiting[rank] = schedule.num_waiting
        (self.queued.add if schedule.num_waiting else self.queued.discard)(rank)
        (self.kv_waiting.add if schedule.num_waiting_for_kv else self.kv_waiting.discard)(rank)
        can_run = state.prefill_wait_steps >= 0
        if can_run:
            self.heads[rank] = step + 1 - state.prefill_wait_steps
        else:
            self.heads.pop(rank, None)
        # If prompts are never held, a rank whose first prompt can run is visited in the next step anyway.
        if self.pages_are_limited:
            is_visited = can_run and not self.config.scheduler.max_prefill_delay_steps
            at = self.page_step[rank] = None if is_visited else scheduler.pages_change_at()
            if at is not None:
                self.page_visits[at].add(rank)

    def _result(self, num_steps: int) -> SimulationResult:
        sink, requests, num_ranks, now_s = self.sink, self.requests, self.config.num_ranks, self.now_s
        rank_of = np.array(self.rank_of, np.int32)
        more = np.array(self.num_kept, np.float64) - 1
        more[more <= 0] = np.nan
        arrived_s, begun_s, first_s, last_s = map(np.array, (self.arrived_s, self.begun_s, self.first_s, self.last_s))
        ttft_s, tpot_s, queue_s = first_s - arrived_s, (last_s - first_s) / more, begun_s - arrived_s
        num_output = sum(self.num_kept)
        num_tokens = sum(request.num_prompt_tokens for request in requests) + num_output
        totals = {name: int(values.sum()) for name, values in sink.totals.items()}
        summary = {
            "requests": len(requests),
            "ranks": num_ranks,
            "steps": num_steps,
            "rank_steps": num_steps * num_ranks,
            "duration_s": now_s,
            "real_tokens": totals["real_rows"],
            "tokens_per_s": num_tokens / now_s if now_s else 0.0,  # of prompts and output
            "output_tokens_per_s": num_output / now_s if now_s else 0.0,
            **{name: totals[name] for name in ("dummy_rows", "padding_rows")},
            **loss_figures(sink.lost()),
            # Rows that preemptions made necessary again are in these.
            "per_rank": {
                "requests": np.bincount(rank_of, minlength=num_ranks).tolist(),
                "real_rows": sink.totals["real_rows"].tolist(),
                "prefill_tokens": sink.totals["prefill_tokens"].tolist(),
                "new_tokens": np.bincount(rank_of, self.num_kept, num_ranks).astype(np.int64).tolist(),
            },
            "ttft_s": _percentiles(ttft_s),
            "tpot_s": _percentiles(tpot_s),
            "queue_s": _percentiles(queue_s),
            "kv_waits": self.kv_waits,  # rank-steps in which requests waited only because the KV cache was full
            **{name: totals[name] for name in ("preempted", "cached_tokens", "overrun_rows")},
            "buffer_limited_steps": sink.num_buffer_limited,  # in more chunks than asked for
            "held_rank_steps": totals["prefills_held"],
        }
        return SimulationResult(summary, sink.table(), rank_of, queue_s, ttft_s, tpot_s)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    ordered = known.tolist()
    return {"mean": float(known.mean()), "p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99)}
