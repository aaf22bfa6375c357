"""What is simulated, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import check_int
from lockstep.simulation.cost import CostConstants
from lockstep.steplog.table import StepTable
from lockstep.workload.schedule import SchedulerConfig

ROW_SHAPES = ("ragged", "dummy", "equal")
"""What a dispatcher makes of uneven rows: nothing; one dummy row for a rank with none left; the longest rank's rows
for all."""


@dataclass(frozen=True)
class SimulationConfig:
    """What is simulated."""

    num_ranks: int  # data-parallel ranks, 1..100,000
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cost: CostConstants = field(default_factory=lambda: CostConstants.load("linear"))
    max_chunk_size: int | None = None  # maximum rows that one rank sends at a time; None for no limit
    row_shapes: str = "ragged"  # one of `ROW_SHAPES`
    clock: str = "cost"  # requests arrive as simulated time passes, or by `steps`, as in a real run
    # A rank may get every row of a chunk: where `num_ranks` times a chunk's size is more, chunks are smaller.
    buffer_capacity_rows: int | None = None

    def __post_init__(self) -> None:
        check_int("num_ranks", self.num_ranks, 1, 100_000)
        if self.max_chunk_size is not None:
            check_int("max_chunk_size", self.max_chunk_size, 1)
        if self.row_shapes not in ROW_SHAPES:
            raise ConfigurationError(f"row_shapes must be one of {ROW_SHAPES}, got {self.row_shapes!r}")
        if self.clock not in ("cost", "steps"):
            raise ConfigurationError(f"clock must be 'cost' or 'steps', got {self.clock!r}")
        if self.buffer_capacity_rows is not None and self.buffer_capacity_rows < self.num_ranks:
            least = f"{self.num_ranks}, a row of each of {self.num_ranks} ranks"
            raise ConfigurationError(f"buffer_capacity_rows must be >= {least}, got {self.buffer_capacity_rows}")

    @property
    def chunk_size(self) -> int | None:
        """Maximum rows per rank and chunk: `max_chunk_size`, or the buffers' capacity if that is less."""
        held = None if self.buffer_capacity_rows is None else self.buffer_capacity_rows // self.num_ranks
        return min((limit for limit in (held, self.max_chunk_size) if limit is not None), default=None)


class Stop(NamedTuple):
    """How a request ended before its last token: by a stop token, a stop string, or because it was aborted."""

    step: int | None  # before whose planning its scheduler was told; None: never, its last row had been planned
    num_new_tokens: int  # tokens that it kept; rows planned for further ones by then are overrun rows


@dataclass
class SimulationResult:
    """What happened: figures, the step log (steps added up where there are many), and each request's rank and times."""

    summary: dict[str, Any]
    steps: StepTable
    rank: np.ndarray
    queue_s: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray
