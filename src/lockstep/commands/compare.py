"""Two runs side by side: figures, where the time went, and the first step in which they did something else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.steplog.files import read_parquet_columns
from lockstep.steplog.table import StepTable, loss_figures
from lockstep.workload.synthetic import percentile


def compare_runs(a: Path, b: Path) -> dict[str, Any]:
    """Compare the folders of two runs or simulations.

    Returns:
        `a`, `b`: the figures of each by name; `clock`: of each, `steps` or `wall`, None where it is not recorded;
        `first_different_step`: the first step in which a rank had other counts of prompt or generated tokens, None
        where all are equal; `different_outputs`: how many requests of both generated other tokens, None where tokens
        were not recorded.

    Raises:
        ConfigurationError: if a folder has no step log.
    """
    tables = [_steps(folder) for folder in (a, b)]
    tokens = [_tokens(folder) for folder in (a, b)]
    different: int | None = None
    if tokens[0] and tokens[1]:
        shared = tokens[0].keys() & tokens[1].keys()
        different = sum(tokens[0][request] != tokens[1][request] for request in shared)
    return {
        "a": {"folder": str(a), **_figures(tables[0], a)},
        "b": {"folder": str(b), **_figures(tables[1], b)},
        "clock": {"a": _clock(a), "b": _clock(b)},
        "first_different_step": _first_difference(*tables),
        "different_outputs": different,
    }


def _steps(folder: Path) -> StepTable:
    from lockstep.steplog.files import read_step_log

    if (folder / "steps.parquet").is_file():
        return StepTable.from_parquet(folder / "steps.parquet")
    if (folder / "steps.jsonl").is_file():
        return StepTable.from_records(read_step_log(folder / "steps.jsonl").records)
    raise ConfigurationError(f"{folder} is not the folder of a run: it has neither steps.jsonl nor steps.parquet")


def _figures(table: StepTable, folder: Path) -> dict[str, float]:
    counts = ("real_rows", "prefill_tokens", "decode_tokens", "dummy_rows", "padding_rows")
    figures: dict[str, float] = {
        "ranks": table.num_ranks,
        "steps": table.num_steps,
        "duration_s": float(table.duration_s.sum()),
        **{name: int(getattr(table, name).sum()) for name in counts},
    }
    loss = loss_figures(table.lost_by_cause())
    figures["lost_fraction"] = loss["lost_fraction"]
    figures.update({f"lost.{cause}": share for cause, share in loss["lost"].items() if cause != "no_requests"})
    figures["no_requests_fraction"] = loss["no_requests_fraction"]
    for name, values in _latencies(folder).items():
        if ordered := sorted(float(value) for value in values if _is_number(value)):
            figures[f"{name}_p50"], figures[f"{name}_p99"] = percentile(ordered, 0.5), percentile(ordered, 0.99)
    return figures


def _latencies(folder: Path) -> dict[str, Sequence[Any]]:
    names = ("ttft_s", "tpot_s")
    path = folder / "requests.parquet"
    if path.is_file():
        columns = read_parquet_columns(path, names)
        return {name: columns[name].tolist() for name in names}
    outputs = _outputs(folder)
    return {name: [output.get(name) for output in outputs] for name in names}


def _outputs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "outputs.jsonl"
    if not path.is_file():
        return []
    # An interrupted run may have torn the last line.
    lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            output = json.loads(line)
            if not isinstance(output, dict) or not isinstance(output.get("request_id"), int):
                raise ValueError
            found.append(output)
        except (ValueError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                raise ConfigurationError(
                    f"{path}: line {number} is not a request's output: expected a JSON object with a request_id"
                ) from None
    return found


def _clock(folder: Path) -> str | None:
    try:
        clock = json.loads((folder / "summary.json").read_bytes())["clock"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a simulation, or a run of an earlier version
    return clock if clock in ("steps", "wall") else None


def _tokens(folder: Path) -> dict[int, Any]:
    return {output["request_id"]: output["tokens"] for output in _outputs(folder) if "tokens" in output}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first_difference(a: StepTable, b: StepTable) -> int | None:
    steps = min(a.num_rows, b.num_rows)
    if a.num_ranks != b.num_ranks:
        return 0
    differs = (a.prefill_tokens[:steps] != b.prefill_tokens[:steps]) | (
        a.decode_tokens[:steps] != b.decode_tokens[:steps]
    )
    rows = np.flatnonzero(differs.any(axis=1))
    if len(rows):
        return int(a.step[rows[0]])
    return None if a.num_rows == b.num_rows else steps
