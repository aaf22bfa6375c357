"""A service's figures as Prometheus text: vLLM's names where it has them, ours for what only uneven ranks have."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from lockstep.serve.service import Generation, Service

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ServiceMetrics(Collector):
    """Counts requests and tokens as they pass, and asks the service and its engine for the rest when it is scraped."""

    def __init__(self, model: str, service: Service) -> None:
        disable_created_metrics()
        self.num_tokens = 0
        self.num_ended: collections.Counter[str] = collections.Counter()  # sequences by how they ended
        self._model, self._service = model, service
        self._registry = CollectorRegistry()  # the global one would add figures of this process that nobody asked for
        self._registry.register(self)
        self._first = self._own(Histogram, "vllm:time_to_first_token_seconds", "From arrival to the first token.")
        self._next = self._own(Histogram, "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.")
        self._whole = self._own(Histogram, "vllm:e2e_request_latency_seconds", "From arrival to the end.")
        self._prompt_tokens = self._own(Counter, "vllm:prompt_tokens", "Tokens of prompts.")
        self._refused = Counter("lockstep_http_errors", "By status.", ["status"], registry=self._registry)

    def token(self, generation: Generation, sequence: int, now_s: float) -> None:
        """Count a token of a sequence, before its time is noted in the generation."""
        self.num_tokens += 1
        if not generation.last_token_s:
            self._prompt_tokens.inc(generation.num_prompt_tokens)
        last_s = generation.last_token_s.get(sequence)
        if last_s is None:
            self._first.observe(now_s - generation.arrived_s)
        else:
            self._next.observe(now_s - last_s)

    def finished(self, generation: Generation, reason: str, num_sequences: int, now_s: float) -> None:
        """Count sequences of a request that have ended."""
        self.num_ended[reason] += num_sequences
        for _ in range(num_sequences):
            self._whole.observe(now_s - generation.arrived_s)

    def refused(self, status: int) -> None:
        """Count an answer with an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> str:
        """Return all figures."""
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Any]:
        """See `Collector`."""
        service, gauge, counter = self._service, GaugeMetricFamily, CounterMetricFamily
        yield self._family(gauge, "vllm:num_requests_running", "Sequences that generate.", service.num_running)
        yield self._family(
            gauge, "vllm:num_requests_waiting", "Sequences without a token, from arrival.", service.num_waiting
        )
        yield self._family(counter, "vllm:generation_tokens", "Tokens generated.", self.num_tokens)
        ended = counter("vllm:request_success", "Ended sequences.", labels=["model_name", "finished_reason"])
        for reason, count in self.num_ended.items():
            ended.add_metric([self._model, reason], count)
        yield ended
        yield gauge("lockstep_up", "Whether requests can be answered.", float(service.health()["status"] != "down"))
        yield counter("lockstep_restarts", "How often all ranks were started again.", service.num_restarts)
        if service.engine is None:
            return
        stats, capacity = service.engine.stats, service.engine.about["kv_capacity_tokens"]
        yield self._family(counter, "vllm:num_preemptions", "Requests computed again.", sum(stats.preempted))
        yield counter("lockstep_steps", "Steps in which any rank had rows.", stats.steps)
        yield gauge("lockstep_idle_share", "Share of the ranks' time lost to uneven rows.", stats.idle_share)
        yield _per_rank(counter, "lockstep_real_rows", "Rows of requests.", stats.rows)
        yield _per_rank(counter, "lockstep_agreement_seconds", "Spent in agreements.", stats.agreement_s)
        yield _per_rank(counter, "lockstep_overrun_rows", "Rows of requests that had ended.", stats.overrun_rows)
        yield _per_rank(gauge, "lockstep_step_rows", "Rows in the last step.", stats.num_tokens_across_dp)
        if capacity:
            shares = [held / capacity for held in stats.num_kv_tokens]
            yield _per_rank(gauge, "lockstep_kv_load", "Of the cache, by all requests at their longest.", shares)

    def _own(self, kind: Any, name: str, text: str) -> Any:
        options = {"buckets": _SECONDS} if kind is Histogram else {}
        return kind(name, text, ["model_name"], registry=self._registry, **options).labels(self._model)

    def _family(self, kind: Any, name: str, text: str, value: float) -> Any:
        family = kind(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


def _per_rank(kind: Any, name: str, text: str, values: Sequence[float]) -> Any:
    family = kind(name, text, labels=["rank"])
    for rank, value in enumerate(values):
        family.add_metric([str(rank)], value)
    return family
