"""`lockstep serve` as its clients see it: a server over three uneven ranks, the real `openai` package, and raw sockets.

A start takes seconds: one server answers most tests, and the last of them end it.
"""

import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from hypothesis import given as hypothesis_given
from one_process import one_process

pytest.importorskip("transformers")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

from lockstep.models.tiny import byte_tokenizer, make_tiny

openai = pytest.importorskip("openai")

KEY = "a-key"
RANKS = 3
MAX_NUM_SEQS = 16
MAX_QUEUE = 128
MAX_CONNECTIONS = 200
ENDLESS = 30_000  # tokens: minutes of work, and within the model's context
SLOW = 60.0


class Server:
    """The command in a process of its own; what it says is collected."""

    def __init__(self, model, *arguments, ranks=RANKS):
        command = [sys.executable, "-m", "lockstep", "serve", "--model", model, "--served-model-name", "tiny"]
        command += ["--data-parallel-size", str(ranks), "--port", "0", *arguments]
        environment = os.environ | {"LOCKSTEP_API_KEY": KEY}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        self.is_ready = threading.Event()
        threading.Thread(target=self.read_lines, daemon=True).start()
        assert self.is_ready.wait(240)
        found = re.search(r"ready: (http://\S+)/v1", "".join(self.lines))
        assert found, "".join(self.lines)
        self.url = found[1]
        self.port = int(self.url.rpartition(":")[2])
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=SLOW)

    def read_lines(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if "ready: http" in line:
                self.is_ready.set()
        self.is_ready.set()

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=SLOW) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, body, path="/v1/completions", **headers):
        """Status, document and headers of a request with any body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SLOW) as answer:
                return answer.status, json.loads(answer.read()), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), error.headers

    def figure(self, name):
        """The sum of a figure of `/metrics` over its labels."""
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return sum(map(float, found))

    def ranks(self):
        return [psutil.Process(rank["pid"]) for rank in json.loads(self.get("/health")[1])["ranks"]]

    def end(self, number=signal.SIGTERM, seconds=SLOW):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.process.wait(seconds)


def wait_for(condition, seconds=SLOW):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("serve") / "tiny", num_layers=2, num_experts=12))


@pytest.fixture(scope="module")
def server(tiny):
    made = Server(
        tiny,
        *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-queue", str(MAX_QUEUE)),
        *("--read-timeout", "2", "--max-connections", str(MAX_CONNECTIONS), "--log-requests", "sizes"),
    )
    yield made
    made.process.kill()


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def alone(tiny):
    """The text that one process generates for a prompt."""
    generate, tokenizer = one_process(tiny), byte_tokenizer()
    return lambda prompt, count: tokenizer.decode(generate(prompt, count), skip_special_tokens=True)


GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.mark.ranks(RANKS)
def test_a_completion_is_that_of_one_process(client, alone):
    answer = client.completions.create(prompt="once upon", max_tokens=12, **GREEDY)
    assert answer.choices[0].text == alone("once upon", 12)
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == ("length", "text_completion", "tiny")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 12, 21)


@pytest.mark.ranks(RANKS)
def test_a_stream_has_the_same_text_and_its_usage_at_the_end(client, alone):
    options = {"include_usage": True}
    events = list(
        client.completions.create(prompt="hello", max_tokens=20, stream=True, stream_options=options, **GREEDY)
    )
    text = "".join(choice.text for event in events for choice in event.choices)
    assert text == alone("hello", 20)
    assert [event.usage for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 20
    assert events[-2].choices[0].finish_reason == "length" and len({event.id for event in events}) == 1


@pytest.mark.ranks(RANKS)
def test_a_chat_goes_through_the_chat_template(client, alone):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    expected = alone("system: Be brief.\nuser: Hi\nassistant:", 16)
    answer = client.chat.completions.create(messages=messages, max_completion_tokens=16, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert (answer.choices[0].message.role, answer.object) == ("assistant", "chat.completion")
    events = list(client.chat.completions.create(messages=messages, max_tokens=16, stream=True, **GREEDY))
    assert "".join(event.choices[0].delta.content for event in events) == expected
    first, *others = (event.choices[0].delta.role for event in events)
    assert first == "assistant" and set(others) <= {None}  # the tokens of several steps may be one event


@pytest.mark.ranks(RANKS)
def test_forty_requests_at_once_are_those_of_one_process(server, client, alone):
    """Prompts and outputs of very uneven lengths, over ranks of which some idle at times."""
    prompts = [[(7 * index + 3 * place) % 256 for place in range(1 + (13 * index) % 90)] for index in range(40)]
    counts = [1 + (11 * index) % 30 for index in range(40)]

    def ask(index):
        if index % 2:
            events = client.completions.create(prompt=prompts[index], max_tokens=counts[index], stream=True, **GREEDY)
            return "".join(event.choices[0].text for event in events)
        return client.completions.create(prompt=prompts[index], max_tokens=counts[index], **GREEDY).choices[0].text

    before = server.figure("vllm:generation_tokens_total")
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        texts = list(pool.map(ask, range(40)))
    assert texts == [alone(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert server.figure("vllm:generation_tokens_total") - before == sum(counts)
    assert server.figure("vllm:num_requests_running") == server.figure("vllm:num_requests_waiting") == 0


@pytest.mark.ranks(RANKS)
def test_several_prompts_and_choices_in_one_request(client, alone):
    answer = client.completions.create(prompt=["ab", "xyz"], n=2, max_tokens=6, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone("ab", 6)] * 2 + [alone("xyz", 6)] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 24)


@pytest.mark.ranks(RANKS)
def test_a_seed_repeats_and_each_choice_has_random_numbers_of_its_own(client):
    def ask(seed):
        options = {"seed": seed, "n": 3, "max_tokens": 12, "temperature": 1.0}
        return [c.text for c in client.completions.create(model="tiny", prompt="abc", **options).choices]

    assert ask(5) == ask(5) != ask(6)
    assert len(set(ask(5))) == 3


@pytest.mark.ranks(RANKS)
def test_a_stop_string_ends_the_text_before_it(client, alone):
    full = alone("stop here", 30)
    stop = full[10:12]
    cut = full[: full.index(stop)]
    answer = client.completions.create(prompt="stop here", max_tokens=30, stop=[stop], **GREEDY).choices[0]
    assert (answer.text, answer.finish_reason) == (cut, "stop")
    events = client.completions.create(prompt="stop here", max_tokens=30, stop=stop, stream=True, **GREEDY)
    assert "".join(event.choices[0].text for event in events) == cut


@pytest.mark.ranks(RANKS)
def test_logprobs_of_both_kinds(client):
    answer = client.completions.create(prompt="abc", max_tokens=4, logprobs=3, **GREEDY).choices[0].logprobs
    assert len(answer.tokens) == len(answer.token_logprobs) == len(answer.text_offset) == 4
    assert all(
        len(top) == 3 and value == max(top.values())
        for value, top in zip(answer.token_logprobs, answer.top_logprobs, strict=True)
    )
    messages = [{"role": "user", "content": "abc"}]
    chat = client.chat.completions.create(messages=messages, max_tokens=4, logprobs=True, top_logprobs=5, **GREEDY)
    content = chat.choices[0].logprobs.content
    assert len(content) == 4 and all(len(token.top_logprobs) == 5 for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in content)
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text == chat.choices[0].message.content
    events = client.chat.completions.create(
        messages=messages, max_tokens=4, logprobs=True, top_logprobs=5, stream=True, **GREEDY
    )
    streamed = [token for event in events for token in (event.choices[0].logprobs.content)]
    assert [token.logprob for token in streamed] == [token.logprob for token in content]


@pytest.mark.ranks(RANKS)
def test_ignore_eos_min_tokens_and_the_room_that_is_left(client, server):
    """With every byte as likely a stop as not, `min_tokens` decides when it ends."""
    extra = {"stop_token_ids": list(range(256)), "min_tokens": 7}
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=30, extra_body=extra)
    assert answer.usage.completion_tokens == 7 or answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens >= 7
    status, document, _ = server.post({"prompt": [1] * 40000, "max_tokens": 1})
    assert (status, document["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.ranks(RANKS)
def test_usage_in_every_event_where_it_is_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = list(client.completions.create(prompt="abc", max_tokens=9, stream=True, stream_options=options, **GREEDY))
    counts = [event.usage.completion_tokens for event in events]
    assert counts == sorted(counts) and counts[-1] == 9 and all(event.usage.prompt_tokens == 3 for event in events)


@pytest.mark.ranks(RANKS)
def test_the_models_and_what_is_not_served(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert server.post({"prompt": "a"}, "/v1/embeddings")[0] == 404
    assert server.post({"prompt": "a"}, "/health")[0] == 405


CHAT = {"messages": [{"role": "user", "content": "a"}]}
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
    (400, {"prompt": "a", "stop": ""}, "stop"),
    (400, {"prompt": "a", "logprobs": 6}, "logprobs"),
    (400, {"prompt": "a", "logprobs": -1}, "logprobs"),
    (400, {"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids"),
    (400, {"prompt": "a", "echo": True}, "echo"),
    (400, {"prompt": "a", "best_of": 3}, "best_of"),
    (400, {"prompt": "a", "no_such_field": 1}, "no_such_field"),
    (400, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (400, {"messages": []}, "messages"),
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


CHATS = "/v1/chat/completions"


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


def head(*lines):
    return "\r\n".join(
        ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *lines, "", ""]
    ).encode()


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


def endless(server, **fields):
    """A connection with a request that ends when it is closed."""
    body = {"prompt": "abc", "max_tokens": ENDLESS, "ignore_eos": True, **fields}
    connection = socket.create_connection(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    connection.sendall(head(f"Content-Length: {len(data)}") + data)
    return connection


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, stream):
    overrun, tokens = server.figure("lockstep_overrun_rows_total"), server.figure("vllm:generation_tokens_total")
    with endless(server, stream=stream):
        wait_for(lambda: server.figure("vllm:generation_tokens_total") > tokens + 3)
    wait_for(lambda: server.figure("vllm:num_requests_running") == 0)
    wait_for(lambda: server.figure("lockstep_step_rows") == 0)
    assert server.figure("vllm:generation_tokens_total") - tokens < ENDLESS
    assert server.figure("lockstep_overrun_rows_total") - overrun <= 3


@pytest.mark.ranks(RANKS)
def test_health_and_figures(server):
    assert server.post({"prompt": "a", "max_tokens": 2})[0] == 200
    status, text = server.get("/health")
    health = json.loads(text)
    assert (status, health["status"]) == (200, "ready")
    assert [(rank["rank"], rank["state"]) for rank in health["ranks"]] == [(rank, "alive") for rank in range(RANKS)]
    assert server.figure("lockstep_up") == 1 and server.figure("lockstep_steps_total") > 0
    assert 0 <= server.figure("lockstep_idle_share") < 1
    assert server.figure("vllm:time_to_first_token_seconds_count") > 0


@pytest.mark.ranks(RANKS)
def test_the_lines_of_the_readme_work(server, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "OpenAI(" in block]
    (command,) = re.findall(r"^curl -N localhost:8000.*$", readme, re.MULTILINE)
    here = code.replace("localhost:8000", f"127.0.0.1:{server.port}").replace('"none"', repr(KEY))
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(here, {})
    assert shown.getvalue().strip()
    if shutil.which("curl"):
        command = (
            command.replace("localhost:8000", f"127.0.0.1:{server.port}") + f" -s -H 'Authorization: Bearer {KEY}'"
        )
        answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=SLOW, check=True).stdout
        assert answer.startswith('data: {"id":"chatcmpl-') and answer.endswith("data: [DONE]\n\n")


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


@pytest.mark.ranks(RANKS)
def test_prompts_are_not_in_the_log(server, client):
    client.completions.create(model="tiny", prompt="a secret phrase", max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a secret phrase", max_tokens=10**6)
    wait_for(lambda: any("15 prompt tokens" in line for line in server.lines))
    log = "".join(server.lines)
    assert "secret" not in log and "97, 32" not in log and "Traceback" not in log


@pytest.mark.ranks(RANKS)
def test_a_dead_rank_costs_no_request_and_dead_ranks_keep_what_waits(server, client, alone):
    """The others go on. With the last of them health tells of it at once, and a request that comes then is answered."""
    victims = server.ranks()
    stream = client.completions.create(prompt="abc", max_tokens=300, stream=True, **GREEDY)
    events = [next(stream)]
    victims[1].kill()
    events += list(stream)
    assert "".join(event.choices[0].text for event in events) == alone("abc", 300)
    wait_for(lambda: server.get("/health")[0] == 200)  # where the stream ended before the loss was noticed
    health = json.loads(server.get("/health")[1])
    assert (health["status"], health["restarts"], health["ranks"][1]["state"]) == ("degraded", 0, "gone")
    assert health["why"] == "rank 1 is lost, the others go on"
    stream = client.completions.create(prompt="abc", max_tokens=ENDLESS, stream=True, **GREEDY)
    next(stream)
    for rank in (0, 2):
        victims[rank].kill()
    wait_for(lambda: server.get("/health")[0] == 503)
    health = json.loads(server.get("/health")[1])
    assert health["status"] == "down" and health["why"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: client.completions.create(prompt="later", max_tokens=5, **GREEDY))
        with pytest.raises(openai.APIError, match="lost with the ranks that ran it"):
            list(stream)
        assert waiting.result(200).choices[0].text == alone("later", 5)
    health = json.loads(server.get("/health")[1])
    assert (health["status"], health["restarts"]) == ("ready", 1)
    assert not {rank.pid for rank in victims} & {rank.pid for rank in server.ranks()} and len(server.ranks()) == RANKS


@pytest.mark.ranks(RANKS)
def test_a_stopped_rank_is_told_of_before_its_deadline(server):
    victim = server.ranks()[2]
    victim.suspend()
    try:
        wait_for(lambda: server.get("/health")[0] == 503, seconds=20)
        assert "rank 2 is stopped" in json.loads(server.get("/health")[1])["why"]
    finally:
        victim.resume()
    wait_for(lambda: server.get("/health")[0] == 200)


@pytest.mark.ranks(RANKS)
def test_sigterm_ends_what_runs_and_takes_nothing_new(server, client, alone):
    """The last test that uses the server: an endless request keeps it draining until all has been looked at."""
    holding = endless(server)
    stream = client.completions.create(prompt="abc", max_tokens=300, stream=True, **GREEDY)
    events = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.get("/health")[0] == 503)
    with pytest.raises(openai.InternalServerError, match="draining"):
        client.completions.create(prompt="abc", max_tokens=3, **GREEDY)
    events += list(stream)
    assert "".join(event.choices[0].text for event in events) == alone("abc", 300)
    holding.close()
    assert server.process.wait(SLOW) == 0
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(tiny, number, status):
    server = Server(tiny, "--drain-s", "1000", ranks=1)
    ranks = server.ranks()
    stream = server.client.completions.create(prompt="abc", max_tokens=ENDLESS, stream=True, **GREEDY)
    next(stream)
    server.process.send_signal(number)
    wait_for(lambda: server.get("/health")[0] == 503)
    assert server.end(number) == status
    wait_for(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks))


@pytest.fixture(scope="module")
def shared(tiny):
    """A server whose HTTP is answered by two processes beside the launcher."""
    made = Server(tiny, "--api-processes", "2", "--max-num-seqs", "4", "--max-queue", "6", ranks=2)
    yield made
    made.process.kill()


def api_processes(server):
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "lockstep.serve.api_process" in child.cmdline()]


@pytest.mark.ranks(2)
def test_api_processes_answer_as_one_process_does(shared, alone):
    """Of thirty connections, none of which is used twice, either process has some."""

    def ask(number):
        body = {"prompt": [[number], [number, 2]], "max_tokens": 3 + number, "temperature": 0, "ignore_eos": True}
        status, document, _ = shared.post(body | {"n": 2, "logprobs": 1}, Connection="close")
        return status, [choice["text"] for choice in document["choices"]], document["usage"]["total_tokens"]

    for number in range(30):
        count = 3 + number
        texts = [alone([number], count)] * 2 + [alone([number, 2], count)] * 2
        assert ask(number) == (200, texts, 3 + 4 * count)
    assert len(api_processes(shared)) == 2
    assert shared.figure("vllm:generation_tokens_total") == sum(4 * (3 + number) for number in range(30))
    events = shared.client.chat.completions.create(**CHAT, max_tokens=9, stream=True, **GREEDY)
    assert "".join(event.choices[0].delta.content for event in events) == alone("user: a\nassistant:", 9)


@pytest.mark.ranks(2)
def test_limits_and_errors_hold_in_every_api_process(shared):
    before = shared.figure("lockstep_http_errors_total")
    for _ in range(6):
        assert shared.post({"prompt": "a"}, Authorization="Bearer wrong", Connection="close")[0] == 401
        assert shared.post(b"{", Connection="close")[0] == 400
        assert shared.post({"prompt": "a", "max_tokens": 10**6}, Connection="close")[0] == 400
    assert shared.figure("lockstep_http_errors_total") - before == 18
    with contextlib.ExitStack() as stack:
        for state, count in (("running", 4), ("running", 8), ("waiting", 3), ("waiting", 6)):  # of both together
            stack.enter_context(endless(shared, n=4 if state == "running" else 3))
            wait_for(lambda count=count, state=state: shared.figure(f"vllm:num_requests_{state}") == count)
        for _ in range(6):
            status, document, headers = shared.post({"prompt": "a"}, Connection="close")
            assert (status, document["error"]["code"], int(headers["Retry-After"]) > 0) == (429, "queue_full", True)
    wait_for(lambda: shared.figure("vllm:num_requests_running") == shared.figure("vllm:num_requests_waiting") == 0)


@pytest.mark.ranks(2)
def test_requests_of_a_killed_api_process_are_freed_and_it_is_started_again(shared, alone):
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(endless(shared))
        wait_for(lambda: shared.figure("vllm:num_requests_running") == 6)
        victims = api_processes(shared)
        for victim in victims:
            victim.kill()
        wait_for(lambda: len(api_processes(shared)) == 2 and not set(victims) & set(api_processes(shared)))
        wait_for(lambda: shared.figure("vllm:num_requests_running") == 0)
    assert shared.client.completions.create(prompt="b", max_tokens=5, **GREEDY).choices[0].text == alone("b", 5)
    assert json.loads(shared.get("/health")[1])["status"] == "ready"


@pytest.mark.ranks(2)
def test_a_drain_waits_for_the_streams_of_api_processes(shared, alone):
    holding = endless(shared)
    stream = shared.client.completions.create(prompt="abc", max_tokens=100, stream=True, **GREEDY)
    events, processes = [next(stream)], api_processes(shared)
    os.kill(processes[0].pid, signal.SIGTERM)  # which is not for them
    shared.process.send_signal(signal.SIGTERM)
    wait_for(lambda: shared.get("/health")[0] == 503)
    with pytest.raises(openai.InternalServerError, match="draining"):
        shared.client.completions.create(prompt="abc", max_tokens=3, **GREEDY)
    events += list(stream)
    assert "".join(event.choices[0].text for event in events) == alone("abc", 100)
    holding.close()
    assert shared.process.wait(SLOW) == 0
    assert not any(process.is_running() for process in processes)
    assert "Traceback" not in "".join(shared.lines)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_benchmark_of_the_face_works(processes):
    script = Path(__file__).parents[2] / "benchmarks" / "bench_serve.py"
    command = [sys.executable, script, "--face", "--streams", "4", "--tokens-per-s", "200", "--seconds", "1"]
    command += ["--api-processes", str(processes)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(ended.stdout)
    assert found["right"] and found["server_us"] > 0 and (found["api_us"] > 0) == (processes > 1)


def test_what_cannot_be_served_is_said_in_a_sentence(command_line, tiny, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, error = command_line("serve", "--model", tiny, "--port", port)
        assert (status, error) == (
            2,
            f"lockstep: error: 127.0.0.1 port {port} cannot be used: Address already in use\n",
        )
    status, _, error = command_line("serve", "--model", str(tmp_path), "--port", 0)
    assert status == 2 and str(tmp_path) in error and "Traceback" not in error
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for arguments in (
        ["--api-key", ""],
        ["--api-key", "ä"],
        ["--api-key-file", str(tmp_path / "no")],
        ["--api-key-file", str(tmp_path / "binary")],
        ["--chat-template", str(tmp_path / "binary")],
        ["--port", "70000"],
    ):
        status, _, error = command_line("serve", "--model", tiny, *arguments)
        assert status == 2 and error.count("\n") == 1, error
    template = tmp_path / "template.jinja"
    for text, told in (("{% if %}", "line 1: Expected an expression"), ("a\n{{ 1 | of_nobody }}", "line 2: No filter")):
        template.write_text(text)
        status, _, error = command_line("serve", "--model", tiny, "--chat-template", template, "--port", 0)
        assert status == 2 and f"error: --chat-template is no Jinja: {told}" in error, error
    template.write_text("{{ messages[0].content }}")
    mute = shutil.copytree(tiny, tmp_path / "mute", ignore=shutil.ignore_patterns("*token*"))
    status, _, error = command_line("serve", "--model", mute, "--chat-template", template, "--port", 0)
    assert status == 2 and f"--chat-template needs a tokenizer, and the checkpoint {mute} has none" in error, error
    monkeypatch.setenv("RANK", "0")
    assert command_line("serve", "--model", tiny)[0] == 2
