"""A request's text and its end: stop tokens, stop strings, lengths, and what its caller gets."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from typing import Literal

from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.text import Detokenizer
from lockstep.errors import ConfigurationError

FinishReason = Literal["stop", "length", "abort"]
_Utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class TextDelta:
    """What one token adds."""

    text: str = ""  # new text; it is final
    # None while the request continues. `"stop"`: a stop token, an end-of-sequence token or a stop string; `"length"`:
    # `max_tokens`; `"abort"`: the caller ended it.
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token of `stop_token_ids` that ended it
    offset: int = 0  # of the token's text in the output, held back or not; 0 unless log probabilities are asked for


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position of the output, before penalties, temperature and filters."""

    logprob: float  # of the token that was drawn
    # The `SamplingParams.logprobs` most likely tokens as `(token id, log probability)`, most likely first. The drawn
    # token need not be among them.
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """One finished request.

    Attributes:
        index: position of its prompt among the prompts of the call, from 0.
        request_id: its number in the engine.
        text: of the output, without the stop string or stop token that ended it; empty without a tokenizer.
        token_ids: of the output, including the one that ended it.
        rank: the data-parallel rank that ran it.
        finish_reason: `"stop"`, `"length"` or `"abort"`.
        logprobs: one entry per token; None if `SamplingParams.logprobs` was None.
        stop_reason: the stop string or token of `stop_token_ids` that ended it; None for any other reason.
    """

    index: int
    request_id: int
    text: str
    token_ids: tuple[int, ...]
    rank: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_reason: str | int | None = None


class StopChecker:
    """Turns one request's tokens into text on the host, and finds its end.

    Text that may begin a stop string is held back. However the text is cut into tokens, the stop string that completes
    first ends it, the longest if several complete together; none does within the first `min_tokens` tokens. Without a
    detokenizer all texts are empty, and stop strings are refused.

    Example:
        >>> from lockstep.models.tiny import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> checker = StopChecker(SamplingParams(stop="##"), detokenizer=Detokenizer(tokenizer))
        >>> [checker.push(token).text for token in tokenizer.encode("a#b##c")], checker.finish_reason
        (['a', '', '#b', '', '', ''], 'stop')
    """

    def __init__(
        self, params: SamplingParams, *, eos_token_ids: Collection[int] = (), detokenizer: Detokenizer | None = None
    ) -> None:
        if params.stop_strings and detokenizer is None:
            raise ConfigurationError(f"stop={params.stop_strings} needs a tokenizer, and there is none")
        self._params = params
        self._eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._stream = detokenizer.stream() if detokenizer is not None else None
        self._matcher = _StopMatcher(params.stop_strings)
        self._offsets = _Offsets(detokenizer) if detokenizer is not None and params.logprobs is not None else None
        self._offset = 0  # of the last token
        self._text = StringIO()
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """The final text so far."""
        return self._text.getvalue()

    def push(self, token_id: int) -> TextDelta:
        """Take the next token; return what it adds. Tokens after the end, of overrun rows, are dropped."""
        if self.finish_reason is not None:
            return TextDelta()
        self.token_ids.append(token_id)
        count = len(self.token_ids)
        is_eos, is_stop = token_id in self._eos_token_ids, token_id in self._stop_token_ids
        is_last = count >= self._params.min_tokens and (is_eos or is_stop)
        decoded = self._stream.push(token_id) if self._stream is not None and not is_last else ""
        if self._offsets is not None:
            self._offset = self._offsets.take(token_id, decoded)
        if is_last:
            return self._end("stop", None if is_eos else token_id)
        text = self._match(decoded)
        looks_on = self.finish_reason is None and count > self._params.min_tokens and self._params.stop_strings
        if looks_on and self._stream is not None and self._matcher.would_match(self._stream.open_text()):
            return self._end("stop", None, text)
        if self.finish_reason is None and count >= self._params.max_tokens:
            return self._end("length", None, text)
        return self._emit(text)

    def abort(self) -> TextDelta:
        """End the request now and return the text that was held back; no-op if it has ended."""
        return TextDelta() if self.finish_reason is not None else self._end("abort", None)

    def _match(self, text: str) -> str:
        """Return the text that is final after new text, and keep the stop string that it completes."""
        text, found = self._matcher.push(text, ignore=len(self.token_ids) <= self._params.min_tokens)
        if found is not None:
            self.finish_reason, self.stop_reason = "stop", found
        return text

    def _end(self, reason: FinishReason, stop_reason: str | int | None, text: str = "") -> TextDelta:
        self.finish_reason, self.stop_reason = reason, stop_reason
        text += self._match(self._stream.flush() if self._stream is not None else "")
        if not self._matcher.found:
            text += self._matcher.rest()
        return self._emit(text)

    def _emit(self, text: str) -> TextDelta:
        self._text.write(text)
        return TextDelta(text, self.finish_reason, self.stop_reason, self._offset)


class _Offsets:
    """Finds where the text of each token begins in the output, for a part of a character where the character does."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._num_decoded = self._num_in_run = 0  # characters: of the stream's text, of the open run of byte tokens
        self._run = _Utf8("replace")

    def take(self, token_id: int, decoded: str) -> int:
        """Return the offset of the next token, for which the stream has returned `decoded`."""
        content, begin = self._detokenizer.token_bytes(token_id), self._num_decoded
        if decoded:  # ends with the token's own text; a character that began before it looks like one of its own
            self._run.reset()
            self._num_in_run = 0
            self._num_decoded += len(decoded)
            return max(begin, self._num_decoded - len(_Utf8("replace").decode(content)))
        first = self._run.getstate()[0] + content[:1]
        offset = begin + self._num_in_run + max(0, len(first.decode(errors="replace")) - 1)
        if self._detokenizer.traits(token_id)[1]:
            self._num_in_run += len(self._run.decode(content))
        return offset


class _StopMatcher:
    """Finds strings in a text that arrives in pieces, by Knuth, Morris and Pratt (1977): constant work per character.

    A string's state is the length of its longest prefix that the text ends with. The longest of these is held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(dict.fromkeys(strings))
        self._borders = _borders_of(self._strings)
        self._first_characters = frozenset(string[0] for string in strings)
        self._states = [0] * len(self._strings)
        self.found = False

    def push(self, text: str, *, ignore: bool = False) -> tuple[str, str | None]:
        """Return the final text, and the string found, if any and not `ignore`; nothing may follow it."""
        if not any(self._states) and self._first_characters.isdisjoint(text):
            return text, None
        waited = self.rest()
        whole = waited + text
        for place, character in enumerate(text, start=len(waited) + 1):
            self._states = [
                _advance(string, borders, state, character)
                for string, borders, state in zip(self._strings, self._borders, self._states, strict=True)
            ]
            complete = [i for i, string in enumerate(self._strings) if self._states[i] == len(string)]
            if complete and not ignore:
                longest = max((self._strings[i] for i in complete), key=len)
                self.found = True
                return whole[: place - len(longest)], longest
            for i in complete:  # ignored: its longest border may still begin the next occurrence
                self._states[i] = self._borders[i][-1]
        return whole[: len(whole) - max(self._states)], None

    def would_match(self, text: str) -> bool:
        """Return whether a string completes if `text` comes next; nothing changes."""
        states = self._states
        _, found = self.push(text)
        self._states, self.found = states, False
        return found is not None

    def rest(self) -> str:
        waiting = (string[:state] for string, state in zip(self._strings, self._states, strict=True))
        return max(waiting, key=len, default="")


@lru_cache(maxsize=32)
def _borders_of(strings: tuple[str, ...]) -> list[list[int]]:
    """Return the borders of each string, which the sequences of a request share."""
    return [_borders(string) for string in strings]


def _borders(string: str) -> list[int]:
    """Return the length of the longest border of each prefix: a proper prefix of it that is also its suffix."""
    borders = [0] * len(string)
    length = 0
    for place in range(1, len(string)):
        while length and string[place] != string[length]:
            length = borders[length - 1]
        length += string[place] == string[length]
        borders[place] = length
    return borders


def _advance(string: str, borders: list[int], state: int, character: str) -> int:
    while state and string[state] != character:
        state = borders[state - 1]
    return state + (string[state] == character)
