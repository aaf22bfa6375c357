"""`lockstep bench calibrate`: cost constants for the machine at hand, from runs on it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.coordination.step_log import StepLogRecord, read_step_log
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.simulation.cost import CostConstants, fit
from lockstep.simulation.sweep import cost_columns, validate

_WORKLOAD = ("--workload", "synthetic", "--rate-scale", "4", "--length-scale", "0.1", "--max-prompt-tokens", "600")


def calibrate(
    run_folders: Sequence[Path], model: str, data_parallel_size: int, requests: int
) -> tuple[CostConstants, dict[str, Any]]:
    """Fit cost constants to recorded runs, or to a run that is made for it.

    Args:
        run_folders: folders that `lockstep run` wrote, all with the same number of ranks; empty to run now.
        model: what to run then.
        data_parallel_size: ranks of that run.
        requests: its requests.

    Returns:
        The constants, and how well they describe the runs that they were fitted to (see `validate`).

    Raises:
        ConfigurationError: if the logs cannot be used together.
        LockstepError: if the run failed.
    """
    if run_folders:
        records = [read_step_log(folder / "steps.jsonl").records for folder in run_folders]
        source = "fitted to " + ", ".join(str(folder) for folder in run_folders)
    else:
        records = [_run(model, data_parallel_size, requests)]
        processor = platform.processor() or platform.machine()
        source = f"fitted to a run of {model} over {data_parallel_size} ranks on {platform.node()} ({processor})"
    if len({len({record.rank for record in run}) for run in records}) > 1:
        raise ConfigurationError("runs to be fitted together must have the same number of ranks")
    parts = [cost_columns(run) for run in records]
    columns: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if columns.pop("filler_rows").any():
        raise ConfigurationError("a cost is fitted to runs without dummy or padding rows: use another dispatcher")
    constants = fit(**columns, source=source)
    # Steps of several runs, numbered on, so that they can be looked at together.
    joined: list[StepLogRecord] = []
    for run in records:
        first = joined[-1].step + 1 if joined else 0
        joined.extend(replace(record, step=record.step + first) for record in run)
    return constants, {name: value for name, value in validate(joined, constants).items() if not name.endswith("_us")}


def execute_calibration(
    run_folders: Sequence[Path], model: str, data_parallel_size: int, requests: int, out: Path, as_json: bool
) -> int:
    """Calibrate, write the constants and show how well they fit; return the exit status."""
    from lockstep.report.tables import print_validation

    constants, fitted = calibrate(run_folders, model, data_parallel_size, requests)
    constants.save(out)
    if as_json:
        sys.stdout.write(json.dumps({"constants": asdict(constants), "fit": fitted, "file": str(out)}) + "\n")
        return 0
    print_validation("the runs that were fitted", constants.source, fitted)
    for name, value in asdict(constants).items():
        if name != "source":
            sys.stdout.write(f"{name:>20} {value:,.4g} us\n")
    sys.stdout.write(f"constants: {out}; use them with --cost {out}\n")
    return 0


def _run(model: str, data_parallel_size: int, requests: int) -> list[StepLogRecord]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [
            *(sys.executable, "-m", "lockstep.cli", "run", "--no-verify", "--json", "--out", str(out)),
            *("--model", model, "--data-parallel-size", str(data_parallel_size), "--requests", str(requests)),
            *_WORKLOAD,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None, text=True, check=False)
        if done.returncode:
            raise LockstepError(f"the run to be fitted ended with exit status {done.returncode}")
        return read_step_log(out / "steps.jsonl").records
