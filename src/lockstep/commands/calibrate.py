"""`lockstep bench calibrate`: cost constants for this machine, fitted to runs on it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lockstep.errors import ConfigurationError, LockstepError
from lockstep.report.tables import print_validation
from lockstep.simulation.cost import CostConstants, cost_columns, fit, join_runs, validate
from lockstep.steplog.files import read_step_log

_WORKLOAD = ("--workload", "synthetic", "--rate-scale", "4", "--length-scale", "0.1", "--max-prompt-tokens", "600")


def read_columns(run_folder: Path) -> dict[str, np.ndarray]:
    """Return the `cost_columns` of a recorded run's folder."""
    path = run_folder / "steps.jsonl"
    if not path.is_file():
        raise ConfigurationError(f"{run_folder} is not the folder of a recorded run: it has no steps.jsonl")
    return cost_columns(read_step_log(path))


def make_run(out: Path, model: str, data_parallel_size: int, requests: int) -> None:
    """Record a run of a synthetic workload in a folder, in separate processes."""
    command = [
        *(sys.executable, "-m", "lockstep.cli", "run", "--no-verify", "--json", "--out", str(out)),
        *("--model", model, "--data-parallel-size", str(data_parallel_size), "--requests", str(requests)),
        *_WORKLOAD,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LockstepError(f"the run to fit to ended with exit status {done.returncode}")


def execute_calibration(
    run_folders: Sequence[Path], model: str, data_parallel_size: int, requests: int, repeats: int, out: Path,
    as_json: bool, make_run: Callable[[Path, str, int, int], None] = make_run,
) -> int:  # fmt: skip
    """Fit cost constants to recorded or new runs, write them, and show how well they fit; return the exit status."""
    _check_replaceable(out)  # fail before the runs, not after them
    source = "fitted to " + ", ".join(map(str, run_folders))
    runs = [read_columns(folder) for folder in run_folders]
    if not runs:
        where = f"{platform.node()} ({platform.processor() or platform.machine()})"
        source = f"fitted to {repeats} runs of {model} over {data_parallel_size} ranks on {where}"
    for _ in range(0 if runs else repeats):
        with tempfile.TemporaryDirectory() as folder:
            make_run(Path(folder, "run"), model, data_parallel_size, requests)
            runs.append(read_columns(Path(folder, "run")))
    columns = join_runs(runs)
    constants = fit(**columns, source=source)
    fitted = validate(columns, constants)
    constants.save(out)
    if as_json:
        sys.stdout.write(json.dumps({"constants": asdict(constants), "fit": fitted, "file": str(out)}) + "\n")
        return 0
    print_validation("fitted runs", constants.source, fitted)
    for name, value in asdict(constants).items():
        if name != "source":
            sys.stdout.write(f"{name:>20} {value:,.4g}\n")
    sys.stdout.write(f"constants: {out}; use them with --cost {out}\n")
    return 0


def _check_replaceable(out: Path) -> None:
    """Raise `ConfigurationError` where `out` cannot be written, or exists and holds anything but cost constants."""
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ConfigurationError(f"the folder of {out} does not exist")
    if not os.access(parent, os.W_OK):
        raise ConfigurationError(f"the folder of {out} cannot be written")
    if out.exists() or out.is_symlink():
        try:
            CostConstants.load(str(out))
        except ConfigurationError:
            raise ConfigurationError(
                f"{out} is not overwritten: it holds no cost constants; choose another file with --out"
            ) from None
