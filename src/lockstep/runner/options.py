"""Options shared by the command line, every rank and the comparison. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep.errors import ConfigurationError
from lockstep.workload import SchedulerConfig, WorkloadOptions

PARTS = "parts"
"""Folder within a run's folder, for each rank's files during the run."""
RANKS_PER_CORE = 16
"""Maximum ranks per CPU core of a host."""


@dataclass(frozen=True)
class ModelOptions:
    """The model and its distribution over ranks; the same on every rank.

    Attributes:
        model: a checkpoint's folder or Hub id.
        data_parallel_size: ranks with requests of their own, >= 1.
        tensor_parallel_size: ranks that share one data-parallel rank's requests, >= 1.
        dispatcher: how tokens reach their experts; `auto` takes the one expected to be fastest.
        dtype: of the weights, by name; `auto` is what the checkpoint says.
        quantize_experts: `auto`, `fp8` or `none`, see `lockstep.from_pretrained`.
        device: `cpu`, `cuda`, or None for a GPU if there is one.
        max_chunk_size: maximum rows per rank and MoE chunk; None for no limit.
        max_model_len: maximum tokens per request, prompt included; None takes the model's context.
        gpu_memory_utilization: share of the GPU's memory for weights, keys and everything else together, in (0, 1].
        deadline_s: longest wait for any rank in a step, in seconds.
        placement: file or run's folder with a recorded expert load, by which the experts are placed; None for equal
            contiguous shares.
        num_redundant_experts: spare slots in each layer, over all ranks, for replicas of hot experts.
        survive: lost ranks for whose experts there are slots from the start; for more, the cache shrinks.
        restart_ranks: how often the process of each lost rank is started again, to come back while the others work.
    """

    model: str
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    dispatcher: str = "auto"
    dtype: str = "auto"
    quantize_experts: str = "auto"
    device: str | None = None
    max_chunk_size: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    deadline_s: float = 30.0
    placement: str | None = None
    num_redundant_experts: int = 0
    survive: int = 0
    restart_ranks: int = 0

    @property
    def can_survive(self) -> bool:
        """Whether other ranks can continue after a loss: the experts are the only weights split over ranks."""
        return self.data_parallel_size > 1 and self.tensor_parallel_size == 1

    def check_survive(self) -> None:
        """Raise `ConfigurationError` if the ranks cannot survive this many losses, or cannot come back."""
        sizes = f"data_parallel_size {self.data_parallel_size}, tensor_parallel_size {self.tensor_parallel_size}"
        if self.survive >= self.data_parallel_size or (self.survive and not self.can_survive):
            rule = "one rank must remain, and ranks that share requests cannot be lost"
            raise ConfigurationError(f"survive is {self.survive} with {sizes}: {rule}")
        if self.restart_ranks and not self.can_survive:
            rule = "no rank comes back where the others cannot go on without it"
            raise ConfigurationError(f"restart_ranks is {self.restart_ranks} with {sizes}: {rule}")
        if self.restart_ranks and self._may_map_memory():
            rule = "torch does not map the memory of a process that started later: take 'allgather' or 'alltoall'"
            given = f"restart_ranks is {self.restart_ranks} with dispatcher {self.dispatcher!r} on GPUs"
            raise ConfigurationError(f"{given}: {rule}, which have no CUDA graphs, or leave restart_ranks at 0")

    def _may_map_memory(self) -> bool:
        from lockstep.coordination.groups import own_device
        from lockstep.dispatch.choose import AutoDispatcher, maps_memory

        mapped = self.dispatcher == AutoDispatcher.name or maps_memory(self.dispatcher)
        return mapped and own_device(self.device).type == "cuda"

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data_parallel_size * self.tensor_parallel_size


def refuse_survivors_under_torchrun(**options: object) -> None:
    """Raise `ConfigurationError` for options of survivors where all ranks start again after a loss."""
    for name, value in options.items():
        if value:
            rule = "after a loss all ranks start again there"
            raise ConfigurationError(f"{name} must be 0 under torchrun, got {value!r:.80}: {rule}")


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """Options of a run, in addition to `ModelOptions`; the same on every rank.

    Attributes:
        workload: a trace's path, or `synthetic`.
        out: folder for what the run writes; exists.
        seed: of made-up prompts and workloads.
        clock: what decides which requests have arrived: `steps`, virtual time that repeats exactly; or `wall`, the time
            that has passed since the run's start, from which latencies count then.
        workload_options: scaling and limits of the workload.
        scheduler: how requests become steps.
        keep_logprobs: write the logprob of each chosen token where the dtype rounds, for a comparison.
        expert_load: count and record the rows of each expert.
        metrics_port: loopback port on which the first remaining rank serves Prometheus text; None for none.
    """

    workload: str
    out: str
    seed: int = 0
    clock: str = "steps"
    workload_options: WorkloadOptions = field(default_factory=WorkloadOptions)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    keep_logprobs: bool = False
    expert_load: bool = False
    metrics_port: int | None = None
