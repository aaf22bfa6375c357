"""`lockstep serve` in a process of its own. A start takes seconds, so that most tests of a file share one."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest
from one_process import one_process

from lockstep.models.tiny import byte_tokenizer

for name in ("transformers", "starlette", "uvicorn", "httptools"):
    pytest.importorskip(name)
openai = pytest.importorskip("openai")

KEY = "a-key"
ENDLESS = 30_000  # tokens: minutes of work, and within the model's context
SLOW = 60.0
GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
CHAT = {"messages": [{"role": "user", "content": "a"}]}


def start(model, *arguments, ranks, environment=()):
    """Start the command in a process group of its own, as a terminal's shell does."""
    command = [sys.executable, "-m", "lockstep", "serve", "--model", model, "--served-model-name", "tiny"]
    command += ["--data-parallel-size", str(ranks), "--port", "0", *arguments]
    environment = os.environ | {"LOCKSTEP_API_KEY": KEY} | dict(environment)
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, process_group=0)


class Server:
    """The running command; what it says is collected."""

    def __init__(self, model, *arguments, ranks):
        self.process = start(model, *arguments, ranks=ranks)
        self.lines = []
        self.is_ready = threading.Event()
        self.reading = threading.Thread(target=self.read_lines, daemon=True)
        self.reading.start()
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

    def drained(self):
        """Wait for the end of a drain: how many sequences there were, and the line that tells what became of them."""
        assert self.wait() == 0
        (counts,) = re.findall(r"^draining: running (\d+), waiting (\d+); at most", "".join(self.lines), re.MULTILINE)
        (last,) = [line for line in self.lines if line.startswith("drained: ")]
        return sum(map(int, counts)), last.rstrip("\n")

    def ranks(self):
        return [psutil.Process(rank["pid"]) for rank in json.loads(self.get("/health")[1])["ranks"]]

    def end(self, number=signal.SIGTERM, seconds=SLOW):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds=SLOW):
        """The exit status, once all lines are there."""
        status = self.process.wait(seconds)
        self.reading.join(seconds)
        return status


def wait_for(condition, seconds=SLOW):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.02)


def head(*lines):
    return "\r\n".join(
        ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *lines, "", ""]
    ).encode()


def endless(server, *, behind=b"", **fields):
    """A connection with a request that ends when it is closed; `behind` comes with its last bytes."""
    body = {"prompt": "abc", "max_tokens": ENDLESS, "ignore_eos": True, **fields}
    connection = socket.create_connection(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    connection.sendall(head(f"Content-Length: {len(data)}") + data + behind)
    return connection


def texts_of_one_process(model):
    """Return a function: the text that one process generates for a prompt."""
    generate, tokenizer = one_process(model), byte_tokenizer()
    return lambda prompt, count: tokenizer.decode(generate(prompt, count), skip_special_tokens=True)
