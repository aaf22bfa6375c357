"""The long version of tests/ranks/test_faults.py: random faults from one seed, bounded in number and time.

    python tests/soak.py --cases 2000 --minutes 30 --seed 1     # `make soak`
    python tests/soak.py --cases 1000 --minutes 4 --seed 1 --jobs 8     # eight at once, with seeds 1 to 8
    python tests/soak.py --write-table     # three ranks, each case once, into docs/benchmarks/faults.md

Runs on CPUs and talks over loopback only. Prints what went wrong as it happens, and as its last line one JSON document.
Exit status 1 if anything went wrong.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

# Before torch is imported: ranks on CPUs, also on a machine with GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT / "ranks"), str(ROOT / "unit")]

import fault_matrix as matrix  # noqa: E402
import test_protocol as protocol  # noqa: E402

from lockstep.models.tiny import make_tiny  # noqa: E402
from lockstep.testing import RankFailure, run_ranks  # noqa: E402

DOCUMENT = ROOT.parent / "docs" / "benchmarks" / "faults.md"
CASES_PER_SPAWN = 20
BEGIN, END = "<!-- cases: begin -->", "<!-- cases: end -->"


# Without and with tensor parallelism.
CASES = {
    "survivable": (matrix.survivable_cases, matrix.tensor_parallel_cases),
    "late": (matrix.late_cases, matrix.tensor_parallel_late_cases),
    "lethal": (matrix.lethal_cases, matrix.tensor_parallel_lethal_cases),
}


def random_case(rng):
    """A case like those of the table, in another step, layer and for another time."""
    kind = rng.choices(("survivable", "late", "lethal", "outer"), (0.8, 0.05, 0.05, 0.1))[0]
    if kind == "outer":
        return kind, rng.choice(matrix.outer_cases())
    case = rng.choice(rng.choice(CASES[kind])())
    case = replace(case, after=rng.randrange(0, 9))
    fault = case.fault
    if fault is None:
        return kind, case
    if fault.phase in ("dispatch", "experts", "combine"):
        layer = rng.randrange(2)
        last_combine = (fault.phase, fault.action, layer) == ("combine", "skip", 1)
        case = replace(case, spoils_own=case.spoils_own or last_combine)
        fault = replace(fault, layer=layer)
    if kind == "survivable" and fault.action == "delay":
        fault = replace(fault, seconds=rng.uniform(0.0, matrix.DEADLINE_S / 3))
    return kind, replace(case, fault=fault)


def run_batch(path, cases, folder, deadline_s):
    """Run survivable cases in one spawn of each kind of parallelism; return `(case, sentences, results)` of each."""
    kinds = ([case for case in cases if case.tensor_parallel is shares] for shares in (False, True))
    return [outcome for kind in kinds if kind for outcome in run_alike(path, kind, folder, deadline_s)]


def run_alike(path, cases, folder, deadline_s):
    """Run survivable cases of one kind of parallelism in one spawn."""
    try:
        results = run_ranks(
            cases[0].num_ranks, matrix.run_survivable, path, cases, folder, deadline_s, deadline_s=60 + 8 * len(cases)
        )
    except RankFailure as failure:
        return [(cases[0], [f"a rank hung or died in a batch of {len(cases)}: {failure}"], [])]
    rows = zip(cases, zip(*results, strict=True), strict=True)
    return [(case, matrix.verdict(case, ranks, deadline_s), ranks) for case, ranks in rows]


def run_one(path, case, folder):
    """Run a case after which a process is gone."""
    try:
        results = run_ranks(
            case.num_ranks, matrix.run_lethal, path, case, folder, deadline_s=40, may_die=[matrix.GUILTY]
        )
    except RankFailure as failure:
        return case, [f"a rank hung: {failure}"], []
    return case, matrix.verdict(case, results), results


def run_outside(path, case):
    """Run a case in which a rank breaks outside of steps."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = run_ranks(
                case.num_ranks, matrix.run_outer, path, case, folder, deadline_s=40, may_die=[matrix.GUILTY]
            )
        except RankFailure as failure:
            return case, [f"a rank hung: {failure}"], []
    return case, matrix.verdict(case, results, case.outer_deadline_s), results


def kind_of(sentence):
    """What a sentence of a verdict complains of."""
    if "hung" in sentence:
        return "hangs"
    if "wrong output" in sentence or "outputs differ" in sentence:
        return "wrong outputs"
    return "wrong names" if "does not name" in sentence else "other"


def soak(path, seed, num_cases, minutes):
    """Run random cases until one of the limits; return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        return soak_in(folder, path, seed, num_cases, minutes)


def soak_in(folder, path, seed, num_cases, minutes):
    rng = random.Random(seed)
    until = time.monotonic() + 60 * minutes
    kinds = (
        "cases",
        "survivable",
        "late",
        "lethal",
        "outer",
        "tensor-parallel",
        "wrong",
        "hangs",
        "wrong outputs",
        "wrong names",
        "other",
    )
    figures = dict.fromkeys(kinds, 0)
    while figures["cases"] < num_cases and time.monotonic() < until:
        drawn = [random_case(rng) for _ in range(min(CASES_PER_SPAWN, num_cases - figures["cases"]))]
        outcomes = run_batch(path, [case for kind, case in drawn if kind == "survivable"], folder, matrix.DEADLINE_S)
        outcomes += run_batch(path, [case for kind, case in drawn if kind == "late"], folder, matrix.SHORT_DEADLINE_S)
        outcomes += [run_one(path, case, folder) for kind, case in drawn if kind == "lethal"]
        outcomes += [run_outside(path, case) for kind, case in drawn if kind == "outer"]
        for kind, case in drawn:
            figures[kind] += 1
            figures["tensor-parallel"] += case.tensor_parallel
        figures["cases"] += len(drawn)
        for case, sentences, _ in outcomes:
            figures["wrong"] += bool(sentences)
            for complaint in {kind_of(sentence) for sentence in sentences}:
                figures[complaint] += 1
            if sentences:
                print(f"seed {seed}: {case}: {sentences}", flush=True)
        print(f"seed {seed}: {figures['cases']} cases, {figures['wrong']} wrong, {figures['hangs']} hangs", flush=True)
        for file in Path(folder).glob("*.jsonl"):
            file.unlink()
    return figures


def every_case(path, folder):
    """Run every case of the table once."""
    outcomes = []
    for cases, deadline_s in (
        (matrix.survivable_cases(), matrix.DEADLINE_S),
        (matrix.late_cases(), matrix.SHORT_DEADLINE_S),
    ):
        for start in range(0, len(cases), CASES_PER_SPAWN):
            outcomes += run_batch(path, cases[start : start + CASES_PER_SPAWN], folder, deadline_s)
    return outcomes + [run_one(path, case, folder) for case in matrix.lethal_cases()]


def table(outcomes):
    """The cases and what became of them, as lines of Markdown."""
    lines = ["| what rank 1 does | the others get | rank 1 gets | after, s |", "|---|---|---|---:|"]
    for case, sentences, results in outcomes:
        others = {result["error"] or "right outputs" for rank, result in enumerate(results) if rank != matrix.GUILTY}
        own = results[matrix.GUILTY] if results else None
        happened = next((r["happened"] for r in results if r and r["happened"] is not None), 0.0)
        after = max((r["ended"] - happened for rank, r in enumerate(results) if rank != matrix.GUILTY), default=0.0)
        seconds = f"{after:.1f}" if case.survivors else ""
        gets = "(gone)" if own is None else own["error"] or "right outputs"
        verdict = "" if not sentences else f" WRONG: {sentences}"
        lines.append(f"| {case.name} | {', '.join(sorted(others))}{verdict} | {gets} | {seconds} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=2000, help="of each job")
    parser.add_argument("--jobs", type=int, default=1, help="so many groups of three ranks at once, each with its seed")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--write-table", action="store_true", help="run every case once and write the table")
    parser.add_argument("--protocol", action="store_true", help="also explore the large settings of the protocol")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(make_tiny(Path(folder, "tiny"), num_layers=2, num_experts=12))
        if options.write_table:
            outcomes = every_case(path, folder)
            text = DOCUMENT.read_text(encoding="utf-8")
            before, after = text.split(BEGIN)[0], text.split(END)[1]
            DOCUMENT.write_text("\n".join([before + BEGIN, *table(outcomes), END]) + after, encoding="utf-8")
            wrong = [(case.name, sentences) for case, sentences, _ in outcomes if sentences]
            figures = {"cases": len(outcomes), "wrong": len(wrong), "which": wrong}
        else:
            started = time.monotonic()
            seeds = range(options.seed, options.seed + options.jobs)
            with ThreadPoolExecutor(options.jobs) as pool:
                jobs = pool.map(lambda seed: soak(path, seed, options.cases, options.minutes), seeds)
                totals = Counter()
                for job in jobs:
                    totals.update(job)
            figures = {"seeds": [*seeds], **totals}
            figures["minutes"] = round((time.monotonic() - started) / 60, 1)
    if options.protocol:
        figures["states"] = {}
        for name, setting in {**protocol.SETTINGS, **protocol.LARGE_SETTINGS}.items():
            figures["states"][name] = protocol.check(setting)
            print(name, *figures["states"][name], flush=True)
    print(json.dumps(figures))
    return int(figures["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
