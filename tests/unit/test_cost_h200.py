"""The shipped H200 constants are those that the stored measurements give, and say again what was measured."""

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


def test_shipped_constants_are_those_of_the_results(fit_h200):
    assert fit_h200.constants_of(48) == COST_CONSTANTS["h200"]


def test_measured_decode_steps_are_met_within_6_percent(fit_h200):
    tokens, context, measured = fit_h200.decode_steps()
    assert tokens.shape == (6, 2)
    assert fit_h200.predicted(fit_h200.constants_of(8), tokens, context) == pytest.approx(measured, rel=0.06)


def test_measured_exchanges_and_experts_are_met(fit_h200):
    chunk_us, row_us = fit_h200.exchange()
    assert chunk_us + row_us == pytest.approx(13.63)  # one row per rank
    assert chunk_us + 4096 * row_us == pytest.approx(204.01)
    weights_us, expert_row_us = fit_h200.experts()
    assert weights_us + 8 * 64 * expert_row_us == pytest.approx(232.3)  # 64 rows for each of 64 experts
