"""A recorded run scheduled again: same requests, ends and settings, compared step by step with what was executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_object
from lockstep.simulation.config import SimulationConfig, Stop
from lockstep.simulation.cost import CostConstants
from lockstep.simulation.simulator import simulate
from lockstep.simulation.sink import COUNTED
from lockstep.steplog.files import read_step_log
from lockstep.steplog.record import StepLogRecord
from lockstep.workload.request import Request, read_block_ids
from lockstep.workload.schedule import SchedulerConfig


@dataclass(frozen=True)
class Replay:
    """A recorded run as input of the simulator."""

    requests: Sequence[Request]
    config: SimulationConfig
    stops: dict[int, Stop]
    executed: Sequence[StepLogRecord]  # one per step and data-parallel rank, in this order

    def run(self) -> tuple[dict[str, Any], str]:
        """Schedule the run again; return the simulation's summary and the first difference in words, if any."""
        parts = [np.zeros((0, len(COUNTED)), np.int64)]

        class Log:
            def write(self, columns: dict[str, Any]) -> None:
                parts.append(np.stack([columns[name] for name in COUNTED], axis=1))

        summary = simulate(self.requests, self.config, Log(), stops=self.stops).summary
        planned = np.concatenate(parts)
        rows = [[getattr(record, name) for name in COUNTED] for record in self.executed]
        executed = np.array(rows, np.int64).reshape(-1, len(COUNTED))
        length = min(len(executed), len(planned))
        for cell, column in np.argwhere(executed[:length] != planned[:length])[:1].tolist():
            step, rank = divmod(cell, self.config.num_ranks)
            differs = f"was {executed[cell, column]} in the run, {planned[cell, column]} is planned"
            return summary, f"step {step}, rank {rank}: {COUNTED[column]} {differs}"
        num_steps = len(self.executed) // self.config.num_ranks
        if summary["steps"] != num_steps:
            return summary, f"the run has {num_steps} steps, {summary['steps']} are planned"
        return summary, ""


def read_replay(run_folder: Path, cost: CostConstants) -> Replay:
    """Read a folder of `lockstep run`; `cost` affects no counts, since requests arrive by step number."""
    for name in ("summary.json", "outputs.jsonl", "steps.jsonl"):
        if not (run_folder / name).is_file():
            raise ConfigurationError(f"{run_folder} is not the folder of a finished run: it has no {name}")
    if any(run_folder.glob("parts/steps-rank*-restart*.jsonl")):
        raise ConfigurationError(f"the ranks of {run_folder} were started again: such a run cannot be planned again")
    path = run_folder / "summary.json"
    summary = json_object(path, path.read_bytes())
    num_ranks = _whole(path, summary, "data_parallel_size", 1)
    tensor_parallel_size = _whole(path, summary, "tensor_parallel_size", 1)
    if summary.get("clock", "steps") != "steps":
        why = "arrivals depended on the machine's speed; use a run with --clock steps"
        raise ConfigurationError(f"{run_folder} was run with --clock {summary['clock']!s:.20}: {why}")
    scheduler = summary.get("scheduler")
    if not isinstance(scheduler, dict):
        raise ConfigurationError(f"{path}: scheduler is missing: this run cannot be planned again")
    try:
        config = SimulationConfig(num_ranks, SchedulerConfig(**scheduler), cost, clock="steps")
    except (ConfigurationError, TypeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    requests, stops = _read_outputs(run_folder / "outputs.jsonl")
    records = read_step_log(run_folder / "steps.jsonl")
    if len(records) % (all_ranks := num_ranks * tensor_parallel_size):
        told = f"{len(records)} records are not the same number of each of {all_ranks} ranks"
        raise ConfigurationError(f"{run_folder / 'steps.jsonl'}: {told}")
    return Replay(requests, config, stops, [record for record in records if record.rank % tensor_parallel_size == 0])


def _read_outputs(path: Path) -> tuple[list[Request], dict[int, Stop]]:
    by_id: dict[int, Request] = {}
    stops: dict[int, Stop] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}: line {number}"
        output = json_object(where, line)
        arrival_s = output.get("arrival_s")
        if isinstance(arrival_s, bool) or not isinstance(arrival_s, int | float) or not 0 <= arrival_s < 1e12:
            raise ConfigurationError(f"{where}: arrival_s must be a number >= 0 and < 1e12, got {arrival_s!r:.60}")
        request_id, num_new_tokens = (_whole(where, output, name, 0) for name in ("request_id", "num_new_tokens"))
        num_prompt_tokens, most = (_whole(where, output, name, 1) for name in ("num_prompt_tokens", "max_new_tokens"))
        if request_id in by_id:
            raise ConfigurationError(f"{where}: request_id {request_id} is there twice")
        if num_new_tokens > most:
            raise ConfigurationError(f"{where}: num_new_tokens is {num_new_tokens}, above max_new_tokens, {most}")
        block_ids = read_block_ids(f"{where}: block_ids", output.get("block_ids"), ConfigurationError)
        by_id[request_id] = Request(request_id, arrival_s, num_prompt_tokens, most, block_ids=block_ids)
        step = None if output.get("stopped_step") is None else _whole(where, output, "stopped_step", 0)
        if step is not None or num_new_tokens < most:
            stops[request_id] = Stop(step, num_new_tokens)
    return [by_id[request_id] for request_id in sorted(by_id)], stops


def _whole(where: object, values: dict[str, Any], name: str, least: int) -> int:
    value = values.get(name)
    if type(value) is not int or not least <= value < 2**31:
        raise ConfigurationError(f"{where}: {name} must be a whole number in {least}..2**31 - 1, got {value!r:.60}")
    return value
