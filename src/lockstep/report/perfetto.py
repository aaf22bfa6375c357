"""A step log as `trace.json`, for ui.perfetto.dev and chrome://tracing: each rank a lane, each activity a slice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lockstep.coordination.step_log import StepLogRecord, by_step


def write_trace(path: str | Path, records: Iterable[StepLogRecord], max_steps: int = 100_000) -> int:
    """Write a trace file.

    Each rank is a thread. Its slices are the wait for the agreement, its own work (named by what it was) and the wait
    for the longest rank; rows and queue lengths are counters. Where a rank's own work was not measured, it is taken to
    be in proportion to the longest rank's rows.

    Args:
        path: the file, replaced where it exists.
        records: in order of step, then rank.
        max_steps: the first so many steps are written; viewers choke on more.

    Returns:
        How many steps were written.
    """
    written = 0
    ranks: set[int] = set()
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        first = True
        for group in by_step(records):
            if written == max_steps:
                break
            written += 1
            ranks.update(record.rank for record in group)
            for event in _events(group):
                file.write(("" if first else ",\n") + json.dumps(event, separators=(",", ":")))
                first = False
        for rank in sorted(ranks):
            name = {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}}
            file.write(("" if first else ",\n") + json.dumps(name, separators=(",", ":")))
            first = False
        file.write("\n]}\n")
    return written


def _events(group: list[StepLogRecord]) -> Iterator[dict[str, Any]]:
    longest = max(max(record.real_rows for record in group), 1)
    for record in group:
        start, duration, agreement = record.start_s * 1e6, record.duration_s * 1e6, record.agreement_s * 1e6
        share = record.real_rows / longest
        busy = (duration - agreement) * share if record.busy_s is None else record.busy_s * 1e6
        busy = min(busy, duration - agreement)
        if agreement > 0:
            yield _slice("agreement", record, start, agreement)
        if busy > 0:
            yield _slice(_kind(record), record, start + agreement, busy)
        if duration - agreement - busy > 0:
            yield _slice("waiting", record, start + agreement + busy, duration - agreement - busy)
    time = group[0].start_s * 1e6
    for counter, name in (("rows", "real_rows"), ("queue", "num_waiting")):
        values = {f"rank {record.rank}": getattr(record, name) for record in group}
        yield {"ph": "C", "pid": 0, "ts": round(time, 3), "name": counter, "args": values}


def _kind(record: StepLogRecord) -> str:
    if not record.real_rows:
        return "dummy" if record.dummy_rows + record.padding_rows else "serving"
    if not record.prefill_tokens:
        return "decode"
    return "prefill + decode" if record.decode_tokens else "prefill"


def _slice(name: str, record: StepLogRecord, start_us: float, duration_us: float) -> dict[str, Any]:
    details = {
        "step": record.step,
        "real rows": record.real_rows,
        "prefill": record.prefill_tokens,
        "decode": record.decode_tokens,
        "dummy": record.dummy_rows,
        "padding": record.padding_rows,
        "chunks": record.num_chunks,
    }
    times = {"ts": round(start_us, 3), "dur": round(duration_us, 3)}
    return {"ph": "X", "pid": 0, "tid": record.rank, "name": name, **times, "args": details}
