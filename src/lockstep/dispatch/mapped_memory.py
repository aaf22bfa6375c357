"""Memory that every rank of one host has mapped, and where the ranks meet around it."""

from typing import Any

import torch
import torch.distributed as dist

from lockstep.coordination.waits import barrier


class MappedMemory:
    """The memory of a process group's GPUs, by torch's symmetric memory. Tests put threads of one GPU in its place."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._group = process_group
        self._kept: Any = None

    def map(self, nbytes: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
        """Return `nbytes` of this rank, mapped by all until `release`, and the addresses of all ranks'. Collective."""
        import torch.distributed._symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        self._kept = symmetric_memory.rendezvous(buffer, self._group)
        return buffer, [int(address) for address in self._kept.buffer_ptrs]

    def release(self) -> None:
        """Let go of what was mapped."""
        self._kept = None

    def synchronize(self, device: torch.device) -> None:
        """Wait for everything that this rank has launched."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def meet(self, deadline_s: float) -> None:
        """Wait until all ranks have come. Collective; raises as `barrier`."""
        barrier(self._group, deadline_s)
