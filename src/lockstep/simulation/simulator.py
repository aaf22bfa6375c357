"""The simulator: the runtime's scheduler and policies over a workload, with a cost formula in place of tensors.

Ranks that only generate in a step are not visited: their counts advance together, in arrays. Only ranks with an
arriving, ending or preempted request, or a running prompt, go through the `RankScheduler` of real runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, nan

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.simulation.bookkeeping import NONE, LoadBalancerTwin, PageSteps, StopSteps
from lockstep.simulation.config import SimulationConfig, SimulationResult, Stop
from lockstep.simulation.sink import StepSink, TakesColumns, filler_rows
from lockstep.steplog.table import loss_figures
from lockstep.workload.rank_scheduler import RankScheduler
from lockstep.workload.request import Request
from lockstep.workload.schedule import Schedule
from lockstep.workload.synthetic import percentile

_FEW_RANKS = 32


def simulate(
    requests: Sequence[Request], config: SimulationConfig, step_log: TakesColumns | None = None,
    on_progress: Callable[[float], None] | None = None, max_report_cells: int = 1_000_000,
    stops: Mapping[int, Stop] | None = None, buffer_cells: int = 400_000,
) -> SimulationResult:  # fmt: skip
    """Simulate a workload, in order of arrival, to its end; `on_progress` is told the share of all rows now and then.

    Memory does not grow beyond a report of `max_report_cells` and buffers of `buffer_cells` (step x rank). `stops` are
    requests that end before their last token, by their ids: those of a recorded run, see `read_replay`.
    """
    config.scheduler.check_fits(requests)
    total_rows = sum(request.num_computed_tokens for request in requests)

    def told(rows: int) -> None:
        # Rows that a preemption makes necessary again are not in the total.
        if on_progress is not None:
            on_progress(min(1.0, rows / total_rows))

    sink = StepSink(config, step_log, max_report_cells, buffer_cells, told)
    return _Simulation(requests, config, sink, stops or {}).run()


class _Simulation:
    """The state of one simulation. Arrays have one entry per rank, or per request where they say so."""

    def __init__(
        self, requests: Sequence[Request], config: SimulationConfig, sink: StepSink, stops: Mapping[int, Stop]
    ) -> None:
        self.requests, self.config, self.sink = requests, config, sink
        num_ranks = config.num_ranks
        self.schedulers = [RankScheduler(config.scheduler) for _ in range(num_ranks)]
        self.balancer = LoadBalancerTwin(config.scheduler.load_balancing, num_ranks)
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
        self.page_steps = PageSteps() if config.scheduler.num_kv_pages is not None else None
        self.num_preemptions = 0
        self.stops = StopSteps(requests, stops)
        self.num_unfinished = 0
        self.index = {request.request_id: index for index, request in enumerate(requests)}
        # Lists, one entry per request: they are written one entry at a time, which arrays are slow at.
        self.rank_of: list[int] = []
        self.arrived_s = [request.arrival_s for request in requests]
        self.begun_s, self.first_s, self.last_s = ([nan] * len(requests) for _ in range(3))

    def run(self) -> SimulationResult:
        config, cost, sink, requests = self.config, self.config.cost, self.sink, self.requests
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
            visited = self.ends.pop(step, NONE)
            if following < count:
                if not self.num_unfinished and arrivals[following] > clock:
                    clock = arrivals[following]
                    now_s = now_s if in_steps else clock
                if arrivals[following] <= clock:
                    visited = visited | self._arrive(following, step, now_s, arrivals, clock)
                    following += len(self.arrived)
            if run_prefills and self.heads:  # others with prompts have to wait for a seat or for pages
                visited = visited.union(self.heads)
            if self.page_steps is not None:
                visited = visited | self.page_steps.pop(step)
            if stopped := self.stops.before(step):
                visited = visited | self._stop(stopped, step)

            slot = sink.next_slot()
            sink.decode[slot] = self.decode
            sink.context_base[slot] = self.context_base
            schedules, prompts = self._visit(visited, step, slot, run_prefills)
            num_tokens = self.total_decode + sum(prefill for _, prefill, _ in prompts)
            own_us, longest = self._longest(step, prompts)
            step_us = (
                cost.step_us
                + own_us
                + cost.chunk_us * (1 if chunk_size is None else -(-longest // chunk_size))
                + cost.row_us * longest
                + cost.experts_us(num_tokens if ragged else num_tokens + self._num_filler(prompts), config.num_ranks)
            )
            sink.start_s[slot] = now_s
            sink.duration_s[slot] = step_us * 1e-6
            started_s, now_s = now_s, now_s + step_us * 1e-6
            clock = clock + 1 if in_steps else now_s
            if not run_prefills:
                sink.held[slot, list(self.heads)] = True
                for rank, schedule in schedules:
                    sink.held[slot, rank] = schedule.prefills_held
            self.balancer.computed(self.decode, prompts)
            for rank, schedule in schedules:
                self._after(rank, schedule, step, started_s, now_s, delay > 0)
            last, overrun = self.stops.of_step(step)
            for index in last:
                self.last_s[index] = now_s
            for index in overrun:
                sink.note(sink.overrun, slot, self.rank_of[index], 1)
            if self.queued:
                sink.num_waiting[slot] = self.num_waiting
                self.kv_waits += len(self.kv_waiting)
            step += 1
        sink.flush()
        self.stops.check_all_done(step)
        return self._result(step, now_s)

    def _visit(
        self, visited: set[int], step: int, slot: int, run_prefills: bool
    ) -> tuple[list[tuple[int, Schedule]], list[tuple[int, int, int]]]:
        """Plan the step of ranks that do more than generate; return schedules, and prompts: `(rank, rows, context)`."""
        sink = self.sink
        schedules = []
        prompts = []
        for rank in visited:
            schedule = self.schedulers[rank].next_step(step, run_prefills, list_entries=False)
            schedules.append((rank, schedule))
            if schedule.preempted:
                self._preempted(rank, schedule, slot)
            if schedule.prefix_hits:
                sink.note(sink.cached, slot, rank, schedule.num_cached_tokens)
            if prefill := schedule.num_prefill_tokens:
                prompts.append((rank, prefill, schedule.prefill_context_tokens))
                sink.prefill[slot, rank] = prefill
                sink.prefill_context[slot, rank] = schedule.prefill_context_tokens
        return schedules, prompts

    def _prefills_run(self, step: int, delay: int) -> bool:
        """Decide as `prefills_run` does, from incremental state instead of all ranks' states."""
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
        """Return the longest rank's own time in us, and the most rows of any; prompts are `(rank, rows, context)`."""
        cost = self.config.cost
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

    def _stop(self, stopped: Sequence[int], step: int) -> set[int]:
        """Let requests, given by their index, end before `step`; return their ranks."""
        ranks = set()
        for index in stopped:
            request = self.requests[index]
            if index >= len(self.rank_of):
                raise ConfigurationError(f"request {request.request_id} cannot stop before step {step}: it comes later")
            rank = self.rank_of[index]
            scheduler = self.schedulers[rank]
            scheduler.skip_to(step)
            scheduler.stop((request.request_id,))
            decode, base, _, _ = scheduler.counts()
            self._set_decode(rank, decode, base)
            self.balancer.finished(rank, request)
            self.balancer.set_outstanding(rank, scheduler.state().num_outstanding_tokens)
            self.num_unfinished -= 1
            ranks.add(rank)
        return ranks

    def _preempted(self, rank: int, schedule: Schedule, slot: int) -> None:
        """Update the counts for requests that lose their pages before this very step."""
        decode = schedule.num_decode_tokens
        base = schedule.decode_context_tokens - schedule.step * decode
        self._set_decode(rank, decode, base)
        self.sink.decode[slot, rank] = decode
        self.sink.context_base[slot, rank] = base
        self.sink.note(self.sink.preempted, slot, rank, len(schedule.preempted))
        self.num_preemptions += len(schedule.preempted)
        for request_id in schedule.preempted:
            self.stops.forget(self.index[request_id])

    def _set_decode(self, rank: int, decode: int, base: int) -> None:
        self.total_decode += decode - int(self.decode[rank])
        self.decode[rank] = decode
        self.context_base[rank] = base
        if self.decode_list is not None:
            self.decode_list[rank] = decode
            self.context_list[rank] = base

    def _after(
        self, rank: int, schedule: Schedule, step: int, started_s: float, now_s: float, prompts_are_held: bool
    ) -> None:
        """Update the counts with a visited rank's step."""
        scheduler, stops = self.schedulers[rank], self.stops
        for entry in schedule.entries:  # prompts only
            index = self.index[entry.request_id]
            if self.begun_s[index] != self.begun_s[index]:  # NaN: not after a preemption
                self.begun_s[index] = started_s
            if entry.samples:
                num_sampled = entry.start + entry.num_tokens + 1 - self.requests[index].num_prompt_tokens
                if num_sampled == 1 and stops.keeps(index, 1):
                    self.first_s[index] = now_s
                if not entry.finishes:
                    last_step = step + self.requests[index].max_new_tokens - num_sampled
                    self.ends.setdefault(last_step, set()).add(rank)
                stops.sampled(index, num_sampled, step)
        for request_id in schedule.finished:
            index = self.index[request_id]
            if stops.keeps(index, self.requests[index].max_new_tokens):
                self.last_s[index] = now_s
            self.balancer.finished(rank, self.requests[index])
        self.num_unfinished -= len(schedule.finished)
        decode, base, has_prompts, head = scheduler.counts()
        self._set_decode(rank, decode, base)
        if schedule.preempted or schedule.prefix_hits:
            self.balancer.set_outstanding(rank, scheduler.state().num_outstanding_tokens)
        if self.page_steps is not None:
            # A rank whose first prompt could run is visited in the next step anyway, where prompts are never held.
            is_visited = head >= 0 and not prompts_are_held
            self.page_steps.put(rank, None if is_visited else scheduler.pages_change_at())
        self.num_waiting[rank] = schedule.num_waiting
        (self.queued.add if has_prompts else self.queued.discard)(rank)
        (self.kv_waiting.add if schedule.num_waiting_for_kv else self.kv_waiting.discard)(rank)
        if head < 0:
            self.heads.pop(rank, None)
        else:
            self.heads[rank] = head

    def _result(self, num_steps: int, now_s: float) -> SimulationResult:
        sink, requests = self.sink, self.requests
        num_new_tokens = self.stops.num_new_tokens()
        rank_of, num_ranks = np.array(self.rank_of, np.int32), self.config.num_ranks
        more = np.array(num_new_tokens, np.float64) - 1
        more[more <= 0] = np.nan
        arrived_s, begun_s, first_s, last_s = map(np.array, (self.arrived_s, self.begun_s, self.first_s, self.last_s))
        ttft_s, tpot_s, queue_s = first_s - arrived_s, (last_s - first_s) / more, begun_s - arrived_s
        num_output = sum(num_new_tokens)
        num_tokens = sum(request.num_prompt_tokens for request in requests) + num_output
        summary = {
            "requests": len(requests),
            "ranks": self.config.num_ranks,
            "steps": num_steps,
            "rank_steps": num_steps * self.config.num_ranks,
            "duration_s": now_s,
            "real_tokens": sink.totals["real_rows"],
            "tokens_per_s": num_tokens / now_s if now_s else 0.0,  # of prompts and output
            "output_tokens_per_s": num_output / now_s if now_s else 0.0,
            "dummy_rows": sink.totals["dummy_rows"],
            "padding_rows": sink.totals["padding_rows"],
            **loss_figures(sink.lost()),
            # Rows that preemptions made necessary again are in these.
            "per_rank": {
                "requests": np.bincount(rank_of, minlength=num_ranks).tolist(),
                "real_rows": sink.real_rows_per_rank.tolist(),
                "prefill_tokens": sink.prefill_tokens_per_rank.tolist(),
                "new_tokens": np.bincount(rank_of, num_new_tokens, num_ranks).astype(np.int64).tolist(),
            },
            "ttft_s": _percentiles(ttft_s),
            "tpot_s": _percentiles(tpot_s),
            "queue_s": _percentiles(queue_s),
            "kv_waits": self.kv_waits,  # rank-steps in which requests waited only because the KV cache was full
            "preempted": self.num_preemptions,  # counted each time
            "cached_tokens": sink.totals["cached"],
            "overrun_rows": sink.totals["overrun"],
            "buffer_limited_steps": sink.totals["buffer_limited"],  # in more chunks than asked for
            "held_rank_steps": sink.totals["held"],
        }
        return SimulationResult(summary, sink.table(), rank_of, queue_s, ttft_s, tpot_s)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    ordered = known.tolist()
    return {"mean": float(known.mean()), "p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99)}
