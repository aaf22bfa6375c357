"""`lockstep serve` as its clients see it: a server over three uneven ranks, the real `openai` package, and raw sockets.

A start takes seconds: one server answers most tests, and the last of them end it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest

pytest.importorskip("transformers")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

from lockstep.models.tiny import byte_tokenizer, make_tiny

openai = pytest.importorskip("openai")

KEY = "a-key"
RANKS = 3
MAX_QUEUE = 300
SLOW = 60.0


class Server:
    """The command in a process of its own; what it says is collected."""

    def __init__(self, model, *arguments, ranks=RANKS):
        command = [sys.executable, "-m", "lockstep", "serve", "--model", model, "--served-model-name", "tiny"]
        command += ["--data-parallel-size", str(ranks), "--port", "0", *arguments]
        environment = os.environ | {"LOCKSTEP_API_KEY": KEY}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._ready.wait(240) and self.process.poll() is None, "".join(self.lines)
        self.url = re.search(r"ready: (http://\S+)/v1", "".join(self.lines))[1]
        self.port = int(self.url.rpartition(":")[2])
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=SLOW)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if "ready: http" in line:
                self._ready.set()
        self._ready.set()

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
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in processes if "lockstep.runner.worker" in " ".join(process.cmdline())]

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
    made = Server(tiny, "--max-queue", str(MAX_QUEUE), "--read-timeout", "2", "--log-requests", "sizes")
    yield made
    made.process.kill()


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def alone(tiny):
    """The text that one process generates for a prompt, by Transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    tokenizer = byte_tokenizer()

    def generate(prompt, count):
        ids = torch.tensor([tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return generate


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
