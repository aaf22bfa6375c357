"""Options of `lockstep serve` besides those of its engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """See the command's options. `model` is the name in requests; no key is needed if `api_key` is None."""

    model: str
    api_key: str | None = None
    api_processes: int = 1
    max_queue: int = 1024
    max_restarts: int = 3
    max_connections: int = 4096
    max_body_bytes: int = 8 * 2**20
    read_timeout_s: float = 10.0
    drain_s: float = 30.0
    log_requests: str = "off"
