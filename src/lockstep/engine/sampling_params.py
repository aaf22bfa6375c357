"""Sampling parameters of a request, and the limits it must fit into; checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import INT32_MAX, shown
from lockstep.workload.kv_pages import PAGE_SIZE, num_pages

GREEDY_BELOW = 1e-5  # lower temperatures are greedy, as in vLLM: float32 could not divide by much less
MAX_LOGPROBS = 5
# Each costs work in every step, and anybody may send a request.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 4096  # of all strings
MAX_STOP_TOKEN_IDS = 256
_LIMITS: dict[str, tuple[float, float]] = {  # inclusive; a field has its limits' type
    "temperature": (0.0, 1e4), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0), "repetition_penalty": (0.01, 100.0), "max_tokens": (1, INT32_MAX),
    "top_k": (-1, INT32_MAX), "seed": (-(2**63), 2**63 - 1), "logprobs": (0, MAX_LOGPROBS),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. Names, defaults and meaning are vLLM's, except where an entry says otherwise.

    All fields are checked at construction. `stop` and `stop_token_ids` are tuples afterwards.

    Args:
        max_tokens: maximum number of tokens to generate, `1..2**31 - 1`. vLLM also takes None, for the whole context.
        temperature: `0..10000`; below 1e-5 is greedy. vLLM raises other values below 0.01 to 0.01.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, in `(0, 1]`; 1 keeps all.
        top_k: keep this many most likely tokens; 0 or -1 keeps all. Among equal logits lower ids come first. vLLM keeps
            all tokens that equal the last one kept.
        min_p: drop tokens less likely than `min_p` times the most likely one, in `0..1`.
        presence_penalty: subtracted from the logit of each token that was generated before, in `-2..2`.
        frequency_penalty: subtracted once per earlier occurrence in the output, in `-2..2`.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output, `0.01..100`.
            vLLM takes any positive number.
        seed: of this request's random numbers, a signed 64-bit integer; None lets the engine choose.
        stop: strings that end the text, which is cut before the string that completes first; vLLM cuts at the first of
            its list that the last token completed. At most 64, with 4096 characters in all; vLLM has no limit.
        stop_token_ids: tokens that end the output. They are in `token_ids` but not in the text. At most 256; vLLM has
            no limit.
        ignore_eos: continue after an end-of-sequence token.
        min_tokens: no end-of-sequence or stop token is drawn, and no stop string is looked for, in the first
            `min_tokens` tokens; at most `max_tokens`.
        logprobs: None for none, 0 for the drawn tokens', `1..5` for the most likely tokens' as well, of the
            distribution before penalties, temperature and filters. vLLM goes up to 20 by default.

    Raises:
        ConfigurationError: for a field of a wrong type or out of its range; names field, limit and value.

    Example:
        >>> SamplingParams(temperature=0, stop="END").stop
        ('END',)
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            if getattr(self, name) is not None or name not in ("seed", "logprobs"):
                self._set_number(name, *limits)
        if self.top_p == 0:
            raise ConfigurationError("top_p must be above 0, got 0")
        self._set_number("min_tokens", 0, self.max_tokens)
        if not isinstance(self.ignore_eos, bool):
            raise ConfigurationError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, typed as it is after the check."""
        return tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always drawn: by temperature, or because no other is kept."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def _set_number(self, name: str, low: float, high: float) -> None:
        value, kind = getattr(self, name), type(low)
        is_kind = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        # Compared before conversion: an integer too large for a float is out of range. NaN is in no range.
        if not is_kind or not low <= value <= high:
            limits = f"an integer in {low}..{high}" if kind is int else f"a number in {low:g}..{high:g}"
            raise ConfigurationError(f"{name} must be {limits}, got {shown(value, 80)}")
        object.__setattr__(self, name, kind(value))


class Limits(NamedTuple):
    """A model's and its cache's limits on requests; the same on all ranks."""

    vocab_size: int  # entries of the embedding
    num_logits: int  # tokens that can be drawn
    max_model_len: int  # maximum tokens of a request, prompt included
    kv_capacity_tokens: int | None  # per rank; None if the cache grows

    def check(self, name: str, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise `ConfigurationError` if a request, `name` in the message, does not fit."""
        problem, longest = None, len(prompt) + params.max_tokens
        sizes = f"has {len(prompt)} tokens and max_tokens is {params.max_tokens}, together more than the"
        pages = None if self.kv_capacity_tokens is None else self.kv_capacity_tokens // PAGE_SIZE
        if not prompt:
            problem = "has no tokens"
        elif (wrong := next((token for token in prompt if not 0 <= token < self.vocab_size), None)) is not None:
            problem = f"has token {wrong}, but the model's embedding has {self.vocab_size} entries"
        elif longest > self.max_model_len:
            problem = f"{sizes} context of {self.max_model_len}"
        elif pages is not None and num_pages(longest) > pages:
            problem = f"{sizes} {pages} pages of {PAGE_SIZE} tokens that a rank's KV cache has"
        elif (largest := max(params.stop_token_ids, default=0)) >= self.num_logits:
            problem = f"has token {largest} in stop_token_ids, but the model draws from {self.num_logits}"
        if problem is not None:
            raise ConfigurationError(f"{name} {problem}")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, bytes | bytearray):
        raise ConfigurationError(f"stop must be a string or a list of strings, got {shown(stop, 80)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise ConfigurationError(f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ConfigurationError(f"stop must hold strings of at least 1 character, got {shown(string, 80)}")
    if (size := sum(map(len, strings))) > MAX_STOP_CHARACTERS:
        raise ConfigurationError(f"stop must hold at most {MAX_STOP_CHARACTERS} characters in all, got {size}")
    return tuple(strings)


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray):
        raise ConfigurationError(f"stop_token_ids must be a list of token ids, got {shown(ids, 80)}")
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ConfigurationError(f"stop_token_ids must hold at most {MAX_STOP_TOKEN_IDS} token ids, got {len(ids)}")
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) <= INT32_MAX:
            raise ConfigurationError(f"stop_token_ids must hold integers in 0..{INT32_MAX}, got {shown(token, 80)}")
    return tuple(int(token) for token in ids)
