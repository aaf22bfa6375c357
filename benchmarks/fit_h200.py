"""The simulator's shipped `h200` constants, from the measurements in `benchmarks/results/`.

    python benchmarks/fit_h200.py            # writes src/lockstep/simulation/h200.json, from the newest results

Qwen3-30B-A3B's shape (hidden 2048, 128 experts of which a row chooses 8, 48 layers, bf16) over 2 H200s. Prints each
measured decode step beside what the constants say of it; those of 8 layers are not fitted to, nor the
step of two lone requests of which one is long: its attention runs on few multiprocessors, which no term knows. Per
layer:

measured  row_us, and chunk_us: dispatch and combine of 4096 rows and of one row per rank (`dispatch_*`, nvlink_pairs,
          of the version that the whole model was measured with)
          weights_us, expert_row_us: all 64 local experts with 4 rows and with 64 rows each (`experts_*`)
fitted    step_us, request_us, decode_context_us: to what is left of the decode steps of `model_*`, 48 layers as graphs
assumed   token_us, prefill_context_us: arithmetic of attention at the 663 TFLOP/s of a large product;
          the output head once a step (622 MB read at 4.3 TB/s);
          steps with prompts start as fast as graphs (ours are eager: about 2 ms per layer, see docs/benchmarks/gpu.md);
          other numbers of ranks: the constants are those of 2
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from lockstep.simulation.cost import CostConstants

RESULTS = Path(__file__).parent / "results"
SHIPPED = Path(__file__).parents[1] / "src" / "lockstep" / "simulation" / "h200.json"
LAYERS, FEW_LAYERS, HEAD_US = 48, 8, 145.0
DECODED = 13.5  # tokens of a request that is decoded, in the middle of what was timed; for results that do not say it
SOURCE = "h200: Qwen3-30B-A3B's shape over 2 H200s, decode steps measured, prompts from arithmetic"


def read(pattern, folder=RESULTS, **wanted):
    """Return the rows of the newest result file of a pattern that have all wanted values."""
    rows = max((rows_of(path) for path in sorted(folder.glob(pattern))), key=age)
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def rows_of(path):
    return [{"file": path.name, **json.loads(line)} for line in path.read_text().splitlines()]


def age(rows):
    """Order files by their day; of one day, the one that says more of what was measured is the later one."""
    return rows[0]["file"].split("_")[2], rows[0].get("date", ""), "decoded" in rows[0], rows[0]["file"]


def exchange_times():
    """Return the time of dispatch and combine by the tokens of every rank, us: of the version of the newest model."""
    commit = read("model_h200x2_*")[0]["commit"]
    wanted = {"hidden": 2048, "dtype": "bf16", "routing": "uniform", "backend": "nvlink_pairs", "mode": "graph"}
    return {tuple(row["counts"]): row["us"] for row in read(f"dispatch_h200x2_*_{commit}.jsonl", **wanted)}


def exchange():
    """Return `chunk_us` and `row_us` of a layer."""
    time_us = exchange_times()
    row_us = (time_us[4096, 4096] - time_us[1, 1]) / 4095
    return time_us[1, 1] - row_us, row_us


def experts():
    """Return `weights_us` and `expert_row_us` of a layer; the faster kernel of each size counts."""
    rows = read("experts_h200_*", shape="qwen3-30b-a3b")
    few, many = (min(row["us"] for row in rows if row["rows_per_expert"] == size) for size in (4, 64))
    # A row of each of two ranks makes 16 pairs, 8 of them for this rank's 64 experts: 8 such rows are one per expert.
    expert_row_us = (many - few) / (8 * (64 - 4))
    return few - 8 * 4 * expert_row_us, expert_row_us


def decode_steps(layers, even=True):
    """Return the measured decode steps after even prompts, or the others: rows and KV entries of each rank, and us."""
    rows = read("model_h200x2_*", backend="lockstep nvlink graph", layers=layers)
    rows = [row for row in rows if isinstance(row["prompt"], int) == even]
    tokens = np.array([row["batches"] for row in rows]).reshape(-1, 2)
    prompts = np.array([np.broadcast_to(row["prompt"], 2) for row in rows]).reshape(-1, 2)
    decoded = np.array([row.get("decoded", DECODED) for row in rows]).reshape(-1, 1)
    return tokens, tokens * (prompts + decoded), 1e3 * np.array([row["decode_ms"] for row in rows])


def predicted(constants, tokens, context):
    """Return what the constants say of decode steps, in us."""
    return constants.step_times_us(tokens, tokens, context, 0 * tokens, np.ones(len(tokens)))


def constants_of(layers):
    """Return the constants of a model of so many layers."""
    chunk_us, row_us = exchange()
    weights_us, expert_row_us = experts()
    tokens, context, measured = decode_steps(LAYERS)
    parts = CostConstants(1e-6, 0.057, chunk_us, 0.0, 2.47e-5, row_us, expert_row_us, 0.0, weights_us, 8 / 128)
    left = (measured - HEAD_US) / LAYERS - predicted(parts, tokens, context)
    scale = LAYERS / measured  # errors count relatively
    features = np.column_stack([np.ones(len(left)), tokens.max(axis=1), context.max(axis=1)]) * scale[:, None]
    step_us, request_us, context_us = np.linalg.lstsq(features, left * scale, rcond=None)[0]
    one = replace(parts, step_us=step_us, request_us=request_us, decode_context_us=context_us)
    scaled = {name: float(f"{layers * value:.4g}") for name, value in asdict(one).items() if name != "source"}
    scaled["step_us"] = float(f"{layers * step_us + HEAD_US:.5g}")
    return CostConstants(**{**scaled, "expert_share": 8 / 128}, source=SOURCE)


def main():
    for layers, even, word in (
        (LAYERS, True, "fitted"),
        (LAYERS, False, "not fitted"),
        (FEW_LAYERS, True, "not fitted"),
    ):
        tokens, context, measured = decode_steps(layers, even)
        formula = predicted(constants_of(layers), tokens, context)
        for counts, us, found in zip(tokens, measured, formula, strict=True):
            print(
                f"{layers} layers, {word}, {counts.tolist()}: measured {us:.0f} us, formula {found:.0f} us, "
                f"{found / us - 1:+.1%}"
            )
    constants_of(LAYERS).save(SHIPPED)
    print(SHIPPED.read_text(), end="")


if __name__ == "__main__":
    main()
