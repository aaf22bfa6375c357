"""Waits for the collectives of a group: with a deadline, watched by whoever knows the other ranks, or parked."""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lockstep.coordination.peers import Peers
from lockstep.coordination.waits import wait_for, wait_until
from lockstep.errors import LockstepError, RankAbsentError

DEADLINE_S = 30.0
"""Longest wait for any rank, in seconds, where nothing else is said."""

_waited = threading.local()


@dataclass
class _Watch:
    """Who watches the waits of a group.

    Attributes:
        peers: knows where the other ranks are.
        members: the group's ranks as `peers` numbers them; empty for all ranks.
        parked: waits for the group's last collective on this rank's GPU after which the host went on; None: none.
    """

    peers: Peers
    members: tuple[int, ...]
    parked: Callable[[], None] | None = None


_watches: dict[str, _Watch] = {}


def watch_group(group: dist.ProcessGroup, peers: Peers | None, members: Sequence[int] = ()) -> None:
    """Let the waits of a group's collectives be watched; None ends it. `members`: as in `_Watch`."""
    if peers is None:
        _watches.pop(group.group_name, None)
    else:
        _watches[group.group_name] = _Watch(peers, tuple(members))


def peers_of(group: dist.ProcessGroup) -> Peers | None:
    """Return the peers of a group that is watched."""
    watch = _watches.get(group.group_name)
    return watch.peers if watch is not None else None


def waited_s() -> float:
    """Return how long this thread has waited in collectives so far, in seconds; a difference tells of one step."""
    seconds: float = getattr(_waited, "seconds", 0.0)
    return seconds


def count_wait(started: float) -> None:
    """Add what has passed since `started`, by `time.perf_counter`, to what this thread has waited."""
    _waited.seconds = waited_s() + time.perf_counter() - started


def await_parked(peers: Peers) -> None:
    """Wait for the collectives after which the host went on, in all groups of these peers. No-op if there are none.

    Whoever lets the host go on calls it before the host needs anything from the GPU: that wait would have no limit.

    Raises:
        RankAbsentError: a rank did not come in time; the group must not be used again.
    """
    for watch in list(_watches.values()):
        if watch.peers is peers and watch.parked is not None:
            parked, watch.parked = watch.parked, None
            parked()


def await_work(
    work: dist.Work, name: str, group: dist.ProcessGroup, deadline_s: float = DEADLINE_S, *, host_waits: bool = True
) -> None:
    """Wait for a collective; on NCCL, the host may go on and the wait be parked with the group.

    Args:
        work: of the collective.
        name: what messages call it.
        group: in which it runs.
        deadline_s: longest wait in seconds.
        host_waits: False: on NCCL the host goes on, up to `await_parked`, if the group is watched.

    Raises:
        RankAbsentError: a rank did not come in time; the group must not be used again.
    """
    watch = _watches.get(group.group_name)
    if dist.get_backend(group) == "nccl":
        work.wait()  # orders streams; the host would go on, and wait without a limit where it next needs a result
        if watch is not None:
            # Work of one group ends in order: a wait for this piece covers what was parked before.
            watch.parked = None
            if not host_waits:
                watch.parked = functools.partial(_await, work, name, group, deadline_s)
                return
    _await(work, name, group, deadline_s)


def barrier(group: dist.ProcessGroup, deadline_s: float = DEADLINE_S) -> None:
    """Wait until all ranks of a group have come. Raises as `await_work`."""
    await_work(dist.barrier(group, async_op=True), "barrier", group, deadline_s)


def _await(work: dist.Work, name: str, group: dist.ProcessGroup, deadline_s: float) -> None:
    watch = _watches.get(group.group_name)
    check = watch.peers.check if watch is not None else None
    started = time.perf_counter()
    try:
        if dist.get_backend(group) == "nccl":
            wait_until(work.is_completed, deadline_s, check)
            return  # most of that wait was for this rank's own GPU
        wait_for(work, deadline_s, check)
        count_wait(started)
    except LockstepError:  # another rank has ended the wait
        raise
    except (TimeoutError, ConnectionError) as error:
        after = f"after {time.perf_counter() - started:.2f} s, deadline {deadline_s:g} s"
        waited_for = f"{name} did not end {after}: {error}"
        if watch is not None:
            raise watch.peers.absent(waited_for, among=watch.members) from error
        raise RankAbsentError(f"rank {dist.get_rank(group)}: {waited_for}; its group is not used again") from error
