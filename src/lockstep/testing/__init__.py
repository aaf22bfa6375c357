"""Test an engine's ranks: real processes, uneven inputs, a record of every collective, faults on purpose."""

from lockstep.dispatch.collectives import record_collectives
from lockstep.testing.faults import Fault, InjectedFault, inject, inject_into, inject_outside
from lockstep.testing.inputs import MoEInputs, uneven_counts
from lockstep.testing.ranks import RankFailure, run_ranks

__all__ = [
    "Fault",
    "InjectedFault",
    "MoEInputs",
    "RankFailure",
    "inject",
    "inject_into",
    "inject_outside",
    "record_collectives",
    "run_ranks",
    "uneven_counts",
]
