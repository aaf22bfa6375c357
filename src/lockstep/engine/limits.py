"""What a request must fit into, checked where it comes in and where it runs. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lockstep.engine.sampling_params import SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.workload.kv_pages import PAGE_SIZE, num_pages


class Limits(NamedTuple):
    """Of a model and its cache, the same on all ranks."""

    vocab_size: int  # entries of the embedding
    num_logits: int  # tokens that can be drawn
    max_model_len: int  # most tokens of a request, prompt included
    kv_capacity_tokens: int | None  # of a rank; None where the cache grows

    def check(self, name: str, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise `ConfigurationError` where a request, called `name` in the message, does not fit."""
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
