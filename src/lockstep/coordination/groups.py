"""How the ranks of a start find each other, and the process groups in which they work."""

import atexit
import datetime
import hashlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from lockstep.coordination.board import Board
from lockstep.coordination.environment import environment_number
from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.meeting import MeetingPlace, Whereabouts
from lockstep.coordination.transports import Transport, open_transport
from lockstep.coordination.waits import await_work, first_line, peers_of, wait_until, within
from lockstep.errors import ConfigurationError, RankAbsentError
from lockstep.metadata.config import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)
T = TypeVar("T")

_OPEN_S = 5.0
# Processes of one start import torch at their own pace before they look for each other.
_START_S = 30.0
_MARGIN_S = 0.5
_LONGEST_IDENTITY = 64
# NCCL's watchdog ends the process: a last resort.
_WATCHDOG_S = 10.0

_BACKEND = "lockstep_watched"
_BEFORE_JOIN = "in a tensor-parallel exchange before join()"
# How the names of a group's collectives begin, which differ between torch's versions.
_COLLECTIVES = ("all", "reduce", "broadcast", "scatter", "gather", "barrier")

_abandoned: list[dist.ProcessGroup] = []
_numbers: dict[tuple[str, str], Iterator[int]] = {}


class Start:
    """A process group's ranks by their numbers in the whole start (`processes`), and a store with keys of its own."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        store = dist.distributed_c10d._get_default_store()
        self.rank = process_group.rank()
        self.processes = tuple(dist.get_process_group_ranks(process_group))
        self._identity = "-".join(map(str, self.processes))
        if len(self._identity) > _LONGEST_IDENTITY:
            self._identity = hashlib.sha256(self._identity.encode()).hexdigest()
        self.store = dist.PrefixStore(f"lockstep/{self._identity}", store)
        self.whereabouts = _whereabouts(store, dist.get_rank())

    def next_number(self, what: str) -> int:
        """Count the calls for `what`, from 0; equal on all ranks of the group."""
        return next(_numbers.setdefault((self._identity, what), itertools.count()))

    def meeting_place(self, key: str, name: str) -> MeetingPlace:
        """Return a place where the group's ranks meet, with a key of its own; `name` is for messages."""
        return MeetingPlace(
            dist.PrefixStore(key, self.store), self.rank, len(self.processes),
            name=name, whereabouts=self.whereabouts, processes=self.processes,
        )  # fmt: skip


def abandon_groups() -> None:
    """Forget all groups, whose other ranks may be gone. The next groups need a store without used keys."""
    # Kept until the process ends: freeing them would wait for collectives that no rank answers.
    _abandoned.extend(dist.distributed_c10d._world.pg_map)
    if dist.is_initialized():  # not where a rank was lost before they had met
        dist.destroy_process_group()
    # torch names groups by this count, which `destroy_process_group` resets. A rank lost while the default group was
    # opened leaves the count at 1 here, and this rank would not find those that count from 0.
    dist.distributed_c10d._world.group_count = 0
    _numbers.clear()


def _whereabouts(store: dist.Store, rank: int) -> Whereabouts:
    return Whereabouts(dist.PrefixStore("lockstep/whereabouts", store), rank)


@dataclass(frozen=True)
class Groups:
    """An epoch's groups; `board` if all ranks share a host. `transport` uses the first of `opened`."""

    data: dist.ProcessGroup
    tensor_parallel: dist.ProcessGroup | None
    transport: Transport
    board: Board | None
    opened: list[dist.ProcessGroup]


def open_groups(config: ParallelConfig, device: torch.device, deadline_s: float, epoch: int, start: Start) -> Groups:
    """Open the groups of an epoch, once its ranks have met. Collective."""

    def open_all(timeout_s: float) -> Groups:
        control = _new_group(start.processes, timeout_s, torch.device("cpu"))
        data, shared = _new_group(start.processes, timeout_s, device), None
        if config.tensor_parallel_size > 1:
            shared = _new_group(_sharers(config, start), timeout_s, device)
        opened = [control, data] if shared is None else [control, data, shared]
        return Groups(data, shared, *open_transport(control, timeout_s), opened)

    groups = _open(f"the groups of epoch {epoch}", open_all, start.processes, device, deadline_s, start.whereabouts)
    start.whereabouts.enter("in join()")
    return groups


def _open(
    what: str, action: Callable[[float], T], ranks: Sequence[int], device: torch.device, deadline_s: float,
    whereabouts: Whereabouts,
) -> T:  # fmt: skip
    """Run `action`, which opens groups of `ranks` within a time-out in seconds; on failure, name the absent ranks."""
    # All ranks have just met, but connecting takes some time, however short the deadline.
    timeout_s, place = max(deadline_s, _OPEN_S), f"opening {what}"

    def run() -> T:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is each thread's own
        whereabouts.enter(place)
        return action(timeout_s)

    try:
        # Groups have a limit of their own, but not the store in which the ranks find each other's addresses.
        return within(run, timeout_s + _MARGIN_S)
    except (RuntimeError, TimeoutError, ConnectionError) as error:
        text = f"rank {whereabouts.rank}: {what} could not be opened within {timeout_s:g} s: {first_line(error)}"
        raise whereabouts.absent(text, ranks, place) from error


def _sharers(config: ParallelConfig, start: Start) -> Sequence[int]:
    """Return the ranks that share this rank's requests, by their numbers in the start."""
    first = config.data_parallel_rank * config.tensor_parallel_size
    return start.processes[first : first + config.tensor_parallel_size]


def _new_group(members: Sequence[int], timeout_s: float, device: torch.device) -> dist.ProcessGroup:
    """Open and connect a group, all of whose ranks are present; its collectives have a time limit."""
    on_gpu = device.type == "cuda"
    limit = datetime.timedelta(seconds=timeout_s + (_WATCHDOG_S if on_gpu else 0))
    group: dist.ProcessGroup = dist.new_group(
        list(members), timeout=limit, backend="nccl" if on_gpu else "gloo", use_local_synchronization=True
    )
    if on_gpu:  # its ranks connect at the first collective, where they would wait without a limit
        connected = dist.all_reduce(torch.zeros(1, device=device), group=group, async_op=True)
        wait_until(connected.is_completed, timeout_s)
    return group


def abort(groups: Sequence[Any], device: torch.device, rank: int, timeout_s: float = _OPEN_S) -> None:
    """Abort NCCL's groups: otherwise their waiting kernels would keep this process from ending."""
    for group in groups:
        try:
            within(group._get_backend(device).abort, timeout_s)
        except (RuntimeError, TimeoutError) as error:
            logger.warning("rank %d: a group of NCCL's did not end: %s", rank, first_line(error))


def find_group(process_group: dist.ProcessGroup | None, deadline_s: float = 30.0) -> dist.ProcessGroup | None:
    """Return the given group, or that of all ranks, which is opened under torchrun if need be; None for one process."""
    if process_group is None:
        world_size = environment_number("WORLD_SIZE", 1, default=1)
        if not dist.is_initialized() and world_size > 1:
            _start(world_size, max(deadline_s, _START_S))
        process_group = dist.group.WORLD if dist.is_initialized() else None
    return process_group if process_group is not None and process_group.size() > 1 else None


def _start(world_size: int, limit_s: float) -> None:
    """Open the default group of a start by torchrun, or by anything that sets the same variables."""
    rank, port = environment_number("RANK", 0, world_size - 1), environment_number("MASTER_PORT", 0, 65535)
    host = os.environ.get("MASTER_ADDR", "")
    if not host or (rank == 0 and not _is_a_host(host)):  # others may hear of rank 0's name later
        raise ConfigurationError(f"the environment variable MASTER_ADDR must name a host, got {host!r:.200}")
    limit = datetime.timedelta(seconds=limit_s)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps_store = rank == 0 and not by_agent

    def open_store() -> dist.Store:
        store = dist.TCPStore(
            host, port, is_master=keeps_store, wait_for_workers=False, timeout=limit, multi_tenant=True
        )
        # The agent may keep one store over restarts, where ranks would find the addresses of those that died.
        start = f"lockstep/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return dist.PrefixStore(start, store) if by_agent else store

    try:
        # torch looks for a host without a name for longer than it is told to.
        store = within(open_store, limit_s + _MARGIN_S)
    except (TimeoutError, RuntimeError, ValueError) as error:
        if keeps_store or not isinstance(error, TimeoutError | dist.DistNetworkError):
            raise ConfigurationError(f"the ranks could not meet at {host}:{port}: {first_line(error)}") from error
        keeper = f"rank 0, which keeps the store at {host}:{port},"
        if by_agent:
            keeper = f"the store at {host}:{port}, which torchrun's agent keeps,"
        text = f"rank {rank}: {keeper} did not answer within {limit_s:g} s: {first_line(error)}"
        raise RankAbsentError(text, () if by_agent else (0,)) from error
    connect(store, rank, world_size, limit_s)


def connect(store: dist.Store, rank: int, world_size: int, deadline_s: float) -> None:
    """Open the default process group as soon as all ranks have come to their common store. Collective."""
    whereabouts, keys = _whereabouts(store, rank), dist.PrefixStore("lockstep/start", store)
    MeetingPlace(keys, rank, world_size, name="the start", whereabouts=whereabouts).meet({}, deadline_s, once=True)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"

    def open_default_group(_timeout_s: float) -> None:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        whereabouts.enter("after connecting")

    _open("the default group", open_default_group, range(world_size), torch.device("cpu"), deadline_s, whereabouts)
    atexit.register(_close_default_group, os.getpid())


def _is_a_host(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


def _close_default_group(pid: int) -> None:
    if dist.is_initialized() and os.getpid() == pid:  # a forked child's groups are its parent's
        dist.destroy_process_group()


def group_of(process_group: dist.ProcessGroup | None, device_mesh: "DeviceMesh | None") -> dist.ProcessGroup | None:
    """Return the group that a script passes, if any: itself, or as a one-dimensional mesh such as `mesh["ep"]`."""
    if device_mesh is None:
        return process_group
    if process_group is not None:
        raise ConfigurationError("process_group and device_mesh both name the ranks: give one of them")
    if device_mesh.ndim != 1:
        raise ConfigurationError(
            f"device_mesh must have one dimension, got {device_mesh.ndim} {device_mesh.mesh_dim_names or ''}: "
            "slice the one whose ranks share the experts, such as mesh['ep']"
        )
    return device_mesh.get_group()


def own_device(device: torch.device | str | None) -> torch.device:
    """Return this rank's device: `cuda` means its own GPU, and so does None on a machine with GPUs."""
    has_gpus = torch.cuda.is_available()
    try:
        meant: torch.device | None = torch.device(("cuda" if has_gpus else "cpu") if device is None else device)
    except RuntimeError:
        meant = None
    if meant is None or meant.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device must be cpu or cuda, got {str(device)!r}")
    if meant.type == "cpu" or (has_gpus and meant.index is not None):
        return meant
    if not has_gpus:
        raise ConfigurationError(f"device {str(device)!r} needs a GPU that PyTorch can use; it finds none here")
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.device("cuda", environment_number("LOCAL_RANK", 0, default=rank % max(1, torch.cuda.device_count())))


def parallel_config(group: dist.ProcessGroup | None, tensor_parallel_size: int) -> ParallelConfig:
    """Return this rank's place; ranks that share their requests have consecutive numbers."""
    num_ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    if tensor_parallel_size < 1 or num_ranks % tensor_parallel_size:
        raise ConfigurationError(f"tensor_parallel_size must divide the {num_ranks} ranks, got {tensor_parallel_size}")
    dp_rank, tp_rank = divmod(rank, tensor_parallel_size)
    return ParallelConfig(num_ranks // tensor_parallel_size, dp_rank, tensor_parallel_size, tp_rank)


class WatchedGroup(dist.ProcessGroup):
    """A proxy for a replaceable group: its collectives run on `inner`, with a deadline.

    A tensor-parallel plan stores its group in every parameter, and waits in C++ for up to torch's half hour.
    `inner` changes whenever groups are reopened; `ranks` are its members' numbers in the whole start.
    """

    inner: dist.ProcessGroup
    ranks: Sequence[int]
    whereabouts: Whereabouts
    deadline_s: float

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # torch's stubs know one constructor of three
        self._name = ""

    # torch asks for these; the base class would ask its backends, and this group has none.
    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> Any:
        """See torch."""
        return self._name

    def getBackendName(self) -> str:
        """See torch."""
        return _BACKEND

    def run(self, name: str, *args: Any) -> Any:
        """Issue a collective on `inner` and wait for it by `await_work`, unless a later wait on the GPU covers it."""
        inner, peers = self.inner, peers_of(self.inner)
        if peers is None:  # before join: the pass that determines the model's shapes
            self.whereabouts.enter(_BEFORE_JOIN)
            work = getattr(inner, name)(*args)
            try:
                await_work(work, name, inner, self.deadline_s)
            except RankAbsentError as error:
                raise self.whereabouts.absent(str(error), self.ranks, _BEFORE_JOIN) from error
            return work
        if dist.get_backend(inner) == "nccl":  # the end of the step waits for the GPU, with a deadline
            return getattr(inner, name)(*args)
        with peers.before_layer(Phase.TENSOR_PARALLEL):
            work = getattr(inner, name)(*args)
            await_work(work, f"a tensor-parallel {name.strip('_')}", inner, self.deadline_s)
        return work


for _name in dir(dist.ProcessGroup):
    if _name.removeprefix("_").startswith(_COLLECTIVES):
        setattr(WatchedGroup, _name, lambda self, *args, _name=_name: self.run(_name, *args))


def tensor_parallel_group(
    config: ParallelConfig, group: dist.ProcessGroup | None, device: torch.device, deadline_s: float
) -> WatchedGroup:
    """Return the group of the ranks that share this rank's requests, for attention's collectives. Collective."""
    assert group is not None
    start = Start(group)
    key = f"tensor parallel/{start.next_number('tensor parallel')}"
    start.meeting_place(key, "from_pretrained()").meet({}, deadline_s, once=True)
    ranks = _sharers(config, start)
    if _BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(
            _BACKEND, lambda _store, rank, size, _timeout: WatchedGroup(rank, size), devices=["cpu", "cuda"]
        )

    def open_group(timeout_s: float) -> WatchedGroup:
        inner = _new_group(ranks, timeout_s, device)
        made = dist.new_group(list(ranks), backend=_BACKEND, use_local_synchronization=True)
        assert isinstance(made, WatchedGroup)
        made.ranks, made.inner, made.whereabouts, made.deadline_s = ranks, inner, start.whereabouts, deadline_s
        return made

    return _open("a tensor-parallel group", open_group, ranks, device, deadline_s, start.whereabouts)
