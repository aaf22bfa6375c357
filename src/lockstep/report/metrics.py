"""A run's figures as Prometheus text, served over HTTP while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from lockstep.errors import ConfigurationError


class RunMetrics(AbstractContextManager["RunMetrics"]):
    """Counts what one rank knows of all ranks, and serves it until it is closed."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

        if not 0 <= port <= 65535:
            raise ConfigurationError(f"metrics_port must be in 0..65535, got {port}")
        # A registry of its own: the library's global one would add figures of this process that nobody asked for.
        registry = CollectorRegistry()
        self._steps = Counter("lockstep_steps", "Steps that all ranks have run.", registry=registry)
        self._real = Counter("lockstep_real_rows", "Rows of requests.", ["rank"], registry=registry)
        self._wait = Histogram(
            "lockstep_agreement_wait_seconds",
            "One rank's wait for all ranks to agree on a step.",
            buckets=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0),
            registry=registry,
        )
        self._idle = Gauge(
            "lockstep_idle_share", "Share of the ranks' time lost to uneven work, counted in rows.", registry=registry
        )
        self._rows = self._longest_rows = 0
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigurationError(f"metrics_port {port} on {host} cannot be used: {error.strerror}") from None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_port)

    def observe(self, num_tokens_across_dp: Sequence[int], agreement_s: float) -> None:
        """Count one step."""
        self._steps.inc()
        for rank, rows in enumerate(num_tokens_across_dp):
            self._real.labels(str(rank)).inc(rows)
        self._wait.observe(agreement_s)
        self._rows += sum(num_tokens_across_dp)
        self._longest_rows += len(num_tokens_across_dp) * max(num_tokens_across_dp)
        if self._longest_rows:
            self._idle.set(1 - self._rows / self._longest_rows)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __exit__(self, *exception: Any) -> None:
        self.close()
