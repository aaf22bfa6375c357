"""The interface of the backends that send tokens to their experts and back, and the abilities they declare."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lockstep.errors import ConfigurationError

NO_EXPERT = -1  # in `topk_ids`: no expert for this choice; it costs nothing on any rank

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Abilities:
    """What a backend can do. Every backend takes uneven row counts, zero included, and is bitwise reproducible."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)  # of the hidden states
    max_rows_per_rank: int | None = None  # in one call; None if only memory limits it
    counts_on_device: bool = False  # may keep the number of pairs on the device, see `DispatchHandle.num_pairs`
    rejoins: bool = False  # can continue with fewer ranks, see `Dispatcher.rejoin`
    note: str = ""  # for reports: the backends it chooses from, and why others are left out


@dataclass(frozen=True)
class ExpertsShape:
    """The routed experts of a layer over all ranks, and the rows that they receive.

    Attributes:
        num_experts: over all ranks, a multiple of their number; rank r holds the r-th contiguous share.
        hidden_size: values per row.
        top_k: experts per row.
        dtype: of the rows that are sent.
        device: of this rank's rows.
    """

    num_experts: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU


@dataclass(frozen=True, slots=True)
class Route:
    """How the rows of a step, or of one of its chunks, travel. Derived from agreed counts, so equal on all ranks.

    Attributes:
        backend: name of the backend that carries them.
        sizes: rows of every rank, `[ranks]`.
        chunk_size: maximum rows per rank and dispatch, >= 1. A step with more is split into chunks.
        captures: whether a CUDA graph may capture dispatch and combine; its replays are then valid for any counts of
            the other ranks.
    """

    backend: str
    sizes: tuple[int, ...]
    chunk_size: int
    captures: bool = False

    def of_chunk(self, sizes: tuple[int, ...]) -> "Route":
        """Return the route of one chunk; `sizes` are the rows of every rank, each at most `chunk_size`."""
        return replace(self, sizes=sizes)


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """What arrived at this rank, and what `combine` needs to send the results back.

    If `num_pairs` is None, only the device knows how many pairs arrived. All tensors then have the length of the
    backend's capacity, belong to the backend, and are valid until its next dispatch.
    """

    route: Route
    num_rows: int  # rows that this rank passed to `dispatch`; `combine` returns as many
    hidden_states: torch.Tensor  # received rows without duplicates, `[received, hidden]`
    scales: torch.Tensor | None  # of fp8 rows, one per 128 values, `[received, ceil(hidden / 128)]` float32
    gather_index: torch.Tensor  # row of each (row, local expert) pair, ordered by expert, `[pairs]` int32
    tokens_per_expert: torch.Tensor  # pairs per local expert, `[num_local_experts]` int32
    expert_offsets: torch.Tensor  # start of each local expert's pairs, and the end, `[num_local_experts + 1]` int32
    pair_weights: torch.Tensor  # routing weight of each pair, `[pairs]` float32
    num_pairs: int | None  # None: it is `expert_offsets[-1]`, on the device
    own: Any = None  # private to the backend, for `combine`


class Dispatcher(Protocol):
    """Sends every row to the ranks that hold its experts, and the weighted sums back.

    Created by `lockstep.make_dispatcher`; add your own by `lockstep.register_dispatcher`.
    """

    name: str
    abilities: Abilities
    num_experts: int
    num_local_experts: int

    def route(self, sizes: Sequence[int], limit: int | None = None, *, capture: bool = False) -> Route:
        """Choose how the rows of a step will travel. Pure: equal arguments give equal routes on all ranks.

        Args:
            sizes: rows of every rank in the step, `[ranks]`, agreed.
            limit: maximum rows per rank and dispatch, to bound memory; None for no limit.
            capture: whether the calls will be captured in a CUDA graph.

        Raises:
            ConfigurationError: `sizes` does not have one entry per rank, or the backend cannot be captured.
            TokenCountError: a negative size, naming the rank.
        """

    def dispatch(
        self, route: Route, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
        num_tokens: torch.Tensor | None = None,
    ) -> DispatchHandle:  # fmt: skip
        """Send this rank's rows to their experts' ranks. Collective.

        Args:
            route: from `route`, of one chunk.
            hidden_states: `[rows, hidden]`; `rows` is `route.sizes[rank]`, or more with `num_tokens`.
            topk_ids: global experts of each row, `[rows, top_k]`, int32 or int64, the same dtype on all ranks;
                `NO_EXPERT`, -1, for none.
            topk_weights: their weights, `[rows, top_k]`.
            num_tokens: how many of the rows are tokens, `[1]`, int32, on the rows' device; the rest are not
                sent. A captured graph reads it at each replay. Backends that only run eagerly use `route.sizes[rank]`
                instead, which must be equal. None: all rows are tokens.
        """

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Send the results back: weighted, summed in rank order in float32, in this rank's row order. Collective.

        Args:
            expert_output: one row per pair, `[pairs, hidden]`, in the order of `handle.gather_index`, not weighted.
            handle: of the same dispatch.

        Returns:
            `[handle.num_rows, hidden]`; rows beyond `num_tokens` are undefined.
        """

    def check(self, *, wait: bool = False) -> None:
        """Raise errors that earlier calls have left on the device; with `wait`, after waiting for these calls."""

    def forget_capture(self) -> None:
        """Discard the state of a failed capture: the recorded calls have not run and never will."""

    def end_waits(self) -> None:
        """End what waits on the device for ranks that will not come; what it computed is worthless. Not collective."""

    def rejoin(self, process_group: dist.ProcessGroup, places: Sequence[int]) -> None:
        """Go on among the ranks that are left, once the others' processes have ended. Collective.

        Graphs that were captured remain valid. Slots of experts keep their numbers, those of lost ranks included.

        Args:
            process_group: the ranks that are left, on the host; left open.
            places: of these ranks, among those that the dispatcher was made for, ascending.

        Raises:
            ConfigurationError: a backend without the ability.
        """


def check_experts(num_experts: int, num_ranks: int) -> int:
    """Return the experts per rank; raise `ConfigurationError` if the ranks do not divide the experts."""
    if num_experts < 1 or num_experts % num_ranks:
        raise ConfigurationError(f"{num_experts} experts cannot be divided evenly among {num_ranks} ranks")
    return num_experts // num_ranks
