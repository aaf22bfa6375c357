"""Choose the backend and the chunk size of a step."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.coordination.waits import DEADLINE_S
from lockstep.dispatch.base import Abilities, Dispatcher, DispatchHandle, ExpertsShape, Route
from lockstep.dispatch.collective_dispatchers import AllGatherDispatcher, AllToAllDispatcher
from lockstep.dispatch.collectives import check_sizes
from lockstep.dispatch.constants import BACKENDS, SHIPPED, DispatchConstants, Exchange, constants_for
from lockstep.errors import ConfigurationError

MAPPED_ROWS = 4096  # rows per rank in the buffers of `nvlink`, unless a limit is given


@dataclass(frozen=True)
class DispatcherOptions:
    """Settings of a dispatcher apart from its ranks and experts; the same on all ranks.

    Attributes:
        deadline_s: longest wait for any rank, in seconds.
        max_rows_per_rank: maximum rows per rank and call, for backends with buffers of fixed size; None for their
            default.
        fp8: send rows as float8_e4m3fn, with a scale per 128 values.
        can_map: whether all ranks can map each other's memory, see `can_map`.
        experts_on_device: whether the experts can run when only the device knows the row counts.
        constants: the machine's cost constants for `auto`; None for those shipped with the device type.
    """

    deadline_s: float = DEADLINE_S
    max_rows_per_rank: int | None = None
    fp8: bool = False
    can_map: bool = False
    experts_on_device: bool = True
    constants: DispatchConstants | None = None


DispatcherFactory = Callable[[dist.ProcessGroup, ExpertsShape, DispatcherOptions], Dispatcher]
"""`(process_group, shape, options) -> dispatcher`. Collective; leaves the group open."""


@dataclass(frozen=True)
class _Registered:
    factory: DispatcherFactory
    carries_fp8: bool
    maps_memory: bool


_registered: dict[str, _Registered] = {}


def register_dispatcher(
    name: str, factory: DispatcherFactory, *, carries_fp8: bool = False, maps_memory: bool = False
) -> None:
    """Add a dispatcher that `from_pretrained`, `parallelize` and `make_dispatcher` can choose by name.

    Lockstep's own are registered the same way. An existing name is replaced. Call it on every rank.

    Args:
        name: of the dispatcher.
        factory: creates it.
        carries_fp8: whether it honors `DispatcherOptions.fp8`.
        maps_memory: whether it needs GPUs that map each other's memory.

    Example:
        >>> def over_tcp(process_group, shape, options):
        ...     return AllGatherDispatcher(process_group, shape.num_experts, deadline_s=options.deadline_s)
        >>> register_dispatcher("over_tcp", over_tcp)
        >>> "over_tcp" in dispatcher_names()
        True
    """
    _registered[name] = _Registered(factory, carries_fp8, maps_memory)


def dispatcher_names() -> tuple[str, ...]:
    """Return the names that `make_dispatcher` accepts, sorted."""
    return tuple(sorted(_registered))


def maps_memory(name: str) -> bool:
    """Return whether a dispatcher needs GPUs that map each other's memory; False for an unknown name."""
    return name in _registered and _registered[name].maps_memory


def backend_names(can_map: bool = True) -> list[str]:
    """Return the backends that `auto` may choose from; without `can_map`, those that need no mapped memory."""
    return [name for name in BACKENDS if can_map or not maps_memory(name)]


def check_dispatcher(name: str, fp8: bool = False, device_type: str = "cuda") -> None:
    """Raise unless a dispatcher of this name is registered, runs on the device type, and sends fp8 if asked to."""
    if name not in _registered:
        raise ConfigurationError(f"dispatcher must be one of {', '.join(dispatcher_names())}, got {name!r}")
    if fp8 and not _registered[name].carries_fp8:
        can = " or ".join(repr(other) for other in dispatcher_names() if _registered[other].carries_fp8)
        raise ConfigurationError(f"fp8_dispatch needs dispatcher {can}, got {name!r}")
    if maps_memory(name) and device_type != "cuda":
        raise ConfigurationError(f"dispatcher {name!r} needs GPUs that map each other's memory; this machine has none")


def make_dispatcher(
    name: str, process_group: dist.ProcessGroup, shape: ExpertsShape, options: DispatcherOptions | None = None
) -> Dispatcher:
    """Create a dispatcher by name. Collective.

    Args:
        name: one of `dispatcher_names()`.
        process_group: the expert-parallel ranks; left open.
        shape: of the experts; layers of equal shapes may share a dispatcher.
        options: the same on all ranks.

    Raises:
        ConfigurationError: an unknown name, experts that the ranks do not divide, or a backend that cannot run here.
    """
    options = options or DispatcherOptions()
    check_dispatcher(name, options.fp8, shape.device.type)
    return _registered[name].factory(process_group, shape, options)


def constants_of(name: str, device_type: str) -> DispatchConstants | None:
    """Return the machine's constants, for ranks to compare, if this dispatcher chooses by them; else None."""
    return constants_for(device_type) if name == AutoDispatcher.name else None


@dataclass(frozen=True)
class Choice:
    """The backend expected to be fastest, its maximum rows per rank and chunk, the slowest rank's time in us."""

    backend: str
    max_chunk_size: int | None
    predicted_us: float


@functools.lru_cache(maxsize=4096)
def choose(
    exchange: Exchange, constants: DispatchConstants, available: tuple[tuple[str, int | None], ...],
    max_chunk_size: int | None = None,
) -> Choice:  # fmt: skip
    """Choose a step's backend and chunk size from agreed values only, so that all ranks choose the same."""
    best: Choice | None = None
    for name in BACKENDS:
        capacity = dict(available).get(name, 0)
        if capacity == 0 or name not in constants.backends:
            continue
        limit = min((each for each in (capacity, max_chunk_size) if each is not None), default=None)
        backend = constants.backends[name]
        predicted = sum(backend.predict_us(name, chunk) * times for chunk, times in _chunks(exchange, limit))
        if best is None or predicted < best.predicted_us:
            best = Choice(name, limit, predicted)
    if best is None:
        known = [name for name, _ in available]
        raise ConfigurationError(f"constants of {constants.source!r} have no entry for any of the backends {known}")
    return best


def _chunks(exchange: Exchange, limit: int | None) -> list[tuple[Exchange, int]]:
    """Return the distinct chunks of an exchange, and how often each repeats."""
    if limit is None:
        return [(exchange, 1)]
    found: list[tuple[Exchange, int]] = []
    start, longest = 0, max(exchange.sizes)
    while start < longest:
        sizes = tuple(min(limit, max(0, size - start)) for size in exchange.sizes)
        # Chunks stay the same until the next rank runs out of rows.
        ending = min(size for size in exchange.sizes if size > start)
        times = max(1, (ending - start) // limit)
        found.append((replace(exchange, sizes=sizes), times))
        start += times * limit
    return found


def mapping_facts(device: torch.device) -> list[str] | None:
    """Return this host's and this GPU's identity, `[boot id, GPU id]`; None where peers' memory cannot be mapped."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    others = [other for other in range(torch.cuda.device_count()) if other != index]
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    # If each rank sees only its own GPU, peer access cannot be queried; mapping will reveal it.
    if not boot_id.is_file() or not all(torch.cuda.can_device_access_peer(index, other) for other in others):
        return None
    return [boot_id.read_text().strip(), str(torch.cuda.get_device_properties(index).uuid)]


def can_map(everyones: Sequence[list[str] | None]) -> bool:
    """Return whether all ranks can map each other's memory: 2 to 8 ranks of one host, each with its own GPU."""
    known = [facts for facts in everyones if facts is not None]
    hosts, gpus = {host for host, _ in known}, {gpu for _, gpu in known}
    return 2 <= len(everyones) <= 8 and len(hosts) == 1 and len(gpus) == len(everyones)


class AutoDispatcher:
    """Chooses the backend expected to be fastest, step by step, from agreed sizes and constants only."""

    name = "auto"

    def __init__(
        self, backends: Sequence[Dispatcher], shape: ExpertsShape, constants: DispatchConstants | None = None,
        note: str = "",
    ) -> None:  # fmt: skip
        self.num_experts = shape.num_experts
        self.num_local_experts = backends[0].num_local_experts
        self._num_ranks = self.num_experts // self.num_local_experts
        self._choose_from(backends, note)
        self._constants = constants or SHIPPED[shape.device.type]
        # Ids and weights travel with the rows to the experts.
        states = shape.hidden_size * shape.dtype.itemsize
        self._weights = shape.num_experts, shape.top_k, states + 8 * shape.top_k, states

    def _choose_from(self, backends: Sequence[Dispatcher], note: str = "") -> None:
        self.abilities = Abilities(
            counts_on_device=any(one.abilities.counts_on_device for one in backends),
            note=", ".join(backend.name for backend in backends) + note,
            rejoins=any(one.abilities.rejoins for one in backends),
        )
        self._backends = {backend.name: backend for backend in backends}
        self._available = tuple((name, one.abilities.max_rows_per_rank) for name, one in self._backends.items())

    def route(self, sizes: Sequence[int], limit: int | None = None, *, capture: bool = False) -> Route:
        """See `Dispatcher.route`."""
        check_sizes("route", sizes, self._num_ranks)
        available = self._available
        if capture:
            available = tuple(one for one in available if self._backends[one[0]].abilities.counts_on_device)
            if not available:
                raise ConfigurationError("dispatcher 'auto' has no backend here that a CUDA graph can capture")
        choice = choose(Exchange(tuple(sizes), *self._weights), self._constants, available, limit)
        return self._backends[choice.backend].route(sizes, choice.max_chunk_size, capture=capture)

    def dispatch(
        self, route: Route, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
        num_tokens: torch.Tensor | None = None,
    ) -> DispatchHandle:  # fmt: skip
        """See `Dispatcher.dispatch`."""
        return self._backends[route.backend].dispatch(route, hidden_states, topk_ids, topk_weights, num_tokens)

    def combine(self, expert_output: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        return self._backends[handle.route.backend].combine(expert_output, handle)

    def check(self, *, wait: bool = False) -> None:
        """See `Dispatcher.check`."""
        for backend in self._backends.values():
            backend.check(wait=wait)

    def forget_capture(self) -> None:
        """See `Dispatcher.forget_capture`."""
        for backend in self._backends.values():
            backend.forget_capture()

    def end_waits(self) -> None:
        """See `Dispatcher.end_waits`."""
        for backend in self._backends.values():
            backend.end_waits()

    def rejoin(self, process_group: dist.ProcessGroup, places: Sequence[int]) -> None:
        """See `Dispatcher.rejoin`; from now on without the backends that cannot."""
        able = [backend for backend in self._backends.values() if backend.abilities.rejoins]
        for backend in able:
            backend.rejoin(process_group, places)
        self._num_ranks = len(places)
        self._choose_from(able, "; the others would number the experts' slots anew")


def _by_collectives(kind: Callable[..., Dispatcher]) -> DispatcherFactory:
    return lambda group, shape, options: kind(group, shape.num_experts, deadline_s=options.deadline_s)


def _make_nvlink(group: dist.ProcessGroup, shape: ExpertsShape, options: DispatcherOptions) -> Dispatcher:
    if not options.experts_on_device:
        raise ConfigurationError(
            "dispatcher 'nvlink' leaves row counts on the GPU, which takes experts that are gated by SiLU or as in "
            "gpt-oss, in bfloat16 or fp8; this model has different experts: use another dispatcher"
        )
    from lockstep.dispatch.nvlink import NvlinkDispatcher

    return NvlinkDispatcher(
        group, num_experts=shape.num_experts, hidden_size=shape.hidden_size, top_k=shape.top_k, fp8=options.fp8,
        max_tokens_per_rank=options.max_rows_per_rank or MAPPED_ROWS, deadline_s=options.deadline_s,
    )  # fmt: skip


def _make_auto(group: dist.ProcessGroup, shape: ExpertsShape, options: DispatcherOptions) -> Dispatcher:
    against = _against_mapping(shape, options)
    made = [make_dispatcher(name, group, shape, options) for name in backend_names(can_map=not against)]
    left_out = ", ".join(name for name in BACKENDS if maps_memory(name))
    return AutoDispatcher(made, shape, options.constants, f"; not {left_out}: {against}" if against else "")


def _against_mapping(shape: ExpertsShape, options: DispatcherOptions) -> str:
    """Return why no backend that maps memory can be used, or an empty string."""
    if not options.can_map:
        return "it needs GPUs" if shape.device.type != "cuda" else "the ranks' GPUs do not map each other's memory"
    if shape.dtype is not torch.bfloat16:
        return f"it carries bfloat16, not {str(shape.dtype).removeprefix('torch.')}"
    return "" if options.experts_on_device else "these experts need the rows' counts on the host"


register_dispatcher("allgather", _by_collectives(AllGatherDispatcher))
register_dispatcher("alltoall", _by_collectives(AllToAllDispatcher))
register_dispatcher("nvlink", _make_nvlink, carries_fp8=True, maps_memory=True)
register_dispatcher(AutoDispatcher.name, _make_auto)
