"""What `lockstep simulate` does around the simulations: progress, table, files, report; its comparison with a run."""

from __future__ import annotations

import csv
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.commands.calibrate import read_columns
from lockstep.commands.folder import output_folder
from lockstep.report.figures import share
from lockstep.report.html import write_report
from lockstep.report.perfetto import write_trace
from lockstep.report.tables import print_settings, print_validation
from lockstep.report.terminal import Terminal, progress
from lockstep.simulation.cost import CostConstants
from lockstep.simulation.replay import read_replay
from lockstep.simulation.simulator import SimulationConfig, SimulationResult, simulate
from lockstep.simulation.sweep import BEST_RULE, SETTING_NAMES, Grid, best, setting, sweep
from lockstep.simulation.validation import join_runs, validate
from lockstep.steplog.files import StepColumns
from lockstep.steplog.record import StepLogRecord
from lockstep.workload import Trace

_TRACE_STEPS = 2000


@dataclass(frozen=True)
class SimulateCommand:
    """What the command line asked for.

    Attributes:
        limits: `ttft_p99_s`, `tpot_p99_s`, `queue_p99_s` of the setting to be named best; None for no limit.
        out: folder to write, empty for none; `overwrite` replaces an earlier simulation in it.
        workers: processes; None for one per core.
        arguments: the command line, for the report.
    """

    trace: Trace
    grid: Grid
    base: SimulationConfig
    limits: Mapping[str, float | None] = field(default_factory=dict)
    out: str = ""
    overwrite: bool = False
    as_json: bool = False
    workers: int | None = None
    arguments: Sequence[str] = ()


def execute(command: SimulateCommand) -> int:
    """Simulate all settings, print and write what came out.

    Returns:
        The exit status: 0, or 1 where no setting keeps to the limits.
    """
    console = Terminal(stderr=True)
    configs = command.grid.configs(command.base)
    for config in configs:
        config.scheduler.check_fits(command.trace.requests)
    with ExitStack() as stack:
        out = stack.enter_context(output_folder(command.out, command.overwrite)) if command.out else None
        if command.trace.left_out:
            console.print(command.trace.left_out, style="yellow", soft_wrap=True)
        started = time.perf_counter()
        count = "1 setting" if len(configs) == 1 else f"{len(configs)} settings"
        with progress(console, f"simulating {count}", len(configs)) as show:
            summaries = sweep(command.trace.requests, configs, command.workers, show)
        chosen = best(summaries, **command.limits)
        document: dict[str, Any] = {
            "workload": command.trace.source,
            "requests": len(command.trace.requests),
            "malformed_lines": command.trace.num_malformed,
            "cost": command.base.cost.source or "given",
            "wall_s": round(time.perf_counter() - started, 3),
            "limits": dict(command.limits),
            "best": chosen,
            "best_rule": BEST_RULE,
            "settings": [{**setting(config), **summary} for config, summary in zip(configs, summaries, strict=True)],
        }
        if command.as_json:
            sys.stdout.write(json.dumps(document) + "\n")
        else:
            print_settings(document["settings"], chosen, command.limits, document["cost"], BEST_RULE)
        if out is not None:
            with progress(console, f"writing {out}", 1) as show:
                _write(command, out, document, chosen or 0, show)
            if not command.as_json:
                Terminal().print(f"report: {out / 'report.html'}", soft_wrap=True)
    return 1 if chosen is None else 0


def execute_validation(run_folders: Sequence[Path], cost: CostConstants, as_json: bool) -> int:
    """Compare recorded runs with what the cost formula predicts of their steps; print it and return the exit status.

    Of runs that did the same steps, each step's median time counts.
    """
    result = validate(join_runs([read_columns(folder) for folder in run_folders]), cost)
    name = ", ".join(str(folder) for folder in run_folders)
    if as_json:
        sys.stdout.write(json.dumps({"run": name, "cost": cost.source, **result}) + "\n")
    else:
        print_validation(name, cost.source, result)
    return 0


def execute_replay(run_folder: Path, cost: CostConstants, as_json: bool) -> int:
    """Plan a recorded run again and compare it with what was executed; return 0, or 1 where they differ."""
    replay = read_replay(run_folder, cost)
    summary, difference = replay.run()
    values = {**setting(replay.config), **summary}
    if as_json:
        sys.stdout.write(json.dumps({"run": str(run_folder), "difference": difference or None, **values}) + "\n")
        return 1 if difference else 0
    print_settings([values], 0, {}, cost.source or "given", BEST_RULE)
    told = difference or f"executed equals planned in all {summary['steps']:,} steps"
    Terminal().print(told, style="red" if difference else "green", soft_wrap=True)
    return 1 if difference else 0


def _write(
    command: SimulateCommand, out: Path, document: dict[str, Any], chosen: int, on_progress: Callable[[float], None]
) -> None:
    import pyarrow

    (out / "settings.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    configs = command.grid.configs(command.base)
    names, config = _names([setting(item) for item in configs]), configs[chosen]
    shown = [{key: value for key, value in item.items() if key != "per_rank"} for item in document["settings"]]
    rows = [_flat(item) for item in shown]
    with (out / "settings.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _write_parquet(pyarrow.Table.from_pylist(rows), out / "settings.parquet")
    # The best setting once more, this time with every step written down.
    with StepColumns(out / "steps.parquet") as log:
        result = simulate(command.trace.requests, config, log, on_progress)
    columns = _request_columns(command, result)
    _write_parquet(pyarrow.table(columns), out / "requests.parquet")
    write_trace(out / "trace.json", _first_records(out / "steps.parquet", _TRACE_STEPS * config.num_ranks))
    write_report(
        out / "report.html",
        {**shown[chosen], "workload": document["workload"], "cost": document["cost"]},
        result.steps,
        _request_rows(columns),
        _compared(document, names) if len(names) > 1 else (),
        title=f"Simulation of {Path(command.trace.source).name}{f': {names[chosen]}' if len(names) > 1 else ''}",
        command=shlex.join(["lockstep", *command.arguments]),
    )


def _write_parquet(table: Any, path: Path) -> None:
    import pyarrow.parquet

    with path.open("wb") as file:  # PyArrow takes some names for addresses, and no name that is not UTF-8
        pyarrow.parquet.write_table(table, file)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested figures as one row: `ttft_s.p99` and so on."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        row.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return row


def _request_columns(command: SimulateCommand, result: SimulationResult) -> dict[str, Any]:
    requests = command.trace.requests
    return {
        "request_id": [request.request_id for request in requests],
        "rank": result.rank,
        "arrival_s": [request.arrival_s for request in requests],
        "num_prompt_tokens": [request.num_prompt_tokens for request in requests],
        "num_new_tokens": [request.max_new_tokens for request in requests],
        "queue_s": result.queue_s,
        "ttft_s": result.ttft_s,
        "tpot_s": result.tpot_s,
    }


def _request_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in columns if name != "arrival_s"]
    # A request of one token has no time per further token: NaN there, None here.
    values = [[None if value != value else value for value in columns[name]] for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _first_records(path: Path, count: int) -> list[StepLogRecord]:
    import pyarrow.parquet

    records: list[StepLogRecord] = []
    with path.open("rb") as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=min(count, 65_536)):
            records.extend(StepLogRecord(**row) for row in batch.to_pylist())
            if len(records) >= count:
                break
    return records[:count]


def _names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a short name of each setting: only what differs between them."""
    varying = [name for name in settings[0] if len({str(item[name]) for item in settings}) > 1]
    words = dict(zip(SETTING_NAMES, ("{} ranks", "{}", "delay {}", "budget {}", "chunk {}", "{} rows"), strict=True))
    return [", ".join(words[name].format(item[name]) for name in varying) or "the setting" for item in settings]


def _compared(document: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    settings = document["settings"]
    groups = _names([{name: item[name] for name in SETTING_NAMES if "delay" not in name} for item in settings])
    return [
        {
            "name": names[index],
            "group": groups[index],
            "label": f"delay {item['max_prefill_delay_steps']}",
            "x": item["ttft_s"]["p99"],
            "y": 100 * item["lost_fraction"],
            "best": index == document["best"],
            "columns": {
                "setting": names[index],
                "tokens/s": f"{item['tokens_per_s']:,.0f}",
                "lost": share(item["lost_fraction"]),
                "no requests": share(item["no_requests_fraction"]),
                **{
                    name.replace("_", " "): f"{item[name]:,}"
                    for name in ("dummy_rows", "padding_rows")
                    if any(other[name] for other in settings)
                },
                "first token: half in": f"{item['ttft_s']['p50']:.3f} s",
                "99 % in": f"{item['ttft_s']['p99']:.3f} s",
                "per token: half in": f"{1e3 * item['tpot_s']['p50']:.1f} ms",
                "99 % in ": f"{1e3 * item['tpot_s']['p99']:.1f} ms",
                "mean queue": f"{1e3 * item['queue_s']['mean']:.0f} ms",
            },
        }
        for index, item in enumerate(settings)
    ]
