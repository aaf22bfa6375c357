"""Generates tokens for one rank's requests: each step is agreed on and issued while the step before it runs."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lockstep.coordination.step import StepDecision, StepRecord, decided
from lockstep.coordination.waits import waited_s
from lockstep.engine.attention import attention_name
from lockstep.engine.decoder import probe_shapes
from lockstep.engine.device_step import DeviceStep, EngineRequest
from lockstep.engine.kv_cache import KVCache, page_bytes
from lockstep.engine.sampling import Sampled, Sampler
from lockstep.engine.sampling_params import Limits, SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.metadata.config import ParallelConfig
from lockstep.models.parallel import ModelParallel, parallel_of
from lockstep.moe.step import Step
from lockstep.workload import PAGE_SIZE, RankScheduler, Request, Schedule, SchedulerConfig, SchedulerState
from lockstep.workload.kv_pages import PageKey, num_pages, token_page_keys
from lockstep.workload.policies import prefills_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineRecord(StepRecord):
    """A step record with the rank's `SchedulerState`, which decides on held prompts and load balancing."""

    num_outstanding_tokens: int = decided("gather", 0)
    num_kv_tokens: int = decided("gather", 0)
    num_decoding: int = decided("gather", 0)
    prefill_wait_steps: int = decided("gather", -1)
    num_messages: int = decided("gather", 0)
    messages_check: int = decided("gather", 0)
    elapsed_ms: int = decided("max", 0)
    ends_epoch: bool = decided("any", False)


@dataclass(frozen=True, slots=True)
class _CacheRecord(StepRecord):
    """The record before the first step: how many pages fit into each rank's memory."""

    num_pages: int = decided("min", 0)


class TokenOutput(NamedTuple):
    """One token of one request."""

    request_id: int
    position: int  # of the token among those generated, from 0
    token_id: int
    logprob: float | None = None  # where the request asks
    top_logprobs: tuple[tuple[int, float], ...] | None = None  # where the request asks, most likely first
    finish_reason: str | None = None  # `stop` or `length` if it is the request's last


@dataclass
class StepReport:
    """Facts about one step, complete once its tokens are on the host. Times are of `time.perf_counter`."""

    schedule: Schedule  # this rank's part of it
    num_tokens_across_dp: tuple[int, ...]  # rows of every data-parallel rank
    began_s: float = 0.0  # when this rank began to plan the step
    agreed_s: float = 0.0  # when all ranks had agreed on the step
    # When its tokens were drawn. On a GPU it ran from `agreed_s` to here, or from the end of the step before, if later.
    done_s: float = 0.0
    waited_s: float = 0.0  # for other ranks in this rank's collectives, as far as the host knows
    overrun_rows: int = 0  # of requests that had ended when the step ran; their tokens were dropped
    replayed: bool = False  # whether this rank ran it as a CUDA graph


@dataclass
class _Flight:
    """A step that was issued."""

    report: StepReport
    sampling: list[EngineRequest] = field(default_factory=list)  # whose token was drawn, in the order of the rows
    drawn: Sampled | None = None
    done: torch.cuda.Event | None = None
    step: Step | None = None  # None in a single process


class RankEngine:
    """Runs the requests of one rank. Every rank of the model has an engine, and all call `step` equally often.

    `step` schedules and agrees on the next step, issues it behind the running one, then waits for the running step's
    tokens and removes the requests that these end. So the host works while the GPU does. A request that a stop token
    ends may have one row in a step that was scheduled before the token was known: an overrun row, whose token is
    dropped.

    Args:
        model: a Transformers causal language model, from `lockstep.from_pretrained` or `lockstep.parallelize`, whose
            ranks have been opened (`ModelParallel.open`); in a single process, any.
        config: limits of a step and of the cache; equal on all ranks.
        max_model_len: maximum tokens of a request, prompt included; None takes the model's context.
        gpu_memory_utilization: share of the GPU's memory for model, cache and everything else; determines the size of
            the cache if `config.kv_capacity_tokens` is None.
        eos_token_ids: tokens that end a request.
        graphs: run steps as CUDA graphs where possible.

    Attributes:
        scheduler: this rank's queue.
        state: this rank's scheduler state after the last step planned.
        states: all ranks' scheduler states at the last agreement, in rank order.
        num_tokens_across_dp: rows of every data-parallel rank in the last step agreed on.
        all_stopped: whether no rank had or expected work at the last agreement.
        messages_alike: whether ranks that share requests got the same messages, as far as all have received them.
        elapsed_ms: largest `elapsed_ms` that any rank has passed to `step`, as of the last agreement.
        epoch_ends: whether any rank passed `ends_epoch` to the last step; no rank may call `step` after that.
        step_number: number of the next step.
        page_keys_of: keys of the whole pages of a prompt's tokens, by which prefix pages are shared.
        reports: reports of the steps whose tokens have arrived since the caller last emptied the list.
        limits: what a request must fit into.

    Raises:
        ConfigurationError: a model whose attention cannot run over pages, or a cache without room for one page.
    """

    def __init__(
        self, model: Any, config: SchedulerConfig, *, max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9, eos_token_ids: Sequence[int] = (), graphs: bool = True,
    ) -> None:  # fmt: skip
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigurationError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
        self.model = model
        self.parallel: ModelParallel | None = parallel_of(model)
        embedding, num_logits = model.get_input_embeddings().weight, len(model.get_output_embeddings().weight)
        self._device = embedding.device
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_len = int(max_model_len or context or 4096)
        if context is not None and max_len > context:
            limit = f"at most the model's context of {context}"
            raise ConfigurationError(f"max_model_len must be {limit}, got {max_model_len}")
        shapes, dtype = probe_shapes(model)
        if config.enable_prefix_caching and self._has_windows():
            config = dataclasses.replace(config, enable_prefix_caching=False)
        total_pages = config.num_kv_pages
        if total_pages is None and self._device.type == "cuda":
            total_pages = self._agree_on_pages(config, page_bytes(shapes, dtype), gpu_memory_utilization, max_len)
        if total_pages is not None:
            config = dataclasses.replace(config, kv_capacity_tokens=total_pages * PAGE_SIZE)
        self.config = config
        self.limits = Limits(len(embedding), num_logits, max_len, config.kv_capacity_tokens)
        self.scheduler = RankScheduler(config)
        self.cache = KVCache(shapes, total_pages, config.max_num_seqs, max_len, dtype, self._device)
        self._eos = frozenset(eos_token_ids)
        sampler = Sampler(config.max_num_seqs, num_logits, self._device, eos_token_ids=sorted(self._eos))
        self._device_step = DeviceStep(model, self.parallel, self.cache, sampler, config, graphs)
        self.page_keys_of: Callable[[Sequence[int]], Sequence[PageKey]] = token_page_keys
        self._requests: dict[int, EngineRequest] = {}
        self._begin()

    def _begin(self) -> None:
        """Start counting steps among the present ranks."""
        ranks = ParallelConfig() if self.parallel is None else self.parallel.config
        self._tp_size, first = ranks.tensor_parallel_size, ranks.data_parallel_rank * ranks.tensor_parallel_size
        self._alike = slice(first, first + self._tp_size)  # ranks with the same requests
        self.state = SchedulerState()
        self.states = [self.state] * ranks.data_parallel_size
        self.num_tokens_across_dp = (0,) * ranks.data_parallel_size
        self.all_stopped = False
        self.messages_alike = True
        self.elapsed_ms = 0
        self.epoch_ends = False
        self._num_messages: Sequence[int] = [0] * ranks.world_size
        self.step_number = 0
        self.reports: list[StepReport] = []
        self._flight: _Flight | None = None

    def go_on(self, parallel: ModelParallel) -> None:
        """Drop all requests and continue among the remaining ranks; `parallel.goes_on` must be true."""
        for request in self._requests.values():
            self._device_step.unseat(request)
        self._requests.clear()
        self.scheduler = RankScheduler(self.config)
        self.cache.clear()
        self.parallel = parallel
        self._device_step.go_on(parallel)
        self._begin()

    def add(
        self, request_id: int, prompt_token_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None,
        generated: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Add a request; it may run from the next step on.

        Args:
            request_id: unique among unfinished requests.
            prompt_token_ids: at least one.
            params: how to sample and when to stop.
            seed: of its random numbers; None takes `params.seed`, or the request's number.
            generated: its tokens so far, if another rank began it.

        Raises:
            ConfigurationError: a request that exceeds `limits`, or a number in use. Nothing else is affected.
        """
        prompt = [int(token) for token in prompt_token_ids]
        if request_id in self._requests:
            raise ConfigurationError(f"request {request_id} is there already")
        self.limits.check(f"request {request_id}", prompt, params)
        request = Request(request_id, 0.0, len(prompt) + len(generated), params.max_tokens - len(generated))
        if seed is None:
            seed = params.seed if params.seed is not None else request_id
        keys = self.page_keys_of(prompt) if self.config.enable_prefix_caching else ()
        self._requests[request_id] = EngineRequest(request_id, prompt, params, seed, list(generated), keys)
        self.scheduler.add(request, self.step_number, keys)

    def abort(self, request_id: int, *, missing_ok: bool = False) -> None:
        """Drop a request, and the tokens of rows that were agreed on; unknown numbers raise unless `missing_ok`."""
        if request := self._requests.pop(request_id, None):
            self._leave(request)
        elif not missing_ok:
            raise ConfigurationError(f"request {request_id} is not an unfinished request of this rank")

    @property
    def has_unfinished(self) -> bool:
        """Whether this rank has work, or tokens that it has not returned yet."""
        return self._flight is not None or self.scheduler.state().num_outstanding_tokens > 0

    @property
    def any_unfinished(self) -> bool:
        """Whether any rank had work left at the last agreement; the same on all ranks."""
        return any(state.num_outstanding_tokens for state in self.states)

    @property
    def can_watch(self) -> bool:
        """Whether `others_wait` knows the other ranks' progress."""
        return self.parallel is not None and self.parallel.coordinator.transport.can_watch

    def others_wait(self) -> bool:
        """Return whether another rank has begun the next agreement; False if that is unknown."""
        return self.parallel is not None and self.parallel.coordinator.transport.wanted()

    @torch.no_grad()
    def capture_ahead(self) -> bool:
        """Capture one CUDA graph that a later step may need; False if none is missing. Call it between steps."""
        return self._device_step.graphs is not None and self._device_step.graphs.capture_ahead()

    def fail(self, error: BaseException) -> None:
        """Report this rank's failure in place of the next agreement; the other ranks then raise it."""
        if self.parallel is not None:
            self.parallel.coordinator.fail(error)

    def num_messages_everywhere(self, received: int) -> int:
        """Return how many messages all ranks that share requests have, to act on; this rank has `received`."""
        return min(self._num_messages[self._alike]) if self.shares_requests else received

    @property
    def shares_requests(self) -> bool:
        """Whether this rank shares its requests with other ranks (tensor parallelism)."""
        return self._tp_size > 1

    def about(self) -> dict[str, Any]:
        """Return this engine's settings and choices as plain values, for logs and reports."""
        dispatcher = self.parallel.layers[0].dispatcher if self.parallel is not None else None
        dtype = self.model.get_input_embeddings().weight.dtype
        return {
            **self.limits._asdict(),
            "eos_token_ids": sorted(self._eos),
            "dispatcher": dispatcher.name if dispatcher is not None else None,
            "dispatcher_note": dispatcher.abilities.note if dispatcher is not None else "",
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(self._device),
            "attention_name": attention_name(self._device),
            "layers": self._device_step.decoder.name,
            "graphs": self._device_step.graphs is not None,
            "graphs_note": self._against_graphs(),
            "enable_prefix_caching": self.config.enable_prefix_caching,
        }

    def _against_graphs(self) -> str:
        """Return why steps are not CUDA graphs, or an empty string."""
        if self._device_step.graphs is not None:
            return ""
        if self._device.type != "cuda":
            return "they need a GPU"
        if self.parallel is None:
            return "one process"
        if self._tp_size > 1:
            return "tensor parallelism"
        return "turned off" if self.parallel.layers.can_capture else "the dispatcher counts rows on the host"

    @torch.no_grad()
    def step(
        self, *, unfinished: bool | None = None, num_messages: int = 0, messages_check: int = 0, elapsed_ms: int = 0,
        ends_epoch: bool = False,
    ) -> list[TokenOutput]:  # fmt: skip
        """Agree on the next step, issue it, and return the tokens of the step before it. Collective.

        Args:
            unfinished: whether this rank may get more work; None means whether it has work now.
            num_messages: how many messages this rank has, see `num_messages_everywhere`.
            messages_check: 31-bit hash of the messages that all ranks sharing requests had at the previous agreement;
                sets `messages_alike`.
            elapsed_ms: time since the run's start on this rank; the attribute becomes all ranks' maximum.
            ends_epoch: make this the last step on all ranks, because the members change.

        Raises:
            LockstepError: see `Coordinator.agree` and `ModelParallel.step`.
        """
        began = time.perf_counter()
        waits, decoding = zip(*((state.prefill_wait_steps, state.num_decoding) for state in self.states), strict=True)
        run_prefills = prefills_run(waits, decoding, self.config.max_prefill_delay_steps)
        schedule = self.scheduler.next_step(self.step_number, run_prefills)
        self.step_number += 1
        unfinished = self.has_unfinished if unfinished is None else unfinished
        told: dict[str, Any] = {"num_messages": num_messages, "messages_check": messages_check}
        told |= {"elapsed_ms": elapsed_ms, "ends_epoch": ends_epoch}
        decision = self._agree(schedule, unfinished, told)
        report = StepReport(schedule, self.num_tokens_across_dp, began, time.perf_counter())
        before, self._flight = self._flight, None
        try:
            for request_id in schedule.preempted:
                self._device_step.unseat(self._requests[request_id])
            self.cache.forget(schedule.forgotten)
            if any(self.num_tokens_across_dp):
                self._flight = self._issue(report, decision)
            return self._collect(before)
        except Exception as error:
            self.fail(error)  # this rank has done all that was agreed on; now it tells the others why it stops
            raise

    @torch.no_grad()
    def drain(self) -> list[TokenOutput]:
        """Return the tokens of the last step. Not collective: call it when no rank has work left."""
        before, self._flight = self._flight, None
        return self._collect(before)

    def _agree(self, schedule: Schedule, unfinished: bool, told: dict[str, Any]) -> StepDecision | None:
        self.state = self.scheduler.state()
        if self.parallel is None:
            self.states, self.num_tokens_across_dp = [self.state], (schedule.num_tokens,)
            self.all_stopped, self.elapsed_ms = not unfinished, max(self.elapsed_ms, told["elapsed_ms"])
            self.epoch_ends = told["ends_epoch"]
            return None
        record = EngineRecord(num_tokens=schedule.num_tokens, unfinished=unfinished, **told, **self.state._asdict())
        decision = self.parallel.coordinator.agree(record)
        columns = [decision.values[name][:: self._tp_size] for name in SchedulerState._fields]
        self.states = [SchedulerState(*row) for row in zip(*columns, strict=True)]
        self.all_stopped = not decision.values["unfinished"]
        self._num_messages = decision.values["num_messages"]
        self.messages_alike = len(set(decision.values["messages_check"][self._alike])) == 1
        self.elapsed_ms = max(self.elapsed_ms, decision.values["elapsed_ms"])
        self.epoch_ends = bool(decision.values["ends_epoch"])
        self.num_tokens_across_dp = decision.num_tokens_across_dp
        return decision

    def _issue(self, report: StepReport, decision: StepDecision | None) -> _Flight:
        """Issue this rank's part of a step; on a GPU it begins when the step before it ends."""
        schedule, flight, waited = report.schedule, _Flight(report), waited_s()
        requests = [self._requests[entry.request_id] for entry in schedule.entries]
        if self.parallel is None or decision is None:
            flight.drawn, report.replayed = self._device_step.run(schedule, requests, None)
        else:
            with self.parallel.begin(decision) as flight.step:
                flight.drawn, report.replayed = self._device_step.run(schedule, requests, flight.step)
        flight.sampling = [r for r, entry in zip(requests, schedule.entries, strict=True) if entry.samples]
        report.waited_s, report.done_s = waited_s() - waited, time.perf_counter()
        if self._device.type == "cuda":
            flight.done = torch.cuda.current_stream().record_event()
        for request_id in schedule.finished:
            request = self._requests[request_id]
            request.scheduled_to_end = True
            self._device_step.unseat(request)
        return flight

    def _has_windows(self) -> bool:
        """Whether the model has sliding-window layers, whose pages cannot be shared; logs it if so."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        windows = set(kinds) != {"full_attention"} if kinds else bool(getattr(config, "sliding_window", None))
        if windows and (self.parallel is None or self.parallel.config.rank == 0):
            text = "prefix caching is off: %s has layers with sliding windows, whose pages are not shared"
            logger.warning(text, type(self.model).__name__)
        return windows

    def _agree_on_pages(self, config: SchedulerConfig, bytes_of_page: int, utilization: float, max_len: int) -> int:
        """Return how many pages fit into every rank's GPU."""
        free, total = torch.cuda.mem_get_info(self._device)
        room = free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        # A rough bound for a step's own tensors, such as logits.
        reserved = 2**31 + config.max_num_seqs * 2**20
        pages = max(0, int((room - (1 - utilization) * total - reserved) // bytes_of_page))
        if self.parallel is not None:
            record = _CacheRecord(num_pages=pages, unfinished=True)
            pages = self.parallel.coordinator.agree(record).values["num_pages"]
        if not pages:
            raise ConfigurationError(
                f"no room for a KV cache: {room / 2**30:.1f} GiB of the GPU are free, and gpu_memory_utilization "
                f"{utilization:g} leaves {(1 - utilization) * total / 2**30:.1f} GiB of them unused"
            )
        return min(pages, config.max_num_seqs * num_pages(max_len))

    def _collect(self, flight: _Flight | None) -> list[TokenOutput]:
        """Wait for a step's tokens, on a GPU until the deadline at most; remove the requests that they end."""
        if flight is None:
            return []
        if flight.done is not None:
            if self.parallel is not None and flight.step is not None:
                self.parallel.layers.wait(flight.done, flight.step.number)
            else:
                flight.done.synchronize()
            flight.report.done_s = time.perf_counter()
        self.reports.append(flight.report)
        outputs: list[TokenOutput] = []
        if flight.drawn is None:
            return outputs
        for row, (request, token) in enumerate(zip(flight.sampling, flight.drawn.tokens.tolist(), strict=True)):
            if self._requests.get(request.request_id) is not request:
                flight.report.overrun_rows += 1
                continue
            request.generated.append(token)
            params, count = request.params, len(request.generated)
            ends = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
            reason = "length" if count == params.max_tokens else None
            if ends and count >= params.min_tokens:
                reason = "stop"
            logprob, top = flight.drawn.logprobs_of(row, params.logprobs)
            outputs.append(TokenOutput(request.request_id, count - 1, token, logprob, top, reason))
            if reason is not None:
                del self._requests[request.request_id]
                self._leave(request)
        return outputs

    def _leave(self, request: EngineRequest) -> None:
        """Remove a request from the schedule, if it is still there, and free its pages."""
        if not request.scheduled_to_end:
            self.scheduler.stop([request.request_id])
        self._device_step.unseat(request)
