"""The time of a step from the counts of its ranks: a formula, and its constants fitted to and compared with runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_object
from lockstep.steplog.record import StepLogRecord


@dataclass(frozen=True)
class CostConstants:
    """What a step costs, in microseconds.

    With `t` the rows of each rank and `d` those of them that generate, a step takes

        step_us + chunk_us * chunks
        + max over ranks of (token_us * t + request_us * d
                             + decode_context_us * decode context + prefill_context_us * prefill context)
        + row_us * max(t)
        + weights_us / ranks * (1 - (1 - expert_share) ** sum(t)) + expert_row_us * mean(t)

    Attention waits for the rank with the most work, and so does the exchange of rows, whose longest rank has the
    fullest link. The experts are spread over all ranks, whose rows they share: there the mean counts. Only the weights
    of experts that some row has chosen are read: of one row's, few; of many rows', all. In `t` of the last two lines,
    dummy and padding rows count too.
    """

    step_us: float  # every step: reading the dense weights, launching kernels, the agreement
    token_us: float  # one row through everything but the experts
    chunk_us: float = 0.0  # every chunk of the step, all layers together
    decode_context_us: float = 0.0  # one KV entry read for a token that generates
    prefill_context_us: float = 0.0  # one KV entry attended to by one token of a prompt
    row_us: float = 0.0  # one row of the longest rank to its experts and back
    expert_row_us: float = 0.0  # one row per rank through the experts
    request_us: float = 0.0  # one request that generates, beyond its row: its part of the attention, its sampling
    weights_us: float = 0.0  # all experts once, on one rank: reading their weights, starting their products
    expert_share: float = 0.0  # experts that one row chooses over all experts, 0..1
    source: str = ""  # where the numbers come from

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self) if item.name != "source"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
                raise ConfigurationError(f"cost constant {name} must be a number >= 0 and < 1e12, got {value!r:.60}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.source, str):
            raise ConfigurationError(f"source of cost constants must be text, got {self.source!r:.60}")
        if self.step_us <= 0:
            raise ConfigurationError(f"cost constant step_us must be > 0, got {self.step_us}: no step takes no time")
        if self.expert_share > 1:
            raise ConfigurationError(f"cost constant expert_share must be in 0..1, got {self.expert_share}")

    def own_us(self, rows: Any, decode_tokens: Any, decode_context: Any, prefill_context: Any) -> Any:
        """Return each rank's own part of the attention's time, in us; numbers, or arrays of any shape."""
        return (
            self.token_us * rows
            + self.request_us * decode_tokens
            + self.decode_context_us * decode_context
            + self.prefill_context_us * prefill_context
        )

    def experts_us(self, num_rows: Any, num_ranks: int) -> Any:
        """Return the experts' time in us for the rows of all ranks together; a number, or an array of any shape."""
        rows_us = self.expert_row_us / num_ranks * num_rows
        if not self.weights_us:
            return rows_us
        return rows_us + self.weights_us / num_ranks * (1 - (1 - self.expert_share) ** num_rows)

    def step_times_us(
        self, real_rows: np.ndarray, decode_tokens: np.ndarray, decode_context_tokens: np.ndarray,
        prefill_context_tokens: np.ndarray, num_chunks: np.ndarray, filler_rows: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Return how long each step takes, in us."""
        rows = real_rows if filler_rows is None else real_rows + filler_rows
        own_us = self.own_us(real_rows, decode_tokens, decode_context_tokens, prefill_context_tokens).max(axis=1)
        times_us: np.ndarray = self.step_time_us(
            own_us, rows.max(axis=1), rows.sum(axis=1), num_chunks, num_ranks=rows.shape[1]
        )
        return times_us

    def step_time_us(self, own_us: Any, longest: Any, num_rows: Any, num_chunks: Any, num_ranks: int) -> Any:
        """Return a step's time in us, from the longest own time and the most rows of any rank, and all ranks' rows."""
        shared_us = self.step_us + self.chunk_us * num_chunks + self.row_us * longest
        return shared_us + own_us + self.experts_us(num_rows, num_ranks)

    def save(self, path: str | Path) -> None:
        """Write the constants as JSON, as `load` reads them."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, name: str) -> CostConstants:
        """Return a shipped set by its name, or read one from a JSON file."""
        if name in COST_CONSTANTS:
            return COST_CONSTANTS[name]
        path = Path(name)
        if not path.is_file():
            raise ConfigurationError(f"cost must be one of {sorted(COST_CONSTANTS)} or a JSON file, got {name!r}")
        values, names = json_object(path, path.read_bytes()), [item.name for item in fields(cls)]
        if missing := next((name for name in ("step_us", "token_us") if name not in values), None):
            raise ConfigurationError(f"{path}: cost constant {missing} is missing; see `lockstep bench calibrate`")
        if foreign := next((name for name in values if name not in names), None):
            raise ConfigurationError(f"{path}: {foreign!r:.60} is no cost constant; there are {', '.join(names)}")
        try:
            return cls(**values)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from None


COST_CONSTANTS = {
    name: CostConstants(**json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8")))
    for name in ("h100", "cpu", "linear")
}
"""Shipped sets by name. `benchmarks/fit_engine.py` writes the first from stored results; the second is
`lockstep bench calibrate` with a small model on 2 shared cores; the third is two numbers for comparison."""

OWN_WORK = ("real_rows", "decode_tokens", "decode_context_tokens", "prefill_context_tokens")
"""The parameters of `CostConstants.own_us`, as the step log names them."""
_COUNTS = (*OWN_WORK, "num_chunks", "filler_rows")
_EXPERT_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
_FITTED = (
    *("step_us", "chunk_us", "expert_row_us", "weights_us"),  # what all ranks share
    *("token_us", "request_us", "decode_context_us", "prefill_context_us"),  # the longest rank's own
)


def fit(
    real_rows: np.ndarray, decode_tokens: np.ndarray, decode_context_tokens: np.ndarray,
    prefill_context_tokens: np.ndarray, num_chunks: np.ndarray, duration_us: np.ndarray, source: str = "",
    filler_rows: np.ndarray | None = None,
) -> CostConstants:  # fmt: skip
    """Fit the constants to the `cost_columns` of measured runs by least squares, none of them negative.

    `row_us` is left at 0: one run cannot tell it from `token_us`. A step log does not say how many experts a row
    chooses; of a few shares, the one that fits best is taken.
    """
    if filler_rows is not None and filler_rows.any():
        raise ConfigurationError("a cost is fitted to runs without dummy or padding rows: use another dispatcher")
    if len(duration_us) < 10:
        raise ConfigurationError(f"at least 10 steps are needed to fit a cost, got {len(duration_us)}")
    counts = (real_rows, decode_tokens, decode_context_tokens, prefill_context_tokens)
    own = np.stack(counts, axis=-1).astype(np.float64)
    num_ranks, total_rows = real_rows.shape[1], real_rows.sum(axis=1)
    found: list[tuple[float, CostConstants]] = []
    for share in _EXPERT_SHARES:
        ones, read = np.ones(len(total_rows)), (1 - (1 - share) ** total_rows) / num_ranks
        # A step of one chunk is the usual one; its cost is in the first constant.
        shared = np.column_stack([ones, np.maximum(num_chunks - 1, 0), total_rows / num_ranks, read])
        error, solution = _fit_longest(shared, own, duration_us)
        values: dict[str, Any] = dict(zip(_FITTED, solution.tolist(), strict=True))
        values["step_us"] = max(values["step_us"] - values["chunk_us"], 1e-3)
        values["expert_share"] = share if values["weights_us"] else 0.0
        found.append((error, CostConstants(**values, source=source)))
    return min(found, key=lambda item: item[0])[1]


def _fit_longest(shared: np.ndarray, own: np.ndarray, duration_us: np.ndarray) -> tuple[float, np.ndarray]:
    """Fit coefficients of what all ranks share, `[steps, features]`, and of the longest rank's own work.

    Which rank is the longest depends on them: repeated until the longest ranks stay. Steps of more than five times what
    a first fit says are left out: the machine did something else.
    """
    steps = np.arange(len(own))
    longest = own[:, :, 0].argmax(axis=1)
    keep = np.ones(len(own), dtype=bool)
    for _ in range(20):
        features = np.column_stack([shared, own[steps, longest]])
        solution = nonnegative_least_squares(features[keep], duration_us[keep])
        keep = duration_us <= 5 * (features @ solution)
        following = (own @ solution[shared.shape[1] :]).argmax(axis=1)
        if np.array_equal(following, longest):
            break
        longest = following
    # Relative errors pull the fit towards the shorter of scattered times; the total of a run should come out right.
    solution = solution * (duration_us[keep].sum() / (features[keep] @ solution).sum())
    error = float((((features @ solution)[keep] / duration_us[keep] - 1) ** 2).mean())
    return error, solution


def nonnegative_least_squares(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Solve for coefficients >= 0 by relative errors, dropping the most negative one until none is left."""
    weights = 1 / np.maximum(target, 1e-9)
    used = [index for index in range(features.shape[1]) if features[:, index].any()]
    while True:
        scaled = features[:, used] * weights[:, None]
        size = np.maximum(np.abs(scaled).max(axis=0), 1e-300)
        found = np.linalg.lstsq(scaled / size, target * weights, rcond=None)[0] / size
        if (found >= 0).all():
            break
        used.pop(int((found * size).argmin()))
    solution = np.zeros(features.shape[1])
    solution[used] = found
    return solution


def cost_columns(records: Sequence[StepLogRecord]) -> dict[str, np.ndarray]:
    """Return a run's step log as `CostConstants.step_times_us` takes it, and `duration_us` of each step.

    A step's time goes from its own agreement to the next one's: there alone are all ranks at the same place.
    """
    ranks = sorted({record.rank for record in records})
    if not records or len(records) % len(ranks):
        raise ConfigurationError(f"{len(records)} records are not the same number of each of {len(ranks)} ranks")

    def grid(name: str) -> np.ndarray:
        return np.array([getattr(record, name) for record in records], np.float64).reshape(-1, len(ranks))

    steps = grid("step")
    torn = (grid("rank") != ranks).any(axis=1) | (steps != steps[:, :1]).any(axis=1)
    if torn.any():
        raise ConfigurationError(f"the step log does not have one record of each rank in step {steps[torn][0, 0]:g}")
    if not grid("duration_s").all():
        raise ConfigurationError("the step log has steps without a duration: it is not of a measured run")
    agreement_s = grid("agreement_s")
    following_s = np.vstack([agreement_s[1:], np.zeros(len(ranks))])
    # Ranks without requests agreed in between, and waited for requests: that is no time of the step before.
    following_s[:-1][np.diff(steps[:, 0]) > 1] = 0
    return {
        **{name: grid(name) for name in OWN_WORK},
        "num_chunks": grid("num_chunks").max(axis=1),
        "filler_rows": grid("dummy_rows") + grid("padding_rows"),
        "duration_us": 1e6 * (grid("duration_s") - agreement_s + following_s).mean(axis=1),
    }


def join_runs(runs: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the `cost_columns` of several runs; repeats of the same steps are combined by each step's median time."""
    if len({run["real_rows"].shape[1] for run in runs}) > 1:
        raise ConfigurationError("runs to be put together must have the same ranks")
    repeats: dict[tuple[bytes, ...], list[dict[str, np.ndarray]]] = {}
    for run in runs:
        repeats.setdefault(tuple(run[name].tobytes() for name in _COUNTS), []).append(run)
    joined = [
        {**group[0], "duration_us": np.median([run["duration_us"] for run in group], axis=0)}
        for group in repeats.values()
    ]
    return {name: np.concatenate([run[name] for run in joined]) for name in runs[0]}


def validate(columns: dict[str, np.ndarray], cost: CostConstants) -> dict[str, Any]:
    """Compare measured and predicted step times; errors are relative, those of single steps without sign."""
    predicted, measured = cost.step_times_us(**{name: columns[name] for name in _COUNTS}), columns["duration_us"]
    errors = np.sort(np.abs(predicted / measured - 1))
    return {
        "steps": len(measured),
        "measured_s": float(measured.sum() * 1e-6),
        "predicted_s": float(predicted.sum() * 1e-6),
        "total_error": float(predicted.sum() / measured.sum() - 1),
        "median_step_error": float(np.median(errors)),
        "p90_step_error": float(errors[int(0.9 * (len(errors) - 1))]),
    }
