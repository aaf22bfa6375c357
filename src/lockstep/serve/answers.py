"""What a client gets: OpenAI's documents, whole or in events, made of the tokens of a step."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.engine.stopping import TokenLogprobs
from lockstep.runner.ranks import detokenizer_of


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to one sequence of a request."""

    index: int
    token_id: int
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: str | None


class TokenTexts:
    """Names and bytes of single tokens, special ones included."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer_of(tokenizer)

    def of(self, token_id: int) -> tuple[str, bytes]:
        """Return a token's name and its bytes: its text, or the bytes' codes where they are no whole characters."""
        content = self._detokenizer.token_bytes(token_id) if self._detokenizer is not None else b""
        if not content and self._tokenizer is not None:
            content = str(self._tokenizer.convert_ids_to_tokens(token_id) or "").encode()
        try:
            return content.decode(), content
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content), content


class Form:
    """Writes one request's answer as completions are answered, or as chats are; `model` is the name to give."""

    def __init__(self, model: str, texts: TokenTexts, *, is_chat: bool) -> None:
        self.answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {"id": self.answer_id, "created": int(time.time()), "model": model}
        self._texts = texts
        self._is_chat = is_chat
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}  # of each sequence's next token in its text

    def event(self, pieces: Sequence[Piece], usage: dict[str, int] | None, *, shows_usage: bool) -> bytes:
        """Return what came together as one event, a choice per sequence; empty where it has nothing to tell."""
        choices = [self._choice(of_one, whole=False) for of_one in _by_index(pieces) if _tells(of_one)]
        if not choices and usage is None:
            return b""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        document = self._head | {"object": kind, "choices": choices}
        return as_event(document | ({"usage": usage} if shows_usage else {}))

    def document(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """Return all of a request as one document."""
        choices = [self._choice(of_one, whole=True) for of_one in _by_index(pieces)]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": usage}

    def _choice(self, pieces: Sequence[Piece], *, whole: bool) -> dict[str, Any]:
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        choice: dict[str, Any] = {"index": last.index, "logprobs": None, "finish_reason": last.finish_reason}
        if last.logprobs is not None:
            choice["logprobs"] = self._chat_logprobs(pieces) if self._is_chat else self._logprobs(pieces)
        if not self._is_chat:
            choice["text"] = text
        elif whole:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["delta"] = {"content": text} if last.index in self._begun else {"role": "assistant", "content": text}
            self._begun.add(last.index)
        return choice

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(pieces[0].index, 0)
        for piece in pieces:
            token, *top = self._tokens(piece)
            named = {one["token"]: one["logprob"] for one in (token, *top)}
            for entries, value in zip(lists.values(), (token["token"], token["logprob"], named, offset), strict=True):
                entries.append(value)
            offset += len(piece.text)
        self._offsets[pieces[0].index] = offset
        return lists

    def _chat_logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = map(self._tokens, pieces)
        return {"content": [token | {"top_logprobs": top} for token, *top in tokens], "refusal": None}

    def _tokens(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the drawn token, and the most likely ones, as chats show them."""
        assert piece.logprobs is not None
        tokens = []
        for token_id, logprob in ((piece.token_id, piece.logprobs.logprob), *piece.logprobs.top):
            name, content = self._texts.of(token_id)
            # JSON has no infinity; OpenAI's stand-in is -9999.
            tokens.append({"token": name, "logprob": max(logprob, -9999.0), "bytes": list(content)})
        return tokens


def as_event(document: dict[str, Any]) -> bytes:
    """Return a document as a server-sent event."""
    return b"data: %b\n\n" % json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _by_index(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return pieces by sequence, sequences in order."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.index, []).append(piece)
    return [found[index] for index in sorted(found)]


def _tells(pieces: Sequence[Piece]) -> bool:
    return any(piece.text or piece.logprobs is not None or piece.finish_reason for piece in pieces)
