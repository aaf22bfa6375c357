"""A rank's side of membership: it works with the ranks of an epoch, and with those that are left in the next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from lockstep.coordination.waits import within
from lockstep.errors import LockstepError, PeerFailedError, RankAbsentError
from lockstep.runner import ranks
from lockstep.runner.failures import failure_of
from lockstep.runner.options import ModelOptions

T = TypeVar("T")

# Whoever decides may have to wait for a rank's deadline, and once more for one that does not say that it has stopped.
_DECISION_DEADLINES, _DECISION_S = 3, 30.0
_LEAVE_S = 10.0


class Member:
    """This rank, in one epoch after another.

    Args:
        rank: its number, which stays.
        options: of the model, the same on all ranks.
        port: of the store of the process that has started it.
        start_timeout_s: longest wait for the others at the start, in seconds.
        say: tells that process something.

    Attributes:
        epoch: in which it works.
        members: of this epoch, by number.
    """

    def __init__(
        self, rank: int, options: ModelOptions, port: int, start_timeout_s: float, say: Callable[[dict[str, Any]], None]
    ) -> None:
        self.rank, self.epoch = rank, 0
        self.members: tuple[int, ...] = tuple(range(options.world_size))
        self._options, self._port, self._start_timeout_s, self._say = options, port, start_timeout_s, say

    def work(self, load: Callable[[], Any], serve: Callable[[Any], T]) -> T:
        """Return what `serve` returns, given the model from `load`; it is called anew in each epoch. Collective."""
        from lockstep.coordination.membership import await_members
        from lockstep.models.respread import Respreader
        from lockstep.moe.survivors import widened, without_lost

        options, store = self._options, ranks.open_store(self._port, self._start_timeout_s)
        model, respreader, placement = None, None, None
        while True:
            try:
                if options.world_size > 1:
                    self._join()
                if model is None:
                    model = load()
                    if options.can_survive:
                        respreader = Respreader(
                            model, options.model, dtype=ranks.torch_dtype(options), device=options.device
                        )
                        placement = widened(respreader.placement, options.survive)
                if respreader is not None and placement is not None and (self.epoch or options.survive):
                    respreader.spread(placement)
                return serve(model)
            except (RankAbsentError, PeerFailedError) as error:
                if placement is None:
                    raise
                self._say(failure_of(self.rank, error) | {"epoch": self.epoch})
            wait_s = _DECISION_DEADLINES * options.deadline_s + _DECISION_S
            before, self.members = self.members, await_members(store, self.rank, self.epoch + 1, wait_s)
            placement = without_lost(placement, [before.index(member) for member in self.members])
            self.epoch += 1
            try:
                within(functools.partial(ranks.leave_groups, model), _LEAVE_S)
            except TimeoutError as error:  # as a GPU might that still waits for a rank that is gone
                raise LockstepError(f"rank {self.rank} could not leave the groups of epoch {self.epoch - 1}") from error

    def _join(self) -> None:
        import torch.distributed as dist

        limit_s = self._options.deadline_s if self.epoch else self._start_timeout_s
        store = dist.PrefixStore(f"epoch/{self.epoch}", ranks.open_store(self._port, limit_s))
        ranks.join_group(store, self.members.index(self.rank), len(self.members), limit_s)
