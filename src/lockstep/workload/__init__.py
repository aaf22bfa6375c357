"""Workloads: where requests come from, and how they become steps."""

from lockstep.errors import ConfigurationError
from lockstep.workload.arrivals import Arrivals
from lockstep.workload.kv_pages import PAGE_SIZE
from lockstep.workload.policies import SchedulerState
from lockstep.workload.rank_scheduler import RankScheduler
from lockstep.workload.request import Request, random_prompt_ids
from lockstep.workload.schedule import Schedule, SchedulerConfig, StepEntry
from lockstep.workload.synthetic import SyntheticParameters, synthetic_requests
from lockstep.workload.traces import Trace, WorkloadOptions, load_trace

__all__ = [
    "PAGE_SIZE",
    "Arrivals",
    "RankScheduler",
    "Request",
    "Schedule",
    "SchedulerConfig",
    "SchedulerState",
    "StepEntry",
    "SyntheticParameters",
    "Trace",
    "WorkloadOptions",
    "load_trace",
    "load_workload",
    "random_prompt_ids",
    "synthetic_requests",
]


def load_workload(
    workload: str, options: WorkloadOptions | None = None, seed: int = 0, synthetic: SyntheticParameters | None = None
) -> Trace:
    """Read a trace file, or make a workload of a seed and parameters where `workload` is the word `synthetic`."""
    if workload == "synthetic":
        return Trace(workload, workload, synthetic_requests(synthetic, options, seed))
    if synthetic is not None:
        raise ConfigurationError(f"synthetic parameters are for the workload `synthetic`, not for the file {workload}")
    return load_trace(workload, options)
