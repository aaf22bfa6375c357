"""Which backend brings the tokens to their experts."""

import torch.distributed as dist

from lockstep.dispatch.allgather import AllGatherDispatcher
from lockstep.dispatch.base import Dispatcher
from lockstep.dispatch.collectives import DEADLINE_S
from lockstep.errors import ConfigurationError

DISPATCHERS = ("allgather",)


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
    raise ConfigurationError(f"dispatcher must be one of {', '.join(DISPATCHERS)}, got {name!r}")
