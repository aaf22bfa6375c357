"""A process group whose waits have a deadline and name who is missing, for collectives that other software issues."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from lockstep.coordination.group_waits import await_work, peers_of
from lockstep.coordination.whereabouts import Whereabouts
from lockstep.errors import RankAbsentError

_BACKEND = "lockstep_watched"
_PLACE = "in a tensor-parallel exchange before join()"
_COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced",
    "_allgather_base", "all_gather_single", "all_gather_single_coalesced", "reduce", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "broadcast", "scatter",
    "gather", "barrier",
)  # fmt: skip


class WatchedGroup(dist.ProcessGroup):
    """A face for a group that may be replaced: what is issued on it runs on `inner`, and is waited for at most so long.

    A tensor-parallel plan puts its group into every parameter for good, and waits in C++, for torch's half hour. This
    group stays where the plan has put it, while `inner` changes whenever groups are opened anew.

    Attributes:
        inner: the group that carries the collectives now.
        ranks: the members' numbers in the whole start.
        whereabouts: where they say what they are doing.
        deadline_s: longest wait for any rank, in seconds.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # torch's stubs know one constructor of three
        self.inner: dist.ProcessGroup
        self.ranks: tuple[int, ...] = ()
        self.whereabouts: Whereabouts
        self.deadline_s = 0.0
        self._name = ""

    # What torch asks a group for; the base class would ask its own backends, of which this one has none.
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
        """Issue a collective on `inner` and wait for it, on NCCL only where no later wait does.

        Raises:
            RankAbsentError: a rank of the group did not come in time.
            PeerFailedError: another rank said that it failed.
        """
        inner, peers = self.inner, peers_of(self.inner)
        if peers is None:
            return self._run_before_join(name, *args)
        if dist.get_backend(inner) == "nccl":  # the end of the step waits for the GPU, with a deadline
            return getattr(inner, name)(*args)
        with peers.in_exchange():
            work = getattr(inner, name)(*args)
            await_work(work, f"a tensor-parallel {name.strip('_')}", inner, self.deadline_s)
        return work

    def _run_before_join(self, name: str, *args: Any) -> Any:
        """Run a collective of the pass that finds out the model's shapes."""
        self.whereabouts.enter(_PLACE)
        work = getattr(self.inner, name)(*args)
        try:
            await_work(work, name, self.inner, self.deadline_s)
        except RankAbsentError as error:
            absent, seen = self.whereabouts.late([rank for rank in self.ranks if rank != dist.get_rank()], _PLACE)
            raise RankAbsentError(f"{error}{seen}", absent) from error
        return work


for _name in _COLLECTIVES:
    if hasattr(dist.ProcessGroup, _name):  # the names differ between torch's versions
        setattr(WatchedGroup, _name, lambda self, *args, _name=_name: self.run(_name, *args))


def watched_group(
    ranks: Sequence[int], inner: dist.ProcessGroup, whereabouts: Whereabouts, deadline_s: float
) -> WatchedGroup:
    """Make a watched group of these ranks of the whole start. Only its members call this; see `WatchedGroup`."""
    if _BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(
            _BACKEND, lambda _store, rank, size, _timeout: WatchedGroup(rank, size), devices=["cpu", "cuda"]
        )
    made = dist.new_group(list(ranks), backend=_BACKEND, use_local_synchronization=True)
    assert isinstance(made, WatchedGroup)
    made.ranks, made.inner, made.whereabouts, made.deadline_s = tuple(ranks), inner, whereabouts, deadline_s
    return made
