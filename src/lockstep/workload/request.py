"""A request: what arrives, when, and how long it will be."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lockstep.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload.

    Attributes:
        request_id: its place in the workload, from 0, in order of arrival; an engine may number its requests otherwise.
        arrival_s: seconds after the first request, >= 0, already divided by the rate scale.
        num_prompt_tokens: tokens of the prompt, >= 1.
        max_new_tokens: tokens to generate, >= 1. Traces say how many were generated, and end-of-sequence is ignored, so
            that exactly so many are.
        prompt: the text, where the workload has one; None where only its length is known.
    """

    request_id: int
    arrival_s: float
    num_prompt_tokens: int
    max_new_tokens: int
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1 or self.max_new_tokens < 1 or not self.arrival_s >= 0:
            raise ConfigurationError(
                f"request {self.request_id}: num_prompt_tokens and max_new_tokens must be >= 1 and arrival_s >= 0, "
                f"got {self.num_prompt_tokens}, {self.max_new_tokens} and {self.arrival_s}"
            )

    @property
    def num_computed_tokens(self) -> int:
        """Rows that this request sends through the model: the prompt, and every generated token but the last."""
        return self.num_prompt_tokens + self.max_new_tokens - 1

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of prompt and output at their longest: what it may come to hold in the KV cache."""
        return self.num_prompt_tokens + self.max_new_tokens


def random_prompt_ids(request: Request, vocab_size: int, seed: int) -> list[int]:
    """Return token ids for a request whose text is not known.

    They depend on the seed and the request alone, never on the rank that computes it or on its neighbours.

    Args:
        request: the request; its `num_prompt_tokens` ids are made.
        vocab_size: ids are in `0..vocab_size-1`.
        seed: the run's seed.

    Example:
        >>> random_prompt_ids(Request(7, 0.0, 4, 1), vocab_size=256, seed=0)
        [165, 77, 202, 24]
    """
    generator = random.Random(seed * 1_000_003 + request.request_id)
    return [generator.randrange(vocab_size) for _ in range(request.num_prompt_tokens)]
