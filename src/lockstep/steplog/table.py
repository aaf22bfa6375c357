"""A step log as arrays, one row per step and one column per rank, and what can be read off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.steplog.record import FIELDS, StepLogRecord

_MOST_HOLES = 10_000_000
ROWS = ("real_rows", "dummy_rows", "padding_rows", "prefill_tokens", "decode_tokens", "num_waiting")
CAUSES = ("other_prompts", "uneven_generation", "no_requests", "padding", "agreement")
"""Why time is lost: the rank waits while another runs prompts; while another generates for more requests; it has no
request at all; it computes dummy and padding rows; all ranks agree on the step."""


def loss_figures(lost: Mapping[str, float]) -> dict[str, Any]:
    """Return what uneven work costs, under the names by which terminal, report and JSON show it."""
    uneven = sum(share for cause, share in lost.items() if cause != "no_requests")
    return {"lost_fraction": uneven, "no_requests_fraction": lost["no_requests"], "lost": dict(lost)}


@dataclass(frozen=True)
class StepTable:
    """A step log as arrays: of each rank, `[steps, ranks]`, int64 but for `busy_s`; of each step, `[steps]`."""

    step: np.ndarray  # number of each step
    real_rows: np.ndarray  # this and the following five of each rank, see `StepLogRecord`
    dummy_rows: np.ndarray
    padding_rows: np.ndarray
    prefill_tokens: np.ndarray
    decode_tokens: np.ndarray
    num_waiting: np.ndarray
    start_s: np.ndarray  # of the step, on the rank where it is largest
    duration_s: np.ndarray  # likewise
    agreement_s: np.ndarray  # the shortest wait of any rank for the agreement: what it costs where no rank is late
    busy_s: np.ndarray  # each rank's own work; NaN where it was not measured
    num_steps: int
    steps_per_row: int = 1  # how many steps were added into one row, see `merged`
    lost: dict[str, float] | None = None  # what `lost_by_cause` said before steps were added up

    @classmethod
    def from_records(cls, records: Sequence[StepLogRecord]) -> StepTable:
        """Make a table of a step log's records; a rank without a record in a step had no rows in it."""
        return cls.from_columns({name: np.array([getattr(record, name) for record in records]) for name in FIELDS})

    @classmethod
    def from_columns(cls, columns: dict[str, np.ndarray]) -> StepTable:
        """Make a table of columns named as `StepLogRecord`'s fields, one entry per step and rank, in any order."""
        steps, row = np.unique(columns["step"], return_inverse=True)
        ranks = np.unique(columns["rank"])
        column = np.searchsorted(ranks, columns["rank"])
        shape = (len(steps), len(ranks))
        if shape[0] * shape[1] > _MOST_HOLES + 16 * len(columns["step"]):
            found = f"{len(columns['step'])} records of {shape[0]} steps and {shape[1]} ranks"
            raise ConfigurationError(f"the step log has {found}, and should have one of each rank in each step")
        cell = row * max(1, len(ranks)) + column
        if len(np.unique(cell)) != len(cell):
            raise ConfigurationError("the step log has two records of one step and rank: are these files of one run?")

        def grid(name: str, missing: float, dtype: type) -> np.ndarray:
            filled: np.ndarray = np.full(shape[0] * shape[1], missing, dtype=dtype)
            if name in columns and len(cell):
                filled[cell] = columns[name].astype(dtype)
            return filled.reshape(shape)

        rows: dict[str, Any] = {name: grid(name, 0, np.int64) for name in ROWS}
        agreement_s = grid("agreement_s", np.inf, np.float64).min(axis=1, initial=np.inf)
        return cls(
            step=steps.astype(np.int64),
            **rows,
            start_s=grid("start_s", 0.0, np.float64).max(axis=1, initial=0.0),
            duration_s=grid("duration_s", 0.0, np.float64).max(axis=1, initial=0.0),
            agreement_s=np.where(np.isinf(agreement_s), 0.0, agreement_s),
            busy_s=grid("busy_s", np.nan, np.float64),
            num_steps=len(steps),
        )

    @classmethod
    def joined(cls, tables: Sequence[StepTable], lost: dict[str, float] | None = None) -> StepTable:
        """Return several tables of one run as one; `lost` is that of the whole, where it is known."""
        if len(tables) == 1:
            return replace(tables[0], lost=lost or tables[0].lost)
        names = ("step", *ROWS, "start_s", "duration_s", "agreement_s", "busy_s")
        columns: dict[str, Any] = {name: np.concatenate([getattr(table, name) for table in tables]) for name in names}
        num_steps = sum(table.num_steps for table in tables)
        return cls(**columns, num_steps=num_steps, steps_per_row=tables[0].steps_per_row, lost=lost)

    @property
    def num_rows(self) -> int:
        """Rows of the table: its steps, or groups of them."""
        return len(self.real_rows)

    @property
    def num_ranks(self) -> int:
        """Columns of the table."""
        return int(self.real_rows.shape[1])

    @property
    def weights(self) -> np.ndarray:
        """What each step counts for, `[steps]`: its duration, or 1 each where no durations were recorded."""
        return self.duration_s if self.duration_s.any() else np.ones(self.num_rows)

    def busy_share(self) -> np.ndarray:
        """Return the share of each step that was each rank's own work, `[steps, ranks]`; by rows where not measured."""
        longest = self.real_rows.max(axis=1, initial=0, keepdims=True)
        share = self.real_rows / np.maximum(longest, 1)
        duration_s = np.maximum(self.duration_s, 1e-12)[:, None]
        if self.duration_s.any() and not np.isnan(self.busy_s).all():
            share = np.where(np.isnan(self.busy_s), share, self.busy_s / duration_s)
        elif self.duration_s.any():
            share = share * (1 - self.agreement_s[:, None] / duration_s)
        return np.asarray(np.clip(share, 0, 1))

    def lost_by_cause(self) -> dict[str, float]:
        """Return the share of all ranks' time that is lost, split by `CAUSES`; the rest of 1 was work."""
        if self.lost is not None:
            return self.lost
        weights = self.weights[:, None]
        total = float(weights.sum()) * self.num_ranks
        if not total:
            return dict.fromkeys(CAUSES, 0.0)
        idle = (1 - self.busy_share()) * weights
        agreed = np.minimum(idle, self.agreement_s[:, None] if self.duration_s.any() else 0.0)
        # Dummy and padding rows fill a part of the wait for the longest rank, in proportion to its rows.
        filler = self.dummy_rows + self.padding_rows
        longest = np.maximum((self.real_rows + filler).max(axis=1, initial=0, keepdims=True), 1)
        padding = np.minimum(idle - agreed, filler / longest * weights)
        waiting = idle - agreed - padding
        none = self.real_rows == 0
        prompts_elsewhere = (self.prefill_tokens.max(axis=1, initial=0, keepdims=True) > 0) & ~none
        lost = (waiting[prompts_elsewhere], waiting[~prompts_elsewhere & ~none], waiting[none], padding, agreed)
        return {cause: float(seconds.sum()) / total for cause, seconds in zip(CAUSES, lost, strict=True)}

    def merged(self, steps_per_row: int) -> StepTable:
        """Return the table with each `steps_per_row` steps added into one row; shares stay the same."""
        if steps_per_row == 1 or not self.num_rows:
            return self
        starts = np.arange(0, self.num_rows, steps_per_row)
        added: dict[str, Any] = {name: np.add.reduceat(getattr(self, name), starts, axis=0) for name in ROWS}
        # Rows of a merged table no longer say who waited for whom; busy seconds do, and are added up instead.
        busy = self.busy_share() * self.weights[:, None]
        return replace(
            self,
            step=self.step[starts],
            start_s=self.start_s[starts],
            duration_s=np.add.reduceat(self.weights, starts),
            agreement_s=np.add.reduceat(self.agreement_s, starts),
            busy_s=np.add.reduceat(busy, starts, axis=0),
            steps_per_row=self.steps_per_row * steps_per_row,
            lost=self.lost_by_cause(),
            **added,
        )
