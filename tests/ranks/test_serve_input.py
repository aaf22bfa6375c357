"""What `lockstep serve` refuses: bad requests, wrong keys, and connections that take too much or too long."""

import contextlib
import json
import os
import socket
import time

import pytest
from hypothesis import given as hypothesis_given
from serving import CHAT, ENDLESS, KEY, SLOW, Server, endless, head, wait_for

from lockstep.models.tiny import make_tiny

RANKS = 2
MAX_NUM_SEQS = 16
MAX_QUEUE = 128
MAX_CONNECTIONS = 200
CHATS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("serve") / "tiny", num_layers=2, num_experts=12))


@pytest.fixture(scope="module")
def server(tiny):
    made = Server(
        tiny,
        *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-queue", str(MAX_QUEUE)),
        *(
            "--read-timeout",
            "2",
            "--max-connections",
            str(MAX_CONNECTIONS),
        ),
        ranks=RANKS,
    )
    yield made
    made.process.kill()


BAD = [
    (400, b"{", None),
    (400, b"", None),
    (400, b'{"prompt": "\xff\xfe"}', None),
    (400, b'{"prompt": "\\ud800"}', None),
    (400, b"[" * 100_000, None),
    (422, b"[]", None),
    (422, {}, "prompt"),
    (422, {"prompt": 5}, "prompt"),
    (422, {"prompt": [[1], "a"]}, "prompt"),
    (400, {"prompt": []}, "prompt"),
    (400, {"prompt": [[]]}, "prompt"),
    (400, {"prompt": [-1]}, "prompt"),
    (400, {"prompt": [10**30]}, "prompt"),
    (422, {"prompt": ["a"] * 129}, "prompt"),
    (400, b'{"prompt":[' + b"[]," * 2_000_000 + b"[1]]}", None),
    (422, {"prompt": "a", "stop": [1] * 1_000_000}, "stop"),
    (400, {"prompt": ["a"] * 3, "n": 60}, "n"),
    (404, {"prompt": "a", "model": "another"}, "model"),
    (422, {"prompt": "a", "max_tokens": "3"}, "max_tokens"),
    (400, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (400, {"prompt": "a", "max_tokens": -5}, "max_tokens"),
    (400, {"prompt": "a", "max_tokens": 10**40}, "max_tokens"),
    (400, {"prompt": "a", "n": 0}, "n"),
    (400, {"prompt": "a", "n": 10**9}, "n"),
    (400, {"prompt": "a", "temperature": -1}, "temperature"),
    (400, b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (400, b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (400, {"prompt": "a", "top_p": 0}, "top_p"),
    (400, {"prompt": "a", "seed": 2**64}, "seed"),
    (400, {"prompt": "a", "stop": ["x"] * 65}, "stop"),
    (400, {"prompt": "a", "n": 128, "stop": ["x" * 1_000_000] * 8}, "stop"),
    (400, {"prompt": "a", "stop": ""}, "stop"),
    (400, {"prompt": "a", "logprobs": 6}, "logprobs"),
    (400, {"prompt": "a", "logprobs": -1}, "logprobs"),
    (400, {"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids"),
    (400, {"prompt": "a" * 8_000_000}, "prompt"),
    (400, {"prompt": "a", "echo": True}, "echo"),
    (400, {"prompt": "a", "echo": 0}, "echo"),
    (400, {"prompt": "a", "best_of": 3}, "best_of"),
    (400, {"prompt": "a", "no_such_field": 1}, "no_such_field"),
    (400, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (400, {"messages": []}, "messages"),
    (400, {"messages": [{"role": "user", "content": "a" * 8_000_000}]}, "messages"),
    (400, {"messages": [{"role": "user", "content": "a" * 40_000}]}, "messages"),
    (400, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "foo": 3}]}]}, "foo"),
    (422, {"messages": "a"}, "messages"),
    (422, {"messages": [{"content": "a"}]}, "messages"),
    (400, {"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    (400, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    (400, CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (400, CHAT | {"tool_choice": "auto"}, "tool_choice"),
    (400, CHAT | {"functions": [{"name": "f"}]}, "functions"),
    (400, CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
    (400, CHAT | {"top_logprobs": 2}, "top_logprobs"),
    (400, CHAT | {"max_tokens": 10**6}, "max_tokens"),
]


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize(("status", "body", "param"), BAD, ids=[str(case[1])[:60] for case in BAD])
def test_bad_input_is_refused_in_openais_form(server, status, body, param):
    is_chat = isinstance(body, dict) and "messages" in body
    got, document, _ = server.post(body, "/v1/chat/completions" if is_chat else "/v1/completions")
    error = document["error"]
    assert (got, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error" and error["message"] and "Traceback" not in error["message"]
    assert ".str" not in error["message"] and "list[" not in error["message"]  # types of our own code


@pytest.mark.ranks(RANKS)
def test_fields_that_ask_for_nothing_are_taken(server):
    nothing = {
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "logit_bias": {},
    }
    assert server.post(CHAT | nothing | {"max_tokens": 1, "stop": None, "parallel_tool_calls": True}, CHATS)[0] == 200
    nothing = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None, "stream_options": None}
    assert server.post(nothing | {"prompt": "a", "max_tokens": 1})[0] == 200


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"])
def test_a_wrong_key_is_401(server, header):
    status, document, headers = server.post({"prompt": "a"}, Authorization=header)
    assert (status, document["error"]["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")


@pytest.mark.ranks(RANKS)
def test_a_large_body_is_413_whether_it_says_its_length_or_not(server):
    large = b'{"prompt": "' + b"a" * (9 * 2**20) + b'"}'
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head(f"Content-Length: {len(large)}"))
    assert b" 413 " in connection.recv(4096)
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head("Transfer-Encoding: chunked"))
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(large), 2**16):
            part = large[start : start + 2**16]
            connection.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
    assert b" 413 " in connection.recv(4096)


@pytest.mark.ranks(RANKS)
def test_slow_and_endless_heads_and_bodies_end(server):
    slow, endless, body = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(3))
    body.sendall(head("Content-Length: 10") + b"{")
    with contextlib.suppress(ConnectionError):
        endless.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 2**17)
    assert b" 431 " in endless.recv(4096)
    slow.settimeout(30)
    for _ in range(3):
        slow.sendall(b"G")
        time.sleep(0.01)
    began = time.monotonic()
    assert b" 4" in slow.recv(4096)  # 408, or 400 for a method that is none
    assert time.monotonic() - began < 20
    body.settimeout(30)
    assert b" 408 " in body.recv(4096)
    assert server.get("/health")[0] == 200


def connected(server, *sent):
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(30)
    for part in sent:
        connection.sendall(part)
    return connection


def all_of(connection):
    """What comes until the server closes."""
    parts = []
    while part := connection.recv(2**16):
        parts.append(part)
    return b"".join(parts)


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_a_client_that_sends_more_before_its_answer_and_goes_away_frees_its_rows(server, stream, together):
    tokens = server.figure("vllm:generation_tokens_total")
    with endless(server, stream=stream, behind=HEALTH if together else b"") as connection:
        wait_for(lambda: server.figure("vllm:generation_tokens_total") > tokens + 3)
        connection.sendall(HEALTH[:-1])
        wait_for(lambda: server.figure("vllm:num_requests_running") == 1)
    wait_for(lambda: server.figure("vllm:num_requests_running") == 0)
    assert server.figure("vllm:generation_tokens_total") - tokens < ENDLESS
    assert not any("socket.send()" in line for line in server.lines)


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("more", [HEALTH, HEALTH[:9], b"\r\n"])
def test_what_comes_before_the_answer_does_not_cut_it_and_is_not_answered(server, more):
    """The stream takes longer than a head may."""
    body = json.dumps({"prompt": "abc", "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
    tokens = server.figure("vllm:generation_tokens_total")
    with connected(server, head(f"Content-Length: {len(body)}") + body) as connection:
        wait_for(lambda: server.figure("vllm:generation_tokens_total") > tokens)
        connection.sendall(more)
        answer = all_of(connection)
    assert answer.count(b"HTTP/1.1") == 1 and answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert server.figure("vllm:generation_tokens_total") - tokens == 1000


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize(
    "sent",
    [
        b"1\r\n{\r\n0\r\n" + b"a: b\r\n" * 100_000,
        b"1\r\n{\r\n0\r\na: " + b"b" * 2**19,
        b"1;" + b"a" * 2**19,
    ],
)
def test_what_surrounds_a_chunked_body_has_a_limit(server, sent):
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head("Transfer-Encoding: chunked") + sent)
        assert b" 431 " in all_of(connection)


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("lines", [b"a: b\r\n" * 20_000, b"a: " + b"b" * 70_000 + b"\r\n"])
def test_a_large_head_is_431_also_if_it_comes_at_once(server, lines):
    refused = server.figure("lockstep_http_errors_total")
    with connected(server, HEALTH[:-2] + lines + b"\r\n") as connection:
        assert b" 431 " in connection.recv(4096)
    assert server.figure("lockstep_http_errors_total") == refused + 1


@pytest.mark.ranks(RANKS)
def test_a_path_with_a_slash_more_is_404(server):
    assert server.post({"prompt": "a"}, "/v1/completions/")[0] == 404


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (HEALTH, b"\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", b"a"),
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"a"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n0\r\na: b"),
    ],
)
def test_an_answered_client_that_sends_a_little_does_not_keep_its_connection(server, sent, more):
    with connected(server, sent) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 ")
        connection.sendall(more)
        all_of(connection)  # it ends


@pytest.mark.ranks(RANKS)
def test_an_offer_of_another_protocol_is_ignored(server):
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
    body = b'{"prompt": "a", "max_tokens": 2}'
    with connected(server, head(*offer, f"Content-Length: {len(body)}"), body) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.ranks(RANKS)
def test_too_many_connections_are_refused_and_idle_ones_end(server):
    with contextlib.ExitStack() as stack:

        def connect():
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.settimeout(30)
            return connection

        assert b" 408 " in connect().recv(4096)
        answer = b" 200 "
        for _ in range(MAX_CONNECTIONS + 1):  # answered ones stay open for longer than the test takes
            assert b" 200 " in answer
            connection = connect()
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = connection.recv(4096)
            if b"too_many_connections" in answer:
                break
        assert b" 503 " in answer and b"too_many_connections" in answer
    wait_for(lambda: server.get("/health")[0] == 200)


@pytest.mark.ranks(RANKS)
def test_a_body_that_breaks_off_into_nonsense_is_400(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(30)
        connection.sendall(head("Transfer-Encoding: chunked") + b"no length\r\n\r\n")
        answer = connection.recv(4096)
    assert b" 400 " in answer and b'"invalid_request_error"' in answer


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("nonsense", [b"\x00" * 9, b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\x16\x03\x01"])
def test_what_is_no_http_is_refused(server, nonsense):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(30)
        connection.sendall(nonsense)
        answer = connection.recv(4096)
    assert b" 400 " in answer and b'"invalid_request_error"' in answer


@pytest.mark.ranks(RANKS)
def test_a_full_queue_is_429_and_says_when_to_come_again(server):
    """Endless sequences run in every slot that a rank has, and as many as may wait for a slot do."""
    with contextlib.ExitStack() as stack:
        for count, state in ((RANKS * MAX_NUM_SEQS, "running"), (MAX_QUEUE, "waiting")):
            stack.enter_context(endless(server, n=count))
            wait_for(lambda count=count, state=state: server.figure(f"vllm:num_requests_{state}") == count)
        status, document, headers = server.post({"prompt": "a"})
        assert (status, document["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(headers["Retry-After"]) <= 60
    wait_for(lambda: server.figure("vllm:num_requests_running") == server.figure("vllm:num_requests_waiting") == 0)
    assert server.post({"prompt": "a", "max_tokens": 1})[0] == 200


def openapi():
    """The two POST paths, with the schemas that their bodies are read by."""
    from pydantic.json_schema import models_json_schema

    from lockstep.serve.schema import ChatRequest, CompletionRequest

    kinds = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
    reference = "#/components/schemas/{model}"
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds.values()], ref_template=reference)
    text, answer = {"type": "string"}, {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    fields = {
        "message": text,
        "type": text,
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"required": [*fields], "properties": fields}},
    }
    responses = {
        "200": {"description": "an answer", "content": answer},
        "default": {"description": "an error", "content": {"application/json": {"schema": error}}},
    }
    paths = {}
    for path, kind in kinds.items():
        content = {"application/json": {"schema": {"$ref": reference.format(model=kind.__name__)}}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": responses}}
    info = {"title": "lockstep serve", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas["$defs"]}}


@pytest.mark.ranks(RANKS)
def test_schemathesis_finds_no_500(server):
    """Bodies of every kind that fits the schemas, and of many that do not: answered, or refused in OpenAI's form."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, settings

    examples, statuses = int(os.environ.get("LOCKSTEP_SCHEMATHESIS", "40")), set()
    loaded = schemathesis.openapi.from_dict(openapi())
    for operation in loaded.get_all_operations():
        for mode in schemathesis.GenerationMode:

            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
            @hypothesis_given(operation.ok().as_strategy(generation_mode=mode))
            def check(case):
                if isinstance(case.body, dict):
                    case.body["max_tokens"] = (
                        min(case.body.get("max_tokens") or 3, 3)
                        if isinstance(case.body.get("max_tokens") or 3, int)
                        else case.body["max_tokens"]
                    )
                    if mode is schemathesis.GenerationMode.POSITIVE:  # noqa: B023 (called in this turn)
                        # What fits the schemas is mostly served then.
                        served = ("prompt", "messages", "seed", "stop", "ignore_eos")
                        case.body = {name: case.body[name] for name in served if name in case.body} | {"max_tokens": 3}
                        if isinstance(case.body.get("prompt"), str):
                            case.body["prompt"] = "a" + case.body["prompt"]
                answer = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=SLOW)
                statuses.add(answer.status_code)
                case.validate_response(
                    answer,
                    checks=[schemathesis.checks.not_a_server_error, schemathesis.checks.response_schema_conformance],
                )

            check()
    assert 200 in statuses and 400 in statuses and max(statuses) < 500
    assert server.get("/health")[0] == 200
