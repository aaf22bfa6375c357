"""Every combination of settings, simulated on all cores, and the best of them under the user's limits."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from operator import setitem
from typing import Any

from lockstep.errors import ConfigurationError
from lockstep.simulation.config import SimulationConfig
from lockstep.simulation.simulator import simulate
from lockstep.workload.request import Request

_PROGRESS_EVERY_S = 0.5
BEST_RULE = (
    "the highest throughput within the limits; among settings within 1 % of it, the least time lost to uneven work, "
    "then the lowest mean time per token"
)
"""By which `best` chooses. Workloads that arrive at their own rate end at nearly the same time: hence the 1 %."""

SETTINGS = {
    "data_parallel_size": ("ranks", "{} ranks"),
    "load_balancing": ("balancing", "{}"),
    "max_prefill_delay_steps": ("delay", "delay {}"),
    "max_num_batched_tokens": ("budget", "budget {}"),
    "max_chunk_size": ("chunk", "chunk {}"),
    "row_shapes": ("rows", "{} rows"),
}
"""What a grid can change, with its heading in a table and its part of a setting's name."""


@dataclass(frozen=True)
class Grid:
    """The values to combine, each at least one; see `SimulationConfig` and `SchedulerConfig`."""

    data_parallel_size: Sequence[int]
    load_balancing: Sequence[str] = ("round-robin",)
    max_prefill_delay_steps: Sequence[int] = (0,)
    max_num_batched_tokens: Sequence[int] = (2048,)
    max_chunk_size: Sequence[int | None] = (None,)
    row_shapes: Sequence[str] = ("ragged",)

    def configs(self, base: SimulationConfig) -> list[SimulationConfig]:
        """Return `base` with every combination, the last-named value changing fastest."""
        for name in SETTINGS:
            if not getattr(self, name):
                raise ConfigurationError(f"{name} needs at least one value, got none")
        found = []
        for combination in itertools.product(*(getattr(self, name) for name in SETTINGS)):
            values = dict(zip(SETTINGS, combination, strict=True))
            of_scheduler = {name: values.pop(name) for name in SETTINGS if hasattr(base.scheduler, name)}
            scheduler = replace(base.scheduler, **of_scheduler)
            found.append(replace(base, num_ranks=values.pop("data_parallel_size"), scheduler=scheduler, **values))
        return found


def setting(config: SimulationConfig) -> dict[str, Any]:
    """Return the values of a configuration that a grid can change, by name."""
    values = {"data_parallel_size": config.num_ranks, **vars(config.scheduler), **vars(config)}
    return {name: values[name] for name in SETTINGS}


def sweep(
    requests: Sequence[Request], configs: Sequence[SimulationConfig], workers: int | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Simulate every configuration in `workers` processes, by default one per core, and return the `summary` of each.

    `on_progress` receives the number of simulations done, fractions included, at least every half second.
    """
    workers = min(workers or os.cpu_count() or 1, len(configs))
    if workers <= 1:
        summaries: list[dict[str, Any]] = []
        for config in configs:
            summaries.append(_summary(requests, config, lambda share: on_progress(len(summaries) + share)))
        return summaries
    # The workload goes to each process once, not with each task.
    context = multiprocessing.get_context("spawn")
    shares = context.Array("d", len(configs), lock=False)  # of each configuration, written by its process
    with ProcessPoolExecutor(workers, context, _take_workload, (list(requests), shares)) as pool:
        tasks = [pool.submit(_simulate_taken, index, config) for index, config in enumerate(configs)]
        left = set(tasks)
        try:
            while left:
                done, left = wait(left, _PROGRESS_EVERY_S, FIRST_COMPLETED)
                for task in done:
                    task.result()  # a failure ends all
                on_progress(sum(shares))
            return [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def best(summaries: Sequence[dict[str, Any]], **limits: float | None) -> int | None:
    """Return the index of the best setting within the limits, such as `ttft_p99_s`, by `BEST_RULE`; None for none."""
    allowed = [
        index
        for index, summary in enumerate(summaries)
        if all(most is None or summary[name.replace("_p99", "")]["p99"] <= most for name, most in limits.items())
    ]
    top = max((summaries[index]["tokens_per_s"] for index in allowed), default=0)
    equal = [index for index in allowed if summaries[index]["tokens_per_s"] >= 0.99 * top]

    def losses(index: int) -> tuple[float, float]:
        return round(summaries[index]["lost_fraction"], 3), summaries[index]["tpot_s"]["mean"]

    return min(equal, key=losses, default=None)


_workload: list[Request] = []
_shares: Any = None


def _take_workload(requests: list[Request], shares: Any) -> None:
    global _shares
    _workload[:], _shares = requests, shares
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # However it ends: one that was killed would leave simulations of hours behind.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _simulate_taken(index: int, config: SimulationConfig) -> dict[str, Any]:
    return _summary(_workload, config, partial(setitem, _shares, index))


def _summary(
    requests: Sequence[Request], config: SimulationConfig, on_progress: Callable[[float], None]
) -> dict[str, Any]:
    return simulate(requests, config, on_progress=on_progress, max_report_cells=1).summary
