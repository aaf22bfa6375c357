"""What a client gets: OpenAI's documents, whole or in events, made of the tokens of a step."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.engine.stopping import TokenLogprobs
from lockstep.engine.text import Detokenizer
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
    """The text and the bytes of single tokens, special ones included."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = detokenizer_of(tokenizer)

    def of(self, token_id: int) -> tuple[str, bytes]:
        """Return a token's text, U+FFFD for parts of characters in it, and its bytes; empty for an unknown id."""
        content = self._detokenizer.token_bytes(token_id) if self._detokenizer is not None else b""
        if not content and self._tokenizer is not None:
            content = str(self._tokenizer.convert_ids_to_tokens(token_id) or "").encode()
        return content.decode(errors="replace"), content


class CompletionForm:
    """Documents of `/v1/completions`.

    Args:
        model: its name.
        texts: of tokens, for log probabilities.
    """

    object_name, event_name, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, texts: TokenTexts) -> None:
        self.answer_id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {"id": self.answer_id, "created": int(time.time()), "model": model}
        self._texts = texts
        self._offsets: dict[int, int] = {}

    def event(self, pieces: Sequence[Piece], usage: dict[str, int] | None, *, shows_usage: bool) -> bytes:
        """Return pieces as one event: a choice per sequence; empty where they have nothing to tell."""
        choices = [self.choice(piece_list, whole=False) for piece_list in _by_index(pieces)]
        choices = [choice for choice in choices if choice is not None]
        if not choices and usage is None:
            return b""
        document = self._head | {"object": self.event_name, "choices": choices}
        return as_event(document | ({"usage": usage} if shows_usage else {}))

    def document(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """Return all pieces of a request as one document."""
        choices = [self.choice(piece_list, whole=True) for piece_list in _by_index(pieces)]
        return self._head | {"object": self.object_name, "choices": choices, "usage": usage}

    def choice(self, pieces: Sequence[Piece], *, whole: bool) -> dict[str, Any] | None:
        """Return pieces of one sequence as a choice; None where a part of an answer would be empty."""
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        logprobs = self._logprobs(pieces) if last.logprobs is not None else None
        if not (whole or text or logprobs or last.finish_reason):
            return None
        return self._choice(text, whole) | {
            "index": last.index, "logprobs": logprobs, "finish_reason": last.finish_reason,
        }  # fmt: skip

    def _choice(self, text: str, whole: bool) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(pieces[0].index, 0)
        for piece in pieces:
            assert piece.logprobs is not None
            text = self._texts.of(piece.token_id)[0]
            own = _finite(piece.logprobs.logprob)
            top = {self._texts.of(token)[0]: _finite(value) for token, value in piece.logprobs.top}
            values = (text, own, {text: own} | top, offset)
            for entries, value in zip(lists.values(), values, strict=True):
                entries.append(value)
            offset += len(text)
        self._offsets[pieces[0].index] = offset
        return lists


class ChatForm(CompletionForm):
    """Documents of `/v1/chat/completions`."""

    object_name, event_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, texts: TokenTexts) -> None:
        super().__init__(model, texts)
        self._begun: set[int] = set()

    def choice(self, pieces: Sequence[Piece], *, whole: bool) -> dict[str, Any] | None:
        """See `CompletionForm`; the first part of an answer says whose it is."""
        choice = super().choice(pieces, whole=whole)
        if choice is not None and not whole and choice["index"] not in self._begun:
            self._begun.add(choice["index"])
            choice["delta"] = {"role": "assistant", **choice["delta"]}
        return choice

    def _choice(self, text: str, whole: bool) -> dict[str, Any]:
        if whole:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {"content": text}}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = []
        for piece in pieces:
            assert piece.logprobs is not None
            top = [self._token(token, value) for token, value in piece.logprobs.top]
            content.append(self._token(piece.token_id, piece.logprobs.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, content = self._texts.of(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(content)}


def usage_of(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    """Return what a request has cost, in tokens."""
    total = num_prompt_tokens + num_tokens
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}


def as_event(document: dict[str, Any]) -> bytes:
    """Return a document as a server-sent event."""
    return b"data: %b\n\n" % json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _finite(logprob: float) -> float:
    """Return a log probability that JSON can carry: OpenAI's stand-in for minus infinity is -9999."""
    return max(logprob, -9999.0)


def _by_index(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return pieces by sequence, sequences in order."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.index, []).append(piece)
    return [found[index] for index in sorted(found)]
