"""How records travel. A transport moves `[WORDS]` integers of each rank to all ranks, and knows when to give up."""

import datetime
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

_SLICE_S = 0.2


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self, timeout_s: float) -> list[list[int]]:
        """Return every rank's words, `[ranks][words]`; `TimeoutError` or `ConnectionError` where they do not come."""
        ...


class Transport(Protocol):
    """One exchange at a time among the ranks of a group."""

    num_ranks: int

    def begin(self, words: Sequence[int]) -> Pending:
        """Send this rank's words and return at once."""
        ...


class ProcessGroupTransport:
    """Exchange over a torch process group: one all-gather of a few integers.

    Args:
        process_group: any group; gloo exchanges on the CPU, NCCL through the current device.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.num_ranks = process_group.size()
        self._device = torch.device("cuda") if dist.get_backend(process_group) == "nccl" else torch.device("cpu")

    def begin(self, words: Sequence[int]) -> "_PendingAllGather":
        """Send this rank's words, `[words]` integers of 64 bits."""
        mine = torch.tensor(words, dtype=torch.int64, device=self._device)
        everyones = torch.empty(self.num_ranks, len(words), dtype=torch.int64, device=self._device)
        try:
            work = dist.all_gather(list(everyones), mine, group=self.process_group, async_op=True)
        except RuntimeError as error:
            raise ConnectionError(f"the exchange could not be started: {first_line(error)}") from error
        return _PendingAllGather(work, mine, everyones)


class _PendingAllGather:
    def __init__(self, work: dist.Work, mine: torch.Tensor, everyones: torch.Tensor) -> None:
        self._work = work
        self._mine = mine  # kept: the transfer reads it until it is done
        self._everyones = everyones

    def wait(self, timeout_s: float) -> list[list[int]]:
        wait_for(self._work, timeout_s)
        return self._everyones.tolist()


def wait_for(work: dist.Work, timeout_s: float) -> None:
    """Wait for a collective at most `timeout_s` seconds.

    Raises:
        TimeoutError: it did not end in time.
        ConnectionError: a peer's connection broke.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        # Slices, because Python sees Ctrl-C only between two waits. A slice that ends leaves the collective running.
        left_s = deadline - time.monotonic()
        try:
            work.wait(datetime.timedelta(seconds=min(max(left_s, 0.001), _SLICE_S)))
            return
        except RuntimeError as error:
            message = first_line(error)
            if "imed out" not in message and "imeout" not in message:
                raise ConnectionError(f"a peer's connection broke ({message})") from error
            if left_s <= _SLICE_S:
                raise TimeoutError(f"no answer within {timeout_s:.3g} s") from error


def first_line(error: BaseException) -> str:
    """Return an exception's message up to its first line break; C++ stack traces follow there."""
    return str(error).strip().split("\n", 1)[0]
