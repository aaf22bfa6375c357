"""What drawing the tokens of a step costs: each path of the sampler beside plain PyTorch, alone and in a mixed batch.

    python benchmarks/bench_sampling.py                                  # a GPU if there is one
    python benchmarks/bench_sampling.py --rows 1 64 256 --vocab 151936 --out benchmarks/results

Logits are bfloat16, other ones in every call. Before a path is timed, its tokens must equal those of the same rows one
by one. `device_us` is from the first kernel to the last, `issue_us` what the host spends to issue them; on a CPU both
are the same. Memory is the peak beyond the logits. Baselines: argmax; softmax and multinomial; the same after a sort
that applies top-p. The last line is one document.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from lockstep import SamplingParams, __version__
from lockstep.engine.sampling import Sampler

PATHS = {
    "greedy": {"temperature": 0.0},
    "unfiltered": {"temperature": 0.8},
    "min_p": {"min_p": 0.05},
    "top_k 20, top_p 0.9": {"top_k": 20, "top_p": 0.9},
    "top_k 64": {"top_k": 64},
    "top_p 0.9": {"top_p": 0.9},
    "greedy, penalties": {"temperature": 0.0, "presence_penalty": 1.0},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
}
NUM_INPUTS = 4


def baseline_sort(logits: torch.Tensor) -> torch.Tensor:
    values, ids = logits.float().sort(descending=True)
    probabilities = values.softmax(-1)
    probabilities[probabilities.cumsum(-1) - probabilities >= 0.9] = 0
    return ids.gather(1, probabilities.multinomial(1)).squeeze(1)


BASELINES = {
    "PyTorch argmax": lambda logits: logits.argmax(-1),
    "PyTorch softmax, multinomial": lambda logits: logits.float().softmax(-1).multinomial(1).squeeze(1),
    "PyTorch sort, top_p 0.9, multinomial": baseline_sort,
}


def sampler_of(choices: list[dict], vocab_size: int, device: torch.device) -> Sampler:
    sampler = Sampler(len(choices), vocab_size, device)
    for slot, fields in enumerate(choices):
        sampler.set(slot, SamplingParams(**fields), slot, [slot])
    return sampler


def call_of(choices: list[dict], vocab_size: int, device: torch.device):
    """The sampler's call for rows with these parameters, as a function of logits."""
    sampler = sampler_of(choices, vocab_size, device)
    rows = list(range(len(choices)))
    slots, positions = torch.tensor(rows, device=device), torch.ones(len(rows), dtype=torch.int64, device=device)
    return lambda logits: sampler.sample(logits, slots, positions, rows).tokens


def check(choices: list[dict], logits: torch.Tensor) -> None:
    together = call_of(choices, logits.shape[1], logits.device)(logits).tolist()
    sampler = sampler_of(choices, logits.shape[1], logits.device)
    one = torch.ones(1, dtype=torch.int64, device=logits.device)
    for slot in range(0, len(choices), max(1, len(choices) // 8)):
        alone = sampler.sample(logits[slot : slot + 1], one * slot, one, [slot]).tokens.item()
        assert alone == together[slot], f"row {slot} draws {together[slot]} in the batch, {alone} alone"


def timed(call, inputs: list[torch.Tensor], rounds: int) -> dict:
    """Medians and spread of one call, and its peak memory."""
    on_gpu = inputs[0].is_cuda
    for logits in inputs:
        call(logits)
    memory = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        memory = torch.cuda.memory_allocated()
    device_us, issue_us = [], []
    for index in range(rounds):
        logits = inputs[index % len(inputs)]
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host runs ahead of a busy GPU, as it does behind a step: else slow issuing would count as device time.
            torch.cuda._sleep(20_000_000)
            begin.record()
        start = time.perf_counter()
        call(logits)
        issue_us.append((time.perf_counter() - start) * 1e6)
        if on_gpu:
            end.record()
            end.synchronize()
            device_us.append(begin.elapsed_time(end) * 1e3)
    device_us = device_us or issue_us
    quartiles = statistics.quantiles(device_us, n=4)
    return {
        "device_us": round(quartiles[1], 1),
        "device_us_quartiles": [round(quartiles[0], 1), round(quartiles[2], 1)],
        "issue_us": round(statistics.median(issue_us), 1),
        "peak_mib": round((torch.cuda.max_memory_allocated() - memory) / 2**20, 1) if on_gpu else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256], help="rows of a step")
    parser.add_argument("--vocab", type=int, default=151936, help="size of the vocabulary")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the rows as JSON lines")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    records = []
    for num_rows in arguments.rows:
        inputs = [(torch.randn(num_rows, arguments.vocab, device=device) * 3).bfloat16() for _ in range(NUM_INPUTS)]
        cases = {name: [fields] * num_rows for name, fields in PATHS.items()}
        cases["all paths mixed"] = [list(PATHS.values())[row % len(PATHS)] for row in range(num_rows)]
        for choices in cases.values():
            check(choices, inputs[0])
        calls = dict(BASELINES)
        calls |= {name: call_of(choices, arguments.vocab, device) for name, choices in cases.items()}
        for name, call in calls.items():
            record = {"case": name, "rows": num_rows, "vocab": arguments.vocab, **timed(call, inputs, arguments.rounds)}
            records.append(record)
            print(
                f"{num_rows:4} rows  {name:38} {record['device_us']:10.1f} us, issued in {record['issue_us']:8.1f} us"
            )
    document = {
        "hardware": hardware,
        "torch": torch.__version__,
        "lockstep": __version__,
        "rounds": arguments.rounds,
        "records": records,
    }
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"sampling_{hardware.replace(' ', '-')}_{time.strftime('%Y-%m-%d')}.jsonl"
        with open(arguments.out / name, "w") as file:
            for record in records:
                row = {**{key: document[key] for key in ("hardware", "torch", "lockstep", "rounds")}, **record}
                file.write(json.dumps(row) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
