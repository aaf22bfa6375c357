"""Collectives over ranks with different, agreed numbers of rows: no padding, and a deadline for every wait."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lockstep.coordination.waits import DEADLINE_S, await_work, count_wait, peers_of
from lockstep.errors import ConfigurationError, TokenCountError

_recorders: list[list[tuple[str, tuple[int, ...]]]] = []


@contextmanager
def record_collectives() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Record `(operation, sizes)` of this process's collectives in order of issue; all ranks' records must be equal."""
    log: list[tuple[str, tuple[int, ...]]] = []
    _recorders.append(log)
    try:
        yield log
    finally:
        _recorders.remove(log)


def all_gatherv(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], group: dist.ProcessGroup, deadline_s: float = DEADLINE_S, *,
    host_waits: bool = True,
) -> list[torch.Tensor]:  # fmt: skip
    """Gather the rows, `[sizes[rank], ...]`, of several tensors in one exchange: `[sum(sizes), ...]` of each.

    Raises `TokenCountError` unless each tensor has `sizes[rank]` rows, and `RankAbsentError` if a rank is absent;
    never use the group after that. On NCCL without `host_waits`, the host continues until `await_parked`.
    """
    if not tensors:
        raise ConfigurationError("all_gatherv needs at least one tensor")
    check_sizes("all_gatherv", sizes, group.size())
    rank = dist.get_rank(group)
    for index, tensor in enumerate(tensors):
        if tensor.shape[0] != sizes[rank]:
            raise TokenCountError(
                f"all_gatherv: tensor {index} has {tensor.shape[0]} rows, but sizes says {sizes[rank]} on rank {rank}"
            )
    if not sum(sizes):
        return [tensor.new_empty((0, *tensor.shape[1:])) for tensor in tensors]
    # One message per rank, not one per tensor: rows of all tensors travel side by side as bytes.
    parts = [_as_bytes(tensor) for tensor in tensors]
    mine = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()
    if mine.device.type == "cuda":
        everyones = mine.new_empty((sum(sizes), mine.shape[1]))
        _record("all_gatherv", sizes, group, deadline_s, on_cpu=False)
        work = dist.all_gather(list(torch.split(everyones, list(sizes))), mine, group=group, async_op=True)
        await_work(work, "all_gatherv", group, deadline_s, host_waits=host_waits)
    else:
        # gloo's all_gather refuses uneven sizes, and its broadcasts run one rank at a time; an all-to-all takes them.
        copies, mine_to_all = mine.repeat(len(sizes), 1), [sizes[rank]] * len(sizes)
        everyones = all_to_allv(copies, mine_to_all, sizes, group, deadline_s, name="all_gatherv", noted_sizes=sizes)
    columns = torch.split(everyones, [part.shape[1] for part in parts], dim=1)
    return [
        view_as(column, tensor.dtype).view(sum(sizes), *tensor.shape[1:])
        for column, tensor in zip(columns, tensors, strict=True)
    ]


def gather_json(value: Any, group: dist.ProcessGroup, deadline_s: float = DEADLINE_S) -> list[Any]:
    """All-gather JSON values over a gloo group, `[ranks]`. Not pickle: data of other processes is not executed."""
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_gatherv([torch.tensor([len(mine)])], [1] * group.size(), group, deadline_s)[0].tolist()
    everyones = all_gatherv([mine], sizes, group, deadline_s)[0]
    return [json.loads(bytes(part.tolist())) for part in torch.split(everyones, sizes)]


def view_as(columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View columns `[rows, n]` of a matrix as another dtype; copies them if their layout does not allow a view."""
    # torch calls a single row contiguous at any offset and stride: `contiguous` would not copy, and `view` would fail.
    one_row = columns.shape[0] <= 1
    plain = columns.clone(memory_format=torch.contiguous_format) if one_row else columns.contiguous()
    return plain.view(dtype)


def reduce_scatterv(
    rows: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup, deadline_s: float = DEADLINE_S, *,
    host_waits: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Sum rows over all ranks, in rank order in float32; return this rank's, `[sizes[rank], hidden]`."""
    check_sizes("reduce_scatterv", sizes, group.size())
    own = sizes[dist.get_rank(group)]
    received = all_to_allv(
        rows, sizes, [own] * len(sizes), group, deadline_s,
        name="reduce_scatterv", noted_sizes=sizes, host_waits=host_waits,
    )  # fmt: skip
    parts = received.view(len(sizes), own, *rows.shape[1:])
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total = total + part
    return total.to(rows.dtype)


def all_to_allv(
    rows: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int], group: dist.ProcessGroup,
    deadline_s: float = DEADLINE_S, *, name: str = "all_to_allv", noted_sizes: Sequence[int] = (),
    host_waits: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Send each rank its slice of the rows; return those received, `[sum(recv_sizes), ...]`. `name` is for records."""
    check_sizes(name, send_sizes, group.size())
    check_sizes(name, recv_sizes, group.size())
    if rows.shape[0] != sum(send_sizes):
        raise TokenCountError(
            f"{name} needs sum(sizes) = {sum(send_sizes)} rows, got {rows.shape[0]} on rank {dist.get_rank(group)}"
        )
    received = rows.new_empty((sum(recv_sizes), *rows.shape[1:]))
    call = AllToAll(
        name, noted_sizes, received, rows.contiguous(), recv_sizes, send_sizes, group, deadline_s, host_waits
    )
    run = _in_place_of[-1] if _in_place_of else AllToAll.run
    run(call)
    return received


@dataclass(frozen=True)
class AllToAll:
    """An all-to-all call: `sent` is ordered by destination; `received`, its output, by source."""

    name: str
    noted_sizes: Sequence[int]
    received: torch.Tensor
    sent: torch.Tensor
    recv_sizes: Sequence[int]
    send_sizes: Sequence[int]
    group: dist.ProcessGroup
    deadline_s: float
    host_waits: bool

    def run(self) -> None:
        """Record the call, issue it and wait for it."""
        _record(self.name, self.noted_sizes, self.group, self.deadline_s, self.sent.device.type == "cpu")
        work = dist.all_to_all_single(
            self.received, self.sent, list(self.recv_sizes), list(self.send_sizes), group=self.group, async_op=True
        )
        await_work(work, self.name, self.group, self.deadline_s, host_waits=self.host_waits)


_in_place_of: list[Callable[[AllToAll], None]] = []


@contextmanager
def instead_of_all_to_all(run: Callable[[AllToAll], None]) -> Iterator[None]:
    """Replace `AllToAll.run` with `run` inside the block, for fault injection."""
    _in_place_of.append(run)
    try:
        yield
    finally:
        _in_place_of.remove(run)


def check_sizes(name: str, sizes: Sequence[int], num_ranks: int) -> None:
    """Raise unless there is one size per rank and none is negative; `name` begins the message."""
    if len(sizes) != num_ranks:
        raise ConfigurationError(f"{name} needs one size per rank: {num_ranks} ranks, got {len(sizes)} sizes")
    for rank, size in enumerate(sizes):
        if size < 0:
            raise TokenCountError(f"{name}: sizes must be >= 0, got {size} on rank {rank}")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View `[rows, ...]` as `[rows, bytes per row]`."""
    elements_per_row = math.prod(tensor.shape[1:])
    # torch calls a single row or column contiguous at any stride, but a view as bytes uses the stride.
    plain = tensor.contiguous().as_strided((tensor.shape[0], elements_per_row), (elements_per_row, 1))
    return plain.view(torch.uint8)


def _record(name: str, sizes: Sequence[int], group: dist.ProcessGroup, deadline_s: float, on_cpu: bool) -> None:
    for log in _recorders:
        log.append((name, tuple(sizes)))
    peers = peers_of(group)
    # Smaller groups have their own sequence of collectives.
    if peers is not None and peers.num_ranks == group.size():
        started = time.perf_counter()
        peers.collective(name, sizes, group, deadline_s, on_cpu)  # waits for all ranks if it compares
        count_wait(started)
