"""Which backend brings the tokens to their experts, and in chunks of what size."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.dispatch.alltoall import AllToAllDispatcher
from lockstep.dispatch.base import Abilities, Dispatcher, DispatchHandle, check_experts
from lockstep.dispatch.collectives import DEADLINE_S
from lockstep.dispatch.constants import BACKENDS, SHIPPED, DispatchConstants, Exchange
from lockstep.errors import ConfigurationError

DISPATCHERS = ("allgather", "alltoall", "auto", "nvlink")


@dataclass(frozen=True)
class Choice:
    """What is expected to be fastest.

    Attributes:
        backend: its name.
        max_chunk_size: most rows that one rank brings at a time; None for all at once.
        predicted_us: dispatch and combine of all chunks, slowest rank, us.
    """

    backend: str
    max_chunk_size: int | None
    predicted_us: float


@functools.lru_cache(maxsize=4096)
def choose(
    exchange: Exchange,
    constants: DispatchConstants,
    available: tuple[tuple[str, int | None], ...],
    max_chunk_size: int | None = None,
) -> Choice:
    """Choose a backend and a chunk size. Everything it looks at is agreed, so all ranks choose alike.

    Chunks only cost time here, so they are as large as the caller and the backend allow.

    Args:
        exchange: the rows of all ranks before they are cut into chunks, and what a row weighs.
        constants: the same on all ranks.
        available: backends that can be had, each with the most rows that one rank may bring it at a time, None for any.
        max_chunk_size: the caller's own limit, to bound memory; None for none.

    Raises:
        ConfigurationError: if there are no constants for any of the backends.

    Example:
        >>> two = (("allgather", None), ("alltoall", None))
        >>> choose(Exchange((900, 0), 8, 1, 1024, 1024), SHIPPED["cpu"], two).backend
        'alltoall'
    """
    best: Choice | None = None
    for name in BACKENDS:
        capacity = dict(available).get(name, 0)
        if capacity == 0 or name not in constants.backends:
            continue
        limits = [limit for limit in (capacity, max_chunk_size) if limit is not None]
        limit = min(limits) if limits else None
        backend = constants.backends[name]
        predicted = sum(backend.predict_us(name, chunk) * times for chunk, times in _chunks(exchange, limit))
        if best is None or predicted < best.predicted_us:
            best = Choice(name, limit, predicted)
    if best is None:
        raise ConfigurationError(
            f"constants of {constants.source!r} know none of the backends {[name for name, _ in available]}"
        )
    return best


def _chunks(exchange: Exchange, limit: int | None) -> list[tuple[Exchange, int]]:
    """The chunks of an exchange, and how often in a row each comes."""
    if limit is None:
        return [(exchange, 1)]
    found: list[tuple[Exchange, int]] = []
    start, longest = 0, max(exchange.sizes)
    while start < longest:
        sizes = tuple(min(limit, max(0, size - start)) for size in exchange.sizes)
        # Chunks stay the same until the next rank runs out of rows.
        ending = min(size for size in exchange.sizes if size > start)
        times = max(1, (ending - start) // limit)
        found.append((Exchange(sizes, *_weights(exchange)), times))
        start += times * limit
    return found


def _weights(exchange: Exchange) -> tuple[int, int, int, int]:
    return exchange.num_experts, exchange.top_k, exchange.dispatch_row_bytes, exchange.combine_row_bytes


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
    fp8: bool = False,
) -> Dispatcher:
    """Make the `nvlink` dispatcher, whose buffers need to know their sizes. Collective.

    Args:
        process_group: the expert-parallel ranks, all on one host with a GPU each; left open.
        num_experts: experts of the layer over all ranks.
        hidden_size: of a row.
        top_k: experts per row.
        max_rows_per_rank: most rows of one rank in one call.
        deadline_s: longest wait for any rank, in seconds.
        fp8: send rows as float8_e4m3fn, with a scale per 128 values.

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
        fp8=fp8,
        deadline_s=deadline_s,
    )


def mapping_facts(device: torch.device) -> list[str] | None:
    """Say what other ranks need to know to tell whether `nvlink` can serve: this host's and this GPU's identity.

    Returns:
        `[boot id, GPU id]`, or None where this rank cannot map its peers' memory: no GPU, no Triton, no peer access.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    others = [other for other in range(torch.cuda.device_count()) if other != index]
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    # Where only one GPU is visible to each rank, peer access cannot be asked for; mapping then shows it.
    if not boot_id.is_file() or not all(torch.cuda.can_device_access_peer(index, other) for other in others):
        return None
    return [boot_id.read_text().strip(), str(torch.cuda.get_device_properties(index).uuid)]


def can_map(everyones: Sequence[list[str] | None]) -> bool:
    """Say whether all ranks can map each other's memory: 2 to 8 ranks of one host, each with a GPU of its own.

    Args:
        everyones: what `mapping_facts` said on every rank, `[ranks]`.

    Example:
        >>> can_map([["host", "GPU-0"], ["host", "GPU-1"]]), can_map([["host", "GPU-0"], ["host", "GPU-0"]])
        (True, False)
    """
    known = [facts for facts in everyones if facts is not None]
    return (
        2 <= len(everyones) <= 8
        and len(known) == len(everyones)
        and len({host for host, _ in known}) == 1
        and len({gpu for _, gpu in known}) == len(known)
    )


class AutoDispatcher:
    """The backend that is expected to be fastest, chosen anew for every call.

    Chosen from agreed sizes and constants only, so that all ranks choose alike.

    Args:
        process_group: the expert-parallel ranks; left open.
        num_experts: experts of the layer over all ranks; the ranks must divide it.
        deadline_s: longest wait for any rank, in seconds.
        constants: of the machine, the same on all ranks; by default those shipped for the rows' kind of device.
        mapped: an `nvlink` dispatcher of the same ranks and experts, where there is one; left open.
    """

    name = "auto"

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        num_experts: int,
        *,
        deadline_s: float = DEADLINE_S,
        constants: DispatchConstants | None = None,
        mapped: Dispatcher | None = None,
    ) -> None:
        self.abilities = Abilities(cuda_graph=mapped is not None)
        self.num_experts = num_experts
        self.num_local_experts = check_experts(num_experts, process_group.size())
        self._constants = constants
        self._backends: dict[str, Any] = {
            "allgather": AllGatherDispatcher(process_group, num_experts, deadline_s=deadline_s),
            "alltoall": AllToAllDispatcher(process_group, num_experts, deadline_s=deadline_s),
        }
        if mapped is not None:
            self._backends["nvlink"] = mapped
        self._available = tuple((name, one.abilities.max_rows_per_rank) for name, one in self._backends.items())

    @property
    def has_limits(self) -> bool:
        """Whether a backend takes only so many rows at a time, so that it may pay to cut a step into chunks."""
        return any(most is not None for _, most in self._available)

    def choose(
        self,
        sizes: Sequence[int],
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        device_type: str,
        max_chunk_size: int | None = None,
    ) -> Choice:
        """Choose for rows that may still be cut into chunks, see the function of this name.

        Args:
            sizes: rows of every rank, `[ranks]`, agreed.
            hidden_size: of a row.
            top_k: experts per row.
            dtype: of the rows.
            device_type: "cpu" or "cuda".
            max_chunk_size: the caller's own limit; None for none.
        """
        exchange = self._exchange(sizes, hidden_size, top_k, dtype)
        return choose(exchange, self._constants_for(device_type), self._available, max_chunk_size)

    def picks(self, sizes: Sequence[int], hidden_size: int, top_k: int, dtype: torch.dtype, device_type: str) -> str:
        """Return which backend one call with these sizes goes to: of those that take so many rows, the fastest.

        Args: as of `choose`.
        """
        longest = max(sizes)
        fitting = tuple((name, None) for name, most in self._available if most is None or longest <= most)
        exchange = self._exchange(sizes, hidden_size, top_k, dtype)
        return choose(exchange, self._constants_for(device_type), fitting).backend

    def dispatch(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, sizes: Sequence[int]
    ) -> DispatchHandle:
        """See `Dispatcher.dispatch`."""
        hidden_size, top_k = hidden_states.shape[1], topk_ids.shape[1]
        name = self.picks(sizes, hidden_size, top_k, hidden_states.dtype, hidden_states.device.type)
        handle = self._backends[name].dispatch(hidden_states, topk_ids, topk_weights, sizes)
        handle.backend = name
        return handle

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        return self._backends[handle.backend].combine(expert_output, handle)

    def forget_capture(self) -> None:
        """After a capture that failed: nothing of it has run."""
        self._backends["nvlink"].forget_capture()

    def _constants_for(self, device_type: str) -> DispatchConstants:
        return self._constants or SHIPPED[device_type]

    def _exchange(self, sizes: Sequence[int], hidden_size: int, top_k: int, dtype: torch.dtype) -> Exchange:
        # Ids and weights travel with the rows on the way to the experts.
        states = hidden_size * dtype.itemsize
        return Exchange(tuple(sizes), self.num_experts, top_k, states + 8 * top_k, states)


def goes_to(
    name: str,
    dispatcher: Dispatcher,
    sizes: Sequence[int],
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    device_type: str,
) -> bool:
    """Say whether one call with these agreed sizes goes to a backend.

    Args:
        name: of the backend.
        dispatcher: of the layer.
        sizes: rows of every rank, `[ranks]`.
        hidden_size: of a row.
        top_k: experts per row.
        dtype: of the rows.
        device_type: "cpu" or "cuda".
    """
    if isinstance(dispatcher, AutoDispatcher):
        return dispatcher.picks(sizes, hidden_size, top_k, dtype, device_type) == name
    return dispatcher.name == name


def captures(dispatcher: Dispatcher, sizes: Sequence[int], hidden_size: int, top_k: int, dtype: torch.dtype) -> bool:
    """Say whether dispatch and combine of these agreed sizes may be part of a CUDA graph.

    Args:
        dispatcher: of the layer.
        sizes: rows of every rank, `[ranks]`.
        hidden_size: of a row.
        top_k: experts per row.
        dtype: of the rows.
    """
    if not dispatcher.abilities.cuda_graph:
        return False
    # A replay does not choose anew: the graph must be of the backend that all other ranks take for these sizes.
    return not isinstance(dispatcher, AutoDispatcher) or (
        goes_to("nvlink", dispatcher, sizes, hidden_size, top_k, dtype, "cuda")
    )
