"""How a model runs over its ranks: what a user may choose, checked before anything is loaded."""

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
    """How a model runs over its ranks; equal on all of them.

    Attributes:
        max_chunk_size_per_rank: most rows that one rank sends through an MoE layer at a time, >= 1; None for no limit.
        dispatcher: how tokens reach their experts, one of `lockstep.dispatch.choose.dispatcher_names()`; `auto` takes,
            for each step, the one that is expected to be fastest.
        fp8_dispatch: send rows to their experts as float8_e4m3fn with a scale per 128 values: half the bytes, and four
            significant bits of each value. Results come back in bfloat16. Needs `dispatcher="nvlink"`.
        deadline_s: longest wait for any rank, in seconds, > 0.
        debug: compare every collective over all ranks before it is issued, and name the first that differs; slow.
        fuse_norms: run each RMSNorm as one kernel: shorter decode steps on GPUs, other last bits.
        placement: which ranks hold which experts, from `lockstep.place`; contiguous shares by default.
        count_expert_load: count on the device what comes to each expert, see `ModelParallel.expert_load`.

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
