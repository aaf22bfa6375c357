"""Uvicorn with limits on connections and on the heads of requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lockstep.serve.app import make_app
from lockstep.serve.errors import ApiError
from lockstep.serve.options import ServeOptions

if TYPE_CHECKING:
    from lockstep.serve.api_process import RemoteService
    from lockstep.serve.service import Service

MAX_HEAD_BYTES = 2**16
_KEEP_ALIVE_S = 30
_LAST_ANSWERS_S = 5


async def serve_http(
    service: Service | RemoteService, options: ServeOptions, listener: socket.socket, ended: asyncio.Event
) -> None:
    """Serve HTTP in this process until `ended`."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not the mistakes of clients
    server = _Server(uvicorn.Config(
        make_app(service, options), http=partial(_Protocol, limits=options), ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False, timeout_keep_alive=_KEEP_ALIVE_S, proxy_headers=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    ))  # fmt: skip

    async def end() -> None:
        await ended.wait()
        server.should_exit = True

    ending = asyncio.ensure_future(end())
    await server.serve(sockets=[listener])
    ending.cancel()


class _Server(uvicorn.Server):
    capture_signals = staticmethod(contextlib.nullcontext)  # signals are the launcher's


class _Protocol(HttpToolsProtocol):
    """One connection, with limits that Uvicorn lacks: number of connections, time and length of a request's head."""

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
        """Answer instead of the application, unless that has begun to answer, and close."""
        self._head_came()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps(error.document()).encode()
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()
