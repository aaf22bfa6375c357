"""How the ranks of a start find each other, each one's place among them, and the groups in which they work."""

import atexit
import datetime
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lockstep.coordination.board import Board
from lockstep.coordination.flight_recorder import within
from lockstep.coordination.transports import Transport, first_line, open_transport, wait_until
from lockstep.errors import ConfigurationError, RankAbsentError
from lockstep.metadata.config import ParallelConfig

logger = logging.getLogger(__name__)

_OPEN_S = 5.0
# NCCL's watchdog ends the process: only where all else has failed.
_WATCHDOG_S = 10.0


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


def open_groups(
    process_group: dist.ProcessGroup, config: ParallelConfig, device: torch.device, deadline_s: float, epoch: int
) -> Groups:
    """Open groups of ranks that have just met. Collective.

    Args:
        process_group: the ranks.
        config: this rank's place.
        device: of the model.
        deadline_s: longest wait for any rank in the groups' collectives, in seconds.
        epoch: how often groups were opened before, for the message.

    Raises:
        RankAbsentError: not all could be opened in time.
    """
    ranks = dist.get_process_group_ranks(process_group)
    # All ranks have just met, but connecting takes some time, however short the deadline.
    timeout_s = max(deadline_s, _OPEN_S)
    opened: list[dist.ProcessGroup] = []

    def new_group(members: list[int], backend: str) -> dist.ProcessGroup:
        limit = datetime.timedelta(seconds=timeout_s + (_WATCHDOG_S if backend == "nccl" else 0))
        group = dist.new_group(members, timeout=limit, backend=backend, use_local_synchronization=True)
        opened.append(group)
        if backend == "nccl":  # its ranks connect at the first collective, where they would wait without a limit
            connected = dist.all_reduce(torch.zeros(1, device=device), group=group, async_op=True)
            wait_until(connected.is_completed, timeout_s)
        return group

    device_backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        control, data = new_group(ranks, "gloo"), new_group(ranks, device_backend)
        tp_size = config.tensor_parallel_size
        first = config.data_parallel_rank * tp_size
        tp_group = new_group(ranks[first : first + tp_size], device_backend) if tp_size > 1 else None
        transport, board = open_transport(control, timeout_s)
    except (RuntimeError, TimeoutError, ConnectionError) as error:
        raise RankAbsentError(
            f"rank {config.rank}: groups of epoch {epoch} could not be opened within "
            f"{timeout_s:g} s: {first_line(error)}"
        ) from error
    return Groups(data, tp_group, transport, board, opened)


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


def find_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the ranks, connected under torchrun where the script has not done so; None for a single process.

    Args:
        process_group: what the script has given, if anything; it is returned as it is.

    Raises:
        ConfigurationError: the ranks could not meet at the address that torchrun gave.
    """
    if process_group is None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                store = _store_of_this_start()
                if store is None:
                    dist.init_process_group(backend)
                else:
                    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
                    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
            except (RuntimeError, ValueError) as error:
                place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise ConfigurationError(f"the ranks could not meet at {place}: {first_line(error)}") from error
            atexit.register(_close_default_group)
        process_group = dist.group.WORLD if dist.is_initialized() else None
    return process_group if process_group is not None and process_group.size() > 1 else None


def _store_of_this_start() -> dist.Store | None:
    """The store of torchrun's agent, with keys of this start's own; None where there is no agent.

    The agent may keep one store over restarts: ranks would look for each other at the addresses of those that died.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False)
    return dist.PrefixStore(f"lockstep/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _close_default_group() -> None:
    if dist.is_initialized():
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


def tensor_parallel_mesh(config: ParallelConfig, group: dist.ProcessGroup | None, device_type: str) -> Any:
    """Return the one-dimensional mesh of the ranks that share this rank's requests, a torch `DeviceMesh`.

    Args:
        config: this rank's place.
        group: all ranks.
        device_type: of the model.
    """
    from torch.distributed.device_mesh import DeviceMesh

    assert group is not None
    ranks = torch.tensor(dist.get_process_group_ranks(group)).view(config.data_parallel_size, -1)
    return DeviceMesh(device_type, ranks, mesh_dim_names=("dp", "tp"))["tp"]
