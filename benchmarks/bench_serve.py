"""`lockstep serve` under load, beside the same requests through the engine.

    python benchmarks/bench_serve.py                     # a crowd, slow readers, clients that hang up; memory
    python benchmarks/bench_serve.py --kill-minutes 10   # and ranks killed at random
    python benchmarks/bench_serve.py --throughput        # at several loads, in turns with Engine.generate
    python benchmarks/bench_serve.py --throughput --device cuda --model DIR --data-parallel-size 2

Every answer is compared with the engine's before anything is timed. Each line on stdout is one JSON document.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from pathlib import Path

import torch

from lockstep import Engine, SamplingParams
from lockstep.models.tiny import make_tiny
from lockstep.serve.options import ServeOptions
from lockstep.serve.server import open_socket, serve
from serve_client import Answer, allow_files, ask, prompts_of, quantiles

RANKS = 3
NEW_TOKENS = 16
REST_S = 0.3
CLIENTS_START_S = 1.0
CLIENT = Path(__file__).with_name("serve_client.py")


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

    def memory_mib(self):
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE") / 2**20

    def ranks(self):
        ranks = []
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
            ranks = json.load(answer)["ranks"]
        return [rank["pid"] for rank in ranks if rank["state"] != "gone"]

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def check(answers, expected, what):
    lost = [index for index, answer in enumerate(answers) if answer.status != 200]
    mixed = [i for i, answer in enumerate(answers) if answer.status == 200 and answer.text != expected[i]]
    print(f"{what}: {len(answers)} requests, {len(lost)} lost, {len(mixed)} with another text", file=sys.stderr)
    return {"requests": len(answers), "lost": len(lost), "mixed_up": len(mixed)}


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
    alone = [(await ask(port, prompt, 1)).first_s for prompt in prompts[:30]]
    began = time.perf_counter()
    jobs = [ask(port, prompt, NEW_TOKENS, stream=index % 2 == 0) for index, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*jobs)
    seconds = time.perf_counter() - began
    found = check(answers, expected, "a crowd")
    streamed = [answer for answer in answers[::2] if answer.first_s is not None]
    found |= {"tokens_per_s": round(len(prompts) * NEW_TOKENS / seconds), "token_alone_s": quantiles(alone)}
    found["first_token_s"] = quantiles(answer.first_s for answer in streamed)
    found["per_token_s"] = quantiles((one.seconds - one.first_s) / (NEW_TOKENS - 1) for one in streamed)
    return found


async def mixture(port, prompts, expected, num_slow, num_leaving):
    """Slow readers and clients that hang up, among others."""
    slow = [ask(port, prompt, NEW_TOKENS, slow_s=0.25) for prompt in prompts[:num_slow]]
    leaving = [ask(port, prompt, 2000, hang_up_after=index % 5) for index, prompt in enumerate(prompts[:num_leaving])]
    others = [ask(port, prompt, NEW_TOKENS) for prompt in prompts[num_slow:]]
    answers = await asyncio.gather(*slow, *others, *leaving)
    found = check(answers[: len(prompts)], expected, "beside slow readers and clients that hang up")
    return found | {"slow": num_slow, "hung_up": sum(answer.status == "left" for answer in answers[len(prompts) :])}


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


def drive_server(start_engine, options, drive):
    """Run `drive(service, port)` beside a server in this process, which ends then."""
    listener = open_socket("127.0.0.1", 0)

    async def watch(service):
        try:
            while service.state != "ready":
                await asyncio.sleep(0.05)
            await drive(service, listener.getsockname()[1])
        except Exception:
            traceback.print_exc()
            os._exit(1)
        os.kill(os.getpid(), signal.SIGTERM)

    asyncio.run(serve(start_engine, options, listener, watch, lambda text: None, os._exit))


class Heard:
    """Hears of requests as the HTTP face does: their texts, and when each of their tokens came.

    A token that is a part of a character has no text yet, and is no event over HTTP: it does not count here either.
    """

    def __init__(self, at_s):
        self.times_s = [[time_s] for time_s in at_s]
        self.texts = ["" for _ in at_s]
        self._left, self._ended = len(at_s), threading.Event()

    def on_token(self, entry, delta):
        if delta.text or delta.finish_reason:
            self.times_s[entry.index].append(time.monotonic())
            self.texts[entry.index] += delta.text
        self._left -= delta.finish_reason is not None
        if not self._left:
            self._ended.set()

    def on_error(self, error):
        print(error, file=sys.stderr)
        os._exit(1)

    def wait(self):
        self._ended.wait()


def latencies(times_s):
    """Of requests' times, each beginning with that of the request: to the first token, and between tokens."""
    gaps = (after - before for times in times_s for before, after in itertools.pairwise(times[1:]))
    return {"first_token_s": quantiles(times[1] - times[0] for times in times_s), "per_token_s": quantiles(gaps)}


def seconds(times_s):
    """From the first request to the last token."""
    return max(times[-1] for times in times_s) - min(times[0] for times in times_s)


class Loads:
    """Bursts and steady arrivals of requests over HTTP and through the engine, on the same ranks and in turns."""

    def __init__(self, arguments, service, port):
        self.engine, self.service, self.port, self.arguments = service.engine, service, port, arguments
        self.round_s = 0.0  # how long the last pair took
        self.params = SamplingParams(max_tokens=arguments.count, temperature=0, ignore_eos=True)

    def prompts(self, count):
        generator, longest = random.Random(count), self.arguments.prompt_tokens
        sizes = [generator.choice((longest, longest // 2, longest // 4, 1)) for _ in range(count)]
        return [[generator.randrange(self.engine.about["num_logits"]) for _ in range(max(1, size))] for size in sizes]

    async def check(self):
        """Compare greedy tokens, by their names, of requests that run alone."""
        prompts, same = self.prompts(4), 0
        for prompt in prompts:
            answer = await ask(self.port, prompt, self.arguments.count, logprobs=0)
            (output,) = await asyncio.to_thread(lambda prompt=prompt: list(self.engine.generate([prompt], self.params)))
            same += answer.tokens == [self.service.token(token, 0.0)["token"] for token in output.token_ids]
        assert same == len(prompts), f"of {len(prompts)} requests alone, only {same} have the engine's tokens over HTTP"
        return {"requests_alone": len(prompts), "with_equal_tokens": same}

    async def measure_burst(self, count, until_s):
        """Send `count` requests at once."""
        return {"requests_at_once": count} | await self.measure([0.0] * count, until_s)

    async def measure_rate(self, tokens_per_s, until_s):
        """Offer this many tokens/s, as requests that arrive at random times (a Poisson process) for some seconds."""
        rate, arrivals = tokens_per_s / self.arguments.count, random.Random(tokens_per_s)
        gaps = (arrivals.expovariate(rate) for _ in itertools.repeat(None))
        offsets_s = list(itertools.takewhile(lambda at_s: at_s < self.arguments.seconds, itertools.accumulate(gaps)))
        offered = {"offered_tokens_per_s": tokens_per_s, "requests": len(offsets_s), "seconds": self.arguments.seconds}
        return offered | await self.measure(offsets_s, until_s)

    async def measure(self, offsets_s, until_s):
        """Measure at least one pair, and more until the time is over."""
        prompts, pairs, same = self.prompts(len(offsets_s)), [], 0
        num_tokens = len(prompts) * self.arguments.count
        times_s = {"engine": [], "http": []}
        while not pairs or (len(pairs) < self.arguments.pairs and time.monotonic() + self.round_s < until_s):
            began_s = time.monotonic()
            heard = await self.rested(self.through_engine(prompts, offsets_s))
            answers = await self.rested(self.over_http(prompts, offsets_s))
            assert all(one.status == 200 for one in answers), {one.status for one in answers}
            over_http = [one.times_s for one in answers]
            pairs.append((num_tokens / seconds(heard.times_s), num_tokens / seconds(over_http)))
            times_s["engine"] += heard.times_s
            times_s["http"] += over_http
            same += sum(one.text == text for one, text in zip(answers, heard.texts, strict=True))
            self.round_s = time.monotonic() - began_s
        engine, http = (round(statistics.median(figures), 1) for figures in zip(*pairs, strict=True))
        ratios = sorted(round(http / engine, 3) for engine, http in pairs)
        return {
            "pairs": len(pairs),
            "engine": {"tokens_per_s": engine} | latencies(times_s["engine"]),
            "http": {"tokens_per_s": http} | latencies(times_s["http"]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "same_texts": same,
            "texts": len(pairs) * len(prompts),
        }

    async def rested(self, work):
        """Do it once the ranks are as idle as they get."""
        await asyncio.sleep(REST_S)
        return await work

    async def through_engine(self, prompts, offsets_s):
        """Submit each request at its time, as the HTTP server does; those of one time together."""
        requests = self.engine.read_requests(prompts, self.params)
        began_s = time.monotonic()
        heard = Heard([began_s + offset_s for offset_s in offsets_s])
        for offset_s, some in itertools.groupby(zip(offsets_s, requests, strict=True), key=operator.itemgetter(0)):
            await asyncio.sleep(began_s + offset_s - time.monotonic())
            self.engine.submit(heard, [request for _, request in some])
        await asyncio.to_thread(heard.wait)
        return heard

    async def over_http(self, prompts, offsets_s):
        """Send from processes that share nothing with the server, once all of them have started."""
        num_clients = min(self.arguments.clients, len(prompts))
        began_s = time.monotonic() + CLIENTS_START_S
        requests = [(prompt, began_s + offset_s) for prompt, offset_s in zip(prompts, offsets_s, strict=True)]

        async def send(some):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            client = await asyncio.create_subprocess_exec(sys.executable, CLIENT, **pipes)
            asked = {"port": self.port, "requests": some, "max_tokens": self.arguments.count}
            shown, _ = await client.communicate(json.dumps(asked).encode())
            return [Answer(*fields) for fields in json.loads(shown)]

        parts = await asyncio.gather(*(send(requests[first::num_clients]) for first in range(num_clients)))
        return [parts[place % num_clients][place // num_clients] for place in range(len(prompts))]


def throughput(arguments):
    """Tokens/s and latencies at several loads. On a CPU, ranks have the last core, so that they are the limit."""
    began_s = time.monotonic()
    ranks = arguments.data_parallel_size
    bursts = [1, 4 * ranks, 32 * ranks, arguments.max_num_seqs * ranks, 2 * arguments.max_num_seqs * ranks]
    bursts = bursts if arguments.loads is None else arguments.loads
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(make_tiny(Path(folder, "tiny"), num_layers=8, hidden_size=256, num_experts=12))
        # Equal prompts would otherwise be computed once.
        options = {"data_parallel_size": ranks, "max_num_seqs": arguments.max_num_seqs, "enable_prefix_caching": False}
        options |= {"device": arguments.device}

        async def drive(service, port):
            about = service.engine.about
            if about["device"].startswith("cpu"):
                cores = sorted(os.sched_getaffinity(0))
                for rank in service.engine.ranks():
                    pin(rank.pid, cores[-1:])
                pin(os.getpid(), cores[:1])
            measured = Loads(arguments, service, port)
            shown = {
                "model": arguments.model or "tiny",
                "ranks": ranks,
                "device": device_name(),
                "torch": torch.__version__,
            }
            shown |= {name: about[name] for name in ("dtype", "dispatcher", "graphs", "attention_name")}
            shown |= {"new_tokens": arguments.count, "prompt_tokens": arguments.prompt_tokens}
            show(shown | {"api_processes": arguments.api_processes} | await measured.check())
            loads = [(measured.measure_burst, count) for count in bursts]
            loads += [(measured.measure_rate, tokens_per_s) for tokens_per_s in arguments.rates]
            for place, (measure, load) in enumerate(loads):
                left_s = began_s + arguments.budget_s - time.monotonic()
                if left_s <= measured.round_s:
                    print(f"no time is left for {measure.__name__} {load}", file=sys.stderr)
                    continue
                show(await measure(load, time.monotonic() + left_s / (len(loads) - place)))

        # Nothing is refused: also what is offered beyond the ranks' speed waits.
        offered = [2 * rate * arguments.seconds / arguments.count for rate in arguments.rates]
        most = math.ceil(max([*bursts, *offered]))
        most = {"max_queue": most, "max_connections": 2 * most}
        served = ServeOptions("model", api_processes=arguments.api_processes, **most)
        drive_server(lambda: Engine(model, **options), served, drive)


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def pin(pid, cores):
    """Let all threads of a process run on these cores only."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cores)


def show(document):
    print(json.dumps(document), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--leaving", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill-minutes", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    of_throughput = parser.add_argument_group("throughput")
    of_throughput.add_argument("--throughput", action="store_true")
    of_throughput.add_argument("--model", help="a checkpoint; by default a tiny one of 8 layers is made")
    of_throughput.add_argument("--device", help="cpu or cuda; by default a GPU if there is one")
    of_throughput.add_argument("--data-parallel-size", type=int, default=RANKS)
    of_throughput.add_argument("--max-num-seqs", type=int, default=256)
    of_throughput.add_argument("--loads", type=int, nargs="*", help="requests at once; by default 1 to twice the slots")
    of_throughput.add_argument("--rates", type=int, nargs="*", default=[], help="offered tokens/s, Poisson arrivals")
    of_throughput.add_argument("--seconds", type=float, default=5.0, help="how long requests arrive at each rate")
    of_throughput.add_argument(
        "--prompt-tokens", type=int, default=128, help="the longest prompt; the others are shorter"
    )
    of_throughput.add_argument("--count", type=int, default=128, help="new tokens of each request")
    of_throughput.add_argument("--api-processes", type=int, default=1)
    of_throughput.add_argument("--clients", type=int, default=min(4, 1 + (os.cpu_count() or 1) // 8), help="processes")
    of_throughput.add_argument("--pairs", type=int, default=9, help="most pairs of each load")
    of_throughput.add_argument(
        "--budget-s", type=float, default=120, help="seconds for all of it; may end one pair late"
    )
    arguments = parser.parse_args()
    allow_files()
    if arguments.throughput:
        throughput(arguments)
    else:
        show(load(arguments))


if __name__ == "__main__":
    main()
