"""The HTTP face: paths, keys, limits, and answers that end when their client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lockstep.serve.answers import ChatForm, CompletionForm, Piece, as_event, usage_of
from lockstep.serve.errors import ApiError
from lockstep.serve.metrics import CONTENT_TYPE
from lockstep.serve.openapi import openapi_document
from lockstep.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, new_requests, parse
from lockstep.serve.service import Generation, Service

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AppOptions:
    """What the HTTP face is told.

    Attributes:
        model: the name that requests may give.
        api_key: what `/v1` needs as a bearer token; None for nothing.
        max_body_bytes: of a request, > 0.
        body_timeout_s: longest wait for a request's body, in seconds.
        log_requests: `off`, `sizes`, or `prompts` for their token ids as well.
    """

    model: str
    api_key: str | None = None
    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 30.0
    log_requests: str = "off"


class App:
    """Answers HTTP requests with a service.

    Args:
        service: generates.
        options: see `AppOptions`.
    """

    def __init__(self, service: Service, options: AppOptions) -> None:
        self._service = service
        self._options = options
        self._key = _digest(options.api_key) if options.api_key is not None else None
        self._document = openapi_document(options.model)

    def asgi(self) -> Starlette:
        """Return it as an ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: Any = {ApiError: self._refuse, HTTPException: self._refuse, Exception: self._fail}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _health(self, _: Request) -> Response:
        health = self._service.health()
        return JSONResponse(health, 503 if health["status"] == "down" else 200)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(self._document)

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        entry: dict[str, Any] = {"id": self._options.model, "object": "model", "created": 0, "owned_by": "lockstep"}
        if self._service.engine is not None:
            entry["max_model_len"] = self._service.engine.about["max_model_len"]
        return JSONResponse({"object": "list", "data": [entry]})

    async def _completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, CompletionForm)

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, ChatForm)

    async def _generate(
        self, request: Request, kind: type[GenerationRequest], form_kind: type[CompletionForm]
    ) -> Response:
        self._check_key(request)
        asked = parse(kind, await self._body(request))
        if asked.model is not None and asked.model != self._options.model:
            text = f"there is no model {asked.model[:80]!r} here, only {self._options.model!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        requests = await self._service.prepare(lambda engine: new_requests(asked, engine))
        form = form_kind(self._options.model, self._service.texts)
        generation = self._service.submit(requests)
        if self._options.log_requests != "off":
            prompt = f": {requests[0].prompt_token_ids}" if self._options.log_requests == "prompts" else ""
            sizes = (form.answer_id, len(requests), generation.num_prompt_tokens, requests[0].params.max_tokens)
            logger.info("%s: %d sequences, %d prompt tokens, at most %d new ones%s", *sizes, prompt)
        return _Answer(self._service, generation, form, asked)

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(_digest(key.strip()), self._key) or scheme.lower() != "bearer":
            text = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, text, code="invalid_api_key", WWW_Authenticate="Bearer")

    async def _body(self, request: Request) -> bytes:
        most, body = self._options.max_body_bytes, bytearray()
        # Where a body is not read to its end, the connection has to end.
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large", Connection="close")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            text = f"the body did not come within {self._options.body_timeout_s:g} s"
            raise ApiError(408, text, Connection="close") from None
        except ClientDisconnect:
            raise ApiError(400, "the client went away") from None
        return bytes(body)

    async def _refuse(self, _: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, error.detail, **dict(error.headers or {}))
        assert isinstance(error, ApiError)
        self._service.metrics.refused(error.status)
        return JSONResponse(error.document(), error.status, headers=error.headers)

    async def _fail(self, request: Request, _: Exception) -> Response:
        return await self._refuse(request, ApiError(500, "an error inside of the server, which its log tells of"))


class _Answer(Response):
    """Sends a generation as it comes, or when it is whole; ends it when the client goes away."""

    def __init__(
        self, service: Service, generation: Generation, form: CompletionForm, asked: GenerationRequest
    ) -> None:
        self._service = service
        self._generation = generation
        self._form = form
        self._streams = bool(asked.stream)
        options = asked.stream_options
        self._shows_usage = options is not None and bool(options.include_usage)
        self._counts_on = options is not None and bool(options.continuous_usage_stats)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        try:
            sending = asyncio.ensure_future(self._send(scope, receive, send))
            leaving = asyncio.ensure_future(_wait_for_leaving(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                if not sending.done():
                    sending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sending
        finally:
            self._service.leave(self._generation)

    async def _send(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._streams:
            await (await self._whole())(scope, receive, send)
            return
        events = self._events()
        # With the first event it is known that there is something to answer: until then an error has a status.
        try:
            first = await anext(events)
        except ApiError as error:
            await self._refusal(error)(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            self._service.metrics.refused(error.status)
            await send({"type": "http.response.body", "body": as_event(error.document()), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        async for pieces in self._generation.steps():
            usage = self._usage() if self._counts_on else None
            if event := self._form.event(pieces, usage, shows_usage=self._shows_usage):
                yield event
        if self._shows_usage:
            yield self._form.event((), self._usage(), shows_usage=True)

    async def _whole(self) -> Response:
        pieces: list[Piece] = []
        try:
            async for some in self._generation.steps():
                pieces += some
        except ApiError as error:
            return self._refusal(error)
        return JSONResponse(self._form.document(pieces, self._usage()))

    def _refusal(self, error: ApiError) -> Response:
        self._service.metrics.refused(error.status)
        return JSONResponse(error.document(), error.status, headers=error.headers)

    def _usage(self) -> dict[str, int]:
        return usage_of(self._generation.num_prompt_tokens, self._generation.num_tokens)


async def _wait_for_leaving(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _digest(key: str) -> bytes:
    """Return a digest: comparing keys themselves would tell their length."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
