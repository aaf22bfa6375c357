"""State that a simulation updates incrementally instead of asking every rank in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.simulation.config import Stop
from lockstep.workload.policies import LoadBalancer, SchedulerState
from lockstep.workload.request import Request

NONE: set[int] = set()


class PageSteps:
    """When each rank must be visited because of its pages: at most one step per rank."""

    def __init__(self) -> None:
        self._step_of: dict[int, int | None] = {}
        self._ranks: dict[int, set[int]] = {}

    def put(self, rank: int, step: int | None) -> None:
        """Visit a rank in `step` instead of the step that was set before; None for no such visit."""
        self._step_of[rank] = step
        if step is not None:
            self._ranks.setdefault(step, set()).add(rank)

    def pop(self, step: int) -> set[int]:
        """Return the ranks to be visited in `step`, and forget them."""
        return {rank for rank in self._ranks.pop(step, NONE) if self._step_of[rank] == step}


class StopSteps:
    """Requests that end early, by index: before which step, and what their rows sample until then."""

    def __init__(self, requests: Sequence[Request], stops: Mapping[int, Stop]) -> None:
        self._requests = requests
        self._stops = {i: stops[item.request_id] for i, item in enumerate(requests) if item.request_id in stops}
        self._before: dict[int, list[int]] = {}
        for index, stop in self._stops.items():
            if stop.step is not None:
                self._before.setdefault(stop.step, []).append(index)
        self._last: dict[int, set[int]] = {}  # step -> requests whose last kept token it samples
        self._overrun: dict[int, set[int]] = {}  # step -> requests of which it samples a token that is dropped

    def before(self, step: int) -> Sequence[int]:
        """Return and forget the requests that stop before `step`."""
        return self._before.pop(step, ())

    def keeps(self, index: int, num_sampled: int) -> bool:
        """Whether a request keeps its token number `num_sampled`, from 1."""
        return index not in self._stops or num_sampled <= self._stops[index].num_new_tokens

    def sampled(self, index: int, num_sampled: int, step: int) -> None:
        """Note that a request samples its token number `num_sampled` in `step`, and one more in every later step."""
        stop = self._stops.get(index)
        if stop is None:
            return
        last = step + stop.num_new_tokens - num_sampled
        end = step + self._requests[index].max_new_tokens - num_sampled + 1
        if stop.step is not None:
            end = min(end, stop.step)
        if step <= last < end:
            self._last.setdefault(last, set()).add(index)
        for overrun in range(max(step, last + 1), end):
            self._overrun.setdefault(overrun, set()).add(index)

    def forget(self, index: int) -> None:
        """Undo `sampled` for later steps: the request is preempted."""
        if index in self._stops:
            for indices in (*self._last.values(), *self._overrun.values()):
                indices.discard(index)

    def of_step(self, step: int) -> tuple[set[int], set[int]]:
        """Return the requests whose last kept token is sampled in `step`, and those with a dropped token in it."""
        return self._last.pop(step, NONE), self._overrun.pop(step, NONE)

    def check_all_done(self, num_steps: int) -> None:
        """Raise if a request was to stop after the last step."""
        for step, indices in self._before.items():
            raise ConfigurationError(
                f"request {self._requests[indices[0]].request_id} cannot stop before step {step}: "
                f"the last step is {num_steps - 1}"
            )

    def num_new_tokens(self) -> list[int]:
        """Return how many tokens each request keeps, `[requests]`."""
        kept = {index: stop.num_new_tokens for index, stop in self._stops.items()}
        return [kept.get(index, request.max_new_tokens) for index, request in enumerate(self._requests)]


class LoadBalancerTwin(LoadBalancer):
    """`LoadBalancer` over arrays: the load of each rank is kept up to date instead of read from its state."""

    def __init__(self, policy: str, num_ranks: int) -> None:
        super().__init__(policy, num_ranks)
        self._load = np.zeros(num_ranks, np.int64)

    def assign(self, requests: Sequence[Request], states: Sequence[SchedulerState] = ()) -> list[int]:
        """Return the rank of each request; no state is looked at."""
        if self._policy == "round-robin":
            return super().assign(requests, states)
        ranks = []
        for request in requests:
            ranks.append(int(self._load.argmin()))  # the lowest of equal ranks, as there
            self._load[ranks[-1]] += self._load_of(request)
        return ranks

    def computed(self, decode: np.ndarray, prompts: Sequence[tuple[int, int, int]]) -> None:
        """Subtract the rows of a step: decode rows of each rank, and prompts as `(rank, rows, context)`."""
        if self._policy == "least-tokens":
            self._load -= decode
            for rank, prefill, _ in prompts:
                self._load[rank] -= prefill

    def set_outstanding(self, rank: int, num_tokens: int) -> None:
        """Set a rank's outstanding tokens after a stop or a preemption."""
        if self._policy == "least-tokens":
            self._load[rank] = num_tokens

    def finished(self, rank: int, request: Request) -> None:
        """Note that a request has left its rank."""
        if self._policy == "least-kv-cache":
            self._load[rank] -= request.num_kv_tokens
