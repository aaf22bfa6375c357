"""`lockstep postmortem`: several ranks' flight recorders side by side, and the step in which they diverged."""

from __future__ import annotations

import math
import os
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.coordination.flight_recorder import FOLDER_VARIABLE, FORMAT, Phase
from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_object
from lockstep.report.terminal import Terminal, plain

PHASES = ("", *(phase.name.lower() for phase in Phase))
"""Phases by their number in events; 0 is an event within a phase."""

_NAMES = "lockstep-rank*.jsonl"
_MOST_BYTES = 16 * 2**20
_MOST_RANKS = 2**20
_ONE_FAILURE_S = 300.0
_MOST_RUNS_NAMED = 5
_LATEST_S = 2.0**33  # in the year 2242


@dataclass(frozen=True)
class RecordedEvent:
    """One entry of a ring: seconds since 1970, the step, one of `PHASES`, the MoE layer or -1."""

    time: float
    step: int
    phase: str
    layer: int
    detail: Any


_NOTHING = RecordedEvent(math.nan, -1, "", -1, None)


@dataclass(frozen=True)
class RecorderFile:
    """What one rank's flight recorder wrote: events oldest first, and where each thread stood."""

    rank: int
    num_ranks: int
    epoch: int
    run: int
    host: str
    pid: int
    reason: str
    time: float
    events: tuple[RecordedEvent, ...]
    stacks: dict[str, list[str]]


def read_recorders(paths: Sequence[Path]) -> tuple[list[RecorderFile], list[str]]:
    """Read recorders from files, and each folder's last failure; also return a sentence on skipped files.

    The files of one failure have the `run` of the newest file. Ranks that agreed on none have run 0: of these, the
    files of as many ranks as the newest, and of the 5 minutes before it.
    """
    files: list[RecorderFile] = []
    left_out: list[str] = []
    usual = Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())
    for path in paths or [usual]:
        if not path.is_dir():
            files.append(read_recorder(path))
            continue
        found, num_unreadable = [], 0
        for each in sorted(path.glob(_NAMES)):
            try:
                found.append(read_recorder(each))
            except (ConfigurationError, OSError):  # another program's or another version's file
                num_unreadable += 1
        if not found:
            raise ConfigurationError(
                f"no flight recorder's file ({_NAMES}) in {path}: ranks write them when one fails, into "
                f"{usual} (another folder: {FOLDER_VARIABLE})"
            )
        found.sort(key=lambda file: file.time, reverse=True)
        newest, earlier = found[0], dict[int, float]()
        for file in found:
            same = (file.run, file.num_ranks) == (newest.run, newest.num_ranks)
            if same and (file.run or newest.time - file.time <= _ONE_FAILURE_S):
                files.append(file)
            else:
                earlier.setdefault(file.run, file.time)
        left_out += [
            f"left out: run {run:08x} of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(ended))}; to read it: "
            f"lockstep postmortem {shlex.quote(str(path))}/lockstep-rank*-run{run:08x}-*.jsonl"
            for run, ended in list(earlier.items())[:_MOST_RUNS_NAMED]
        ]
        if len(earlier) > _MOST_RUNS_NAMED:
            left_out.append(f"older runs left out: {len(earlier) - _MOST_RUNS_NAMED}")
        if num_unreadable:
            left_out.append(f"files left out that cannot be read, or that another version wrote: {num_unreadable}")
    return files, left_out


def read_recorder(path: str | Path) -> RecorderFile:
    """Read a flight recorder's file. An incomplete last line is skipped."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block until it has a writer
        raise ConfigurationError(f"{path} is no file")
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ConfigurationError(f"{path}: a flight recorder's file has at most {_MOST_BYTES} bytes")
    lines = data.split(b"\n")
    where = f"{path}: line 1"
    header = json_object(where, lines[0])
    if header.get("format") != FORMAT:
        raise ConfigurationError(f"{where} is not a flight recorder's: format is {header.get('format')!r:.80}")
    numbers = _numbers(where, header, "rank", "num_ranks", "epoch", "run", "pid", "clock_ns", "time")
    if not 0 <= numbers["rank"] < numbers["num_ranks"] <= _MOST_RANKS:
        raise ConfigurationError(f"{where}: rank {numbers['rank']} of {numbers['num_ranks']} ranks")
    if not 0 <= numbers["time"] < _LATEST_S:
        raise ConfigurationError(f"{where}: time is {numbers['time']}, expected seconds since 1970")
    events, stacks = [], {}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        where = f"{path}: line {number}"
        try:
            entry = json_object(where, line)
        except ConfigurationError:
            if number == len(lines):  # incomplete: the process was killed while writing it
                break
            raise
        if "stacks" in entry:
            threads = entry["stacks"].items() if isinstance(entry["stacks"], dict) else ()
            stacks = {str(name)[:200]: [*map(str, lines)] for name, lines in threads if isinstance(lines, list)}
            continue
        values = _numbers(where, entry, "ns", "step", "phase", "layer")
        phase = PHASES[int(values["phase"])] if 0 <= values["phase"] < len(PHASES) else "?"
        at = numbers["time"] - (numbers["clock_ns"] - values["ns"]) / 1e9
        events.append(RecordedEvent(at, int(values["step"]), phase, int(values["layer"]), entry.get("detail")))
    return RecorderFile(
        int(numbers["rank"]), int(numbers["num_ranks"]), int(numbers["epoch"]), int(numbers["run"]),
        str(header.get("host"))[:200], int(numbers["pid"]), str(header.get("reason"))[:4000], numbers["time"],
        tuple(events), stacks,
    )  # fmt: skip


def postmortem_document(files: Sequence[RecorderFile]) -> dict[str, Any]:
    """Merge the recorders of one failure."""
    if not files:
        raise ConfigurationError("a post-mortem needs at least one flight recorder's file")
    sizes = {file.num_ranks for file in files}
    if len(sizes) > 1:
        raise ConfigurationError(f"these files are of runs with {sorted(sizes)} ranks: pass those of one run")
    last = {file.rank: file for file in sorted(files, key=lambda file: file.time)}
    end = max((event.time for file in last.values() for event in file.events), default=0.0)
    ranks = []
    for _, file in sorted(last.items()):
        event = next((event for event in reversed(file.events) if event.phase), _NOTHING)
        ranks.append(
            {name: getattr(file, name) for name in ("rank", "host", "pid", "epoch", "reason")}
            | {name: getattr(event, name) for name in ("step", "phase", "layer")}
            | {"seconds_before_end": None if math.isnan(event.time) else round(end - event.time, 3)}
        )
    num_ranks = next(iter(sizes))
    return {
        "num_ranks": num_ranks,
        "missing": [rank for rank in range(min(num_ranks, 1024)) if rank not in last],
        "ranks": ranks,
        "parted": _parting(last),
        "stacks": {str(rank): file.stacks for rank, file in sorted(last.items())},
    }


def print_postmortem(document: dict[str, Any], stacks: bool) -> None:
    """Print a merged post-mortem as a table and sentences on stdout, without control characters of the files."""
    from rich.table import Table

    console = Terminal()
    table = Table(title=f"{len(document['ranks'])} of {document['num_ranks']} ranks left a flight recorder")
    for heading in ("rank", "process", "epoch", "step", "last phase", "seconds before the end"):
        table.add_column(heading)
    for row in document["ranks"]:
        phase = f"{row['phase']} of layer {row['layer']}" if row["layer"] >= 0 else row["phase"]
        cells = [row["rank"], f"{row['pid']} on {plain(row['host'], keep='')}", row["epoch"], row["step"], phase]
        table.add_row(*map(str, cells), str(row["seconds_before_end"]))
    console.print(table)
    for sentence in document["left_out"]:
        console.print(plain(sentence, keep=""), soft_wrap=True)
    if document["missing"]:
        console.print(f"no file of ranks {document['missing']}: their processes may have been killed")
    if parted := document["parted"]:
        console.print(f"they parted in step {parted['step']}:")
        for rank, did in parted["did"].items():
            console.print(f"  rank {rank}: {plain(did, keep='')}", soft_wrap=True)
    else:
        console.print("as far as the recorders reach, the ranks went through the same steps alike")
    for row in document["ranks"]:
        console.print(f"rank {row['rank']} stopped because: {_indented(row['reason'])}", soft_wrap=True)
    for rank, threads in document["stacks"].items() if stacks else ():
        for name, lines in threads.items():
            sys.stdout.write(f"\nrank {rank}, thread {plain(name, keep='')}:\n")
            sys.stdout.write(f"    {_indented(''.join(lines).rstrip())}\n")


def _indented(text: str) -> str:
    """Indent the lines of a text, so that none of them looks like ours."""
    return plain(text).replace("\n", "\n    ")


def _parting(last: dict[int, RecorderFile]) -> dict[str, Any] | None:
    """The first step within reach of all recorders in which the ranks issued different operations."""
    if len(last) < 2:
        return None
    did: dict[int, dict[int, list[str]]] = {}
    first = -1
    for rank, file in last.items():
        steps: dict[int, list[str]] = {}
        for event in file.events:
            if event.phase == "agreement":
                steps.setdefault(event.step, []).append("agreement")
            elif not event.phase and isinstance(event.detail, list) and event.detail:
                # A collective's entry begins with its name; all other entries are agreed counts.
                name, sizes = str(event.detail[0]), event.detail[1:]
                if isinstance(event.detail[0], str):
                    steps.setdefault(event.step, []).append(f"{name}{sizes}"[:200])
        did[rank] = steps
        first = max(first, min(steps, default=first))
    for step in sorted({step for steps in did.values() for step in steps if step > first}):
        lists = {rank: steps.get(step, []) for rank, steps in did.items()}
        if len({tuple(operations) for operations in lists.values()}) > 1:
            return {"step": step, "did": {rank: _where_they_differ(lists, rank) for rank in lists}}
    return None


def _where_they_differ(lists: dict[int, list[str]], rank: int) -> str:
    """A rank's operations in the step, from the first one that differs between ranks."""
    alike = [len(set(operations)) == 1 for operations in zip(*lists.values(), strict=False)]
    common = [*alike, False].index(False)
    rest = lists[rank][common:]
    done = f"{common} operations alike, then " if common else ""
    return done + (", ".join(rest[:4]) if rest else "nothing more")


def _numbers(where: str, values: dict[str, Any], *names: str) -> dict[str, float]:
    for name in names:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
            raise ConfigurationError(f"{where}: {name} is {value!r:.80}, expected a number")
    return {name: values[name] for name in names}
