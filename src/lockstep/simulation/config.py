"""What is simulated, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.simulation.cost import CostConstants
from lockstep.steplog.table import StepTable
from lockstep.workload.schedule import SchedulerConfig

ROW_SHAPES = ("ragged", "dummy", "equal")
"""What a dispatcher makes of uneven rows: nothing; one dummy row for a rank with none left; the longest rank's rows
for all."""

_MAX_RANKS = 100_000


@dataclass(frozen=True)
class SimulationConfig:
    """What is simulated.

    Attributes:
        num_ranks: data-parallel ranks, 1..100,000.
        scheduler: how requests become steps.
        cost: what a step costs.
        max_chunk_size: most rows that one rank sends at a time, >= 1; None for no limit.
        row_shapes: one of `ROW_SHAPES`.
        clock: `cost`: requests arrive as simulated time passes; `steps`: `scheduler.seconds_per_step` of the workload's
            time pass in every step, as in a real run.
        buffer_capacity_rows: rows that a rank's exchange buffers hold, >= `num_ranks`; None for no limit. A rank may
            get every row of a chunk, so the buffers need `num_ranks` times the chunk's size, and where they are smaller
            than that, so are the chunks. In bytes: rows x hidden size x bytes per value, for rows and results each.
    """

    num_ranks: int
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cost: CostConstants = field(default_factory=lambda: CostConstants.load("linear"))
    max_chunk_size: int | None = None
    row_shapes: str = "ragged"
    clock: str = "cost"
    buffer_capacity_rows: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= _MAX_RANKS:
            raise ConfigurationError(f"num_ranks must be in 1..{_MAX_RANKS}, got {self.num_ranks}")
        if self.max_chunk_size is not None and self.max_chunk_size < 1:
            raise ConfigurationError(f"max_chunk_size must be >= 1, got {self.max_chunk_size}")
        if self.row_shapes not in ROW_SHAPES:
            raise ConfigurationError(f"row_shapes must be one of {ROW_SHAPES}, got {self.row_shapes!r}")
        if self.clock not in ("cost", "steps"):
            raise ConfigurationError(f"clock must be 'cost' or 'steps', got {self.clock!r}")
        if self.buffer_capacity_rows is not None and self.buffer_capacity_rows < self.num_ranks:
            raise ConfigurationError(
                f"buffer_capacity_rows must be >= {self.num_ranks}, a row of each of {self.num_ranks} ranks, "
                f"got {self.buffer_capacity_rows}"
            )

    @property
    def chunk_size(self) -> int | None:
        """Most rows that one rank sends at a time: `max_chunk_size`, or what the buffers hold where that is less."""
        if self.buffer_capacity_rows is None:
            return self.max_chunk_size
        held = self.buffer_capacity_rows // self.num_ranks
        return held if self.max_chunk_size is None else min(held, self.max_chunk_size)


class Stop(NamedTuple):
    """How a request ended before its last token: by a stop token, a stop string, or because it was aborted.

    Attributes:
        step: the step before whose planning its rank's scheduler was told; None where it was never told, since the
            request's last row had been planned already.
        num_new_tokens: tokens that it kept, the one that ended it included. Rows that had been planned for further ones
            by then are overrun rows: their tokens are dropped.
    """

    step: int | None
    num_new_tokens: int


@dataclass
class SimulationResult:
    """What happened.

    Attributes:
        summary: figures by name, see `simulate`.
        steps: the step log, several steps added into one row where there are many.
        rank, queue_s, ttft_s, tpot_s: of each request, `[requests]`: the rank it ran on; seconds until it first ran;
            until its first token; per further token (NaN where there was none).
    """

    summary: dict[str, Any]
    steps: StepTable
    rank: np.ndarray
    queue_s: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray
