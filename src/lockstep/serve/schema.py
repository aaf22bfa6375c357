"""What a client may ask for: OpenAI's fields that are served and some of vLLM's; all others are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lockstep.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.runner.engine import Engine
from lockstep.runner.front import NewRequest
from lockstep.serve.errors import ApiError
from lockstep.workload.kv_pages import PAGE_SIZE

MAX_SEQUENCES = 128
"""Most sequences that one HTTP request may ask for: prompts times `n`."""

_REFUSED = {
    **dict.fromkeys(
        ("tools", "tool_choice", "tool_calls", "tool_call_id", "functions", "function_call"), "tool calling"
    ),
    **dict.fromkeys(("response_format", "structured_outputs", "guided_json", "guided_regex"), "structured output"),
    **dict.fromkeys(("guided_choice", "guided_grammar"), "structured output"),
    **dict.fromkeys(("audio", "modalities"), "audio"),
}
# What they may hold all the same, since it asks for nothing.
_NOTHING: tuple[Any, ...] = (None, [], {}, "none", False, {"type": "text"}, ["text"])
_NO_EFFECT = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
_NEUTRAL: dict[str, Any] = {"best_of": 1, "suffix": ""}
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "ignore_eos", "min_tokens"),
)


class _Model(BaseModel):
    """Fields have their JSON types exactly; null is the same as leaving one out."""

    model_config = ConfigDict(strict=True, extra="allow")

    def refuse_unknown(self) -> None:
        """Raise for fields that would change the answer, and are not served."""
        for name, value in (self.model_extra or {}).items():
            if name in _NO_EFFECT or any(value is one or value == one for one in (*_NOTHING, _NEUTRAL.get(name))):
                continue
            what = f"{_REFUSED[name]} is not supported" if name in _REFUSED else "this field is not supported"
            raise ApiError(400, f"{name[:80]}: {what}", param=name[:80], code="unsupported_parameter")


class StreamOptions(_Model):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(_Model):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None

    def num_logprobs(self) -> int | None:
        """Return how many most likely tokens are asked for; None for no log probabilities at all."""
        raise NotImplementedError

    def wanted_tokens(self) -> int | None:
        """Return the length that is asked for; None for as much as there is room for."""
        raise NotImplementedError

    def prompts(self, engine: Engine) -> list[list[int]]:
        """Return the token ids of each prompt."""
        raise NotImplementedError


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    def num_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return self.logprobs

    def wanted_tokens(self) -> int | None:
        """See `GenerationRequest`; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self, engine: Engine) -> list[list[int]]:
        """See `GenerationRequest`."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        prompts: Sequence[Any] = self.prompt if several else [self.prompt]
        if not prompts:
            raise ApiError(400, "prompt must hold at least 1 prompt", param="prompt")
        _check_sequences(len(prompts), self.n)
        return [engine.prompt_ids(index, prompt) for index, prompt in enumerate(prompts)]


class Part(_Model):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(_Model):
    """One message of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Return it as chat templates take it: parts joined by newlines, `developer` as `system`."""
        self.refuse_unknown()
        if self.role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"messages: role {self.role[:40]!r} is not supported", param="messages")
        parts = self.content if isinstance(self.content, list) else []
        for part in parts:
            part.refuse_unknown()
            if part.type != "text" or part.text is None:
                raise ApiError(400, f"messages: content of type {part.type[:40]!r} is not supported", param="messages")
        text = "\n".join(part.text or "" for part in parts) if parts else self.content or ""
        message = {"role": "system" if self.role == "developer" else self.role, "content": str(text)}
        return message | ({"name": self.name} if self.name is not None else {})


class ChatRequest(GenerationRequest):
    """Body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def num_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        if not self.logprobs:
            if self.top_logprobs:
                raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
            return None
        return self.top_logprobs or 0

    def wanted_tokens(self) -> int | None:
        """See `GenerationRequest`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompts(self, engine: Engine) -> list[list[int]]:
        """See `GenerationRequest`: the one that the tokenizer's chat template makes."""
        if not self.messages:
            raise ApiError(400, "messages must hold at least 1 message", param="messages")
        _check_sequences(1, self.n)
        messages = [message.for_template() for message in self.messages]
        if getattr(engine.tokenizer, "chat_template", None) is None:
            raise ApiError(400, "this model has no chat template: use /v1/completions", param="messages")
        try:
            ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template may raise what it likes, most of it by its own raise_exception
            raise ApiError(400, f"the chat template refused the messages: {error!s:.200}", param="messages") from None
        return [list(ids)]


def parse(kind: type[GenerationRequest], body: bytes) -> Any:
    """Read a request's body.

    Raises:
        ApiError: 400 for what is no JSON or not supported, 422 for a field that is missing or of a wrong type.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(place) for place in first["loc"])[:80]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is no valid JSON: {first['msg']}") from None
        param = str(first["loc"][0])[:80] if first["loc"] else None
        raise ApiError(422, f"{where or 'the body'}: {first['msg']}", param=param) from None
    request.refuse_unknown()
    if request.stream_options is not None:
        request.stream_options.refuse_unknown()
        if not request.stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    return request


def new_requests(request: GenerationRequest, engine: Engine) -> list[NewRequest]:
    """Tokenize and check a request; sequence `prompt * n + choice` has that index.

    Raises:
        ApiError: 400, naming the field where that is known.
    """
    given = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    num_choices, top = request.n or 1, request.num_logprobs()
    if top is not None and top > MAX_LOGPROBS:
        raise ApiError(400, f"at most {MAX_LOGPROBS} log probabilities are supported, got {top}", param="logprobs")
    try:
        SamplingParams(**given | {"min_tokens": 0})  # before the work of tokenizing
        requests: list[NewRequest] = []
        for ids in request.prompts(engine):
            wanted = request.wanted_tokens()
            max_tokens = _room(engine) - len(ids) if wanted is None else wanted
            params = SamplingParams(**given, seed=request.seed, max_tokens=max(1, max_tokens), logprobs=top)
            if wanted is not None and wanted < 1:
                raise ApiError(400, f"max_tokens must be >= 1, got {wanted}", param="max_tokens")
            engine.check(len(requests) // num_choices, ids, params)
            for choice in range(num_choices):
                requests.append(NewRequest(len(requests), ids, _with_seed(params, choice)))
    except ConfigurationError as error:
        message = str(error)
        code = "context_length_exceeded" if "together more than" in message else None
        first = message.partition(" ")[0]
        param = first if first in GenerationRequest.model_fields else None
        raise ApiError(400, message, param=param, code=code) from None
    return requests


def _check_sequences(num_prompts: int, n: int | None) -> None:
    if n is not None and n < 1:
        raise ApiError(400, f"n must be >= 1, got {n}", param="n")
    if num_prompts * (n or 1) > MAX_SEQUENCES:
        text = f"prompts * n must be <= {MAX_SEQUENCES}, got {num_prompts} * {n or 1}"
        raise ApiError(400, text, param="n" if n is not None else "prompt")


def _room(engine: Engine) -> int:
    """Return how many tokens a request may have at most, prompt included."""
    longest, capacity = engine.about["max_model_len"], engine.about["kv_capacity_tokens"]
    return int(longest if capacity is None else min(longest, capacity // PAGE_SIZE * PAGE_SIZE))


def _with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    """Return parameters for one of several sequences of a prompt: each has random numbers of its own."""
    if params.seed is None or choice == 0:
        return params
    return dataclasses.replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)
