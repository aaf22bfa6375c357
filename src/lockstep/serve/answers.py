"""OpenAI's response documents, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from lockstep.serve.errors import ApiError

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Piece(NamedTuple):
    """What one token adds to one sequence of a request."""

    sequence: int  # its number in the request
    text: str
    tokens: list[dict[str, Any]] | None  # the drawn token and then the most likely ones; None if not asked for
    finish_reason: str | None
    offset: int = 0  # of the token's text in the output, where log probabilities are asked for


class Stream:
    """The pieces of one request on their way to its client."""

    leave: Callable[[], None]  # releases the request; set by the service, called once by the reader

    def __init__(self, num_sequences: int, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens, self.num_tokens = num_prompt_tokens, 0
        self._num_open = num_sequences
        self._pieces: list[Piece] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    async def steps(self) -> AsyncIterator[list[Piece]]:
        """Yield all new pieces at a time until all sequences have ended; raise the error that ended them."""
        while self._error is None:
            pieces, self._pieces = self._pieces, []
            if pieces:
                yield pieces
            elif not self._num_open:
                return
            else:
                await self._news.wait()
                self._news.clear()
        raise self._error

    def take(self, news: Piece | ApiError) -> None:
        """Add a token, or the error that ends the request; no error comes after its end."""
        if isinstance(news, ApiError):
            self._error = news if self._num_open and self._error is None else self._error
        else:
            self._pieces.append(news)
            self.num_tokens += 1
            self._num_open -= news.finish_reason is not None
        self._news.set()


class Form:
    """Formats one request's answer as a completion or a chat; `model` is the name to give."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self.answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {"id": self.answer_id, "created": int(time.time()), "model": model}
        self._is_chat = is_chat
        self._begun: set[int] = set()

    def event(self, pieces: Sequence[Piece], usage: dict[str, int] | None, *, shows_usage: bool) -> bytes:
        """Return pieces as one event with a choice per sequence, empty if none has news; without pieces, only usage."""
        choices = [self._choice(of_one, whole=False) for of_one in _by_sequence(pieces) if _tells(of_one)]
        if pieces and not choices:
            return b""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        document = self._head | {"object": kind, "choices": choices}
        return as_event(document | ({"usage": usage} if shows_usage else {}))

    def document(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """Return a whole answer as one document."""
        choices = [self._choice(of_one, whole=True) for of_one in _by_sequence(pieces)]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": usage}

    def _choice(self, pieces: Sequence[Piece], *, whole: bool) -> dict[str, Any]:
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        choice: dict[str, Any] = {"index": last.sequence, "logprobs": None, "finish_reason": last.finish_reason}
        if last.tokens is not None:
            choice["logprobs"] = self._logprobs(pieces)
        if not self._is_chat:
            choice["text"] = text
        elif whole:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            role = {} if last.sequence in self._begun else {"role": "assistant"}
            choice["delta"] = role | {"content": text}
            self._begun.add(last.sequence)
        return choice

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if self._is_chat:
            tokens = (piece.tokens for piece in pieces if piece.tokens)
            return {"content": [token | {"top_logprobs": top} for token, *top in tokens], "refusal": None}
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            assert piece.tokens is not None
            token, *top = piece.tokens
            named = {one["token"]: one["logprob"] for one in (token, *top)}
            values = (token["token"], token["logprob"], named, piece.offset)
            for entries, value in zip(lists.values(), values, strict=True):
                entries.append(value)
        return lists


def as_event(document: dict[str, Any]) -> bytes:
    """Return a document as a server-sent event."""
    return b"data: %b\n\n" % _encode(document).encode()


def _by_sequence(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return pieces by sequence, sequences in order."""
    number = itemgetter(0)
    return [list(of_one) for _, of_one in groupby(sorted(pieces, key=number), key=number)]


def _tells(pieces: Sequence[Piece]) -> bool:
    return any(piece.text or piece.tokens or piece.finish_reason for piece in pieces)
