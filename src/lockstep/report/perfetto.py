"""A step log as `trace.json`, for ui.perfetto.dev and chrome://tracing: each rank a lane, each activity a slice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from lockstep.report.figures import ACTIVITIES, FIGURE_WORDS
from lockstep.steplog.record import StepLogRecord

_BOTH = f"{ACTIVITIES['prefill']}, {ACTIVITIES['decode']}"
# Colours for chrome://tracing; Perfetto derives its own from the names.
_COLORS = {
    ACTIVITIES["prefill"]: "thread_state_iowait",
    _BOTH: "thread_state_iowait",
    ACTIVITIES["decode"]: "thread_state_running",
    ACTIVITIES["serving"]: "rail_response",
    ACTIVITIES["filler"]: "terrible",
    ACTIVITIES["waiting"]: "grey",
    "agreement": "generic_work",
}

# Viewers show these numbers behind the names. Perfetto takes thread 0, or one with its process's number, for the main
# thread, so neither is used.
_PROCESS, _FIRST_THREAD = 100_000, 100_001


def write_trace(path: str | Path, records: Iterable[StepLogRecord], max_steps: int = 100_000) -> int:
    """Write the first `max_steps` steps as a trace (viewers choke on more) and return their number."""
    written = 0
    ends_ns: dict[int, int] = {}  # of each rank's last slice
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for _, of_step in islice(groupby(records, attrgetter("step")), max_steps):
            group = list(of_step)
            names = [] if written else _names([record.rank for record in group])
            events = [json.dumps(event, separators=(",", ":")) for event in (*names, *_events(group, ends_ns))]
            file.write(",\n" * bool(written) + ",\n".join(events))
            written += 1
        file.write("\n]}\n")
    return written


def _names(ranks: list[int]) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": "Lockstep"}}
    for rank in ranks:
        named = {"ph": "M", "pid": _PROCESS, "tid": _FIRST_THREAD + rank}
        yield {**named, "name": "thread_name", "args": {"name": f"rank {rank}"}}
        yield {**named, "name": "thread_sort_index", "args": {"sort_index": rank}}


def _events(group: list[StepLogRecord], ends_ns: dict[int, int]) -> Iterator[dict[str, Any]]:
    longest = max(max(record.real_rows for record in group), 1)
    for record in group:
        share = record.real_rows / longest
        busy_s = (record.duration_s - record.agreement_s) * share if record.busy_s is None else record.busy_s
        # Clocks in the log are rounded, and Perfetto drops a slice that begins before the one before it has ended.
        start = max(round(record.start_s * 1e9), ends_ns.get(record.rank, 0))
        end = max(start, round((record.start_s + record.duration_s) * 1e9))
        agreed = min(end, start + round(record.agreement_s * 1e9))
        done = min(end, agreed + round(busy_s * 1e9))
        ends_ns[record.rank] = end
        for name, first, last in (
            ("agreement", start, agreed),
            (_kind(record), agreed, done),
            (ACTIVITIES["waiting"], done, end),
        ):
            if last > first:
                times = {"ts": first / 1e3, "dur": (last - first) / 1e3}
                of_rank = {"ph": "X", "pid": _PROCESS, "tid": _FIRST_THREAD + record.rank}
                yield {**of_rank, "name": name, "cname": _COLORS[name], **times, "args": _details(record)}
    for counter, field in (("rows", "real_rows"), ("requests waiting", "num_waiting")):
        values = {f"rank {record.rank}": getattr(record, field) for record in group}
        yield {"ph": "C", "pid": _PROCESS, "ts": round(group[0].start_s * 1e9) / 1e3, "name": counter, "args": values}


def _kind(record: StepLogRecord) -> str:
    if not record.real_rows:
        return ACTIVITIES["filler" if record.dummy_rows + record.padding_rows else "serving"]
    if not record.prefill_tokens:
        return ACTIVITIES["decode"]
    return _BOTH if record.decode_tokens else ACTIVITIES["prefill"]


def _details(record: StepLogRecord) -> dict[str, int]:
    counts = ("real_rows", "prefill_tokens", "decode_tokens", "dummy_rows", "padding_rows")
    words = {FIGURE_WORDS[name]: getattr(record, name) for name in counts}
    return {"step": record.step, **words, "chunks": record.num_chunks}
