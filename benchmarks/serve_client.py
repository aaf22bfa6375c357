"""Clients of `lockstep serve` for its benchmarks.

As a script it reads requests on stdin, each with the time to send it, and prints what came. It imports neither torch
nor Lockstep, so that it takes little from the server's cores.
"""

import asyncio
import json
import math
import random
import resource
import socket
import statistics
import sys
import time
from typing import NamedTuple

KEPT_EVENTS = 2**16


class Answer(NamedTuple):
    """What became of a request: `times_s` of its events, on the clock that all processes of a host share."""

    status: int | str
    text: str
    times_s: list[float]
    seconds: float
    tokens: list[str]

    @property
    def first_s(self):
        """Seconds from the request to its first text; None without any."""
        return self.times_s[1] - self.times_s[0] if len(self.times_s) > 1 else None


async def ask(port, prompt, max_tokens, *, at_s=None, stream=True, slow_s=0.0, hang_up_after=None, logprobs=None):
    """One request over a connection of its own, sent at `at_s` or now; `times_s` begins with that time."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    data = json.dumps(body | {"logprobs": logprobs}).encode()
    if at_s is not None:
        await asyncio.sleep(at_s - time.monotonic())
    times = [at_s or time.monotonic()]
    connection = socket.socket()
    if slow_s:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=KEPT_EVENTS)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    status, texts, tokens = 0, [], []
    try:
        async for line in reader:
            status = status or int(line.split()[1])
            line = line.removeprefix(b"data: ")
            if not line.startswith(b'{"'):
                continue
            times.append(time.monotonic())
            document = json.loads(line)
            if "error" in document:
                status, texts = document["error"].get("code") or status, []
                break
            for choice in document["choices"]:
                texts.append(choice["text"])
                tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
            if hang_up_after is not None and len(times) > hang_up_after + 1:
                status, texts = "left", []
                break
            if slow_s:
                await asyncio.sleep(slow_s)
    finally:
        writer.transport.abort()
    return Answer(status, "".join(texts), times, time.monotonic() - times[0], tokens)


def prompts_of(count, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(256) for _ in range(generator.choice((3, 8, 20, 60)))] for _ in range(count)]


def quantiles(values):
    """The p50 and p99 of some seconds; None without any."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {"p50": round(statistics.median(ordered), 4), "p99": round(ordered[math.ceil(0.99 * len(ordered)) - 1], 4)}


def allow_files():
    """Let this process open as many connections as the system allows, up to 4096."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))


async def ask_all(port, requests, max_tokens):
    """Send `[prompt, at_s]` requests, each at its time."""
    return await asyncio.gather(*(ask(port, prompt, max_tokens, at_s=at_s) for prompt, at_s in requests))


if __name__ == "__main__":
    allow_files()
    print(json.dumps(asyncio.run(ask_all(**json.load(sys.stdin)))))
