"""Workloads: where requests come from, and how they become steps."""

from lockstep.errors import ConfigurationError
from lockstep.workload.kv_pages import PAGE_SIZE as PAGE_SIZE
from lockstep.workload.policies import Arrivals as Arrivals
from lockstep.workload.policies import SchedulerState as SchedulerState
from lockstep.workload.rank_scheduler import RankScheduler as RankScheduler
from lockstep.workload.request import Request as Request
from lockstep.workload.request import random_prompt_ids as random_prompt_ids
from lockstep.workload.schedule import Schedule as Schedule
from lockstep.workload.schedule import SchedulerConfig as SchedulerConfig
from lockstep.workload.schedule import StepEntry as StepEntry
from lockstep.workload.synthetic import SyntheticParameters as SyntheticParameters
from lockstep.workload.synthetic import synthetic_requests as synthetic_requests
from lockstep.workload.traces import Trace as Trace
from lockstep.workload.traces import WorkloadOptions as WorkloadOptions
from lockstep.workload.traces import load_trace as load_trace


def load_workload(
    workload: str, options: WorkloadOptions | None = None, seed: int = 0, synthetic: SyntheticParameters | None = None
) -> Trace:
    """Read a trace file, or make a workload of a seed and parameters where `workload` is the word `synthetic`."""
    if workload == "synthetic":
        return Trace(workload, workload, synthetic_requests(synthetic, options, seed))
    if synthetic is not None:
        raise ConfigurationError(f"synthetic parameters are for the workload `synthetic`, not for the file {workload}")
    return load_trace(workload, options)
