"""Which backend brings the tokens to their experts."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.dispatch.alltoall import AllToAllDispatcher, expected_ranks_per_row, row_bytes
from lockstep.dispatch.base import Abilities, Dispatcher, DispatchHandle, check_experts
from lockstep.dispatch.collectives import DEADLINE_S
from lockstep.errors import ConfigurationError

DISPATCHERS = ("allgather", "alltoall", "auto", "nvlink")

# Bytes that one link moves in the time of the all-to-all's count exchange and its wait on the host, roughly.
# CPU: 0.4 ms at 1 GB/s, gloo on one host (benchmarks/bench_alltoall.py). GPU: 40 us at 300 GB/s, H200, NVLink, NCCL.
_COUNT_EXCHANGE_BYTES = {"cpu": 400_000, "cuda": 12_000_000}


def make_dispatcher(
    name: str, process_group: dist.ProcessGroup, num_experts: int, *, deadline_s: float = DEADLINE_S
) -> Dispatcher:
    """Make a dispatcher by name.

    Args:
        name: one of `DISPATCHERS`.
        process_group: the expert-parallel ranks; left open.
        num_experts: experts of the layer over all ranks.
        deadline_s: longest wait for any rank, in seconds.

    Raises:
        ConfigurationError: an unknown name, or experts that the ranks do not divide.
    """
    if name == "allgather":
        return AllGatherDispatcher(process_group, num_experts, deadline_s=deadline_s)
    if name == "alltoall":
        return AllToAllDispatcher(process_group, num_experts, deadline_s=deadline_s)
    if name == "auto":
        return AutoDispatcher(process_group, num_experts, deadline_s=deadline_s)
    if name == "nvlink":
        raise ConfigurationError("dispatcher 'nvlink' is made by make_mapped_dispatcher, which is told its sizes")
    raise ConfigurationError(f"dispatcher must be one of {', '.join(DISPATCHERS)}, got {name!r}")


def make_mapped_dispatcher(
    process_group: dist.ProcessGroup,
    *,
    num_experts: int,
    hidden_size: int,
    top_k: int,
    max_rows_per_rank: int,
    deadline_s: float = DEADLINE_S,
) -> Dispatcher:
    """Make the `nvlink` dispatcher, whose buffers need to know their sizes. Collective.

    Args:
        process_group: the expert-parallel ranks, all on one host with a GPU each; left open.
        num_experts: experts of the layer over all ranks.
        hidden_size: of a row.
        top_k: experts per row.
        max_rows_per_rank: most rows of one rank in one call.
        deadline_s: longest wait for any rank, in seconds.

    Raises:
        ConfigurationError: on a machine without GPUs, or sizes that cannot work.
    """
    if not torch.cuda.is_available():
        raise ConfigurationError("dispatcher 'nvlink' needs GPUs that map each other's memory; this machine has none")
    from lockstep.dispatch.nvlink import NvlinkDispatcher

    return NvlinkDispatcher(
        process_group,
        num_experts=num_experts,
        hidden_size=hidden_size,
        top_k=top_k,
        max_tokens_per_rank=max_rows_per_rank,
        deadline_s=deadline_s,
    )


class AutoDispatcher:
    """All-to-all where it saves more bytes than its exchange of counts is worth, all-gather otherwise.

    Chosen anew for every call, from agreed sizes only, so that all ranks choose alike.

    Args:
        process_group: the expert-parallel ranks; left open.
        num_experts: experts of the layer over all ranks; the ranks must divide it.
        deadline_s: longest wait for any rank, in seconds.
    """

    name = "auto"

    def __init__(self, process_group: dist.ProcessGroup, num_experts: int, *, deadline_s: float = DEADLINE_S) -> None:
        self.abilities = Abilities()
        self.num_experts = num_experts
        self.num_local_experts = check_experts(num_experts, process_group.size())
        self._allgather = AllGatherDispatcher(process_group, num_experts, deadline_s=deadline_s)
        self._alltoall = AllToAllDispatcher(process_group, num_experts, deadline_s=deadline_s)

    def dispatch(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, sizes: Sequence[int]
    ) -> DispatchHandle:
        """See `Dispatcher.dispatch`."""
        bytes_per_row = row_bytes(hidden_states.shape[1], topk_ids.shape[1], hidden_states.element_size())
        saved = saved_bytes(sizes, self.num_experts, topk_ids.shape[1], bytes_per_row)
        backend: AllGatherDispatcher | AllToAllDispatcher = self._allgather
        if saved > _COUNT_EXCHANGE_BYTES.get(hidden_states.device.type, 0):
            backend = self._alltoall
        return backend.dispatch(hidden_states, topk_ids, topk_weights, sizes)

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        # The all-gather keeps no state of its own.
        backend = self._allgather if handle.state is None else self._alltoall
        return backend.combine(expert_output, handle)


def saved_bytes(sizes: Sequence[int], num_experts: int, top_k: int, bytes_per_row: int) -> float:
    """Return the bytes that the busiest rank's link is spared if rows go only where they must.

    Args:
        sizes: rows of every rank, `[ranks]`.
        num_experts: experts of the layer, a multiple of the ranks.
        top_k: experts per row.
        bytes_per_row: of one row, there and back.

    Returns:
        Expected for a router that chooses evenly.

    Example:
        >>> saved_bytes([100, 0], num_experts=8, top_k=8, bytes_per_row=1000)  # every row needs both ranks
        0.0
        >>> saved_bytes([100, 0], num_experts=8, top_k=1, bytes_per_row=1000)
        50000.0
    """
    num_ranks = len(sizes)
    total = sum(sizes)
    busiest = max(max(size * (num_ranks - 1), total - size) for size in sizes)
    spared = 1 - expected_ranks_per_row(num_experts, top_k, num_ranks) / num_ranks
    return spared * busiest * bytes_per_row
