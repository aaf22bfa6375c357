"""How the ranks of a start find each other, each one's place among them, and the groups in which they work."""

import atexit
import datetime
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lockstep.coordination.board import Board
from lockstep.coordination.meeting import MeetingPlace
from lockstep.coordination.transports import Transport, open_transport
from lockstep.coordination.waits import first_line, wait_until, within
from lockstep.coordination.watched_group import WatchedGroup, watched_group
from lockstep.coordination.whereabouts import Whereabouts
from lockstep.errors import ConfigurationError, RankAbsentError
from lockstep.metadata.config import ParallelConfig

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
        """Return a place where the group's ranks meet.

        Args:
            key: of its own in the store.
            name: what the ranks meet at, to stand after "did not enter".
        """
        return MeetingPlace(
            dist.PrefixStore(key, self.store),
            self.rank,
            len(self.processes),
            name=name,
            whereabouts=self.whereabouts,
            processes=self.processes,
        )


def _whereabouts(store: dist.Store, rank: int) -> Whereabouts:
    return Whereabouts(dist.PrefixStore("lockstep/whereabouts", store), rank)


def open_groups(
    process_group: dist.ProcessGroup,
    config: ParallelConfig,
    device: torch.device,
    deadline_s: float,
    epoch: int,
    start: Start,
) -> Groups:
    """Open groups of ranks that have just met. Collective.

    Args:
        process_group: the ranks.
        config: this rank's place.
        device: of the model.
        deadline_s: longest wait for any rank in the groups' collectives, in seconds.
        epoch: how often groups were opened before, for the message.
        start: of the same ranks.

    Raises:
        RankAbsentError: not all could be opened in time.
    """
    ranks = dist.get_process_group_ranks(process_group)
    # All ranks have just met, but connecting takes some time, however short the deadline.
    timeout_s = max(deadline_s, _OPEN_S)
    opened: list[dist.ProcessGroup] = []
    place = f"opening the groups of epoch {epoch}"

    def new_group(members: list[int], backend: str) -> dist.ProcessGroup:
        opened.append(_new_group(members, backend, timeout_s, device))
        return opened[-1]

    def open_all() -> tuple[dist.ProcessGroup, dist.ProcessGroup | None, Transport, Board | None]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is each thread's own
        start.whereabouts.enter(place)
        control, data = new_group(ranks, "gloo"), new_group(ranks, device_backend)
        tp_size = config.tensor_parallel_size
        first = config.data_parallel_rank * tp_size
        tp_group = new_group(ranks[first : first + tp_size], device_backend) if tp_size > 1 else None
        return data, tp_group, *open_transport(control, timeout_s)

    device_backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        # Each of them has a limit of its own, but not the store's in which the ranks find each other's addresses.
        data, tp_group, transport, board = within(open_all, timeout_s + _MARGIN_S)
    except (RuntimeError, TimeoutError, ConnectionError) as error:
        raise _not_opened(f"groups of epoch {epoch}", timeout_s, error, start, ranks, place) from error
    start.whereabouts.enter("in join()")
    return Groups(data, tp_group, transport, board, opened)


def _not_opened(
    what: str, timeout_s: float, error: BaseException, start: Start, ranks: Sequence[int], place: str
) -> RankAbsentError:
    """Return the error for groups that could not be opened, naming who was not there."""
    own = dist.get_rank()
    absent, seen = start.whereabouts.late([rank for rank in ranks if rank != own], place)
    text = f"rank {own}: {what} could not be opened within {timeout_s:g} s: {first_line(error)}{seen}"
    return RankAbsentError(text, absent)


def _new_group(members: list[int], backend: str, timeout_s: float, device: torch.device) -> dist.ProcessGroup:
    """Open a group of ranks that are all there, and connect it; its collectives end after a limit."""
    limit = datetime.timedelta(seconds=timeout_s + (_WATCHDOG_S if backend == "nccl" else 0))
    group = dist.new_group(members, timeout=limit, backend=backend, use_local_synchronization=True)
    if backend == "nccl":  # its ranks connect at the first collective, where they would wait without a limit
        connected = dist.all_reduce(torch.zeros(1, device=device), group=group, async_op=True)
        wait_until(connected.is_completed, timeout_s)
    return group


def abort(groups: list[dist.ProcessGroup], device: torch.device, rank: int) -> None:
    """End what waits in these groups on the GPU; otherwise the end of this process would wait for its kernels.

    Args:
        groups: not to be used again.
        device: of the model.
        rank: this rank, for messages.
    """
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
        ConfigurationError: the ranks could not meet at the address that torchrun gave.
        RankAbsentError: ranks that did not come, by number.
    """
    if process_group is None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            limit_s = max(deadline_s, _START_S)
            try:
                store = _store_of_this_start(rank, limit_s)
            except (RuntimeError, ValueError) as error:
                place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise ConfigurationError(f"the ranks could not meet at {place}: {first_line(error)}") from error
            connect(store, rank, world_size, limit_s)
        process_group = dist.group.WORLD if dist.is_initialized() else None
    return process_group if process_group is not None and process_group.size() > 1 else None


def connect(
    store: dist.Store, rank: int, world_size: int, deadline_s: float, *, limit: datetime.timedelta | None = None
) -> None:
    """Open the default process group of ranks that start, when all of them have come. Collective.

    Args:
        store: that all ranks have opened.
        rank: this rank.
        world_size: all ranks.
        deadline_s: longest wait for any rank, in seconds.
        limit: of the group's own collectives; torch's by default.

    Raises:
        RankAbsentError: ranks that did not come, by number.
    """
    whereabouts = _whereabouts(store, rank)
    meeting = MeetingPlace(
        dist.PrefixStore("lockstep/start", store), rank, world_size, name="the start", whereabouts=whereabouts
    )
    meeting.meet({}, deadline_s, once=True)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    connecting_s = max(deadline_s, _OPEN_S)

    def open_default_group() -> None:
        whereabouts.enter(_CONNECTING)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        whereabouts.enter("after connecting")

    try:
        within(open_default_group, connecting_s)
    except (RuntimeError, TimeoutError) as error:
        others = [other for other in range(world_size) if other != rank]
        absent, seen = whereabouts.late(others, _CONNECTING)
        raise RankAbsentError(
            f"rank {rank}: the ranks could not connect within {connecting_s:g} s: {first_line(error)}{seen}", absent
        ) from error
    atexit.register(_close_default_group, os.getpid())


def _store_of_this_start(rank: int, limit_s: float) -> dist.Store:
    """The store through which ranks of torchrun, or of anything that sets the same variables, find each other.

    Under torchrun it is that of its agent, with keys of this start's own: the agent may keep one store over restarts,
    and ranks would look for each other at the addresses of those that died.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = datetime.timedelta(seconds=limit_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(host, port, is_master=False, timeout=limit)
        return dist.PrefixStore(f"lockstep/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        return dist.TCPStore(host, port, is_master=rank == 0, wait_for_workers=False, timeout=limit, multi_tenant=True)
    except dist.DistNetworkError as error:
        if rank == 0:
            raise
        raise RankAbsentError(
            f"rank {rank}: rank 0, which keeps the store at {host}:{port}, did not answer within {limit_s:g} s: "
            f"{first_line(error)}",
            (0,),
        ) from error


def _close_default_group(pid: int) -> None:
    if dist.is_initialized() and os.getpid() == pid:  # a forked child's groups are its parent's
        dist.destroy_process_group()


def local_rank() -> int:
    """Return this rank's number among those of its host."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return int(os.environ.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))


def own_device(device: torch.device | str | None) -> torch.device:
    """Return the device that is meant on this rank: `cuda` is its own GPU, and so is None where there are GPUs.

    Args:
        device: such as `cpu`, `cuda` or `cuda:1`, or None.

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
    return torch.device("cuda", local_rank()) if meant.index is None else meant


def parallel_config(group: dist.ProcessGroup | None, tensor_parallel_size: int) -> ParallelConfig:
    """Return this rank's place: ranks that share their requests have numbers that follow each other.

    Args:
        group: from `find_group`.
        tensor_parallel_size: ranks that share their requests, >= 1.

    Raises:
        ConfigurationError: a size that does not divide the ranks.
    """
    num_ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    if tensor_parallel_size < 1 or num_ranks % tensor_parallel_size:
        raise ConfigurationError(f"tensor_parallel_size must divide the {num_ranks} ranks, got {tensor_parallel_size}")
    return ParallelConfig(
        num_ranks // tensor_parallel_size,
        rank // tensor_parallel_size,
        tensor_parallel_size,
        rank % tensor_parallel_size,
    )


def tensor_parallel_group(
    config: ParallelConfig, group: dist.ProcessGroup | None, device: torch.device, deadline_s: float
) -> WatchedGroup:
    """Return the group that attention runs its collectives on, of the ranks that share this rank's requests.

    Args:
        config: this rank's place.
        group: all ranks, which are all there.
        device: of the model.
        deadline_s: longest wait for any rank, in seconds.
    """
    assert group is not None
    start = Start(group)
    key = f"tensor parallel/{start.next_number('tensor parallel')}"
    start.meeting_place(key, "from_pretrained()").meet({}, deadline_s, once=True)
    first = config.data_parallel_rank * config.tensor_parallel_size
    ranks = list(start.processes[first : first + config.tensor_parallel_size])
    timeout_s = max(deadline_s, _OPEN_S)
    place = "opening a tensor-parallel group"

    def open_group() -> WatchedGroup:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is each thread's own
        start.whereabouts.enter(place)
        inner = _new_group(ranks, "nccl" if device.type == "cuda" else "gloo", timeout_s, device)
        return watched_group(ranks, inner, start.whereabouts, deadline_s)

    try:
        opened: WatchedGroup = within(open_group, timeout_s + _MARGIN_S)
    except (RuntimeError, TimeoutError) as error:
        raise _not_opened("a tensor-parallel group", timeout_s, error, start, ranks, place) from error
    return opened


def tensor_parallel_mesh(group: WatchedGroup, device_type: str) -> Any:
    """Return the one-dimensional mesh of a tensor-parallel group, a torch `DeviceMesh`.

    Args:
        group: from `tensor_parallel_group`.
        device_type: of the model.
    """
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("tp",))
