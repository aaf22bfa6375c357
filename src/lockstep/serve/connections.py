"""Uvicorn with limits on connections and on the heads of requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lockstep.serve.app import make_app
from lockstep.serve.errors import ApiError
from lockstep.serve.options import ServeOptions

if TYPE_CHECKING:
    from lockstep.serve.api_process import RemoteService
    from lockstep.serve.service import Service

MAX_HEAD_BYTES = 2**16
_HEAD_TOO_LARGE = ApiError(431, f"the head or the trailers of a request are larger than {MAX_HEAD_BYTES} bytes")
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_KEEP_ALIVE_S = 30
_LAST_ANSWERS_S = 5


async def serve_http(
    service: Service | RemoteService, options: ServeOptions, listener: socket.socket, ended: asyncio.Event
) -> None:
    """Serve HTTP in this process until `ended`."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not the mistakes of clients
    protocol = partial(_Protocol, limits=options, refused=service.refused)
    server = _Server(uvicorn.Config(
        make_app(service, options), http=protocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=_KEEP_ALIVE_S,
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
    """One connection with one request at a time, and limits that Uvicorn lacks: connections, heads, unread bodies.

    If a client sends a request before the previous one is answered, the connection closes after that answer. Uvicorn
    would queue the request, and no longer notice that the client of the first one has gone.
    """

    def __init__(self, *arguments: Any, limits: ServeOptions, refused: Callable[[int], None], **names: Any) -> None:
        super().__init__(*arguments, **names)
        self._limits, self._refused = limits, refused
        self._awaits: Literal["head", "body", "answer"] = "head"
        self._timer: asyncio.TimerHandle | None = None
        self._num_idle_bytes = 0  # since the last part of a body or the end of the last head
        self._reads = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self._limits.max_connections:
            self._end_with(ApiError(503, "too many connections", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._awaits == "answer":
            self._read_no_more()
        if not self._reads:
            return
        if self._awaits == "head":
            if self._timer is None:
                self._await_head()
            # With an offer to upgrade, as curl --http2 makes one, the parser would take the body for another protocol.
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"", head) + end + rest
        self._num_idle_bytes += len(data)
        super().data_received(data)
        if self._num_idle_bytes > MAX_HEAD_BYTES:  # also trailers, and what may follow a chunk's length
            self._end_with(_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        if self._awaits == "answer":
            self._read_no_more()
            raise _NotRead
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._awaits == "head":  # otherwise a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._end_with(_HEAD_TOO_LARGE)
            raise _NotRead
        self._stop_timer()
        self._awaits, self._num_idle_bytes = "body", 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._awaits = "answer"
        if self.cycle.response_complete:  # an error that did not wait for the body
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._awaits == "answer":
            self._awaits = "head"
        elif not self.transport.is_closing():  # the client reads the answer while it still sends
            self._timer = self.loop.call_later(self._limits.read_timeout_s, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        if self._reads:
            self._end_with(ApiError(400, msg))

    def shutdown(self) -> None:
        if self._awaits == "body" and self._reads:
            self._end_with(ApiError(503, "the service is draining", code="service_draining", Retry_After="5"))
        else:
            super().shutdown()

    def _await_head(self) -> None:
        limit_s, self._num_idle_bytes = self._limits.read_timeout_s, 0
        late = ApiError(408, f"the head of a request did not come within {limit_s:g} s")
        self._timer = self.loop.call_later(limit_s, self._end_with, late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _read_no_more(self) -> None:
        """Discard what comes, and close after the present answer. A closed connection is still noticed."""
        self._reads = self.cycle.keep_alive = False

    def _end_with(self, error: ApiError) -> None:
        """Answer instead of the application, unless that has begun to answer, and close."""
        self._stop_timer()
        self._reads = False
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self._refused(error.status)
            body = json.dumps(error.document()).encode()
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()


class _NotRead(Exception):
    """Ends the parser's work on data; the rest of it is discarded."""
