"""A run's `parts` folder: each rank's files during the run, which ranks read back to continue after a loss."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lockstep.runner.options import PARTS
from lockstep.steplog.files import StepLogWriter

Gather = Callable[[list[Any]], list[Any]]
StepLogs = dict[int, dict[int, list[dict[str, Any]]]]
"""Records by start of the ranks and by rank."""


@dataclass
class Notes:
    """State of an unfinished request. Times are in seconds since the start of the run."""

    assigned_step: int
    arrived_s: float
    first_step: int | None = None
    first_token_step: int | None = None
    first_token_s: float = 0.0
    num_cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)


class Parts:
    """One rank's files: finished requests, tokens of the others, and steps. Each line is written at once.

    This rank reads the files of `read_ranks` for all ranks, which `gather` theirs: hosts need not share a disk.
    """

    def __init__(self, out: str, rank: int, read_ranks: Iterable[int], gather: Gather) -> None:
        self._folder = Path(out, PARTS)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rank, self._read_ranks, self._gather = rank, sorted(read_ranks), gather

    def open(self, start: int, age_s: float) -> None:
        """Begin to write; `start` counts the starts of the ranks before this one, `age_s` is the age of the run."""
        mode = "a" if start else "x"
        self._outputs = self._path("outputs").open(mode, encoding="utf-8", buffering=1)
        self._tokens = self._path("tokens").open(mode, encoding="utf-8", buffering=1)
        self._write_tokens({"run_began": time.time() - age_s})
        # A log for each start, since what the ranks logged last may differ by a step.
        self.steps = StepLogWriter(self._path("steps", f"-restart{start}" if start else ""))

    def close(self) -> None:
        """Close the files."""
        for file in (self._outputs, self._tokens, self.steps):
            file.close()

    def write_output(self, output: dict[str, Any]) -> None:
        """Write a finished request."""
        self._outputs.write(json.dumps(output) + "\n")

    def write_notes(self, request_id: int, notes: Notes) -> None:
        """Write what is known of a request besides its tokens."""
        about = asdict(notes)
        del about["tokens"], about["logprobs"]
        self._write_tokens({"request_id": request_id, "notes": about})

    def write_tokens(self, tokens: list[tuple[int, int, int, float | None]]) -> None:
        """Write a step's tokens: request, position, token and its logprob."""
        if tokens:
            self._write_tokens({"tokens": tokens})

    def outputs(self) -> list[dict[str, Any]]:
        """Return the finished requests of all ranks. Collective."""
        return self._gather(list(self._lines("outputs")))

    def step_logs(self) -> StepLogs:
        """Return the steps of all ranks. Collective."""
        own = []
        for rank in self._read_ranks:
            for path in self._folder.glob(f"steps-rank{rank}*.jsonl"):
                number, _, start = path.stem.removeprefix("steps-rank").partition("-restart")
                if int(number) == rank:
                    own.append([int(start or 0), rank, [json.loads(line) for line in mend_lines(path).splitlines()]])
        logs: StepLogs = {}
        for start, rank, records in self._gather(own):
            logs.setdefault(start, {})[rank] = records
        return logs

    def unfinished(self) -> tuple[set[int], dict[int, Notes], float]:
        """Return which requests have finished, what is known of others, and the age of the run. Collective."""
        finished = set(self._gather([output["request_id"] for output in self._lines("outputs")]))
        began, notes, tokens = time.time(), dict[int, Notes](), dict[int, dict[int, tuple[int, float | None]]]()
        for line in self._gather([left for line in self._lines("tokens") if (left := _without(finished, line))]):
            began = min(began, line.get("run_began", began))
            if "notes" in line and (line["request_id"] not in notes or line["notes"]["first_token_step"] is not None):
                notes[line["request_id"]] = Notes(**line["notes"])
            for request_id, position, token, logprob in line.get("tokens", ()):
                tokens.setdefault(request_id, {})[position] = token, logprob
        for request_id, by_position in tokens.items():
            known, position = notes[request_id], 0
            while position in by_position:
                token, logprob = by_position[position]
                known.tokens.append(token)
                known.logprobs.append(logprob)
                position += 1
        return finished, notes, time.time() - began

    def _path(self, kind: str, suffix: str = "", rank: int | None = None) -> Path:
        return self._folder / f"{kind}-rank{self._rank if rank is None else rank}{suffix}.jsonl"

    def _write_tokens(self, line: dict[str, Any]) -> None:
        self._tokens.write(json.dumps(line, separators=(",", ":")) + "\n")

    def _lines(self, kind: str) -> Iterable[dict[str, Any]]:
        for rank in self._read_ranks:
            yield from map(json.loads, mend_lines(self._path(kind, rank=rank)).splitlines())


def _without(finished: set[int], line: dict[str, Any]) -> dict[str, Any]:
    """Return what a line says of unfinished requests, and of the run; nothing where it does not."""
    if "tokens" in line:
        left = [token for token in line["tokens"] if token[0] not in finished]
        return {"tokens": left} if left else {}
    return {} if line.get("request_id") in finished else line


def mend_lines(path: Path) -> bytes:
    """Cut off an incomplete last line, left by a killed process, and return the whole lines, if any."""
    if not path.exists():
        return b""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return whole


def whole_steps(logs: StepLogs, num_ranks: int) -> list[dict[str, Any]]:
    """Return the records of steps that all ranks of a start have ended, in order; ranks that were lost have no rows."""
    whole = []
    for by_rank in logs.values():
        ended = set.intersection(*({record["step"] for record in records} for records in by_rank.values()))
        whole += [record for records in by_rank.values() for record in records if record["step"] in ended]
        some = next(iter(by_rank.values()))
        for rank in set(range(num_ranks)).difference(by_rank):
            whole += [_without_rows(record, rank) for record in some if record["step"] in ended]
    return sorted(whole, key=lambda record: (record["step"], record["rank"]))


def _without_rows(record: dict[str, Any], rank: int) -> dict[str, Any]:
    kept = ("step", "num_chunks", "start_s", "duration_s")
    return {name: value if name in kept else type(value)() for name, value in record.items()} | {"rank": rank}
