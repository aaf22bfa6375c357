"""How the ranks of a start find each other, each one's place among them, and the groups in which they work."""

import atexit
import datetime
import hashlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lockstep.coordination.board import Board
from lockstep.coordination.environment import environment_number
from lockstep.coordination.meeting import MeetingPlace
from lockstep.coordination.transports import Transport, open_transport
from lockstep.coordination.waits import first_line, wait_until, within
from lockstep.coordination.watched_group import WatchedGroup, watched_group
from lockstep.coordination.whereabouts import Whereabouts
from lockstep.errors import ConfigurationError, RankAbsentError
from lockstep.metadata.config import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

_OPEN_S = 5.0
# Processes of one start import torch at their own pace before they look for each other.
_START_S = 30.0
_MARGIN_S = 0.5
_CONNECTING = "connecting to the other ranks"
_LONGEST_IDENTITY = 64
# NCCL's watchdog ends the process: only where all else has failed.
_WATCHDOG_S = 10.0

_numbers: dict[tuple[str, str], Iterator[int]] = {}


@dataclass(frozen=True)
class Groups:
    """One group per purpose.

    Attributes:
        data: of all ranks, for tokens.
        tensor_parallel: of the ranks that share this rank's requests, if there are several.
        transport: of all ranks, for agreements.
        board: of all ranks, where they are on one host.
        opened: all of torch's groups, those under `transport` too.
    """

    data: dist.ProcessGroup
    tensor_parallel: dist.ProcessGroup | None
    transport: Transport
    board: Board | None
    opened: list[dist.ProcessGroup] = field(default_factory=list)


class Start:
    """The ranks of a process group within the whole start, and where they write what others should know of them.

    Args:
        process_group: any of the default group's ranks, in any number.

    Attributes:
        rank: this rank's number in the group.
        processes: each rank's number in the default group, `[ranks]`: what messages call it.
        store: keys of this group alone. Groups of other ranks never meet each other there.
        whereabouts: of all ranks of the default group.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        store = dist.distributed_c10d._get_default_store()
        self.rank = process_group.rank()
        self.processes = tuple(dist.get_process_group_ranks(process_group))
        identity = "-".join(map(str, self.processes))
        if len(identity) > _LONGEST_IDENTITY:
            identity = hashlib.sha256(identity.encode()).hexdigest()
        self.store = dist.PrefixStore(f"lockstep/{identity}", store)
        self.whereabouts = _whereabouts(store, dist.get_rank())
        self._identity = identity

    def next_number(self, what: str) -> int:
        """Return how many of these the group has had so far, the same on all its ranks."""
        return next(_numbers.setdefault((self._identity, what), itertools.count()))

    def meeting_place(self, key: str, name: str) -> MeetingPlace:
        """Return a place where the group's ranks meet: a key of its own in the store, and its `name` in messages."""
        return MeetingPlace(
            dist.PrefixStore(key, self.store), self.rank, len(self.processes),
            name=name, whereabouts=self.whereabouts, processes=self.processes,
        )  # fmt: skip


def _whereabouts(store: dist.Store, rank: int) -> Whereabouts:
    return Whereabouts(dist.PrefixStore("lockstep/whereabouts", store), rank)


def open_groups(
    process_group: dist.ProcessGroup, config: ParallelConfig, device: torch.device, deadline_s: float, epoch: int,
    start: Start,
) -> Groups:  # fmt: skip
    """Open groups of ranks that have just met, whose collectives wait `deadline_s` for any rank. Collective.

    Raises:
        RankAbsentError: not all could be opened in time.
    """
    ranks = dist.get_process_group_ranks(process_group)
    backend = "nccl" if device.type == "cuda" else "gloo"

    def open_all(timeout_s: float) -> Groups:
        control, data = (_new_group(ranks, name, timeout_s, device) for name in ("gloo", backend))
        opened, tp_group = [control, data], None
        if config.tensor_parallel_size > 1:
            tp_group = _new_group(_sharers(config, ranks), backend, timeout_s, device)
            opened.append(tp_group)
        return Groups(data, tp_group, *open_transport(control, timeout_s), opened)

    groups: Groups = _open(f"the groups of epoch {epoch}", open_all, ranks, device, deadline_s, start)
    start.whereabouts.enter("in join()")
    return groups


def _open(
    what: str, action: Callable[[float], Any], ranks: Sequence[int], device: torch.device, deadline_s: float,
    start: Start,
) -> Any:  # fmt: skip
    """Run what opens groups of `ranks`, with its time-out in seconds; if it fails, say who was not there."""
    # All ranks have just met, but connecting takes some time, however short the deadline.
    timeout_s, place = max(deadline_s, _OPEN_S), f"opening {what}"

    def run() -> Any:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is each thread's own
        start.whereabouts.enter(place)
        return action(timeout_s)

    try:
        # Groups have a limit of their own, but not the store in which the ranks find each other's addresses.
        return within(run, timeout_s + _MARGIN_S)
    except (RuntimeError, TimeoutError, ConnectionError) as error:
        own = dist.get_rank()
        absent, seen = start.whereabouts.late([rank for rank in ranks if rank != own], place)
        text = f"rank {own}: {what} could not be opened within {timeout_s:g} s: {first_line(error)}{seen}"
        raise RankAbsentError(text, absent) from error


def _sharers(config: ParallelConfig, ranks: Sequence[int]) -> list[int]:
    """Those of all ranks that share this rank's requests."""
    first = config.data_parallel_rank * config.tensor_parallel_size
    return list(ranks[first : first + config.tensor_parallel_size])


def _new_group(members: list[int], backend: str, timeout_s: float, device: torch.device) -> dist.ProcessGroup:
    """Open a group of ranks that are all there, and connect it; its collectives end after a limit."""
    limit = datetime.timedelta(seconds=timeout_s + (_WATCHDOG_S if backend == "nccl" else 0))
    group: dist.ProcessGroup = dist.new_group(members, timeout=limit, backend=backend, use_local_synchronization=True)
    if backend == "nccl":  # its ranks connect at the first collective, where they would wait without a limit
        connected = dist.all_reduce(torch.zeros(1, device=device), group=group, async_op=True)
        wait_until(connected.is_completed, timeout_s)
    return group


def abort(groups: list[dist.ProcessGroup], device: torch.device, rank: int) -> None:
    """End what waits in these groups on the GPU; otherwise the end of this process would wait for its kernels."""
    for group in groups:
        if dist.get_backend(group) != "nccl":
            continue
        try:
            within(group._get_backend(device).abort, _OPEN_S)
        except (RuntimeError, TimeoutError) as error:
            logger.warning("rank %d: a group of NCCL's did not end: %s", rank, first_line(error))


def find_group(process_group: dist.ProcessGroup | None, deadline_s: float = 30.0) -> dist.ProcessGroup | None:
    """Return the ranks, connected under torchrun where the script has not done so; None for a single process.

    Args:
        process_group: what the script has given, if anything; it is returned as it is.
        deadline_s: longest wait for any rank, in seconds; processes that start have half a minute at least.

    Raises:
        ConfigurationError: environment variables that name no place to meet, or one where the ranks could not meet.
        RankAbsentError: ranks that did not come, by number.
    """
    if process_group is None:
        world_size = environment_number("WORLD_SIZE", 1, default=1)
        if not dist.is_initialized() and world_size > 1:
            rank = environment_number("RANK", 0, world_size - 1)
            limit_s = max(deadline_s, _START_S)
            host, port = os.environ.get("MASTER_ADDR", ""), environment_number("MASTER_PORT", 0, 65535)
            place = f"{host}:{port}"
            if not host or (rank == 0 and not _is_a_host(host)):  # others may hear of rank 0's name later
                raise ConfigurationError(f"the environment variable MASTER_ADDR must name a host, got {host!r:.200}")
            try:
                # torch looks for a host without a name for longer than it is told to.
                store = within(lambda: _store_of_this_start(host, port, rank, limit_s), limit_s + _MARGIN_S)
            except TimeoutError as error:
                raise RankAbsentError(
                    f"rank {rank}: rank 0, which keeps the store at {place}, did not answer within {limit_s:g} s", (0,)
                ) from error
            except (RuntimeError, ValueError) as error:
                raise ConfigurationError(f"the ranks could not meet at {place}: {first_line(error)}") from error
            connect(store, rank, world_size, limit_s)
        process_group = dist.group.WORLD if dist.is_initialized() else None
    return process_group if process_group is not None and process_group.size() > 1 else None


def group_of(process_group: dist.ProcessGroup | None, device_mesh: "DeviceMesh | None") -> dist.ProcessGroup | None:
    """Return the group that a script means, by either of its names; None where it gives neither.

    Args:
        process_group: the ranks.
        device_mesh: the same ranks as a mesh of one dimension, such as `mesh["ep"]` of a larger one.

    Raises:
        ConfigurationError: both are given, or a mesh of several dimensions.
    """
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


def connect(store: dist.Store, rank: int, world_size: int, deadline_s: float) -> None:
    """Open the default process group of ranks that start, when all of them have come. Collective.

    Args:
        store: that all ranks have opened.
        rank: this rank.
        world_size: all ranks.
        deadline_s: longest wait for any rank, in seconds.

    Raises:
        RankAbsentError: ranks that did not come, by number.
    """
    whereabouts, keys = _whereabouts(store, rank), dist.PrefixStore("lockstep/start", store)
    meeting = MeetingPlace(keys, rank, world_size, name="the start", whereabouts=whereabouts)
    meeting.meet({}, deadline_s, once=True)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    connecting_s = max(deadline_s, _OPEN_S)

    def open_default_group() -> None:
        whereabouts.enter(_CONNECTING)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        whereabouts.enter("after connecting")

    try:
        within(open_default_group, connecting_s)
    except (RuntimeError, TimeoutError) as error:
        absent, seen = whereabouts.late([other for other in range(world_size) if other != rank], _CONNECTING)
        text = f"rank {rank}: the ranks could not connect within {connecting_s:g} s: {first_line(error)}{seen}"
        raise RankAbsentError(text, absent) from error
    atexit.register(_close_default_group, os.getpid())


def _is_a_host(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):
        return False
    return True


def _store_of_this_start(host: str, port: int, rank: int, limit_s: float) -> dist.Store:
    """The store through which ranks of torchrun, or of anything that sets the same variables, find each other.

    Under torchrun it is that of its agent, with keys of this start's own: the agent may keep one store over restarts,
    and ranks would look for each other at the addresses of those that died.
    """
    limit = datetime.timedelta(seconds=limit_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(host, port, is_master=False, timeout=limit)
        return dist.PrefixStore(f"lockstep/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        return dist.TCPStore(host, port, is_master=rank == 0, wait_for_workers=False, timeout=limit, multi_tenant=True)
    except dist.DistNetworkError as error:
        if rank == 0:
            raise
        keeper = f"rank 0, which keeps the store at {host}:{port}"
        text = f"rank {rank}: {keeper}, did not answer within {limit_s:g} s: {first_line(error)}"
        raise RankAbsentError(text, (0,)) from error


def _close_default_group(pid: int) -> None:
    if dist.is_initialized() and os.getpid() == pid:  # a forked child's groups are its parent's
        dist.destroy_process_group()


def own_device(device: torch.device | str | None) -> torch.device:
    """Return the device that is meant on this rank: `cuda` is its own GPU, and so is None where there are GPUs.

    Raises:
        ConfigurationError: for what is no device, and for a GPU where there is none.
    """
    has_gpus = torch.cuda.is_available()
    try:
        meant: torch.device | None = torch.device(("cuda" if has_gpus else "cpu") if device is None else device)
    except RuntimeError:
        meant = None
    if meant is None or meant.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device must be cpu or cuda, got {str(device)!r}")
    if meant.type == "cpu":
        return meant
    if not has_gpus:
        raise ConfigurationError(f"device {str(device)!r} needs a GPU that PyTorch can use; it finds none here")
    if meant.index is not None:
        return meant
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.device("cuda", environment_number("LOCAL_RANK", 0, default=rank % max(1, torch.cuda.device_count())))


def parallel_config(group: dist.ProcessGroup | None, tensor_parallel_size: int) -> ParallelConfig:
    """Return this rank's place: ranks that share their requests have numbers that follow each other.

    Raises:
        ConfigurationError: a size that does not divide the ranks.
    """
    num_ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    if tensor_parallel_size < 1 or num_ranks % tensor_parallel_size:
        raise ConfigurationError(f"tensor_parallel_size must divide the {num_ranks} ranks, got {tensor_parallel_size}")
    dp_rank, tp_rank = divmod(rank, tensor_parallel_size)
    return ParallelConfig(num_ranks // tensor_parallel_size, dp_rank, tensor_parallel_size, tp_rank)


def tensor_parallel_group(
    config: ParallelConfig, group: dist.ProcessGroup | None, device: torch.device, deadline_s: float
) -> WatchedGroup:
    """Return the group, of the ranks that share this rank's requests, that attention runs its collectives on.

    `group` are all ranks, which are all there.
    """
    assert group is not None
    start = Start(group)
    key = f"tensor parallel/{start.next_number('tensor parallel')}"
    start.meeting_place(key, "from_pretrained()").meet({}, deadline_s, once=True)
    ranks = _sharers(config, start.processes)

    def open_group(timeout_s: float) -> WatchedGroup:
        inner = _new_group(ranks, "nccl" if device.type == "cuda" else "gloo", timeout_s, device)
        return watched_group(ranks, inner, start.whereabouts, deadline_s)

    opened: WatchedGroup = _open("a tensor-parallel group", open_group, ranks, device, deadline_s, start)
    return opened


def tensor_parallel_mesh(group: WatchedGroup, device_type: str) -> Any:
    """Return the one-dimensional mesh of a tensor-parallel group, a torch `DeviceMesh`."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("tp",))
