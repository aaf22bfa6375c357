"""The benchmarks of `lockstep serve` run, and what they measure is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("transformers", "starlette", "uvicorn", "httptools"):
    pytest.importorskip(name)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def shown_by(name, *arguments):
    """The JSON documents that a benchmark prints."""
    command = [sys.executable, BENCHMARKS / name, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_cost_of_the_face(processes):
    arguments = ("--streams", 4, "--tokens-per-s", 200, "--seconds", 1, "--api-processes", processes)
    (found,) = shown_by("bench_serve_face.py", *arguments)
    assert found["right"] and found["server_us"] > 0 and (found["api_us"] > 0) == (processes > 1)


@pytest.mark.ranks(2)
def test_throughput_at_several_loads():
    """Also of more requests than there are slots, from two processes of clients, and at a rate."""
    arguments = ("--data-parallel-size", 2, "--max-num-seqs", 2, "--count", 6, "--pairs", 1, "--loads", 1, 8)
    arguments += ("--rates", 60, "--seconds", 1)
    about, *loads = shown_by("bench_serve.py", "--throughput", "--device", "cpu", "--clients", 2, *arguments)
    assert (about["ranks"], about["requests_alone"], about["with_equal_tokens"]) == (2, 4, 4)
    *bursts, steady = loads
    assert [(one["requests_at_once"], one["same_texts"], one["pairs"]) for one in bursts] == [(1, 1, 1), (8, 8, 1)]
    assert steady["offered_tokens_per_s"] == 60 and steady["same_texts"] == steady["texts"] == steady["requests"] > 3
    for load in loads:
        for how in ("engine", "http"):
            assert load[how]["tokens_per_s"] > 0
            assert load[how]["first_token_s"]["p99"] >= load[how]["first_token_s"]["p50"] > 0
            assert load[how]["per_token_s"]["p50"] > 0
