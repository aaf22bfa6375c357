"""One record per step and rank: what it did in the step, written by the real run and by the simulator alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import attrgetter
from typing import Any


@dataclass(frozen=True, slots=True)
class StepLogRecord:
    """What one rank did in one step.

    Rows are counted once per step, although every MoE layer sends them: layers of one step do not differ in that.

    Attributes:
        step: number of the step, from 0.
        rank: expert-parallel rank, from 0.
        real_rows: rows of requests that this rank took into the experts; 0 for an idle rank.
        dummy_rows: rows sent only so that the rank took part.
        padding_rows: rows added to make shapes equal.
        prefill_tokens: tokens of prompts, of this rank's data-parallel rank.
        decode_tokens: tokens of requests that generate, of this rank's data-parallel rank.
        prefill_context_tokens: KV entries that its prompts' tokens attend to, summed over these tokens.
        decode_context_tokens: the same of the tokens that generate.
        num_waiting: requests left in the queue after the step was formed.
        prefills_held: prompts that could have run were held, so that prompts of several ranks run together.
        preempted: requests of its data-parallel rank that lost their KV cache before the step, to be computed again.
        overrun_rows: rows of its data-parallel rank whose token is dropped: their request had ended by a stop token, a
            stop string or an abort, after the step was planned.
        cached_tokens: tokens of its data-parallel rank's prompts that begin in this step, taken over from pages that
            were known; they need no rows.
        num_chunks: chunks of the step, equal on all ranks; 0 where no rank had rows.
        start_s: when the step began on this rank, in seconds after the run's first step began.
        duration_s: how long it took there, from this rank's start to the start of its next step.
        agreement_s: of that, the wait for all ranks' records.
        busy_s: of that, this rank's own work; the rest it stood idle. None where it was not measured.
    """

    step: int
    rank: int
    real_rows: int
    dummy_rows: int = 0
    padding_rows: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_context_tokens: int = 0
    decode_context_tokens: int = 0
    num_waiting: int = 0
    prefills_held: bool = False
    preempted: int = 0
    overrun_rows: int = 0
    cached_tokens: int = 0
    num_chunks: int = 1
    start_s: float = 0.0
    duration_s: float = 0.0
    agreement_s: float = 0.0
    busy_s: float | None = None


FIELDS = tuple(item.name for item in fields(StepLogRecord))
OPTIONAL_FIELDS = tuple(item.name for item in fields(StepLogRecord) if item.default is None)
"""Fields that may be None: they were not measured."""


def by_step(records: Iterable[StepLogRecord]) -> Iterator[list[StepLogRecord]]:
    """Yield each step's records together, given records in order of step."""
    for _, group in groupby(records, key=attrgetter("step")):
        yield list(group)


def summarize(records: Sequence[StepLogRecord]) -> dict[str, Any]:
    """Return a run's totals; tensor-parallel ranks of one group repeat each other's tokens."""
    names = (
        "dummy_rows",
        "padding_rows",
        "prefill_tokens",
        "decode_tokens",
        "preempted",
        "overrun_rows",
        "cached_tokens",
    )
    return {
        "ranks": len({record.rank for record in records}),
        "steps": len({record.step for record in records}),
        "real_tokens": sum(record.real_rows for record in records),
        **{name: sum(getattr(record, name) for record in records) for name in names},
        "duration_s": max((record.start_s + record.duration_s for record in records), default=0.0),
    }
