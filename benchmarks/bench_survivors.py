"""How long an engine stands still when a rank is killed, and how fast it is without it.

    python benchmarks/bench_survivors.py --gpus 4 --model path/to/checkpoint --survive 1 --out survivors.jsonl

Requests without an end run on all ranks. `outage_s` is the time from `kill -9` of a rank to the next token of any
request, `decided_s` the part of it until the launcher has begun the next epoch. `tokens_per_s` and `step_ms` are of
three seconds before, and of three seconds after the ranks have caught up. The page cache is warm, since the ranks have
just read the checkpoint. Without `--model` one of Qwen3-30B's shape is made, with random weights.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAKE = """
import sys, torch
from bench_model import make_config
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
with torch.device(sys.argv[3]):
    model = AutoModelForCausalLM.from_config(make_config(int(sys.argv[2]), sys.argv[3] == "cpu"), dtype=torch.bfloat16)
model.save_pretrained(sys.argv[1])
"""


class Heard:
    """Counts tokens, with the time of each."""

    def __init__(self):
        self.times, self.error = [], None

    def on_token(self, entry, delta):
        self.times.append(time.monotonic())

    def on_error(self, error):
        self.error = error

    def wait(self, num_tokens, seconds):
        until, wanted = time.monotonic() + seconds, len(self.times) + num_tokens
        while len(self.times) < wanted:
            if self.error is not None or time.monotonic() > until:
                raise SystemExit(f"no token for {seconds} s: {self.error}")
            time.sleep(0.0005)


def pace(engine, heard, seconds):
    """Tokens per second, and milliseconds per step."""
    tokens, steps, began = len(heard.times), engine.stats.steps, time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    return round((len(heard.times) - tokens) / passed), round(1e3 * passed / max(1, engine.stats.steps - steps), 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="ranks, with a GPU each, or on a CPU without GPUs")
    parser.add_argument("--model", help="a checkpoint's folder")
    parser.add_argument("--layers", type=int, default=8, help="of the model that is made")
    parser.add_argument("--requests", type=int, default=16, help="per rank")
    parser.add_argument("--survive", type=int, default=1)
    parser.add_argument("--losses", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import torch

    import lockstep

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or f"{folder}/model"
        if arguments.model is None:
            command = [sys.executable, "-c", MAKE, model, str(arguments.layers), device]
            subprocess.run(command, check=True, cwd=Path(__file__).parent)
        began = time.monotonic()
        options = {"device": device, "survive": arguments.survive, "max_model_len": 4096, "max_num_seqs": 64}
        with lockstep.Engine(model, data_parallel_size=arguments.gpus, **options) as engine:
            start_s = round(time.monotonic() - began, 1)
            prompts = [[1 + (n + i) % 200 for i in range(64)] for n in range(arguments.requests * arguments.gpus)]
            heard = Heard()
            params = lockstep.SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
            engine.submit(heard, engine.read_requests(prompts, params))
            heard.wait(20 * len(prompts), 120)
            for loss in range(arguments.losses):
                before = pace(engine, heard, arguments.seconds)
                epoch = engine.stats.epoch
                os.kill(engine.ranks()[arguments.gpus - 1 - loss].pid, signal.SIGKILL)
                killed = time.monotonic()
                while engine.stats.epoch == epoch:
                    time.sleep(0.0005)
                decided = time.monotonic()
                heard.wait(1, 120)
                outage = heard.times[-1] - killed
                heard.wait(20 * len(prompts), 120)
                after = pace(engine, heard, arguments.seconds)
                record = {
                    "benchmark": "survivors", "ranks": arguments.gpus - loss, "survive": arguments.survive,
                    "requests": len(prompts), "outage_s": round(outage, 2), "decided_s": round(decided - killed, 2),
                    "tokens_per_s": before[0], "tokens_per_s_after": after[0], "step_ms": before[1],
                    "step_ms_after": after[1], "start_s": start_s, "layers": arguments.layers,
                    "hardware": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                    "torch": torch.__version__, "commit": arguments.commit,
                }  # fmt: skip
                print(json.dumps(record), flush=True)
                if arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
            engine.abandon(heard)


if __name__ == "__main__":
    main()
