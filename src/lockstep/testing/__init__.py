"""Test an engine's ranks: real processes, uneven inputs of all ranks from one seed, a record of every collective."""

from lockstep.dispatch.collectives import record_collectives
from lockstep.testing.inputs import MoEInputs, uneven_counts
from lockstep.testing.ranks import RankFailure, run_ranks

__all__ = ["MoEInputs", "RankFailure", "record_collectives", "run_ranks", "uneven_counts"]
