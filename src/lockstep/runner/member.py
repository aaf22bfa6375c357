"""A rank's side of membership: it works with the ranks of one epoch after another."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lockstep.coordination.meeting import Whereabouts
from lockstep.coordination.membership import EpochEnded, asked_to_stop, await_members
from lockstep.coordination.waits import within
from lockstep.errors import LockstepError, PeerFailedError, RankAbsentError
from lockstep.moe.survivors import placement_of_epoch, widened
from lockstep.runner import ranks
from lockstep.runner.losses import WHEREABOUTS, failure_of
from lockstep.runner.options import EngineOptions

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Whoever decides may have to wait for a rank's deadline, and once more for one that does not say that it has stopped.
_DECISION_DEADLINES, _DECISION_S = 3, 30.0
_LEAVE_S = 10.0
_ASK_S = 0.1  # how often the first member looks whether it was asked to stop


class Member:
    """This rank, in one epoch after another: `members` are those of the present `epoch`, by their first numbers.

    `port` is that of the launcher's store, and `say` tells the launcher something. A rank that comes back (`returns`)
    is given the first epoch that it may enter.
    """

    def __init__(
        self, rank: int, options: EngineOptions, port: int, start_timeout_s: float,
        say: Callable[[dict[str, Any]], None], first_epoch: int = 0,
    ) -> None:  # fmt: skip
        self.rank, self.epoch, self.returns = rank, 0, first_epoch > 0
        self.members: tuple[int, ...] = tuple(range(options.world_size))
        self._options, self._port, self._start_timeout_s, self._say = options, port, start_timeout_s, say
        self._first_epoch = first_epoch
        self._epochs: list[tuple[int, ...]] = []  # members of each but the first
        self._store = ranks.open_store(port, start_timeout_s)
        self._asked_at_s = 0.0

    def work(self, serve: Callable[[Any], T], *, count_expert_load: bool = False) -> T:
        """Return what `serve` returns, given the model; it is called anew in each epoch. Collective."""
        options, model = self._options, None
        survives = options.can_survive
        respreader = ranks.respreader_of(options, self._store, count_expert_load) if survives else None
        if self.returns and respreader is not None:
            model = respreader.load_alone(self.rank, options.world_size, options.device)
            self._whereabouts().enter("back")  # the launcher must not take it for its earlier process
            self._say({"back": True})
            while self.epoch < self._first_epoch or self.rank not in self.members:
                self._await_epoch()
        while True:
            began_s = time.monotonic()
            try:
                if options.world_size > 1:
                    self._join()
                joined_s = time.monotonic()
                if model is None:
                    model = ranks.load_model(options, count_expert_load=count_expert_load)
                if respreader is not None and (self.epoch or options.survive):
                    first = widened(respreader.first_placement(model, options.world_size), options.survive)
                    with self._whereabouts().working(f"spreading the experts of epoch {self.epoch}"):
                        respreader.spread(model, placement_of_epoch(first, self._epochs), self.members)
                if self.epoch and self.rank == self.members[0]:
                    took_s = joined_s - began_s, time.monotonic() - joined_s
                    logger.warning("met in %.2f s, experts there in %.2f s: epoch %d begins", *took_s, self.epoch)
                return serve(model)
            except EpochEnded:
                self._say({"stopped": self.epoch})
            except (RankAbsentError, PeerFailedError) as error:
                if respreader is None or model is None:
                    raise
                self._say(failure_of(self.rank, error) | {"epoch": self.epoch})
            self._await_epoch()
            if self.rank not in self.members:
                text = f"rank {self.rank} is no member of epoch {self.epoch}: it was given up"
                raise RankAbsentError(text, (self.rank,))
            try:
                within(functools.partial(ranks.leave_groups, model), _LEAVE_S)
            except TimeoutError as error:  # as a GPU might that still waits for a rank that is gone
                raise LockstepError(f"rank {self.rank} could not leave the groups of epoch {self.epoch - 1}") from error

    def was_asked_to_stop(self) -> bool:
        """Return whether this epoch is to end, since a lost rank is back; called before each step."""
        if not self._options.restart_ranks or self.rank != self.members[0] or time.monotonic() < self._asked_at_s:
            return False
        self._asked_at_s = time.monotonic() + _ASK_S
        return asked_to_stop(self._store, self.epoch)

    def _await_epoch(self) -> None:
        wait_s = _DECISION_DEADLINES * self._options.deadline_s + _DECISION_S
        self.epoch += 1
        self.members = await_members(self._store, self.rank, self.epoch, wait_s)
        self._epochs.append(self.members)

    def _whereabouts(self) -> Whereabouts:
        return Whereabouts(dist.PrefixStore(WHEREABOUTS, self._store), self.rank)

    def _join(self) -> None:
        limit_s = self._options.deadline_s if self.epoch else self._start_timeout_s
        store = dist.PrefixStore(f"epoch/{self.epoch}", ranks.open_store(self._port, limit_s))
        ranks.join_group(store, self.members.index(self.rank), len(self.members), limit_s)
