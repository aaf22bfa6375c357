"""Tables for a terminal."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lockstep.coordination.step_log import StepLogRecord


def print_run(summary: Mapping[str, Any], records: Sequence[StepLogRecord], report: Path) -> None:
    """Print what a run did, a line per rank, on stdout.

    Args:
        summary: the run's figures by name.
        records: its step log.
        report: the page that was written.
    """
    console = Console(file=sys.stdout)
    table = Table(title=f"{summary['requests']} requests over {summary['ranks']} ranks, {summary['steps']} steps")
    for heading in (
        "rank",
        "rows of requests",
        "of prompts",
        "steps with work",
        "steps idle",
        "dummy rows",
        "padding rows",
    ):
        table.add_column(heading, justify="right")
    for rank in range(summary["ranks"]):
        mine = [record for record in records if record.rank == rank]
        busy = sum(record.real_rows > 0 for record in mine)
        cells = [
            rank,
            sum(record.real_rows for record in mine),
            sum(record.prefill_tokens for record in mine),
            busy,
            len(mine) - busy,
            sum(record.dummy_rows for record in mine),
            sum(record.padding_rows for record in mine),
        ]
        table.add_row(*(f"{cell:,}" for cell in cells))
    console.print(table)
    console.print(
        f"{summary['generated_tokens']:,} tokens generated in {summary['wall_s']:.1f} s, "
        f"{summary['tokens_per_s']:,.1f} per second; "
        f"{summary['idle_fraction']:.0%} of the ranks' time is lost to uneven work (counted in rows)"
    )
    console.print(_verdict(summary))
    console.print(f"report: {report}", soft_wrap=True)


def _verdict(summary: Mapping[str, Any]) -> str:
    if summary["verified"] is None:
        return "not compared with one process"
    if summary["verified"]:
        how = "the same" if summary["dtype"] == "float32" else "the same within the tolerance"
        return f"[green]verified[/green]: all {summary['compared_tokens']:,} tokens are {how} as in one process"
    return f"[red]NOT verified[/red]: {summary['mismatches']} of {summary['requests']} requests differ from one process"
