"""Tokens per second of `generate` on 2 CPU ranks: Lockstep against Transformers' own expert parallelism (`all_to_all`).

The same tiny checkpoint and equal calls on both ranks, since Transformers' waits for ever otherwise. Outputs are
compared with one process first. Both run in turn within one run; the slowest rank counts. The last line is one JSON
document.

    python benchmarks/bench_generate.py [--calls 4] [--rounds 5] [--out benchmarks/results]
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import lockstep
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

NEW_TOKENS = 16
RANKS = 2


def prompts(rank, calls):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(0, 256, (4, 24), generator=generator) for _ in range(calls)]


def generate(model, batches):
    return [
        model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        ).tolist()
        for batch in batches
    ]  # fmt: skip


def transformers_model(path):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=RANKS, ep_size=RANKS, ep_implementation="all_to_all")
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32).eval()


def measure(path, calls, rounds):
    rank = dist.get_rank()
    batches = prompts(rank, calls)
    theirs = transformers_model(path)
    ours = lockstep.from_pretrained(path)
    seconds = {"transformers": [], "lockstep": []}
    outputs = {}
    for index in range(rounds + 1):
        for name in seconds:
            dist.barrier()
            started = time.perf_counter()
            if name == "lockstep":
                with lockstep.join(ours):
                    outputs[name] = generate(ours, batches)
            else:
                outputs[name] = generate(theirs, batches)
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return outputs, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(make_tiny(folder, num_experts=16))
        results = run_ranks(RANKS, measure, path, arguments.calls, arguments.rounds, deadline_s=500)
        whole = lockstep.from_pretrained(path)
        for rank, (outputs, _) in enumerate(results):
            expected = generate(whole, prompts(rank, arguments.calls))
            for name, output in outputs.items():
                assert output == expected, f"{name} differs from one process on rank {rank}"
    tokens = RANKS * arguments.calls * 4 * NEW_TOKENS
    slowest = {
        name: [max(times) for times in zip(*(seconds[name] for _, seconds in results), strict=True)]
        for name in ("transformers", "lockstep")
    }
    document = {
        "benchmark": "generate",
        "baseline": "transformers all_to_all",
        "ranks": RANKS,
        "tokens": tokens,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "date": datetime.date.today().isoformat(),
        **{f"{name}_tokens_per_s": round(tokens / statistics.median(times), 2) for name, times in slowest.items()},
        "ratio_of_medians": round(
            statistics.median(slowest["transformers"]) / statistics.median(slowest["lockstep"]), 3
        ),
        "ratios": [
            round(theirs / ours, 3) for theirs, ours in zip(slowest["transformers"], slowest["lockstep"], strict=True)
        ],
    }
    line = json.dumps(document)
    if arguments.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        name = f"generate_cpu_{document['date']}_{commit}.jsonl"
        (arguments.out / name).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
