"""Options of engines and runs, and checks of a checkpoint before any rank starts; all without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_object
from lockstep.metadata.sizes import check_int
from lockstep.moe.placement import ExpertLoad, Placement
from lockstep.workload import SchedulerConfig, WorkloadOptions
from lockstep.workload.policies import LOAD_BALANCING

PARTS = "parts"
"""Folder within a run's folder, for each rank's files during the run."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineOptions:
    """The model, its distribution over ranks, and how requests become steps; the same on every rank.

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
        max_num_seqs: maximum requests per rank at a time, >= 1.
        max_num_batched_tokens: maximum rows per rank and step, >= 1.
        kv_capacity_tokens: tokens of KV cache per rank; None for as many as fit into memory.
        enable_prefix_caching: compute whole pages of shared prompt prefixes only once.
        max_prefill_delay_steps: steps that a prompt may wait for prompts of other ranks.
        load_balancing: which rank gets a request, one of `lockstep.workload.policies.LOAD_BALANCING`.
        start_timeout_s: longest wait for all ranks to have loaded the model, in seconds.
        graphs: run decoding as CUDA graphs where possible.

    Raises:
        ConfigurationError: invalid sizes or names.
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
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_capacity_tokens: int | None = None
    enable_prefix_caching: bool = True
    max_prefill_delay_steps: int = 0
    load_balancing: str = "least-tokens"
    start_timeout_s: float = 600.0
    graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("data_parallel_size", "tensor_parallel_size"):
            check_int(name, getattr(self, name), 1)
        for name in ("max_model_len", "max_chunk_size", "kv_capacity_tokens"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("num_redundant_experts", "survive", "restart_ranks"):
            check_int(name, getattr(self, name), 0)
        self._check_losses()
        for name, most in (("gpu_memory_utilization", 1.0), ("deadline_s", math.inf), ("start_timeout_s", math.inf)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= most or value == math.inf:
                limit = f"in (0, {most:g}]" if most < math.inf else "> 0"
                raise ConfigurationError(f"{name} must be a number {limit}, got {value!r:.80}")
        for name in ("graphs", "enable_prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False, got {getattr(self, name)!r:.80}")
        self._check_name("dtype", ("auto", *DTYPES))
        self._check_name("load_balancing", LOAD_BALANCING)
        if (self.quantize_experts, self.dispatcher) != ("auto", "auto"):  # the names are known to modules with torch
            from lockstep.dispatch.choose import check_dispatcher
            from lockstep.models.options import QUANTIZE_EXPERTS

            self._check_name("quantize_experts", QUANTIZE_EXPERTS)
            check_dispatcher(self.dispatcher)
        _ = self.scheduler  # which checks the rest

    def _check_name(self, option: str, names: Sequence[str]) -> None:
        if getattr(self, option) not in names:
            raise ConfigurationError(f"{option} must be one of {', '.join(names)}, got {getattr(self, option)!r:.80}")

    @property
    def scheduler(self) -> SchedulerConfig:
        """How requests become steps."""
        given = {each.name: getattr(self, each.name) for each in fields(SchedulerConfig) if hasattr(self, each.name)}
        return SchedulerConfig(**given)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def can_survive(self) -> bool:
        """Whether other ranks can continue after a loss: the experts are the only weights split over ranks."""
        return self.data_parallel_size > 1 and self.tensor_parallel_size == 1

    def _check_losses(self) -> None:
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


@dataclass(frozen=True, kw_only=True)
class RunOptions(EngineOptions):
    """Options of a run, in addition to `EngineOptions`; the same on every rank.

    Attributes:
        workload: a trace's path, or `synthetic`.
        out: folder for what the run writes; exists.
        seed: of made-up prompts and workloads.
        clock: what decides which requests have arrived: `steps`, virtual time that repeats exactly; or `wall`, the time
            that has passed since the run's start, from which latencies count then.
        workload_options: scaling and limits of the workload.
        seconds_per_step: of the workload's time, in virtual time.
        keep_logprobs: write the logprob of each chosen token where the dtype rounds, for a comparison.
        expert_load: count and record the rows of each expert.
        metrics_port: loopback port on which the first remaining rank serves Prometheus text; None for none.
    """

    workload: str
    out: str
    seed: int = 0
    clock: str = "steps"
    workload_options: WorkloadOptions = field(default_factory=WorkloadOptions)
    load_balancing: str = "round-robin"
    seconds_per_step: float = 0.05
    keep_logprobs: bool = False
    expert_load: bool = False
    metrics_port: int | None = None


def refuse_survivors(**options: object) -> None:
    """Raise `ConfigurationError` for options of survivors where all ranks start again after a loss."""
    for name, value in options.items():
        if value:
            rule = "after a loss all ranks start again there"
            raise ConfigurationError(f"{name} must be 0 under torchrun, got {value!r:.80}: {rule}")


def check_checkpoint(model: str) -> None:
    """Raise if a folder is missing or holds no checkpoint; a Hub id cannot be checked yet."""
    path = Path(model)
    if not path.exists():
        if path.is_absolute() or len(path.parts) > 2 or model.startswith("."):
            raise ConfigurationError(f"no checkpoint at {path}: there is no such folder")
        return
    if not (path / "config.json").is_file():
        raise ConfigurationError(f"{path} is no checkpoint: it has no config.json")
    json_object(path / "config.json", (path / "config.json").read_bytes())


def placement_of(options: EngineOptions) -> Placement | None:
    """Place the experts by the load named in the options; `ConfigurationError` if it is of another model."""
    if options.placement is None:
        if options.num_redundant_experts:
            raise ConfigurationError("num_redundant_experts needs a placement: which experts are hot is not known")
        return None
    load = ExpertLoad.read(options.placement)
    try:
        return load.place(check_config(options.model).model_type, options.world_size, options.num_redundant_experts)
    except ConfigurationError as error:
        raise ConfigurationError(f"{options.placement}: {error}") from None


def check_config(model: str) -> Any:
    """Return a checkpoint's configuration as read by Transformers, also from the Hub.

    Raises:
        ConfigurationError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigurationError(f"the configuration of {model} cannot be read: {first}") from None
