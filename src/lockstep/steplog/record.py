"""One record per step and rank: what it did in the step, written by the real run and by the simulator alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class StepLogRecord:
    """What one rank did in one step; requests are its data-parallel rank's, seconds count from the run's first step."""

    step: int  # from 0
    rank: int  # expert-parallel rank, from 0
    real_rows: int  # rows of requests that this rank took into the experts of each layer; 0 for an idle rank
    dummy_rows: int = 0  # rows sent only so that the rank took part
    padding_rows: int = 0  # rows added to make shapes equal
    prefill_tokens: int = 0  # tokens of prompts
    decode_tokens: int = 0  # tokens of requests that generate
    prefill_context_tokens: int = 0  # KV entries that the prompts' tokens attend to, summed over these tokens
    decode_context_tokens: int = 0  # the same of the tokens that generate
    num_waiting: int = 0  # requests left in the queue after the step was formed
    prefills_held: bool = False  # prompts that could have run were held, so that prompts of several ranks run together
    preempted: int = 0  # requests that lost their KV cache before the step, to be computed again
    overrun_rows: int = 0  # rows whose token is dropped: their request had ended after the step was planned
    cached_tokens: int = 0  # tokens of prompts that begin here, taken over from known pages; they need no rows
    num_chunks: int = 1  # chunks of the step, equal on all ranks; 0 where no rank had rows
    start_s: float = 0.0  # when the step began on this rank
    duration_s: float = 0.0  # from this rank's start to the start of its next step
    agreement_s: float = 0.0  # of that, the wait for all ranks' records
    busy_s: float | None = None  # of that, this rank's own work; the rest it stood idle. None: not measured


FIELDS = tuple(item.name for item in fields(StepLogRecord))
OPTIONAL_FIELDS = tuple(item.name for item in fields(StepLogRecord) if item.default is None)
"""Fields that may be None: they were not measured."""


def summarize(records: Sequence[StepLogRecord]) -> dict[str, Any]:
    """Return a run's totals; tensor-parallel ranks of one group repeat each other's tokens."""
    rows = ("dummy_rows", "padding_rows", "prefill_tokens", "decode_tokens")
    names = (*rows, "preempted", "overrun_rows", "cached_tokens")
    return {
        "ranks": len({record.rank for record in records}),
        "steps": len({record.step for record in records}),
        "real_tokens": sum(record.real_rows for record in records),
        **{name: sum(getattr(record, name) for record in records) for name in names},
        "duration_s": max((record.start_s + record.duration_s for record in records), default=0.0),
    }
