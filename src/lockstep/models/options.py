"""Options of a model over its ranks, checked before anything is loaded."""

from dataclasses import dataclass
from math import isfinite

from lockstep.coordination.waits import DEADLINE_S
from lockstep.dispatch.choose import check_dispatcher
from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import check_int
from lockstep.moe.placement import Placement

QUANTIZE_EXPERTS = ("auto", "fp8", "none")


@dataclass(frozen=True)
class ParallelOptions:
    """Options of a model over its ranks; they must be equal on all ranks.

    Attributes:
        max_chunk_size_per_rank: maximum rows per rank and MoE chunk, >= 1; None for no limit.
        dispatcher: how tokens reach their experts, one of `lockstep.dispatch.choose.dispatcher_names()`; `auto` takes
            the one with the shortest expected time for each step.
        fp8_dispatch: send rows to their experts as float8_e4m3fn with a scale per 128 values: half the bytes, with four
            significant bits per value. Results return in bfloat16. Needs `dispatcher="nvlink"`.
        deadline_s: longest wait for any rank, in seconds, > 0.
        debug: compare every collective on all ranks before it is issued, and name the first difference; slow.
        fuse_norms: run each RMSNorm as one kernel: decode steps on GPUs are shorter, the last bits of results differ.
        placement: which ranks hold which experts, from `lockstep.place`; contiguous shares by default.
        count_expert_load: count the rows of each expert on the device, see `ModelParallel.expert_load`.

    Raises:
        ConfigurationError: naming the option, its limit and its value.

    Example:
        >>> ParallelOptions(dispatcher="allgather", max_chunk_size_per_rank=0)
        Traceback (most recent call last):
        lockstep.errors.ConfigurationError: max_chunk_size_per_rank must be >= 1, got 0
    """

    max_chunk_size_per_rank: int | None = None
    dispatcher: str = "auto"
    fp8_dispatch: bool = False
    deadline_s: float = DEADLINE_S
    debug: bool = False
    fuse_norms: bool = False
    placement: Placement | None = None
    count_expert_load: bool = False

    def __post_init__(self) -> None:
        if self.max_chunk_size_per_rank is not None:
            check_int("max_chunk_size_per_rank", self.max_chunk_size_per_rank, 1)
        check_dispatcher(self.dispatcher, self.fp8_dispatch)
        if not self.deadline_s > 0 or not isfinite(self.deadline_s):
            raise ConfigurationError(f"deadline_s must be a number > 0, got {self.deadline_s}")
