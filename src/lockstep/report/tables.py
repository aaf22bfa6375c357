"""Tables for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lockstep.report.figures import CLOCK_WORDS, FIGURE_WORDS, headline, setting_cells, share
from lockstep.report.terminal import Terminal
from lockstep.simulation.sweep import BEST_RULE, SETTINGS
from lockstep.steplog.record import StepLogRecord
from lockstep.workload import Trace

_MOST_RANKS = 64
_SAID_WHERE_ANY = {
    "kv_waits": "requests waited because the KV cache was full: in {:,} steps, counted per rank",
    "preempted": "requests preempted because the KV cache was full, and computed again: {:,}",
    "cached_tokens": "prompt tokens taken from the KV cache of earlier requests: {:,}",
    "overrun_rows": "overrun rows, scheduled before their request was known to have ended: {:,}",
    "buffer_limited_steps": "steps split into more, smaller chunks to fit the exchange buffers: {:,}",
}


def print_run(
    summary: Mapping[str, Any], records: Sequence[StepLogRecord], report: Path, console: Terminal | None = None
) -> None:
    """Print what each rank of a run did, and where its `report` is, on stdout."""
    console = console or Terminal()
    filler = [name for name in ("dummy_rows", "padding_rows", "preempted", "overrun_rows") if summary.get(name)]
    headings = ("rank", FIGURE_WORDS["real_rows"], "of prompts", "steps with work", "steps idle")
    title = f"{summary['requests']} requests over {summary['ranks']} ranks, {summary['steps']} steps"
    table = _table(title, (*headings, *(FIGURE_WORDS[name] for name in filler)))
    for rank in range(summary["ranks"]):
        mine = [record for record in records if record.rank == rank]
        busy = sum(record.real_rows > 0 for record in mine)
        real, prompts, *rest = (
            sum(getattr(record, name) for record in mine) for name in ("real_rows", "prefill_tokens", *filler)
        )
        table.add_row(*(f"{cell:,}" for cell in (rank, real, prompts, busy, len(mine) - busy, *rest)))
    console.print(table)
    console.print(headline(summary["ranks"], summary["steps"], summary["requests"], summary))
    console.print(
        f"{summary['generated_tokens']:,} tokens generated in {summary['wall_s']:.1f} s, "
        f"{summary['tokens_per_s']:,.1f} per second"
    )
    if summary.get("cached_tokens"):
        console.print(_SAID_WHERE_ANY["cached_tokens"].format(summary["cached_tokens"]))
    if summary.get("clock") in CLOCK_WORDS:
        console.print(CLOCK_WORDS[summary["clock"]])
    console.print(_verdict(summary))
    console.print(f"report: {report}", soft_wrap=True)


def _verdict(summary: Mapping[str, Any]) -> Text:
    if summary["verified"] is None:
        return Text("not compared with one process")
    if summary["verified"]:
        within = "" if summary["dtype"] == "float32" else ", within the tolerance"
        told = f": all {summary['compared_tokens']:,} tokens are the same as in one process{within}"
        return Text.assemble(("verified", "green"), told)
    told = f": {summary['mismatches']} of {summary['requests']} outputs differ from those of one process"
    return Text.assemble(("NOT verified", "red"), told)


def print_settings(
    settings: Sequence[Mapping[str, Any]], best: int | None, limits: Mapping[str, float | None], cost: str
) -> None:
    """Print simulated settings; `best` is the index of the best one within the limits, None where none meets them."""
    shown = [name for name in SETTINGS if len({str(item[name]) for item in settings}) > 1] or ["data_parallel_size"]
    figures = setting_cells(settings)
    count = "1 setting" if len(settings) == 1 else f"{len(settings)} settings"
    title = f"{settings[0]['requests']:,} requests, {count}; times are p50/p99 in ms"
    table = _table(title, (*(SETTINGS[name][0] for name in shown), *figures[0]), dense=True)
    for index, (item, cells) in enumerate(zip(settings, figures, strict=True)):
        style = "bold green" if index == best else None
        table.add_row(*(str(item[name]) for name in shown), *cells.values(), style=style)
    console = Terminal()
    console.print(table)
    which = "" if len(settings) == 1 else "first setting" if best is None else "best setting"
    told = settings[best or 0]
    if told["ranks"] > 1:
        _print_ranks(console, which, told["per_rank"])
    says = headline(told["ranks"], told["steps"], told["requests"], told)
    console.print(f"{which}: {says}" if which else says)
    console.print(
        "tok/s: tokens of prompts and outputs per second; lost: time of ranks spent waiting for other ranks, on dummy "
        "and padding rows, or on agreeing; no requests: time without any; TTFT: time to first token; TPOT: time per "
        "further token; queue: wait for the first step"
    )
    console.print(f"cost: {cost}")
    for name, sentence in _SAID_WHERE_ANY.items():
        if total := sum(item[name] for item in settings):
            console.print(sentence.format(total))
    asked = ", ".join(
        f"{name.removesuffix('_s')} <= {limit:g} s" for name, limit in limits.items() if limit is not None
    )
    if best is None:
        console.print(f"no setting meets {asked}", style="red")
    elif len(settings) > 1:
        values = ", ".join(f"{SETTINGS[name][0]} {settings[best][name]}" for name in shown)
        console.print(Text.assemble(("best", "green"), f"{' with ' + asked if asked else ''}: {values}"))
        console.print(f"rule: {BEST_RULE}")


def _print_ranks(console: Terminal, which: str, per_rank: Mapping[str, Sequence[int]]) -> None:
    names = ("requests", "real_rows", "prefill_tokens", "new_tokens")
    table = _table(which or None, ("rank", *(FIGURE_WORDS[name] for name in names)), dense=True)
    num_ranks = len(per_rank["requests"])
    for rank in range(min(num_ranks, _MOST_RANKS)):
        table.add_row(str(rank), *(f"{per_rank[name][rank]:,}" for name in names))
    console.print(table)
    if num_ranks > _MOST_RANKS:
        console.print(f"{num_ranks - _MOST_RANKS:,} more ranks not shown; --json shows all")


def print_validation(run: str, source: str, result: Mapping[str, Any]) -> None:
    """Print how well the cost formula predicts a recorded run, on stdout; see `validate`."""
    errors = ("error of total", "median error of steps", "p90 error of steps")
    table = _table(f"{run}: measured and predicted step times", ("steps", "measured", "predicted", *errors))
    seconds = (result["measured_s"], result["predicted_s"])
    table.add_row(
        f"{result['steps']:,}",
        *(f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms" for value in seconds),
        f"{100 * result['total_error']:+.1f} %",
        share(result["median_step_error"]),
        share(result["p90_step_error"]),
    )
    console = Terminal()
    console.print(table)
    console.print(f"cost: {source}")


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """Print two runs side by side, on stdout; see `compare_runs`."""
    a, b = comparison["a"], comparison["b"]
    runs = [f"{name}: {Path(run['folder']).name}" for name, run in (("A", a), ("B", b))]
    table = _table("two runs", ("", *runs, "change from A to B"))
    for name in a:
        if name == "folder" or name not in b:
            continue
        if name.startswith("lost") or name.endswith("fraction"):
            cells = [share(run[name]) for run in (a, b)]
            change = f"{100 * (b[name] - a[name]):+.1f} points"
        else:
            cells = [f"{run[name]:,.4g}" if isinstance(run[name], float) else f"{run[name]:,}" for run in (a, b)]
            change = f"{100 * (b[name] / a[name] - 1):+.1f} %" if a[name] else ""
        table.add_row(FIGURE_WORDS[name], *cells, change)
    console = Terminal()
    console.print(table)
    step = comparison["first_different_step"]
    if a["ranks"] != b["ranks"]:
        console.print("the runs have different numbers of ranks, so their steps are not compared")
    else:
        console.print(
            "every rank had the same row counts in every step"
            if step is None
            else f"row counts differ from step {step} on"
        )
    if real_time := [name.upper() for name, clock in comparison["clock"].items() if clock == "wall"]:
        console.print(
            f"{' and '.join(real_time)} ran with --clock wall, where steps depend on the machine's speed: "
            "only runs with --clock steps can have equal steps"
        )
    if comparison["different_outputs"] is not None:
        console.print(f"requests with different tokens: {comparison['different_outputs']}")


def print_description(trace: Trace, description: Mapping[str, Any]) -> None:
    """Print what `describe` says of a workload, on stdout."""
    console = Terminal()
    table = _table(f"{trace.source} ({trace.format})", ("", "total", "mean", "p50", "p90", "p99", "max"))
    for name in ("prompt_tokens", "output_tokens"):
        table.add_row(name.replace("_", " "), *(f"{value:,}" for value in description[name].values()))
    console.print(table)
    console.print(
        f"{description['num_requests']:,} requests in {description['duration_s']:,.0f} s: "
        f"{description['requests_per_s']:g} per second, {description['peak_requests_per_s']:g} in the busiest 10 s; "
        f"burstiness {description['burstiness']:g} (1 is a Poisson process)"
    )
    if trace.left_out:
        console.print(trace.left_out, style="red", soft_wrap=True)
    options = ",".join(f"{name}={value}" for name, value in description["synthetic"].items())
    console.print("a synthetic workload with the same rate, burstiness and lengths:", style="dim")
    console.print(f"--workload synthetic --synthetic {options}", soft_wrap=True)


def _table(title: str | None, headings: Sequence[str], dense: bool = False) -> Table:
    """A table of numbers; only a column without a heading is left-aligned."""
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 0), "pad_edge": False} if dense else {}
    table = Table(title=title, **style)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=dense)
    return table
