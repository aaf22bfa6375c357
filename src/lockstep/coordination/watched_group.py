"""A process group whose waits have a deadline and name who is missing, for collectives that other software issues."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.meeting import Whereabouts
from lockstep.coordination.waits import await_work, peers_of
from lockstep.errors import RankAbsentError

_BACKEND = "lockstep_watched"
_PLACE = "in a tensor-parallel exchange before join()"
_COLLECTIVES = ("all", "reduce", "broadcast", "scatter", "gather", "barrier")
"""How the names of a group's collectives begin, which differ between torch's versions."""


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
        """Issue a collective on `inner` and wait for it as `await_work`, on NCCL only where no later wait does."""
        inner, peers = self.inner, peers_of(self.inner)
        if peers is None:  # before join: the pass that determines the model's shapes
            self.whereabouts.enter(_PLACE)
            work = getattr(inner, name)(*args)
            try:
                await_work(work, name, inner, self.deadline_s)
            except RankAbsentError as error:
                raise self.whereabouts.absent(str(error), self.ranks, _PLACE) from error
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
    made.ranks, made.inner, made.whereabouts, made.deadline_s = ranks, inner, whereabouts, deadline_s
    return made
