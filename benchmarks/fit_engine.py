"""The simulator's shipped `h100` constants, from the engine's measurements in `benchmarks/results/engine_*.jsonl`.

    python benchmarks/fit_engine.py            # writes src/lockstep/simulation/h100.json

Qwen3-30B-A3B's shape (hidden 2048, 128 experts of which a row chooses 8, bfloat16), 32 layers, over 2 and 4 H100s. Two
times are known of each measured case: that of a step in which all its requests generate, and that from the start to the
last prompt's first token. The scheduler says which steps these were. All constants are fitted to both at once by least
squares of relative errors; `row_us` stays 0, since no case tells a row on the link from a row in attention.

Prints each case beside what the constants say of it, and beside what constants say that were fitted without the case.
"""

import json
from pathlib import Path

import numpy as np

from lockstep.simulation.cost import CostConstants, nonnegative_least_squares
from lockstep.workload import Request, SchedulerConfig
from lockstep.workload.rank_scheduler import RankScheduler

RESULTS = Path(__file__).parent / "results"
SHIPPED = Path(__file__).parents[1] / "src" / "lockstep" / "simulation" / "h100.json"
EXPERT_SHARE, TOKENS = 8 / 128, 40  # tokens that each request of bench_engine.py generates
FITTED = ("step_us", "token_us", "request_us", "decode_context_us", "prefill_context_us", "expert_row_us", "weights_us")
SOURCE = "h100: the engine with 32 layers of Qwen3-30B-A3B's shape over 2 and 4 H100s"
COUNTS_ONE_DECODE_STEP_MORE = ("b0e5f11", "e758127")  # in `prompts_ms`, see docs/benchmarks/gpu.md


def cases():
    """Return the newest measured row of each case: by requests and prompt tokens of each rank."""
    found = {}
    for path in sorted(RESULTS.glob("engine_h100*.jsonl"), key=lambda path: path.name.endswith("46217ca.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if row["commit"] in COUNTS_ONE_DECODE_STEP_MORE:
                row["prompts_ms"] -= row["decode_ms"]
            prompts = tuple(np.broadcast_to(row["prompt"], row["ranks"]).tolist())
            found[tuple(row["batches"]), prompts] = row
    return found


def schedules(batches, prompts):
    """Return each step of a case as one `Schedule` per rank."""
    ranks = []
    for count, tokens in zip(batches, prompts, strict=True):
        ranks.append(RankScheduler(SchedulerConfig(max_num_batched_tokens=4096, enable_prefix_caching=False)))
        for number in range(count):
            ranks[-1].add(Request(number, 0.0, tokens, TOKENS), 0)
    steps = []
    while not steps or any(schedule.num_tokens for schedule in steps[-1]):
        steps.append([rank.next_step(len(steps)) for rank in ranks])
    return steps[:-1]


def counts_of(steps):
    """Return the counts of steps as `CostConstants.step_times_us` takes them."""
    names = ("num_tokens", "num_decode_tokens", "decode_context_tokens", "prefill_context_tokens")
    columns = [np.array([[getattr(rank, name) for rank in step] for step in steps], float) for name in names]
    return (*columns, np.ones(len(steps)))


def measured_parts(batches, prompts, row):
    """Return the two measured parts of a case: the counts of its steps, and their time in us, all together."""
    steps = schedules(batches, prompts)
    generating = [step for step in steps if tuple(rank.num_decode_tokens for rank in step) == batches]
    last_prompt = max(i for i, step in enumerate(steps) if any(rank.num_prefill_tokens for rank in step))
    return [
        (counts_of([generating[len(generating) // 2]]), 1e3 * row["decode_ms"]),
        (counts_of(steps[: last_prompt + 1]), 1e3 * row["prompts_ms"]),
    ]


def features_of(counts):
    """Return what each fitted constant is multiplied by, over all steps: the rank with most rows counts for its own."""
    tokens, *_ = counts
    longest = np.arange(len(tokens)), tokens.argmax(axis=1)
    own = [column[longest] for column in counts[:4]]
    read = (1 - (1 - EXPERT_SHARE) ** tokens.sum(axis=1)) / tokens.shape[1]
    return np.array([np.ones(len(tokens)), *own, tokens.mean(axis=1), read]).sum(axis=1)


def constants_from(parts):
    """Fit the constants to measured parts."""
    found = nonnegative_least_squares(
        np.array([features_of(counts) for counts, _ in parts]), np.array([us for _, us in parts])
    )
    values = {name: float(f"{value:.4g}") for name, value in zip(FITTED, found, strict=True)}
    return CostConstants(**values, expert_share=EXPERT_SHARE, source=SOURCE)


def shipped():
    """Return the constants fitted to all cases."""
    return constants_from([part for case, row in cases().items() for part in measured_parts(*case, row)])


def errors(fitted_without=False):
    """Return, per case, the relative errors of its decode step, its prompts, and the run of all its steps."""
    parts = {case: measured_parts(*case, row) for case, row in cases().items()}
    all_of_them = shipped()
    found = {}
    for case, own in parts.items():
        others = [part for other, both in parts.items() if other != case for part in both]
        constants = constants_from(others) if fitted_without else all_of_them
        predicted = [constants.step_times_us(*counts).sum() for counts, _ in own]
        measured = [us for _, us in own]
        run = [(TOKENS - 1) * decode + prompt for decode, prompt in (predicted, measured)]
        found[case] = (predicted[0] / measured[0] - 1, predicted[1] / measured[1] - 1, run[0] / run[1] - 1)
    return found


def main():
    print("requests; prompt tokens: errors of decode, prompts and run | of constants fitted without the case")
    for (case, fitted), left_out in zip(errors().items(), errors(fitted_without=True).values(), strict=True):
        figures = " | ".join(" ".join(f"{error:+6.1%}" for error in three) for three in (fitted, left_out))
        print(f"{case[0]}; {case[1]}: {figures}")
    shipped().save(SHIPPED)
    print(SHIPPED.read_text(), end="")


if __name__ == "__main__":
    main()
