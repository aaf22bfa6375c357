"""Output of simulated steps: buffers of fixed size, flushed to the step log, to sums, and to the report's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from lockstep.simulation.config import SimulationConfig
from lockstep.steplog.table import CAUSES, ROWS, StepTable


class TakesColumns(Protocol):
    """A destination of steps: `StepColumns`, or anything else with its `write`."""

    def write(self, columns: dict[str, Any]) -> None:
        """Append records as columns of equal length, named as `StepLogRecord`'s fields; they change after the call."""


def filler_rows(tokens: np.ndarray, max_chunk_size: int | None, row_shapes: str) -> np.ndarray:
    """Return the dummy or padding rows that each rank computes, `[steps, ranks]`, from its rows of requests."""
    longest = tokens.max(axis=1, keepdims=True)
    if row_shapes == "equal":
        return longest - tokens
    if row_shapes == "dummy":
        # A rank with no rows left sends one row in each chunk that the longest rank still needs.
        size = np.maximum(longest, 1) if max_chunk_size is None else max_chunk_size
        return -(-longest // size) + (-tokens // size)
    return np.zeros_like(tokens)


def _num_chunks(longest: np.ndarray, chunk_size: int | None) -> np.ndarray:
    return -(-longest // chunk_size) if chunk_size else (longest > 0).astype(np.int64)


class StepSink:
    """Collects steps in buffers; full ones go to the step log, into sums, and into a table for the report.

    That table is halved by adding up pairs of rows whenever it grows beyond `max_cells` (step x rank).
    """

    def __init__(
        self, config: SimulationConfig, step_log: TakesColumns | None, max_cells: int, buffer_cells: int,
        on_flush: Callable[[int], None],
    ) -> None:  # fmt: skip
        num_ranks = config.num_ranks
        # A power of two, so that groups of steps (powers of two as well) never straddle two buffers.
        self._size = 2 ** max(4, (buffer_cells // num_ranks).bit_length() - 1)
        shape = (self._size, num_ranks)
        self.decode, self.prefill, self.context_base, self.prefill_context, self.num_waiting = (
            np.zeros(shape, np.int64) for _ in range(5)
        )
        self.held = np.zeros(shape, np.bool_)
        # Written by `note` only.
        self.preempted, self.overrun, self.cached = (np.zeros(shape, np.int64) for _ in range(3))
        self.start_s, self.duration_s = np.zeros(self._size), np.zeros(self._size)
        names = ("real_rows", "dummy_rows", "padding_rows", "held", "buffer_limited", "overrun", "cached")
        self.totals = dict.fromkeys(names, 0)
        self.real_rows_per_rank, self.prefill_tokens_per_rank = (np.zeros(num_ranks, np.int64) for _ in range(2))
        self._noted = False  # whether `note` has been called for what the buffers hold
        self._config, self._step_log, self._on_flush = config, step_log, on_flush
        self._used = self._first_step = 0
        self._seconds = 0.0
        self._lost_s = dict.fromkeys(CAUSES, 0.0)
        self._max_rows = max(16, max_cells // num_ranks)
        self._unit = 1
        self._kept: list[StepTable] = []
        self._pending: list[StepTable] = []

    def next_slot(self) -> int:
        """Return the next free row of the buffers; all but `decode` and `context_base` are zero in it."""
        if self._used == self._size:
            self.flush()
        self._used += 1
        return self._used - 1

    def note(self, buffer: np.ndarray, slot: int, rank: int, count: int) -> None:
        """Add to a rare count: `preempted`, `overrun` or `cached`."""
        buffer[slot, rank] += count
        self._noted = True

    def flush(self) -> None:
        """Flush and clear the buffers."""
        used = self._used
        if not used:
            return
        table = self._table(used)
        rank_seconds = float(table.duration_s.sum()) * table.num_ranks
        for cause, lost in table.lost_by_cause().items():
            self._lost_s[cause] += lost * rank_seconds
        self._seconds += rank_seconds
        for name in ("real_rows", "dummy_rows", "padding_rows"):
            self.totals[name] += int(getattr(table, name).sum())
        self.real_rows_per_rank += table.real_rows.sum(axis=0)
        self.prefill_tokens_per_rank += table.prefill_tokens.sum(axis=0)
        for name in ("held", *(("overrun", "cached") if self._noted else ())):
            self.totals[name] += int(getattr(self, name)[:used].sum())
        longest = table.real_rows.max(axis=1)
        chunks = _num_chunks(longest, self._config.chunk_size)
        if self._config.buffer_capacity_rows is not None:
            self.totals["buffer_limited"] += int((chunks > _num_chunks(longest, self._config.max_chunk_size)).sum())
        if self._step_log is not None:
            self._write(self._step_log, table, chunks)
        self._keep(table)
        self._first_step += used
        self._used = 0
        rare = (self.preempted, self.overrun, self.cached) if self._noted else ()
        for buffer in (self.prefill, self.prefill_context, self.num_waiting, self.held, *rare):
            buffer[:used] = 0
        self._noted = False
        self._on_flush(self.totals["real_rows"] + self.totals["cached"])

    def lost(self) -> dict[str, float]:
        """Return the lost share of all ranks' time by cause."""
        return {cause: seconds / max(self._seconds, 1e-300) for cause, seconds in self._lost_s.items()}

    def table(self) -> StepTable:
        """Return the whole run as a table."""
        tables = list(self._kept)
        if self._pending:
            tables.append(StepTable.joined(self._pending).merged(self._unit // min(self._unit, self._size)))
        return StepTable.joined(tables, lost=self.lost()) if tables else StepTable.from_records([])

    def _table(self, used: int) -> StepTable:
        config, cost = self._config, self._config.cost
        decode = self.decode[:used].copy()
        tokens = decode + self.prefill[:used]
        filler = filler_rows(tokens, config.chunk_size, config.row_shapes)
        # A rank's own time: all that it would not have waited for. A rank without rows has none.
        own = cost.own_us(tokens, decode, self._decode_context(), self.prefill_context[:used])
        waits = own.max(axis=1, keepdims=True) - own
        waits = waits + cost.row_us * ((tokens + filler).max(axis=1, keepdims=True) - tokens)
        rows = (tokens + filler).sum(axis=1, keepdims=True)
        num_ranks = tokens.shape[1]
        filler_us = cost.experts_us(rows, num_ranks) - cost.experts_us(tokens.sum(axis=1, keepdims=True), num_ranks)
        nothing = np.zeros_like(tokens)
        return StepTable(
            step=np.arange(self._first_step, self._first_step + used),
            real_rows=tokens,
            dummy_rows=filler if config.row_shapes == "dummy" else nothing,
            padding_rows=filler if config.row_shapes == "equal" else nothing,
            prefill_tokens=self.prefill[:used].copy(),
            decode_tokens=decode,
            num_waiting=self.num_waiting[:used].copy(),
            start_s=self.start_s[:used].copy(),
            duration_s=self.duration_s[:used].copy(),
            agreement_s=np.zeros(used),
            busy_s=np.where(tokens > 0, self.duration_s[:used, None] - (waits + filler_us) * 1e-6, 0.0),
            num_steps=used,
        )

    def _decode_context(self) -> np.ndarray:
        steps = np.arange(self._first_step, self._first_step + self._used)[:, None]
        return self.context_base[: self._used] + steps * self.decode[: self._used]

    def _write(self, step_log: TakesColumns, table: StepTable, chunks: np.ndarray) -> None:
        used, num_ranks = self._used, table.num_ranks
        of_steps = {"step": table.step, "num_chunks": chunks, "start_s": table.start_s, "duration_s": table.duration_s}
        of_ranks = {name: getattr(table, name) for name in (*ROWS, "busy_s")} | {
            "prefill_context_tokens": self.prefill_context[:used],
            "decode_context_tokens": self._decode_context(),
            "prefills_held": self.held[:used],
            "preempted": self.preempted[:used],
            "overrun_rows": self.overrun[:used],
            "cached_tokens": self.cached[:used],
        }
        columns = {name: np.repeat(values, num_ranks) for name, values in of_steps.items()}
        columns |= {name: values.ravel() for name, values in of_ranks.items()}
        step_log.write({"rank": np.tile(np.arange(num_ranks), used), **columns})

    def _keep(self, table: StepTable) -> None:
        unit = min(self._unit, self._size)
        self._pending.append(table.merged(unit))
        if sum(part.num_rows for part in self._pending) * unit < self._unit:
            return
        self._kept.append(StepTable.joined(self._pending).merged(self._unit // unit))
        self._pending = []
        # An odd row out would make all groups after it uneven: it waits for the next one.
        while (rows := sum(part.num_rows for part in self._kept)) > self._max_rows and rows % 2 == 0:
            self._kept = [StepTable.joined(self._kept).merged(2)]
            self._unit *= 2
