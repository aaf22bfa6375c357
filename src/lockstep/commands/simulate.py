"""`lockstep simulate`: progress, table, files and report of simulations; comparison with a recorded run."""

from __future__ import annotations

import csv
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lockstep.commands.calibrate import read_columns
from lockstep.commands.folder import output_folder
from lockstep.moe.placement import ExpertLoad, Placement
from lockstep.report.figures import setting_cells, share
from lockstep.report.html import write_report
from lockstep.report.perfetto import write_trace
from lockstep.report.tables import print_settings, print_validation
from lockstep.report.terminal import Terminal, progress
from lockstep.simulation.config import SimulationConfig, SimulationResult
from lockstep.simulation.cost import CostConstants, join_runs, validate
from lockstep.simulation.replay import read_replay
from lockstep.simulation.simulator import simulate
from lockstep.simulation.sweep import BEST_RULE, SETTINGS, Grid, best, setting, sweep
from lockstep.steplog.files import StepColumns, read_step_columns
from lockstep.workload import Trace

_TRACE_STEPS = 2000
_PLACEMENT_GAIN = (
    "{ranks} ranks: the busiest has {even:.2f} times the mean of the experts' work, {placed:.2f} times once placed in "
    "{slots} slots: {saved} less time in MoE layers that are bound by rows"
)


def placement_gains(path: str, ranks: Sequence[int], num_redundant_experts: int) -> list[dict[str, Any]]:
    """Return the busiest rank's work over the mean for each number of ranks, with even and with placed experts."""
    load = ExpertLoad.read(path)
    gains = []
    for num_ranks in ranks:
        even = Placement.even(len(load.pairs), len(load.pairs[0]), num_ranks).busiest_over_mean(load.pairs)
        placed = load.place(load.model, num_ranks, num_redundant_experts)
        after = placed.busiest_over_mean(load.pairs)
        gains.append({"ranks": num_ranks, "slots": placed.num_slots, "even": round(even, 4), "placed": round(after, 4)})
    return gains


def execute(
    trace: Trace, grid: Grid, base: SimulationConfig, limits: Mapping[str, float | None], *, out: str = "",
    overwrite: bool = False, as_json: bool = False, workers: int | None = None, arguments: Sequence[str] = (),
    placement: Sequence[Mapping[str, Any]] = (),
) -> int:  # fmt: skip
    """Simulate all settings, print and write the results; return 0, or 1 if no setting meets the limits."""
    console = Terminal(stderr=True)
    configs = grid.configs(base)
    for config in configs:
        config.scheduler.check_fits(trace.requests)
    with ExitStack() as stack:
        folder = stack.enter_context(output_folder(out, overwrite)) if out else None
        if trace.left_out:
            console.print(trace.left_out, style="yellow", soft_wrap=True)
        started = time.perf_counter()
        count = "1 setting" if len(configs) == 1 else f"{len(configs)} settings"
        with progress(console, f"simulating {count}", len(configs)) as show:
            summaries = sweep(trace.requests, configs, workers, show)
        chosen = best(summaries, **limits)
        document: dict[str, Any] = {
            "workload": trace.source,
            "requests": len(trace.requests),
            "malformed_lines": trace.num_malformed,
            "cost": base.cost.source or "given",
            "wall_s": round(time.perf_counter() - started, 3),
            "limits": dict(limits),
            "best": chosen,
            "best_rule": BEST_RULE,
            **({"placement": list(placement)} if placement else {}),
            "settings": [{**setting(config), **summary} for config, summary in zip(configs, summaries, strict=True)],
        }
        if as_json:
            sys.stdout.write(json.dumps(document) + "\n")
        else:
            print_settings(document["settings"], chosen, limits, document["cost"])
            for gain in placement:
                Terminal().print(_PLACEMENT_GAIN.format(**gain, saved=share(1 - gain["placed"] / gain["even"])))
        if folder is not None:
            with progress(console, f"writing {folder}", 1) as show:
                _write(folder, document, trace, configs, shlex.join(["lockstep", *arguments]), show)
            if not as_json:
                Terminal().print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 1 if chosen is None else 0


def execute_validation(run_folders: Sequence[Path], cost: CostConstants, as_json: bool) -> int:
    """Compare recorded steps with the cost formula's predictions; print the result and return the exit status."""
    result = validate(join_runs([read_columns(folder) for folder in run_folders]), cost)
    name = ", ".join(str(folder) for folder in run_folders)
    if as_json:
        sys.stdout.write(json.dumps({"run": name, "cost": cost.source, **result}) + "\n")
    else:
        print_validation(name, cost.source, result)
    return 0


def execute_replay(run_folder: Path, cost: CostConstants, as_json: bool) -> int:
    """Plan a recorded run again and compare it with the execution; return 0, or 1 if they differ."""
    replay = read_replay(run_folder, cost)
    summary, difference = replay.run()
    values = {**setting(replay.config), **summary}
    if as_json:
        sys.stdout.write(json.dumps({"run": str(run_folder), "difference": difference or None, **values}) + "\n")
    else:
        print_settings([values], 0, {}, cost.source or "given")
        told = difference or f"executed equals planned in all {summary['steps']:,} steps"
        Terminal().print(told, style="red" if difference else "green", soft_wrap=True)
    return 1 if difference else 0


def _write(
    out: Path, document: dict[str, Any], trace: Trace, configs: Sequence[SimulationConfig], command: str,
    on_progress: Callable[[float], None],
) -> None:  # fmt: skip
    import pyarrow

    (out / "settings.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    names, chosen = _names(document["settings"]), document["best"] or 0
    shown = [{key: value for key, value in item.items() if key != "per_rank"} for item in document["settings"]]
    table = pyarrow.Table.from_pylist(shown).flatten()  # nested figures as `ttft_s.p99` and so on
    with (out / "settings.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table.column_names)
        writer.writeheader()
        writer.writerows(table.to_pylist())
    _write_parquet(table, out / "settings.parquet")
    # The best setting once more, this time recording every step.
    with StepColumns(out / "steps.parquet") as log:
        result = simulate(trace.requests, configs[chosen], log, on_progress)
    columns = _request_columns(trace, result)
    _write_parquet(pyarrow.table(columns), out / "requests.parquet")
    first = read_step_columns(out / "steps.parquet", _TRACE_STEPS * configs[chosen].num_ranks)
    write_trace(out / "trace.json", first)
    several = len(names) > 1
    write_report(
        out / "report.html",
        {**shown[chosen], "workload": document["workload"], "cost": document["cost"]},
        result.steps,
        _request_rows(columns),
        _compared(document, names) if several else (),
        title=f"Simulation of {Path(trace.source).name}{f': {names[chosen]}' if several else ''}",
        command=command,
    )


def _write_parquet(table: Any, path: Path) -> None:
    import pyarrow.parquet

    with path.open("wb") as file:  # PyArrow mistakes some names for addresses, and refuses names that are not UTF-8
        pyarrow.parquet.write_table(table, file)


def _request_columns(trace: Trace, result: SimulationResult) -> dict[str, Any]:
    return {
        "request_id": [request.request_id for request in trace.requests],
        "rank": result.rank,
        "arrival_s": [request.arrival_s for request in trace.requests],
        "num_prompt_tokens": [request.num_prompt_tokens for request in trace.requests],
        "num_new_tokens": [request.max_new_tokens for request in trace.requests],
        "queue_s": result.queue_s,
        "ttft_s": result.ttft_s,
        "tpot_s": result.tpot_s,
    }


def _request_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in columns if name != "arrival_s"]
    # A request of one token has no time per output token: NaN there, None here.
    values = [[None if value != value else value for value in columns[name]] for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _names(settings: Sequence[Mapping[str, Any]], without: str = "") -> list[str]:
    """Return a short name for each setting: only the options that differ."""
    varying = [name for name in SETTINGS if name != without and len({str(item[name]) for item in settings}) > 1]
    return [", ".join(SETTINGS[name][1].format(item[name]) for name in varying) or "the setting" for item in settings]


def _compared(document: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the settings as the report's points and rows."""
    settings = document["settings"]
    groups, cells = _names(settings, "max_prefill_delay_steps"), setting_cells(settings)
    return [
        {
            "name": names[index],
            "group": groups[index],
            "label": f"delay {item['max_prefill_delay_steps']}",
            "x": item["ttft_s"]["p99"],
            "y": 100 * item["lost_fraction"],
            "best": index == document["best"],
            "columns": {"setting": names[index], **cells[index]},
        }
        for index, item in enumerate(settings)
    ]
