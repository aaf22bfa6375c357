"""What the HTTP face of `lockstep serve` costs per token: CPU time of the launcher, over ranks that only count.

    python benchmarks/bench_serve_face.py --api-processes 2

The last line is one JSON document.
"""

import argparse
import asyncio
import contextlib
import json
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

import lockstep.runner.engine as runner
from bench_serve import CLIENT, drive_server
from lockstep import Engine, SamplingParams
from lockstep.models.tiny import make_tiny
from lockstep.runner.engine_ranks import RankProcesses
from lockstep.serve.options import ServeOptions
from lockstep.workload import SchedulerState
from serve_client import Answer, allow_files

RANKS = 3


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
        num_acted = [0 for _ in running]
        due = time.monotonic()
        while True:
            due += 1 / self.steps_per_s
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(queue.Empty):
                while True:
                    rank, message = self._received.get_nowait()
                    num_acted[rank] += 1
                    for request in message.get("add", ()):
                        running[rank][request["id"]] = [0, request["params"]["max_tokens"]]
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
                message = {"tokens": tokens, "num_acted": num_acted[rank], "counts": counts, "state": SchedulerState()}
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
    streams, made = arguments.streams, []

    class Counting(CountingRanks):
        steps_per_s = arguments.tokens_per_s / streams

        def __init__(self, options):
            super().__init__(options)
            made.append(self)

    runner.RankProcesses = Counting
    count = int(Counting.steps_per_s * arguments.seconds)
    result = {"streams": streams, "tokens_per_s_asked": arguments.tokens_per_s}
    result["api_processes"] = arguments.api_processes

    def us_per_token(seconds):
        return round(1e6 * seconds / (streams * count), 1)

    def spent():
        return time.process_time() - made[-1].own_cpu_s

    def spent_by_api_processes():
        children = [one for one in psutil.Process().children() if "lockstep.serve.api_process" in one.cmdline()]
        return sum(sum(one.cpu_times()[:2]) for one in children)

    async def drive(_, port):
        asked = {"port": port, "requests": [([1, 2], time.monotonic())] * streams, "max_tokens": count}
        began, api_began, at_s = spent(), spent_by_api_processes(), time.monotonic()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        client = await asyncio.create_subprocess_exec(sys.executable, CLIENT, **pipes)
        shown, _ = await client.communicate(json.dumps(asked).encode())
        result["server_us"] = us_per_token(spent() - began)
        result["api_us"] = us_per_token(spent_by_api_processes() - api_began)
        result["server_tokens_per_s"] = round(streams * count / (time.monotonic() - at_s))
        letters = "".join(chr(97 + place % 26) for place in range(count))
        result["right"] = all(Answer(*fields).text == letters for fields in json.loads(shown))

    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny(Path(folder, "tiny"), num_layers=1, num_experts=RANKS, num_experts_per_token=1))
        with Engine(model, data_parallel_size=RANKS) as engine:
            began, at_s = spent(), time.monotonic()
            list(engine.generate([[1, 2]] * streams, SamplingParams(max_tokens=count)))
            result["engine_us"] = us_per_token(spent() - began)
            result["engine_tokens_per_s"] = round(streams * count / (time.monotonic() - at_s))
        options = ServeOptions("tiny", api_processes=arguments.api_processes, drain_s=1)
        drive_server(lambda: Engine(model, data_parallel_size=RANKS), options, drive)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-processes", type=int, default=1)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens-per-s", type=float, default=10_000)
    parser.add_argument("--seconds", type=float, default=10)
    allow_files()
    print(json.dumps(face(parser.parse_args())))


if __name__ == "__main__":
    main()
