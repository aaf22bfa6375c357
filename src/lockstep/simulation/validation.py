"""Recorded runs as input of the cost formula: step times, repeats combined, and predictions to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.simulation.cost import CostConstants, fit
from lockstep.steplog.record import StepLogRecord

_COUNTS = ("tokens", "decode_tokens", "decode_context", "prefill_context", "num_chunks", "filler_rows")


def cost_columns(records: Sequence[StepLogRecord]) -> dict[str, np.ndarray]:
    """Return a run's step log as `CostConstants.step_times_us` takes it, and `duration_us` of each step.

    A step's time goes from its own agreement to the next one's: there alone are all ranks at the same place.
    """
    ranks = sorted({record.rank for record in records})
    if not records or len(records) % len(ranks):
        raise ConfigurationError(
            f"the step log has {len(records)} records, not the same number of each of {len(ranks)} ranks"
        )

    def grid(name: str) -> np.ndarray:
        return np.array([getattr(record, name) for record in records], np.float64).reshape(-1, len(ranks))

    steps = grid("step")
    torn = (grid("rank") != ranks).any(axis=1) | (steps != steps[:, :1]).any(axis=1)
    if torn.any():
        raise ConfigurationError(
            f"the step log does not have one record of each rank in step {int(steps[torn.argmax(), 0])}"
        )
    if not grid("duration_s").all():
        raise ConfigurationError("the step log has steps without a duration: it is not of a measured run")
    agreement_s = grid("agreement_s")
    following_s = np.vstack([agreement_s[1:], np.zeros(len(ranks))])
    # Ranks without requests agreed in between, and waited for requests: that is no time of the step before.
    following_s[:-1][np.diff(steps[:, 0]) > 1] = 0
    return {
        "tokens": grid("real_rows"),
        "decode_tokens": grid("decode_tokens"),
        "decode_context": grid("decode_context_tokens"),
        "prefill_context": grid("prefill_context_tokens"),
        "num_chunks": grid("num_chunks").max(axis=1),
        "filler_rows": grid("dummy_rows") + grid("padding_rows"),
        "duration_us": 1e6 * (grid("duration_s") - agreement_s + following_s).mean(axis=1),
    }


def join_runs(runs: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the `cost_columns` of several runs; repeats of the same steps are combined by each step's median time."""
    if len({run["tokens"].shape[1] for run in runs}) > 1:
        raise ConfigurationError("runs to be put together must have the same ranks")
    repeats: dict[tuple[bytes, ...], list[dict[str, np.ndarray]]] = {}
    for run in runs:
        repeats.setdefault(tuple(run[name].tobytes() for name in _COUNTS), []).append(run)
    joined = [
        {**group[0], "duration_us": np.median([run["duration_us"] for run in group], axis=0)}
        for group in repeats.values()
    ]
    return {name: np.concatenate([run[name] for run in joined]) for name in runs[0]}


def fit_runs(columns: dict[str, np.ndarray], source: str = "") -> CostConstants:
    """Fit the cost constants to the columns of recorded runs without dummy or padding rows."""
    if columns["filler_rows"].any():
        raise ConfigurationError("a cost is fitted to runs without dummy or padding rows: use another dispatcher")
    counts = {name: columns[name] for name in _COUNTS if name != "filler_rows"}
    return fit(**counts, duration_us=columns["duration_us"], source=source)


def validate(columns: dict[str, np.ndarray], cost: CostConstants) -> dict[str, Any]:
    """Compare measured and predicted step times; errors are relative, those of single steps without sign."""
    predicted, measured = cost.step_times_us(**{name: columns[name] for name in _COUNTS}), columns["duration_us"]
    errors = np.sort(np.abs(predicted / measured - 1))
    return {
        "steps": len(measured),
        "measured_s": float(measured.sum() * 1e-6),
        "predicted_s": float(predicted.sum() * 1e-6),
        "total_error": float(predicted.sum() / measured.sum() - 1),
        "median_step_error": float(np.median(errors)),
        "p90_step_error": float(errors[int(0.9 * (len(errors) - 1))]),
    }
