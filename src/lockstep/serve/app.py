"""The HTTP application: paths, keys, limits, and answers that end when their client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lockstep.serve.answers import Form, Stream, as_event
from lockstep.serve.errors import ApiError, as_api_error
from lockstep.serve.options import ServeOptions
from lockstep.serve.schema import ChatRequest, CompletionRequest, num_sequences, parse

if TYPE_CHECKING:  # neither is needed by both kinds of process
    from lockstep.serve.api_process import RemoteService
    from lockstep.serve.service import Service

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service | RemoteService, options: ServeOptions) -> Starlette:
    """Return the ASGI application that answers HTTP requests with a service."""
    digest = _digest(options.api_key) if options.api_key is not None else None

    async def health(_: Request) -> Response:
        found = await service.ask("health")
        return JSONResponse(found, 503 if found["status"] == "down" else 200)

    async def metrics(_: Request) -> Response:
        return Response(await service.ask("metrics"), media_type=_METRICS_TYPE)

    async def models(request: Request) -> Response:
        _check_key(request, digest)
        entry = {"id": options.model, "object": "model", "created": 0, "owned_by": "lockstep"}
        if (longest := await service.ask("max_model_len")) is not None:
            entry["max_model_len"] = longest
        return JSONResponse({"object": "list", "data": [entry]})

    async def generate(request: Request) -> Response:
        _check_key(request, digest)
        is_chat = request.scope["path"] == "/v1/chat/completions"
        body = await _read_body(request, options)
        asked = parse(ChatRequest if is_chat else CompletionRequest, body)
        if asked.model not in (None, options.model):
            text = f"there is no model {asked.model[:80]!r} here, only {options.model!r}"
            raise ApiError(404, text, "model", "model_not_found")
        form = Form(options.model, is_chat=is_chat)
        return _Answer(service, service.start(asked, body, num_sequences(asked), form.answer_id), form, asked)

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, error.detail, **dict(error.headers or {}))
        told = as_api_error(error)  # Starlette raises the error again, for the log
        service.refused(told.status)
        return JSONResponse(told.document(), told.status, headers=told.headers)

    routes = [Route("/health", health), Route("/metrics", metrics), Route("/v1/models", models)]
    routes += [Route(path, generate, methods=["POST"]) for path in ("/v1/completions", "/v1/chat/completions")]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), refuse))
    app.router.redirect_slashes = False  # to the host that the client has named
    return app


class _Answer(Response):
    """Sends an answer token by token or whole; ends the request when the client goes away."""

    def __init__(
        self, service: Service | RemoteService, stream: Stream, form: Form, asked: CompletionRequest | ChatRequest
    ) -> None:
        self._service, self._stream, self._form = service, stream, form
        self._streams, options = bool(asked.stream), asked.stream_options
        self._shows_usage = options is not None and bool(options.include_usage)
        self._counts_on = options is not None and bool(options.continuous_usage_stats)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        leaving = asyncio.ensure_future(_wait_for_leaving(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()  # no effect if it has ended
            self._stream.leave()
        with contextlib.suppress(asyncio.CancelledError):
            await sending

    async def _send(self, scope: Any, receive: Any, send: Any) -> None:
        started = False
        try:
            if not self._streams:
                pieces = [piece async for step in self._stream.steps() for piece in step]
                await JSONResponse(self._form.document(pieces, self._usage()))(scope, receive, send)
                return
            async for event in self._events():
                if not started:  # before the first event, an error has a status of its own
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    started = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            self._service.refused(error.status)
            if not started:
                await JSONResponse(error.document(), error.status, headers=error.headers)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": as_event(error.document()), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        async for pieces in self._stream.steps():
            usage = self._usage() if self._counts_on and self._shows_usage else None  # as in vLLM
            if event := self._form.event(pieces, usage, shows_usage=self._shows_usage):
                yield event
        if self._shows_usage:
            yield self._form.event((), self._usage(), shows_usage=True)

    def _usage(self) -> dict[str, int]:
        prompt, new = self._stream.num_prompt_tokens, self._stream.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _wait_for_leaving(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, options: ServeOptions) -> bytes:
    most, limit_s, body = options.max_body_bytes, 3 * options.read_timeout_s, bytearray()
    # A connection whose body was not read to its end cannot be used again.
    too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large", Connection="close")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    try:
        async with asyncio.timeout(limit_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limit_s:g} s", Connection="close") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away") from None
    return bytes(body)


def _check_key(request: Request, digest: bytes | None) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if digest is not None and not (hmac.compare_digest(_digest(key.strip()), digest) and scheme.lower() == "bearer"):
        text = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
        raise ApiError(401, text, code="invalid_api_key", WWW_Authenticate="Bearer")


def _digest(key: str) -> bytes:
    """Return a digest: a comparison of the keys themselves would reveal their length."""
    return hashlib.sha256(key.encode()).digest()
