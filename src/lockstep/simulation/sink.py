"""Output of simulated steps: buffers of fixed size, flushed to the step log, to sums, and to the report's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from lockstep.simulation.config import SimulationConfig
from lockstep.simulation.cost import OWN_WORK
from lockstep.steplog.table import CAUSES, ROWS, StepTable

COUNTED = (
    *("prefill_tokens", "decode_tokens", "prefill_context_tokens", "decode_context_tokens"),
    *("num_waiting", "prefills_held", "preempted", "overrun_rows", "cached_tokens"),
)
"""What a scheduler decides for each step and rank, named as `StepLogRecord`'s fields."""
_SUMMED = (
    *("real_rows", "dummy_rows", "padding_rows", "prefill_tokens"),
    *("prefills_held", "preempted", "overrun_rows", "cached_tokens"),
)


class TakesColumns(Protocol):
    """A destination of steps: `StepColumns`, or anything else with its `write`."""

    def write(self, columns: dict[str, Any]) -> None:
        """Append records as columns of equal length, named as `StepLogRecord`'s fields."""


def filler_rows(tokens: np.ndarray, max_chunk_size: int | None, row_shapes: str) -> np.ndarray:
    """Return the dummy or padding rows that each rank computes, `[steps, ranks]`, from its rows of requests."""
    longest = tokens.max(axis=1, keepdims=True)
    if row_shapes == "equal":
        return longest - tokens
    if row_shapes == "dummy":
        # A rank with no rows left sends one row in each chunk that the longest rank still needs.
        return num_chunks(longest, max_chunk_size) - num_chunks(tokens, max_chunk_size)
    return np.zeros_like(tokens)


def num_chunks(rows: Any, chunk_size: int | None) -> Any:
    """Return in how many chunks rows are sent; an integer, or an array of any shape."""
    return -(-rows // chunk_size) if chunk_size else (rows > 0) + 0


class StepSink:
    """Collects steps in buffers; full ones go to the step log, into sums, and into a table for the report.

    That table is halved by adding up pairs of rows whenever it grows beyond `max_cells` (step x rank).
    """

    def __init__(
        self, config: SimulationConfig, step_log: TakesColumns | None, max_cells: int, buffer_cells: int,
        on_flush: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._config, self._step_log, self._on_flush = config, step_log, on_flush
        # A power of two, so that groups of steps (powers of two as well) never straddle two buffers.
        self._size = 2 ** max(4, (buffer_cells // config.num_ranks).bit_length() - 1)
        self._first_step = 0
        self._begin()
        self.totals = {name: np.zeros(config.num_ranks, np.int64) for name in _SUMMED}
        self.num_buffer_limited = 0
        self._seconds, self._lost_s = 0.0, np.zeros(len(CAUSES))
        self._max_rows = max(16, max_cells // config.num_ranks)
        self._unit = 1
        self._kept: list[StepTable] = []
        self._pending: list[StepTable] = []

    def _begin(self) -> None:
        # New buffers: the table may keep the old ones.
        self._used = 0
        self.start_s, self.duration_s = np.zeros(self._size), np.zeros(self._size)
        self.cells = {name: np.zeros((self._size, self._config.num_ranks), np.int64) for name in COUNTED}

    def next_slot(self) -> int:
        """Return the next row of the buffers, all zeros; `flush` makes `decode_context_tokens` grow with the step."""
        if self._used == self._size:
            self.flush()
        self._used += 1
        return self._used - 1

    def flush(self) -> None:
        """Hand over what the buffers hold, and begin new ones."""
        config, used = self._config, self._used
        if not used:
            return
        step = np.arange(self._first_step, self._first_step + used)
        columns = {name: values[:used] for name, values in self.cells.items()}
        columns["decode_context_tokens"] += step[:, None] * columns["decode_tokens"]
        tokens = columns["real_rows"] = columns["decode_tokens"] + columns["prefill_tokens"]
        filler = filler_rows(tokens, config.chunk_size, config.row_shapes)
        columns["dummy_rows"] = filler if config.row_shapes == "dummy" else np.zeros_like(tokens)
        columns["padding_rows"] = filler if config.row_shapes == "equal" else np.zeros_like(tokens)
        start_s, duration_s = self.start_s[:used], self.duration_s[:used]
        columns["busy_s"] = np.where(tokens > 0, duration_s[:, None] - self._waits_us(columns, filler) * 1e-6, 0.0)
        rows: dict[str, Any] = {name: columns[name] for name in (*ROWS, "busy_s")}
        table = StepTable(
            step=step, start_s=start_s, duration_s=duration_s, agreement_s=np.zeros(used), num_steps=used, **rows
        )
        rank_seconds = float(duration_s.sum()) * config.num_ranks
        self._seconds += rank_seconds
        self._lost_s += rank_seconds * np.array(list(table.lost_by_cause().values()))
        for name, total in self.totals.items():
            total += columns[name].sum(axis=0)
        longest = tokens.max(axis=1)
        chunks = num_chunks(longest, config.chunk_size)
        if config.buffer_capacity_rows is not None:
            self.num_buffer_limited += int((chunks > num_chunks(longest, config.max_chunk_size)).sum())
        if self._step_log is not None:
            of_steps = {"step": step, "num_chunks": chunks, "start_s": start_s, "duration_s": duration_s}
            self._step_log.write(
                {"rank": np.tile(np.arange(config.num_ranks), used)}
                | {name: np.repeat(values, config.num_ranks) for name, values in of_steps.items()}
                | {name: values.ravel() for name, values in columns.items()}
            )
        self._keep(table)
        self._first_step += used
        self._begin()
        self._on_flush(int(self.totals["real_rows"].sum() + self.totals["cached_tokens"].sum()))

    def _waits_us(self, columns: dict[str, np.ndarray], filler: np.ndarray) -> np.ndarray:
        """Return the time in which each rank has no work of its own: it waits for others, or runs filler rows."""
        cost, tokens, num_ranks = self._config.cost, columns["real_rows"], self._config.num_ranks
        own = cost.own_us(*(columns[name] for name in OWN_WORK))
        rows, with_filler = tokens.sum(axis=1, keepdims=True), (tokens + filler).sum(axis=1, keepdims=True)
        waits: np.ndarray = (
            own.max(axis=1, keepdims=True)
            - own
            + cost.row_us * ((tokens + filler).max(axis=1, keepdims=True) - tokens)
            + (cost.experts_us(with_filler, num_ranks) - cost.experts_us(rows, num_ranks))
        )
        return waits

    def lost(self) -> dict[str, float]:
        """Return the lost share of all ranks' time by cause."""
        return dict(zip(CAUSES, (self._lost_s / max(self._seconds, 1e-300)).tolist(), strict=True))

    def table(self) -> StepTable:
        """Return the whole run as a table."""
        tables = list(self._kept)
        if self._pending:
            tables.append(StepTable.joined(self._pending).merged(self._unit // min(self._unit, self._size)))
        return StepTable.joined(tables, lost=self.lost()) if tables else StepTable.from_records([])

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
