"""The shipped H200 constants are those that the newest stored measurements give, and say again what was measured."""

import importlib.util
from pathlib import Path

import pytest

from lockstep.simulation.cost import COST_CONSTANTS


@pytest.fixture(scope="module")
def fit_h200():
    path = Path(__file__).parents[2] / "benchmarks" / "fit_h200.py"
    spec = importlib.util.spec_from_file_location("fit_h200", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_constants_are_those_of_the_newest_results(fit_h200):
    assert fit_h200.constants_of(48) == COST_CONSTANTS["h200"], "run benchmarks/fit_h200.py"


def test_measured_decode_steps_are_met_within_1_percent(fit_h200):
    tokens, context, measured = fit_h200.decode_steps(48)
    assert len(tokens) >= 6
    assert fit_h200.predicted(fit_h200.constants_of(48), tokens, context) == pytest.approx(measured, rel=0.01)


def test_measured_exchanges_and_experts_are_met(fit_h200):
    chunk_us, row_us = fit_h200.exchange()
    measured = fit_h200.exchange_times()
    for rows in (1, 4096):
        assert chunk_us + rows * row_us == pytest.approx(measured[rows, rows])
    weights_us, expert_row_us = fit_h200.experts()
    rows = fit_h200.read("experts_h200_*", shape="qwen3-30b-a3b", rows_per_expert=64)
    assert weights_us + 8 * 64 * expert_row_us == pytest.approx(min(row["us"] for row in rows))


def test_the_newest_file_counts(fit_h200, tmp_path):
    names = ("model_h200x2_2026-11-22_f.jsonl", "model_h200x2_2026-11-23_a.jsonl", "model_h200x2_2026-11-23_b.jsonl")
    for name, more in zip(names, ("", ', "decoded": 15.5', ""), strict=True):
        (tmp_path / name).write_text('{"layers": 8' + more + "}\n")
    assert [row["file"] for row in fit_h200.read("model_h200x2_*", tmp_path, layers=8)] == [names[1]]
