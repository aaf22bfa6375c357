"""How far the cost formula can be trusted on this machine: constants fitted to some runs, held against another.

    python benchmarks/bench_validation.py [--trace FILE] [--repeats 3] [--out benchmarks/results]

Runs the tiny model over 2 ranks on three workloads in turn, as often as asked for; then, for each workload, fits the
constants to the runs of the two others and compares: the median times of its repeats, and each run by itself. With
`--trace`, an Azure or Mooncake trace is the third workload. Takes about 15 s per run on two idle cores, and says how
much of the machine other programs had. The last line on stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lockstep.commands.calibrate import read_columns
from lockstep.models.tiny import make_tiny
from lockstep.simulation.cost import fit, join_runs, validate
from lockstep.workload import SyntheticParameters, synthetic_requests

SCALED = ("--requests", "150", "--rate-scale", "4", "--length-scale", "0.1", "--max-prompt-tokens", "600")
RANKS = 2
GOAL_TOTAL, GOAL_STEP = 0.10, 0.15


def workloads(folder, trace):
    """Return the options of `lockstep run` for each workload, by name."""
    if trace is None:
        # Prompts twice as long and outputs a quarter as long as the others', in bursts.
        trace = folder / "bursts.jsonl"
        requests = synthetic_requests(
            SyntheticParameters(num_requests=150, burstiness=3, prompt_median=2000, output_median=30), seed=3
        )
        lines = (
            {"timestamp": 1e3 * r.arrival_s, "input_length": r.num_prompt_tokens, "output_length": r.max_new_tokens}
            for r in requests
        )
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "synthetic, seed 1": ("--workload", "synthetic", "--seed", "1"),
        "synthetic, seed 2": ("--workload", "synthetic", "--seed", "2"),
        Path(trace).stem: ("--workload", str(trace)),
    }


def run(folder, model, options):
    """Do one run; return its steps, and how many cores other programs used just before (None where nothing says so)."""
    others = cores_in_use()
    command = (
        *(sys.executable, "-m", "lockstep.cli", "run", "--model", str(model), *options, *SCALED, "--no-verify"),
        *("--data-parallel-size", str(RANKS), "--json", "--out", str(folder)),
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read_columns(folder), others


def cores_in_use(seconds=1.0):
    """Return how many of this machine's cores are at work while this program sleeps; None where nothing says so."""
    try:
        before = busy_ticks()
        time.sleep(seconds)
        return (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds
    except OSError:
        return None


def busy_ticks():
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[:8])
    return user + nice + system + irq + softirq + steal


def rows_of(runs, others_cores):
    """Return the comparisons as rows: each workload against constants of the two others."""
    rows = []
    for name, repeats in runs.items():
        fitted_to = [other for other in runs if other != name]
        constants = fit(**join_runs([columns for other in fitted_to for columns in runs[other]]))
        for what, columns in [("median of repeats", join_runs(repeats)), *(("one run", one) for one in repeats)]:
            rows.append(
                {
                    "benchmark": "validation", "ranks": RANKS, "validated_on": name, "fitted_to": fitted_to,
                    "what": what, "repeats": len(repeats), **rounded(validate(columns, constants)),
                    "others_cores": others_cores,
                }
            )  # fmt: skip
    return rows


def rounded(values):
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def within(errors):
    """Whether a comparison meets the goal."""
    return abs(errors["total_error"]) <= GOAL_TOTAL and errors["median_step_error"] <= GOAL_STEP


def table(rows):
    lines = [
        "| not fitted to | times | steps | measured | predicted | total differs by | a step's median error "
        "| 90 % of steps within | within the goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            *(row["validated_on"], row["what"], str(row["steps"]), f"{row['measured_s']:.1f} s"),
            *(f"{row['predicted_s']:.1f} s", f"{row['total_error']:+.1%}"),
            *(f"{row[name]:.1%}" for name in ("median_step_error", "p90_step_error")),
            "yes" if within(row) else "**no**",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", help="the third workload; without it, a made-up one with bursts and long prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", help="folder for the runs, which is kept")
    parser.add_argument("--out", help="folder for the result file")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs, shares = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = make_tiny(folder / "model", num_experts=16)
        for repeat in range(arguments.repeats):
            # In turn, so that minutes in which the machine is slower touch all of them.
            for number, (name, options) in enumerate(workloads(folder, arguments.trace).items()):
                columns, others = run(folder / f"run-{number}-{repeat}", model, options)
                runs.setdefault(name, []).append(columns)
                shares.append(others)
                print(
                    f"{name}: {len(columns['duration_us'])} steps in {columns['duration_us'].sum() / 1e6:.2f} s; "
                    "others had "
                    + ("an unknown part" if others is None else f"{others:.2f} of {os.cpu_count()} cores before"),
                    file=sys.stderr,
                )
    known = [share for share in shares if share is not None]
    rows = rows_of(runs, round(sum(known) / len(known), 2) if known else None)
    print(table(rows), file=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "cores": os.cpu_count(), "processor": platform.processor() or platform.machine(), "commit": commit,
        "python": platform.python_version(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if arguments.out:
        name = f"validation_cpu-{os.cpu_count()}-cores_{about['date']}_{commit}.jsonl"
        Path(arguments.out, name).write_text("".join(json.dumps({**row, **about}) + "\n" for row in rows))
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
