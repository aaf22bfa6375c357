"""What a request may say: fields that change nothing, fields that are refused, and what errors name."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("starlette")

from lockstep.engine.sampling_params import Limits
from lockstep.models.tiny import byte_tokenizer
from lockstep.runner.engine import Engine
from lockstep.runner.options import EngineOptions
from lockstep.serve.errors import ApiError
from lockstep.serve.schema import ChatRequest, CompletionRequest, new_requests, parse
from lockstep.workload.kv_pages import PAGE_SIZE

CONTEXT = 64
CHAT = {"messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"prompt": "a"}


class TokenizingEngine(Engine):
    """An engine without ranks, which checks and tokenizes as any other."""

    def __init__(self, tokenizer=None, max_model_len=CONTEXT, kv_capacity_tokens=None):
        self.tokenizer = tokenizer or byte_tokenizer()
        self.options = EngineOptions("tiny")
        self.about = {"max_model_len": max_model_len, "kv_capacity_tokens": kv_capacity_tokens}
        self._limits = Limits(300, 300, **self.about)


def ask(body, engine=None):
    """The sequences of a body that has messages or a prompt."""
    kind = ChatRequest if "messages" in body else CompletionRequest
    return new_requests(parse(kind, json.dumps(body).encode()), engine or TokenizingEngine())


def refused(body, engine=None):
    with pytest.raises(ApiError) as caught:
        ask(body, engine)
    return caught.value


@pytest.mark.parametrize("body", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("foo", value) for value in (0, 0.0, False, "", "none", 1)),
        *(("tools", value) for value in (False, "", 0)),
        *(("echo", value) for value in (0, True, "")),
        *((name, False) for name in ("add_generation_prompt", "skip_special_tokens", "detokenize")),
        *((name, 0) for name in ("truncate_prompt_tokens", "thinking_token_budget", "prompt_logprobs")),
        *((name, True) for name in ("include_stop_str_in_output", "use_beam_search", "continue_final_message")),
        *(("web_search_options", {}), ("guided_json", {}), ("allowed_token_ids", [])),
        *(("reasoning_effort", "none"), ("length_penalty", 2.0), ("priority", False)),
    ],
)
def test_a_value_that_requests_something_is_refused_by_name(body, field, value):
    error = refused(body | {field: value})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")


def test_special_tokens_are_added_as_the_endpoint_does():
    assert refused(COMPLETION | {"add_special_tokens": False}).param == "add_special_tokens"
    assert refused(CHAT | {"add_special_tokens": True}).param == "add_special_tokens"
    assert ask(COMPLETION | {"add_special_tokens": True}) == ask(COMPLETION)
    assert ask(CHAT | {"add_special_tokens": False}) == ask(CHAT)


@pytest.mark.parametrize("body", [CHAT, COMPLETION], ids=["chat", "completion"])
def test_values_without_effect_are_taken(body):
    fields = {
        **dict.fromkeys(("foo", "tools", "prompt_logprobs", "reasoning_effort", "web_search_options")),
        "tools": [],
        "bar": {},
        "logit_bias": {},
        "tool_choice": "none",
        "function_call": "none",
        "response_format": {"type": "text"},
        "echo": False,
        "use_beam_search": False,
        "length_penalty": 1,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "priority": 0,
    }
    assert ask(body | fields) == ask(body)
    own = {"modalities": ["text"], "add_generation_prompt": True} if body is CHAT else {"suffix": "", "best_of": 1}
    assert ask(body | own) == ask(body)


def test_fields_of_messages_and_parts():
    def said(part, **fields):
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"} | part], **fields}]}

    assert ask(said({"foo": None}, refusal=None, tool_calls=[])) == ask(CHAT)
    assert refused(said({"foo": 3})).param == "foo"
    assert refused(said({"cache_control": {"type": "ephemeral"}})).param == "cache_control"
    assert refused(said({}, echo=False)).param == "echo"


def test_unions_say_what_they_take():
    error = refused({"prompt": [1, "a"]})
    assert (error.status, error.param) == (422, "prompt")
    assert error.message == "prompt must be a string, token ids, or a list of at most 128 strings or lists of token ids"
    assert refused(COMPLETION | {"stop": 5}).message == "stop must be a string or a list of strings"
    error = refused({"messages": [{"role": "user", "content": 5}]})
    assert (error.message, error.param) == ("messages.0.content must be a string or a list of parts", "messages")
    assert refused({"prompt": "a", "n": "1"}).message == "n: Input should be a valid integer"


def test_a_chat_is_refused_in_its_own_terms():
    long = {"messages": [{"role": "user", "content": "a" * 60}]}
    for given in ({}, {"max_tokens": 1}, {"max_completion_tokens": 1}):
        error = refused(long | given)
        expected = "the chat has 77 tokens, more than the 63 that leave room for an answer in the context"
        assert (error.message, error.param, error.code) == (expected, "messages", "context_length_exceeded")
    two_pages = [{"role": "user", "content": "a" * 2 * PAGE_SIZE}]
    error = refused({"messages": two_pages}, TokenizingEngine(None, 10 * PAGE_SIZE, 2 * PAGE_SIZE + 1))
    limit = 2 * PAGE_SIZE - 1
    assert error.message.endswith(f"tokens, more than the {limit} that leave room for an answer in a rank's KV cache")
    for name in ("max_tokens", "max_completion_tokens"):
        error = refused(CHAT | {name: 1000})
        expected = f"the chat has 18 tokens and {name} is 1000, together more than the context of 64"
        assert (error.message, error.param, error.code) == (expected, name, "context_length_exceeded")
        assert refused(CHAT | {name: 0}).param == name
    assert refused(CHAT | {"logprobs": True, "top_logprobs": 6}).param == "top_logprobs"
    assert refused(CHAT | {"response_format": {}}).message == "response_format: structured output is not supported"
    silent = byte_tokenizer()
    silent.chat_template = "{{ '' }}"
    error = refused(CHAT, TokenizingEngine(silent))
    assert (error.message, error.param) == ("the chat has no tokens", "messages")


def test_a_long_prompt_is_at_fault_and_not_a_length_that_nobody_gave():
    error = refused({"prompt": ["a", "a" * 64]})
    expected = "prompt 1 has 64 tokens, more than the 63 that leave room for an answer in the context"
    assert (error.message, error.param, error.code) == (expected, "prompt", "context_length_exceeded")
    assert [new.params.max_tokens for new in ask({"prompt": ["a", "a" * 63]})] == [16, 1]
    assert refused({"prompt": ""}).message == "prompt 0 has no tokens"
    assert refused({"prompt": "a", "max_tokens": 64}).param == "max_tokens"


class OfLongTokens:
    """A tokenizer of one long token, which is asked only for texts that might fit."""

    chat_template = "any"

    def get_vocab(self):
        return {"a": 0, "<|special|>": 1}

    def __call__(self, text):
        assert len(text) <= 11 * CONTEXT
        return {"input_ids": [0]}

    def apply_chat_template(self, messages, **_):
        assert sum(len(message["content"]) for message in messages) <= 11 * CONTEXT
        return [0]


def test_a_text_that_no_tokens_could_make_fit_is_refused_before_it_is_tokenized():
    engine = TokenizingEngine(OfLongTokens())
    limit = 11 * CONTEXT
    assert len(ask({"prompt": "a" * limit}, engine)) == 1
    error = refused({"prompt": ["a", "a" * (limit + 1)]}, engine)
    expected = "prompt 1 has 705 characters, more than the 704 that the context of 64 tokens could hold"
    assert (error.message, error.param, error.code) == (expected, "prompt", "context_length_exceeded")
    messages = [{"role": "user", "content": "a" * (limit // 2)}] * 2
    assert len(ask({"messages": messages}, engine)) == 1
    error = refused({"messages": [*messages, CHAT["messages"][0]]}, engine)
    expected = "the chat has 705 characters, more than the 704 that the context of 64 tokens could hold"
    assert (error.message, error.param, error.code) == (expected, "messages", "context_length_exceeded")
