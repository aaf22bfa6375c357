"""What a finished request gives back."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.engine.stopping import FinishReason


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one place of the output, before penalties, temperature and filters.

    Attributes:
        logprob: of the token that was drawn.
        top: the most likely tokens as `(token id, log probability)`, most likely first; as many as `logprobs` asked
            for. The drawn token is among them only if it is one of these.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """One finished request.

    Attributes:
        index: place of its prompt among the prompts of the call, from 0.
        request_id: its number in the engine.
        text: of the output, without the stop string or stop token that ended it; empty without a tokenizer.
        token_ids: of the output, the last one included, whatever ended it.
        rank: the data-parallel rank that ran it.
        finish_reason: `"stop"`, `"length"` or `"abort"`.
        logprobs: one entry per token; None if `SamplingParams.logprobs` was None.
        stop_reason: the stop string or token of `stop_token_ids` that ended it; None for any other end.
    """

    index: int
    request_id: int
    text: str
    token_ids: tuple[int, ...]
    rank: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_reason: str | int | None = None
