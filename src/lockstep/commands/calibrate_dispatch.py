"""`lockstep bench calibrate --dispatch`: measure, fit and store what dispatch and combine take on this machine."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from lockstep.commands.calibrate import check_replaceable
from lockstep.commands.dispatch_times import measure
from lockstep.dispatch.constants import DispatchConstants, Exchange, fit, machine_name, stored_path
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.runner.launcher import launch
from lockstep.runner.options import RANKS_PER_CORE

_SAMPLES = 9  # timed calls of each case
_LIMIT_S = 120.0
_PRELOAD = ("lockstep.commands.dispatch_times",)  # of the ranks' server; not Transformers, which takes long to import


def execute_dispatch_calibration(num_ranks: int, out: Path | None, as_json: bool) -> int:
    """Measure, store the constants and show how well they describe the times; return the exit status.

    Args:
        num_ranks: local ranks, on GPUs if there are so many, otherwise on the CPU.
        out: file for the constants; None for this machine's place (`lockstep.dispatch.constants.stored_path`).
        as_json: print one JSON document instead of the table.

    Raises:
        ConfigurationError: more ranks than are started on one host, or a file that is not to be overwritten.
        LockstepError: a rank failed.
    """
    most_ranks = RANKS_PER_CORE * (os.cpu_count() or 1)
    if num_ranks > most_ranks:
        raise ConfigurationError(
            f"data_parallel_size must be <= {most_ranks}, {RANKS_PER_CORE} for each core of this host, got {num_ranks}"
        )
    device_type = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= num_ranks else "cpu"
    path = out or stored_path(device_type)
    if out:
        check_replaceable(out, lambda: DispatchConstants.load(out))
    measured: list[tuple[str, Exchange, float]]
    try:
        measured = launch(num_ranks, measure, device_type, _SAMPLES, limit_s=_LIMIT_S, preload=_PRELOAD)
    except LockstepError as error:
        raise LockstepError(f"{error}; `lockstep env` tries the backends one by one") from error
    by_backend: dict[str, list[tuple[Exchange, float]]] = {}
    for name, exchange, us in measured:
        by_backend.setdefault(name, []).append((exchange, us))
    constants = DispatchConstants(
        {name: fit(name, times) for name, times in by_backend.items()},
        f"measured over {num_ranks} ranks of {machine_name(device_type)}",
    )
    errors = {
        name: sorted(abs(constants.backends[name].predict_us(name, exchange) / us - 1) for exchange, us in times)
        for name, times in by_backend.items()
    }
    constants.save(path)
    median_error = {name: round(values[len(values) // 2], 3) for name, values in errors.items()}
    if as_json:
        numbers = {name: asdict(one) for name, one in constants.backends.items()}
        document = {"source": constants.source, "constants": numbers, "median_error": median_error, "file": str(path)}
        sys.stdout.write(json.dumps(document) + "\n")
        return 0
    sys.stdout.write(f"{constants.source}: dispatch and combine, us\n")
    for name, one in constants.backends.items():
        sys.stdout.write(
            f"  {name:<10} {one.latency_us:,.1f} + {one.row_us:.3g} per row + {one.dispatch_us_per_mb:,.3g} per MB to "
            f"experts + {one.combine_us_per_mb:,.3g} per MB back + {one.total_us_per_mb:,.3g} per MB of all ranks + "
            f"{one.first_us_per_mb:,.3g} per MB of the first 2; "
            f"half of the {len(by_backend[name])} times within {100 * median_error[name]:.0f} %\n"
        )
    use = "used where LOCKSTEP_DISPATCH_CONSTANTS names it" if out else "dispatcher `auto` chooses by them from now on"
    sys.stdout.write(f"constants: {path}; {use}\n")
    return 0
