"""`lockstep compare`: two runs side by side, and the first step in which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_lines
from lockstep.steplog.files import NEEDED_FIELDS, read_parquet_columns, read_step_log
from lockstep.steplog.record import FIELDS
from lockstep.steplog.table import StepTable, loss_figures
from lockstep.workload.synthetic import percentile


def compare_runs(a: Path, b: Path) -> dict[str, Any]:
    """Compare the folders of two runs or simulations; None means not recorded, or no difference."""
    tables = [_steps(folder) for folder in (a, b)]
    outputs = [_outputs(folder) for folder in (a, b)]
    tokens = [{item["request_id"]: item["tokens"] for item in items if "tokens" in item} for items in outputs]
    shared = tokens[0].keys() & tokens[1].keys()
    different = sum(tokens[0][request] != tokens[1][request] for request in shared)
    return {
        "a": {"folder": str(a), **_figures(tables[0], a, outputs[0])},
        "b": {"folder": str(b), **_figures(tables[1], b, outputs[1])},
        "clock": {"a": _clock(a), "b": _clock(b)},
        "first_different_step": _first_difference(*tables),
        "different_outputs": different if all(tokens) else None,
    }


def _steps(folder: Path) -> StepTable:
    if (folder / "steps.parquet").is_file():
        return StepTable.from_columns(read_parquet_columns(folder / "steps.parquet", NEEDED_FIELDS, FIELDS))
    if (folder / "steps.jsonl").is_file():
        return StepTable.from_records(read_step_log(folder / "steps.jsonl"))
    raise ConfigurationError(f"{folder} is not the folder of a run: it has neither steps.jsonl nor steps.parquet")


def _figures(table: StepTable, folder: Path, outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    counts = ("real_rows", "prefill_tokens", "decode_tokens", "dummy_rows", "padding_rows")
    loss = loss_figures(table.lost_by_cause())
    figures: dict[str, float] = {
        "ranks": table.num_ranks,
        "steps": table.num_steps,
        "duration_s": float(table.duration_s.sum()),
        **{name: int(getattr(table, name).sum()) for name in counts},
        "lost_fraction": loss["lost_fraction"],
        **{f"lost.{cause}": share for cause, share in loss["lost"].items() if cause != "no_requests"},
        "no_requests_fraction": loss["no_requests_fraction"],
    }
    names = ("ttft_s", "tpot_s")
    latencies: dict[str, Any] = {name: [output.get(name) for output in outputs] for name in names}
    if (folder / "requests.parquet").is_file():
        latencies = read_parquet_columns(folder / "requests.parquet", names)
    for name, values in latencies.items():
        if ordered := sorted(float(value) for value in values if _is_number(value)):
            figures[f"{name}_p50"], figures[f"{name}_p99"] = percentile(ordered, 0.5), percentile(ordered, 0.99)
    return figures


def _outputs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "outputs.jsonl"
    return json_lines(path, "a request's output", _output) if path.is_file() else []


def _output(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("request_id"), int):
        raise ValueError(f"request_id is {row.get('request_id')!r:.60}, not an integer")
    return row


def _clock(folder: Path) -> str | None:
    try:
        clock = json.loads((folder / "summary.json").read_bytes())["clock"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a simulation, or a run of an earlier version
    return clock if clock in ("steps", "wall") else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _first_difference(a: StepTable, b: StepTable) -> int | None:
    if a.num_ranks != b.num_ranks:
        return 0
    steps = min(a.num_rows, b.num_rows)
    counts = ("prefill_tokens", "decode_tokens")
    differs = sum(getattr(a, name)[:steps] != getattr(b, name)[:steps] for name in counts)
    rows = np.flatnonzero(np.any(differs, axis=1))
    if len(rows):
        return int(a.step[rows[0]])
    return None if a.num_rows == b.num_rows else steps
