"""Ranks meet before they open groups: all of them or none, and nobody is added later."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lockstep.coordination.flight_recorder import within
from lockstep.errors import RankAbsentError

if TYPE_CHECKING:
    import torch.distributed as dist

_POLL_S = 0.002
_MARGIN_S = 0.5


class MeetingPlace:
    """Where the ranks of a group exchange a few facts through a torch store, which outlives every group.

    A meeting is either complete, then every rank knows all facts, or it has failed, then no rank ever takes part in it:
    which of the two is written once, by whoever comes first. A rank that comes too late waits in the next meeting.

    Args:
        store: of all ranks; keys of its own.
        rank: this rank.
        num_ranks: all ranks.
        name: of what the ranks meet for, to tell it from another.
        entrances: a store that all places share; there each rank writes at which it is waiting.
        processes: each rank's key in it, `[num_ranks]`; by default its number here.
    """

    def __init__(
        self,
        store: "dist.Store",
        rank: int,
        num_ranks: int,
        *,
        name: str = "",
        entrances: "dist.Store | None" = None,
        processes: Sequence[int] | None = None,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.name = name
        self._store = store
        self._entrances = entrances
        self._keys = [str(process) for process in processes or range(num_ranks)]

    def meet(self, facts: dict[str, Any], deadline_s: float) -> list[dict[str, Any]]:
        """Wait for all ranks and return what each said, `[num_ranks]`. Collective.

        Args:
            facts: of this rank; what JSON can hold.
            deadline_s: longest wait, in seconds.

        Raises:
            RankAbsentError: ranks that did not come, by number; or the store that does not answer.
        """
        try:
            return within(lambda: self._meet(facts, deadline_s), deadline_s + _MARGIN_S)
        except TimeoutError as error:
            if isinstance(error, RankAbsentError):
                raise
            raise RankAbsentError(
                f"rank {self.rank}: the store through which ranks meet did not answer within "
                f"{deadline_s + _MARGIN_S:g} s: the process that keeps it may have stopped"
            ) from error
        except RuntimeError as error:
            first = str(error).strip().split("\n", 1)[0]
            raise RankAbsentError(
                f"rank {self.rank}: the store through which ranks meet does not answer: {first}"
            ) from error

    def _meet(self, facts: dict[str, Any], deadline_s: float) -> list[dict[str, Any]]:
        until = time.monotonic() + deadline_s
        self._wait_here(True)
        number = self._current()
        self._store.set(f"{number}/{self.rank}", json.dumps(facts))
        while True:
            missing = [rank for rank in range(self.num_ranks) if not self._store.check([f"{number}/{rank}"])]
            if not missing:
                verdict = self._settle(number, "complete")
            elif time.monotonic() > until:
                verdict = self._settle(number, json.dumps(missing))
            else:
                verdict = self._verdict(number)
            if verdict == "complete":
                self._wait_here(False)
                return [json.loads(self._store.get(f"{number}/{rank}")) for rank in range(self.num_ranks)]
            if verdict:
                absent = json.loads(verdict)
                if self.rank not in absent:
                    here = f"join() of {self.name}" if self.name else "join()"
                    raise RankAbsentError(
                        f"rank {self.rank}: ranks {absent} did not enter {here} within {deadline_s:g} s"
                        f"{self._seen_elsewhere(absent)}",
                        tuple(absent),
                    )
                # It ended just before this rank came: to the next one, with what is left of the time.
                number = self._current()
                self._store.set(f"{number}/{self.rank}", json.dumps(facts))
            time.sleep(_POLL_S)

    def _wait_here(self, waits: bool) -> None:
        if self._entrances is not None:
            self._entrances.set(self._keys[self.rank], self.name if waits else "")

    def _seen_elsewhere(self, absent: list[int]) -> str:
        """Return which of these ranks wait, or have waited in vain, at another entrance."""
        seen = ""
        if self._entrances is None:
            return seen
        for rank in absent:
            key = self._keys[rank]
            name = self._entrances.get(key).decode() if self._entrances.check([key]) else ""
            if name and name != self.name:
                seen += f"; rank {rank} was last seen entering join() of {name}: models are joined in one order"
        return seen

    def _current(self) -> int:
        """The number of the first meeting that has not ended."""
        number = int(self._store.get("now")) if self._store.check(["now"]) else 0
        while self._verdict(number):
            number += 1
        return number

    def _verdict(self, number: int) -> str:
        key = f"{number}/verdict"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _settle(self, number: int, verdict: str) -> str:
        """Write how a meeting ended, unless that stands already; return what stands."""
        stands = self._store.compare_set(f"{number}/verdict", "", verdict).decode()
        self._store.compare_set("now", str(number) if number else "", str(number + 1))
        return stands
