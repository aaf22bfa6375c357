"""Fields of requests: OpenAI's that are served and some of vLLM's. All others are refused by name."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from annotated_types import MaxLen
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from lockstep.engine.sampling_params import SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.serve.errors import ApiError
from lockstep.workload.kv_pages import PAGE_SIZE

if TYPE_CHECKING:
    from lockstep.runner.engine import Engine
    from lockstep.runner.front import NewRequest

MAX_SEQUENCES = 128
"""Maximum sequences of one HTTP request: prompts times `n`."""
_MAX_BRACKETS = 250_000  # even an empty list takes hundreds of bytes, and time to parse
_WHAT = {
    "tool calls are": ("tools", "tool_choice", "tool_calls", "tool_call_id", "functions", "function_call"),
    "structured output is": ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
}
_UNIONS = {
    "prompt": f"a string, token ids, or a list of at most {MAX_SEQUENCES} strings or lists of token ids",
    "stop": "a string or a list of strings",
    "content": "a string or a list of parts",
}
# Values that change nothing here, by field; None if none of its values does.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")),
    "parallel_tool_calls": None,
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),  # of beams
    "priority": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    # An empty one of these is a request: for a search, for any JSON, for no token at all.
    **dict.fromkeys(("web_search_options", "guided_json", "allowed_token_ids"), ()),
}
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "ignore_eos", "min_tokens"),
)


class _FailFast(FailFast):
    __hash__ = object.__hash__  # needed in unions of types


Entry = TypeVar("Entry")
# With an error per entry, a body of a few megabytes would take gigabytes of memory.
List = Annotated[list[Entry], _FailFast()]
Prompts = Annotated[list[Entry], _FailFast(), MaxLen(MAX_SEQUENCES)]


class Fields(BaseModel):
    """Fields have exactly their JSON types; null means that a field is absent."""

    model_config = ConfigDict(strict=True, extra="allow")
    without_effect: ClassVar[dict[str, tuple[Any, ...] | None]] = {}  # see `_WITHOUT_EFFECT`


class StreamOptions(Fields):
    """What a stream contains besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Fields):
    """What completions and chats have in common."""

    without_effect = _WITHOUT_EFFECT
    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: str | List[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: List[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`."""

    without_effect = _WITHOUT_EFFECT | {"suffix": ("",), "add_special_tokens": (True,)}
    prompt: str | Prompts[str] | List[int] | Prompts[List[int]]
    logprobs: int | None = None
    best_of: int | None = None


class Part(Fields):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(Fields):
    """One message of a conversation."""

    role: str
    content: str | List[Part] | None = None
    name: str | None = None


class ChatRequest(GenerationRequest):
    """Body of `/v1/chat/completions`."""

    without_effect = _WITHOUT_EFFECT | {
        "modalities": (["text"],),
        "add_special_tokens": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "include_reasoning": (True,),
    }
    messages: List[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


Request = TypeVar("Request", bound=GenerationRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """Parse a body; 400 for invalid JSON or an unsupported field, 422 for a missing field or a wrong type."""
    if body.count(b"[") + body.count(b"{") > _MAX_BRACKETS:
        raise ApiError(400, f"the body has more than {_MAX_BRACKETS} brackets, which would take long to read")
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is no valid JSON: {first['msg']}") from None
        parts = [str(part) for part in first["loc"]]
        # Pydantic also names the type of a union that it tried.
        place = ".".join(part for part in parts if part != "str" and "[" not in part)[:80]
        is_union = parts[-1:] == ["str"]
        what = f" must be {_UNIONS[parts[-2]]}" if is_union else f": {first['msg']}"
        raise ApiError(422, f"{place or 'the body'}{what}", place.partition(".")[0] or None) from None
    _refuse_unknown(request)
    if request.stream_options is not None:
        _refuse_unknown(request.stream_options)
        if not request.stream:
            raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    return request


def num_sequences(request: CompletionRequest | ChatRequest) -> int:
    """Return prompts times `n`; 400 for none or too many."""
    num_prompts, n = len(_prompts(request)), 1 if request.n is None else request.n
    name = "messages" if isinstance(request, ChatRequest) else "prompt"
    if not num_prompts:
        raise ApiError(400, f"{name} must not be empty", name)
    if not 1 <= n <= MAX_SEQUENCES // num_prompts:
        text = f"n must be >= 1, and n * prompts <= {MAX_SEQUENCES}, got {n} * {num_prompts}"
        raise ApiError(400, text, name if request.n is None else "n")
    return num_prompts * n


def new_requests(request: CompletionRequest | ChatRequest, engine: Engine) -> list[NewRequest]:
    """Tokenize and check a request; sequence `prompt * n + choice` has that index. 400 names the field if it can."""
    from lockstep.runner.front import NewRequest  # imports torch, which API processes do without

    prompts = _prompts(request)
    num_choices = num_sequences(request) // len(prompts)
    given = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    given |= {"seed": request.seed, "logprobs": _num_logprobs(request)}
    requests: list[NewRequest] = []
    try:
        SamplingParams(**given | {"min_tokens": 0})  # before the work of tokenizing
        for number, ids in enumerate(_tokenize(request, prompts, engine)):
            params = SamplingParams(**given, max_tokens=_max_tokens(request, engine, number, len(ids)))
            engine.check(number, ids, params)
            for choice in range(num_choices):
                requests.append(NewRequest(len(requests), ids, _with_seed(params, choice)))
    except ConfigurationError as error:
        message, fields, default = str(error), type(request).model_fields, None
        if isinstance(request, ChatRequest):  # in its own terms
            names, default = {"prompt 0": "the chat", "logprobs": "top_logprobs"}, "messages"
            if request.max_completion_tokens is not None:
                names["max_tokens"] = "max_completion_tokens"
            message = re.sub("|".join(names), lambda found: names[found[0]], message)
        first, *words = re.findall(r"\w+", message)  # "prompt 0 has token 9 in stop_token_ids"
        param = next((word for word in words if "_" in word and word in fields), first if first in fields else default)
        code = "context_length_exceeded" if "more than the" in message else None
        raise ApiError(400, message, param, code) from None
    return requests


def _refuse_unknown(fields: Fields) -> None:
    """Refuse unsupported fields that would change the answer; null, and mostly [] and {}, request nothing."""
    for name, value in (fields.model_extra or {}).items():
        harmless = fields.without_effect.get(name, ([], {}))
        # In Python, 0 equals False.
        if value is None or harmless is None or any(type(one) is type(value) and one == value for one in harmless):
            continue
        what = next((what for what, names in _WHAT.items() if name in names), "this field is")
        raise ApiError(400, f"{name[:80]}: {what} not supported", name[:80], "unsupported_parameter")


def _num_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        if request.best_of not in (None, 1):
            raise ApiError(400, f"best_of must be 1, got {request.best_of}", "best_of", "unsupported_parameter")
        return request.logprobs
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _max_tokens(request: CompletionRequest | ChatRequest, engine: Engine, number: int, num_prompt_tokens: int) -> int:
    """Return the requested length; by default all that fits, for completions at most OpenAI's 16."""
    limit, where, capacity = engine.about["max_model_len"], "the context", engine.about["kv_capacity_tokens"]
    if capacity is not None and capacity // PAGE_SIZE * PAGE_SIZE < limit:
        limit, where = capacity // PAGE_SIZE * PAGE_SIZE, "a rank's KV cache"
    room = int(limit) - num_prompt_tokens
    if room < 1:
        what = f"has {num_prompt_tokens} tokens, more than the {limit - 1} that leave room for an answer in {where}"
        raise ConfigurationError(f"prompt {number} {what}")
    if isinstance(request, CompletionRequest):
        return min(16, room) if request.max_tokens is None else request.max_tokens
    given = (request.max_completion_tokens, request.max_tokens, room)
    return next(length for length in given if length is not None)


def _prompts(request: CompletionRequest | ChatRequest) -> list[Any]:
    """Return the prompts: texts, token ids, or the messages of a chat."""
    if isinstance(request, ChatRequest):
        return [request.messages] if request.messages else []
    is_one = isinstance(request.prompt, str) or isinstance(next(iter(request.prompt), None), int)
    return [request.prompt] if is_one else list(request.prompt)


def _for_template(message: Message) -> dict[str, str]:
    _refuse_unknown(message)
    if message.role not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"messages: role {message.role[:40]!r} is not supported", "messages")
    parts = message.content if isinstance(message.content, list) else [Part(type="text", text=message.content or "")]
    if any(part.type != "text" or part.text is None for part in parts):
        raise ApiError(400, "messages: content that is no text is not supported", "messages")
    for part in parts:
        _refuse_unknown(part)
    content = "\n".join(str(part.text) for part in parts)
    read = {"role": message.role.replace("developer", "system"), "content": content}
    return read if message.name is None else read | {"name": message.name}


def _tokenize(request: CompletionRequest | ChatRequest, prompts: list[Any], engine: Engine) -> list[list[int]]:
    if isinstance(request, CompletionRequest):
        return [engine.prompt_ids(number, prompt) for number, prompt in enumerate(prompts)]
    if getattr(engine.tokenizer, "chat_template", None) is None:
        raise ApiError(400, "this model has no chat template: use /v1/completions", "messages")
    messages = [_for_template(message) for message in prompts[0]]
    engine.check_size(0, sum(len(message["content"]) for message in messages))
    try:
        ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template may raise what it likes, most of it by its own raise_exception
        raise ApiError(400, f"the chat template refused the messages: {error!s:.200}", "messages") from None
    return [list(ids)]


def _with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    """Return parameters for one of several sequences of a prompt: each has random numbers of its own."""
    if params.seed is None or choice == 0:
        return params
    return dataclasses.replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)
