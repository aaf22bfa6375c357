"""A service's figures as Prometheus text: vLLM's names where it has them, ours for what only uneven ranks have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from lockstep.serve.service import Generation, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ServiceMetrics(Collector):
    """Counts requests and tokens as they pass, and asks the engine for the rest when it is scraped.

    Args:
        model: label of vLLM's figures.
    """

    def __init__(self, model: str) -> None:
        disable_created_metrics()
        self.num_tokens = 0
        self._model = model
        self._service: Service | None = None
        self._registry = CollectorRegistry()  # the global one would add figures of this process that nobody asked for
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._next = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its end.")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._ended = Counter(
            "vllm:request_success", "Requests by how they ended.", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self._refused = Counter(
            "lockstep_http_errors", "Answers with an error, by status.", ["status"], registry=self._registry
        )

    def attach(self, service: Service) -> None:
        """Show a service's engine too."""
        self._service = service
        self._registry.register(self)

    def first_token(self, generation: Generation, seconds: float) -> None:
        """Count a sequence's first token."""
        self.num_tokens += 1
        self._first.observe(seconds)
        if not generation.begun:
            self._prompt_tokens.inc(generation.num_prompt_tokens)

    def next_token(self, seconds: float) -> None:
        """Count a further token."""
        self.num_tokens += 1
        self._next.observe(seconds)

    def finished(self, reason: str, generation: Generation) -> None:
        """Count the end of a sequence, or of a request that was lost or left."""
        self._ended.labels(self._model, reason).inc()
        self._whole.observe(generation.last_token_s - generation.began_s)

    def refused(self, status: int) -> None:
        """Count an answer with an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """See `Collector`."""
        service = self._service
        if service is None:
            return
        yield self._one(GaugeMetricFamily, "vllm:num_requests_running", "Sequences that generate.", service.num_running)
        yield self._one(
            GaugeMetricFamily, "vllm:num_requests_waiting", "Sequences without a token.", service.num_waiting
        )
        yield self._one(CounterMetricFamily, "vllm:generation_tokens", "Tokens generated.", self.num_tokens)
        yield GaugeMetricFamily("lockstep_up", "Whether requests can be answered.", float(not service.health()["why"]))
        yield CounterMetricFamily("lockstep_restarts", "How often all ranks were started again.", service.num_restarts)
        if service.engine is None:
            return
        stats, capacity = service.engine.stats, service.engine.about["kv_capacity_tokens"]
        yield self._one(CounterMetricFamily, "vllm:num_preemptions", "Requests computed again.", sum(stats.preempted))
        if capacity:
            shares = [held / capacity for held in stats.num_kv_tokens]
            yield _per_rank(GaugeMetricFamily, "lockstep_kv_load", "Of the cache, at the requests' longest.", shares)
        yield CounterMetricFamily("lockstep_steps", "Steps in which any rank had rows.", stats.steps)
        yield GaugeMetricFamily("lockstep_idle_share", "Of the ranks' time, by uneven rows.", stats.idle_share)
        yield _per_rank(CounterMetricFamily, "lockstep_real_rows", "Rows of requests.", stats.rows)
        yield _per_rank(CounterMetricFamily, "lockstep_agreement_seconds", "In agreements.", stats.agreement_s)
        yield _per_rank(CounterMetricFamily, "lockstep_overrun_rows", "Rows after an end.", stats.overrun_rows)
        yield _per_rank(GaugeMetricFamily, "lockstep_step_rows", "In the last step.", stats.num_tokens_across_dp)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        family = Histogram(name, help_text, ["model_name"], buckets=_SECONDS, registry=self._registry)
        return family.labels(self._model)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, ["model_name"], registry=self._registry).labels(self._model)

    def _one(self, kind: Any, name: str, help_text: str, value: float) -> Any:
        family = kind(name, help_text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


def _per_rank(kind: Any, name: str, help_text: str, values: Any) -> Any:
    family = kind(name, help_text, labels=["rank"])
    for rank, value in enumerate(values):
        family.add_metric([str(rank)], value)
    return family
