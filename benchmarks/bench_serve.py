"""`lockstep serve` under load, beside the same requests through the engine; and what the HTTP face costs per token.

    python benchmarks/bench_serve.py                     # a crowd, slow readers, clients that hang up; memory
    python benchmarks/bench_serve.py --kill-minutes 10   # and ranks killed at random
    python benchmarks/bench_serve.py --face              # CPU per token of the launcher, over ranks that only count
    python benchmarks/bench_serve.py --throughput        # tokens/s beside Engine.generate, ranks on a core of their own

Every answer is compared with the engine's, byte by byte, before anything is timed. The last line is one JSON document.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pickle
import queue
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from pathlib import Path

import psutil

from lockstep import Engine, SamplingParams
from lockstep.models.tiny import make_tiny
from lockstep.runner.rank_processes import RankProcesses
from lockstep.workload import SchedulerState

RANKS = 3
NEW_TOKENS = 16
KEPT_EVENTS = 2**16


class Server:
    """The command in a process of its own."""

    def __init__(self, model, *arguments):
        command = [sys.executable, "-m", "lockstep", "serve", "--model", model, "--data-parallel-size", str(RANKS)]
        self.process = subprocess.Popen([*command, "--port", "0", *arguments], stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"ready: http://127.0.0.1:(\d+)/v1", line):
                break
        self.port = int(found[1])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.launcher = psutil.Process(self.process.pid)

    def memory_mib(self):
        return self.launcher.memory_info().rss / 2**20

    def ranks(self):
        ranks = []
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
            ranks = json.load(answer)["ranks"]
        return [rank["pid"] for rank in ranks if rank["state"] != "gone"]

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def ask(port, prompt, max_tokens, *, stream=True, slow_s=0.0, hang_up_after=None):
    """One request over a connection of its own: status, text, seconds to the first byte of text and to the end."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    data, began = json.dumps(body).encode(), time.perf_counter()
    connection = socket.socket()
    if slow_s:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=KEPT_EVENTS)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    status, first, events, texts = 0, None, 0, []
    try:
        async for line in reader:
            status = status or int(line.split()[1])
            line = line.removeprefix(b"data: ")
            if not line.startswith(b'{"'):
                continue
            document = json.loads(line)
            if "error" in document:
                return document["error"].get("code") or status, "", first, time.perf_counter() - began
            first = first or time.perf_counter() - began
            texts += [choice["text"] for choice in document["choices"]]
            events += 1
            if hang_up_after is not None and events > hang_up_after:
                return "left", "", first, time.perf_counter() - began
            if slow_s:
                await asyncio.sleep(slow_s)
    finally:
        writer.transport.abort()
    return status, "".join(texts), first, time.perf_counter() - began


def prompts_of(count, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(256) for _ in range(generator.choice((3, 8, 20, 60)))] for _ in range(count)]


def check(answers, expected, what):
    lost = [index for index, answer in enumerate(answers) if answer[0] != 200]
    mixed = [i for i, answer in enumerate(answers) if answer[0] == 200 and answer[1] != expected[i]]
    print(f"{what}: {len(answers)} requests, {len(lost)} lost, {len(mixed)} with another text", file=sys.stderr)
    return {"requests": len(answers), "lost": len(lost), "mixed_up": len(mixed)}


def quantiles(values):
    ordered = sorted(values)
    return {"p50": round(statistics.median(ordered), 4), "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 4)}


def through_the_engine(model, prompts):
    """What the same ranks do without HTTP: texts, tokens per second, seconds to a token when nothing else runs."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    with Engine(model, data_parallel_size=RANKS) as engine:
        list(engine.generate(prompts[:RANKS], params))
        alone = []
        for prompt in prompts[:30]:
            began = time.perf_counter()
            list(engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)))
            alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        outputs = sorted(engine.generate(prompts, params), key=lambda output: output.index)
        seconds = time.perf_counter() - began
    texts = [output.text for output in outputs]
    return texts, {"tokens_per_s": round(len(prompts) * NEW_TOKENS / seconds), "token_alone_s": quantiles(alone)}


async def crowd(port, prompts, expected):
    """All at once, half of them as streams."""
    await asyncio.gather(*(ask(port, prompt, 4) for prompt in prompts[:RANKS]))
    alone = [(await ask(port, prompt, 1))[2] for prompt in prompts[:30]]
    began = time.perf_counter()
    jobs = [ask(port, prompt, NEW_TOKENS, stream=index % 2 == 0) for index, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*jobs)
    seconds = time.perf_counter() - began
    found = check(answers, expected, "a crowd")
    streamed = [answer for answer in answers[::2] if answer[2] is not None]
    found |= {"tokens_per_s": round(len(prompts) * NEW_TOKENS / seconds), "token_alone_s": quantiles(alone)}
    found["first_token_s"] = quantiles([first for _, _, first, _ in streamed])
    found["per_token_s"] = quantiles([(end - first) / (NEW_TOKENS - 1) for _, _, first, end in streamed])
    return found


async def mixture(port, prompts, expected, num_slow, num_leaving):
    """Slow readers and clients that hang up, among others."""
    slow = [ask(port, prompt, NEW_TOKENS, slow_s=0.25) for prompt in prompts[:num_slow]]
    leaving = [ask(port, prompt, 2000, hang_up_after=index % 5) for index, prompt in enumerate(prompts[:num_leaving])]
    others = [ask(port, prompt, NEW_TOKENS) for prompt in prompts[num_slow:]]
    answers = await asyncio.gather(*slow, *others, *leaving)
    found = check(answers[: len(prompts)], expected, "beside slow readers and clients that hang up")
    return found | {"slow": num_slow, "hung_up": sum(answer[0] == "left" for answer in answers[len(prompts) :])}


async def kill_at_random(server, prompts, expected, minutes, seed):
    """Ranks die every few seconds under steady load: an answer is right, or says that it was lost."""
    generator, until, counts = random.Random(seed), time.monotonic() + 60 * minutes, {}
    kills = 0

    async def client(number):
        while time.monotonic() < until:
            index = generator.randrange(len(prompts))
            try:
                status, text, *_ = await ask(server.port, prompts[index], NEW_TOKENS, stream=number % 2 == 0)
            except OSError as error:
                status, text = type(error).__name__, ""
            if status == 200 and text != expected[index]:
                status = "mixed up"
            counts[status] = counts.get(status, 0) + 1
            await asyncio.sleep(0.1 if status == 200 else 0.5)

    async def killer():
        nonlocal kills
        while time.monotonic() < until - 20:
            await asyncio.sleep(generator.uniform(2, 12))
            if ranks := server.ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(generator.choice(ranks), generator.choice((signal.SIGKILL, signal.SIGTERM)))
                    kills += 1

    await asyncio.gather(killer(), *(client(number) for number in range(20)))
    print(f"{kills} ranks killed in {minutes:g} minutes: {counts}", file=sys.stderr)
    return {"minutes": minutes, "kills": kills, "answers": {str(status): count for status, count in counts.items()}}


def load(arguments):
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny(Path(folder, "tiny"), num_layers=2, num_experts=12))
        prompts = prompts_of(arguments.requests)
        expected, engine = through_the_engine(model, prompts)
        result = {"ranks": RANKS, "new_tokens": NEW_TOKENS, "engine": engine}
        server = Server(model, "--max-restarts", "1000")
        try:
            result["server"] = asyncio.run(crowd(server.port, prompts, expected))
            memory = []
            for _ in range(arguments.rounds):
                found = asyncio.run(mixture(server.port, prompts, expected, arguments.slow, arguments.leaving))
                memory.append(round(server.memory_mib(), 1))
            result |= {"mixture": found, "memory_mib": memory}
            print(f"memory of the launcher after each round: {memory} MiB", file=sys.stderr)
            if arguments.kill_minutes:
                job = kill_at_random(server, prompts, expected, arguments.kill_minutes, arguments.seed)
                result["killed"] = asyncio.run(job)
                result["killed"]["memory_mib"] = round(server.memory_mib(), 1)
        finally:
            result["exit_status"] = server.end()
    return result


def throughput(arguments):
    """Tokens/s over HTTP and through `Engine.generate`, in turns: ranks on the last core, all else on the first.

    The ranks have to be the limit, as GPUs are: a step of this model takes tens of milliseconds.
    """
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    params = SamplingParams(max_tokens=arguments.count, temperature=0, ignore_eos=True)
    prompts, pairs = prompts_of(arguments.streams), []
    num_tokens = arguments.streams * arguments.count
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny(Path(folder, "tiny"), num_layers=8, hidden_size=256, num_experts=12))
        server = Server(model, "--api-processes", str(arguments.api_processes))
        with Engine(model, data_parallel_size=RANKS) as engine:
            ranks = [[psutil.Process(rank.pid) for rank in engine.ranks()], [*map(psutil.Process, server.ranks())]]
            for process in (psutil.Process(), server.launcher, *server.launcher.children(recursive=True)):
                process.cpu_affinity([first])
            for process in ranks[0] + ranks[1]:
                process.cpu_affinity([last])

            def through_the_engine():
                outputs = sorted(engine.generate(prompts, params), key=lambda output: output.index)
                return [output.text for output in outputs]

            def over_http():
                return [answer[1] for answer in asyncio.run(ask_all())]

            async def ask_all():
                return await asyncio.gather(*(ask(server.port, prompt, arguments.count) for prompt in prompts))

            assert through_the_engine() == over_http()
            for _ in range(5):
                measured = []
                for function, processes in ((through_the_engine, ranks[0]), (over_http, ranks[1])):
                    began, cpu_began = time.perf_counter(), cpu_s(processes)
                    function()
                    seconds, cpu_seconds = time.perf_counter() - began, cpu_s(processes) - cpu_began
                    measured.append((round(num_tokens / seconds, 1), round(cpu_seconds, 2)))
                pairs.append(measured)
                print(f"tokens/s, CPU s of the ranks: engine {measured[0]}, HTTP {measured[1]}", file=sys.stderr)
        server.end()
    ratio = statistics.median(http[0] / engine[0] for engine, http in pairs)
    return {"pairs": pairs, "ratio": round(ratio, 3), "streams": arguments.streams, "new_tokens": arguments.count,
            "ranks": RANKS, "api_processes": arguments.api_processes}  # fmt: skip


def cpu_s(processes):
    return sum(sum(process.cpu_times()[:2]) for process in processes)


class CountingRanks(RankProcesses):
    """Ranks that give every request one token per step, at a fixed pace, and compute nothing."""

    steps_per_s = 100.0
    can_survive, store = False, None

    def __init__(self, options):
        self.num_processes = self.num_data_ranks = options.world_size
        self._received = queue.SimpleQueue()
        self._lines = queue.SimpleQueue()
        self.own_cpu_s = 0.0

    def start(self, on_message):
        about = {"vocab_size": 259, "num_logits": 259, "eos_token_ids": [257], "max_model_len": 32768, "graphs": False}
        about |= {
            "kv_capacity_tokens": None,
            "dispatcher": None,
            "dispatcher_note": "",
            "dtype": "none",
            "device": "no",
        }
        about |= {"attention_name": "none", "layers": "none", "graphs_note": "they only count"}
        self._on_message = on_message
        for rank in range(self.num_processes):
            on_message(rank, {"ready": about})
        for function in (self._count, self._listen):
            threading.Thread(target=function, daemon=True).start()

    def _listen(self):
        while True:
            rank, line = self._lines.get()
            self._on_message(rank, pickle.loads(line))

    def _count(self):
        running, steps = [{} for _ in range(self.num_processes)], 0
        due = time.monotonic()
        while True:
            due += 1 / self.steps_per_s
            time.sleep(max(0.0, due - time.monotonic()))
            taken_in = [[] for _ in running]
            with contextlib.suppress(queue.Empty):
                while True:
                    rank, message = self._received.get_nowait()
                    if "add" in message:
                        running[rank][message["add"]] = [0, message["params"]["max_tokens"]]
                        taken_in[rank].append(message["add"])
                    for request_id in message.get("abort", ()):
                        running[rank].pop(request_id, None)
            steps += 1
            rows = [len(requests) for requests in running]
            for rank, requests in enumerate(running):
                tokens = []
                for request_id, state in list(requests.items()):
                    finish = "length" if state[0] + 1 == state[1] else None
                    tokens.append((request_id, state[0], 64 + state[0] % 26, None, None, finish))  # 64 is `a`
                    state[0] += 1
                    if finish:
                        del requests[request_id]
                counts = {"steps": steps, "overrun_rows": 0, "preempted": 0, "agreement_s": 0.0}
                counts |= {"rows": rows, "longest_rows": max(rows)}
                message = {"tokens": tokens, "taken_in": taken_in[rank], "counts": counts, "state": SchedulerState()}
                self._lines.put((rank, pickle.dumps(message | {"rows": rows, "epoch": 0})))
            self.own_cpu_s = time.thread_time()

    def send(self, data_rank, message):
        self._received.put((data_rank, message))

    def check(self, is_ending=False):
        pass

    def states(self):
        return [(0, "alive")] * self.num_processes

    def stop(self):
        pass

    def kill(self, error=None):
        pass


def face(arguments):
    """CPU time of the launcher per token, with HTTP and without, at a fixed number of tokens per second."""
    import lockstep.runner.engine as runner
    from lockstep.serve.options import ServeOptions
    from lockstep.serve.server import open_socket, serve

    streams, made = arguments.streams, []

    class Counting(CountingRanks):
        steps_per_s = arguments.tokens_per_s / streams

        def __init__(self, options):
            super().__init__(options)
            made.append(self)

    runner.RankProcesses = Counting

    def spent():
        return time.process_time() - made[-1].own_cpu_s

    def spent_by_api_processes():
        children = [one for one in psutil.Process().children() if "lockstep.serve.api_process" in one.cmdline()]
        return sum(sum(one.cpu_times()[:2]) for one in children)

    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny(Path(folder, "tiny"), num_layers=1, num_experts=RANKS, num_experts_per_token=1))
        count = int(Counting.steps_per_s * arguments.seconds)
        with Engine(model, data_parallel_size=RANKS) as engine:
            began, at_s = spent(), time.monotonic()
            list(engine.generate([[1, 2]] * streams, SamplingParams(max_tokens=count)))
            result = {"engine_us": round(1e6 * (spent() - began) / (streams * count), 1)}
            result["engine_tokens_per_s"] = round(streams * count / (time.monotonic() - at_s))
        listener = open_socket("127.0.0.1", 0)
        port = listener.getsockname()[1]

        async def drive(service):
            while service.state != "ready":
                await asyncio.sleep(0.05)
            command = [
                sys.executable,
                __file__,
                "--client",
                str(port),
                "--streams",
                str(streams),
                "--count",
                str(count),
            ]
            began, api_began = spent(), spent_by_api_processes()
            client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            shown, _ = await client.communicate()
            result["server_us"] = round(1e6 * (spent() - began) / (streams * count), 1)
            result["api_us"] = round(1e6 * (spent_by_api_processes() - api_began) / (streams * count), 1)
            texts, seconds = json.loads(shown)
            result["server_tokens_per_s"] = round(streams * count / seconds)
            result["right"] = texts == ["".join(chr(97 + place % 26) for place in range(count))]
            os.kill(os.getpid(), signal.SIGTERM)

        async def drive_or_end(service):
            try:
                await drive(service)
            except Exception:
                traceback.print_exc()
                os._exit(1)

        options = ServeOptions("tiny", api_processes=arguments.api_processes, drain_s=1)

        def start_engine():
            return Engine(model, data_parallel_size=RANKS)

        asyncio.run(serve(start_engine, options, listener, drive_or_end, lambda text: None, os._exit))
    asked = {"streams": streams, "tokens_per_s_asked": arguments.tokens_per_s}
    return result | asked | {"api_processes": arguments.api_processes}


async def read_all(arguments):
    jobs = [ask(arguments.client, [1, 2], arguments.count) for _ in range(arguments.streams)]
    began = time.monotonic()
    texts = sorted({text for _, text, *_ in await asyncio.gather(*jobs)})
    return texts, time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--leaving", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill-minutes", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--face", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--api-processes", type=int, default=1)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens-per-s", type=float, default=10_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=32, help="new tokens of each request of --throughput")
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    if arguments.client:
        print(json.dumps(asyncio.run(read_all(arguments))))
        return
    measure = face if arguments.face else throughput if arguments.throughput else load
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
