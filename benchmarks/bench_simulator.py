"""Speed of the simulator: rank-steps per second at 8 ranks on a real or made-up trace, and from 8 to 4096 ranks.

    python benchmarks/bench_simulator.py [--trace FILE] [--plot scaling.png] [--out benchmarks/results]

Time is this process's CPU time, so that a busy machine does not count. The last line on stdout is one JSON document.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy

from lockstep.simulation.cost import CostConstants
from lockstep.simulation.simulator import SimulationConfig, simulate
from lockstep.steplog.files import StepColumns
from lockstep.workload import SchedulerConfig, SyntheticParameters, WorkloadOptions, load_trace, synthetic_requests

LINEAR = CostConstants.load("linear")


def timed(requests, config, log_path=None):
    """Return rank-steps per CPU second, CPU seconds, wall seconds and the summary."""
    log = StepColumns(log_path) if log_path else None
    cpu, wall = time.process_time(), time.perf_counter()
    summary = simulate(requests, config, log).summary
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if log:
        log.close()
    return summary["rank_steps"] / cpu, cpu, wall, summary


def eight_ranks(trace, repeats):
    """Time 8 ranks, also with few pages of KV cache; the best of a few repeats, which a busy machine disturbs least."""
    rows = []
    for rate in (1, 4):
        if trace:
            requests = load_trace(trace, WorkloadOptions(rate_scale=rate)).requests
        else:
            requests = synthetic_requests(SyntheticParameters(num_requests=19_366), WorkloadOptions(rate_scale=rate))
        for capacity, delay in itertools.product((None, 40_000), (0, 10)):
            scheduler = SchedulerConfig(max_prefill_delay_steps=delay, kv_capacity_tokens=capacity)
            config = SimulationConfig(8, scheduler, LINEAR)
            speed, cpu, wall, summary = max(
                (timed(requests, config) for _ in range(repeats)), key=lambda found: found[0]
            )
            rows.append(
                {
                    "what": "8 ranks", "rate_scale": rate, "max_prefill_delay_steps": delay,
                    "kv_capacity_tokens": capacity, "kv_waits": summary["kv_waits"], "preempted": summary["preempted"],
                    "rank_steps": summary["rank_steps"], "rank_steps_per_s": round(speed), "cpu_s": round(cpu, 2),
                    "wall_s": round(wall, 2), "simulated_s": round(summary["duration_s"]),
                }
            )  # fmt: skip
            print(rows[-1], file=sys.stderr)
    return rows


def scaling(repeats, largest):
    """Time the same load per rank from 8 ranks to 4096: the cost of one rank-step should stay flat."""
    rows = []
    ranks = 8
    while ranks <= largest:
        config = SimulationConfig(ranks, SchedulerConfig(max_prefill_delay_steps=10), LINEAR)
        rank_steps, cpu, steps = 0, 0.0, 0
        # As many runs as make 20,000 requests: one of 8 ranks alone is over within milliseconds.
        for seed in range(max(1, 20_000 // (40 * ranks))):
            # Four requests per second and rank would overload; 2.8 is the conversation trace at four times its rate.
            requests = synthetic_requests(SyntheticParameters(num_requests=40 * ranks, rate=2.8 * ranks), seed=seed)
            _, best_cpu, _, summary = min((timed(requests, config) for _ in range(repeats)), key=lambda found: found[1])
            rank_steps, cpu, steps = rank_steps + summary["rank_steps"], cpu + best_cpu, steps + summary["steps"]
        rows.append(
            {
                "what": "scaling", "ranks": ranks, "steps": steps, "rank_steps": rank_steps,
                "us_per_rank_step": round(1e6 * cpu / rank_steps, 3), "cpu_s": round(cpu, 2),
            }
        )  # fmt: skip
        print(rows[-1], file=sys.stderr)
        ranks *= 2
    return rows


def memory(path):
    """Return the peak memory, in MiB, of writing every step of a short and of an eight times longer run."""
    rows = []
    for steps in (20_000, 160_000):
        script = _MEMORY.format(steps=steps, path=str(path))
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        rows.append({"what": "memory", "steps": steps, "peak_mib": int(found.stdout.split()[-1])})
        print(rows[-1], file=sys.stderr)
    return rows


# Few requests with long outputs: so many steps that memory per step would show, and the workload itself stays small.
_MEMORY = """
import resource
from lockstep.steplog.files import StepColumns
from lockstep.simulation.simulator import SimulationConfig, simulate
from lockstep.workload import Request
requests = [Request(index, float(index), 100, {steps}) for index in range(64)]
with StepColumns({path!r}) as log:
    summary = simulate(requests, SimulationConfig(64), log).summary
assert summary["steps"] >= {steps}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", help="an Azure or Mooncake trace; without it, a synthetic workload like one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest", type=int, default=4096)
    parser.add_argument("--out", help="folder for the result file")
    arguments = parser.parse_args()
    rows = eight_ranks(arguments.trace, arguments.repeats) + scaling(arguments.repeats, arguments.largest)
    scratch = Path("bench_simulator_steps.parquet")
    try:
        rows += memory(scratch)
    finally:
        scratch.unlink(missing_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "numpy": numpy.__version__, "commit": commit}
    processor = _processor()
    if arguments.out:
        name = f"simulator_{processor}_{time.strftime('%Y-%m-%d')}_{commit}.jsonl"
        lines = [json.dumps({**row, **versions, "processor": processor}) + "\n" for row in rows]
        Path(arguments.out, name).write_text("".join(lines))
    print(json.dumps({"processor": processor, **versions, "rows": rows}))


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "unknown"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "unknown"


if __name__ == "__main__":
    main()
