"""Uvicorn around the HTTP face: limits of connections and heads, the order in which all of it starts and ends."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lockstep.errors import ConfigurationError
from lockstep.runner.engine import Engine
from lockstep.serve.app import ServeOptions, make_app
from lockstep.serve.errors import ApiError
from lockstep.serve.metrics import ServiceMetrics
from lockstep.serve.service import Service

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 2**16
_KEEP_ALIVE_S = 30
_LAST_ANSWERS_S = 5
_OTHER_FILES = 256  # descriptors that are no connections


def open_socket(host: str, port: int) -> socket.socket:
    """Listen; `ConfigurationError` for an address that cannot be used."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]
        raise ConfigurationError(f"{host} port {port} cannot be used: {why}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # clients that have vanished leave
    return listener


async def serve(
    start_engine: Callable[[], Engine],
    options: ServeOptions,
    listener: socket.socket,
    watch: Callable[[Service], Coroutine[Any, Any, None]],
    end_now: Callable[[int], NoReturn],
) -> None:
    """Serve until a signal comes; the main thread calls it.

    Args:
        start_engine: starts the ranks; blocks until they are ready.
        options: see `ServeOptions`.
        listener: from `open_socket`.
        watch: runs beside, to show what goes on.
        end_now: ends the process with a status: at a second signal.

    Raises:
        LockstepError: what has ended the ranks for good.
    """
    _allow_files(options.max_connections)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients send wrong is no news
    metrics = ServiceMetrics(options.model)
    service = Service(start_engine, metrics, options.max_queue, options.max_restarts)
    metrics.attach(service)
    config = uvicorn.Config(
        make_app(service, options), http=partial(_Protocol, limits=options), ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False, timeout_keep_alive=_KEEP_ALIVE_S, proxy_headers=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )  # fmt: skip
    loop, signalled = asyncio.get_running_loop(), asyncio.Event()
    server = _Server(config, lambda: loop.call_soon_threadsafe(signalled.set), end_now)

    async def drain() -> None:
        await signalled.wait()
        await service.drain(options.drain_s)
        server.should_exit = True

    async def run() -> None:
        try:
            await service.run()
        finally:
            server.should_exit = True

    running, *others = (asyncio.ensure_future(one) for one in (run(), drain(), watch(service)))
    await server.serve(sockets=[listener])
    for task in others:
        task.cancel()
    await asyncio.wait(others)
    if running.done():
        running.result()


class _Server(uvicorn.Server):
    """The first signal begins the end, the second ends the process at once; its ranks end with it."""

    def __init__(self, config: uvicorn.Config, begin: Callable[[], Any], end_now: Callable[[int], NoReturn]) -> None:
        super().__init__(config)
        self._begin, self._end_now, self._signalled = begin, end_now, False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handle a signal."""
        if self._signalled:
            self._end_now(128 + sig)
        self._signalled = True
        self._begin()


class _Protocol(HttpToolsProtocol):
    """One connection, with limits that Uvicorn's own lacks: of connections, and of a head's time and length."""

    def __init__(self, *arguments: Any, limits: ServeOptions, **names: Any) -> None:
        super().__init__(*arguments, **names)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self._limits.max_connections:
            self._end_with(ApiError(503, "too many connections", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._end_with(ApiError(431, f"the head of a request is larger than {MAX_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._end_with(ApiError(400, msg))

    def _await_head(self) -> None:
        if self._head_timer is None:
            limit_s, self._head_bytes = self._limits.read_timeout_s, 0
            late = ApiError(408, f"the head of a request did not come within {limit_s:g} s")
            self._head_timer = self.loop.call_later(limit_s, self._end_with, late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_with(self, error: ApiError) -> None:
        """Answer without the application, unless it is answering, and close."""
        self._head_came()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(error.document()).encode()
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()


def _allow_files(max_connections: int) -> None:
    """Raise this process's limit of open files as far as the connections need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        logger.warning("at most %d connections at a time: the system allows %d open files", most - _OTHER_FILES, most)
