"""Made-up workloads with bursty arrivals and long-tailed lengths; any workload described in those terms."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.errors import ConfigurationError
from lockstep.workload.request import Request
from lockstep.workload.traces import WorkloadOptions

_MAX_REQUESTS = 10_000_000


@dataclass(frozen=True)
class SyntheticParameters:
    """Gamma-distributed gaps between arrivals and lognormal lengths; the defaults resemble the Azure trace of 2023."""

    num_requests: int = 1000
    rate: float = 5.5  # mean arrivals per second
    # Standard deviation of the gaps over their mean: 0 is a clock, 1 a Poisson process, above 1 bursts and lulls.
    burstiness: float = 1.1
    prompt_median: float = 1020.0  # tokens
    # Standard deviation of the length's logarithm: 0 is one length for all, 1 a long tail (p99 is ten medians).
    prompt_sigma: float = 1.0
    prompt_max: int = 14050  # longer ones are cut to it
    output_median: float = 129.0
    output_sigma: float = 0.8
    output_max: int = 1000

    @classmethod
    def parse(cls, text: str) -> SyntheticParameters:
        """Read parameters as `name=value,name=value`; those left out have their default."""
        values: dict[str, Any] = {}
        kinds = {name: type(default) for name, default in dataclasses.asdict(cls()).items()}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            try:
                if name in values:
                    raise ValueError
                values[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise ConfigurationError(
                    f"synthetic parameters are name=number, each once, with a name of {', '.join(kinds)}; "
                    f"got {part!r:.60}"
                ) from None
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("num_requests", "prompt_median", "prompt_max", "output_median", "output_max"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ConfigurationError(f"{name} must be >= 1 and < 2**31, got {getattr(self, name)}")
        if not 1e-9 <= self.rate <= 1e9:
            raise ConfigurationError(f"rate must be in 1e-9..1e9 requests per second, got {self.rate}")
        for name in ("burstiness", "prompt_sigma", "output_sigma"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigurationError(f"{name} must be in 0..100, got {getattr(self, name)}")


def synthetic_requests(
    parameters: SyntheticParameters | None = None, options: WorkloadOptions | None = None, seed: int = 0
) -> list[Request]:
    """Make requests in order of arrival, the first at 0 s, the same on every machine; `options` as for a trace."""
    parameters = parameters or SyntheticParameters()
    options = options or WorkloadOptions()
    num_requests = options.num_requests or parameters.num_requests
    if num_requests > _MAX_REQUESTS:
        raise ConfigurationError(f"num_requests of a synthetic workload must be <= {_MAX_REQUESTS}, got {num_requests}")
    generator = random.Random(seed)
    mean_gap = 1 / (parameters.rate * options.rate_scale)
    requests = []
    arrival = 0.0
    for index in range(num_requests):
        if index and parameters.burstiness < 1e-3:
            arrival += mean_gap
        elif index:
            shape = 1 / parameters.burstiness**2
            arrival += generator.gammavariate(shape, mean_gap / shape)
        lengths = [
            max(1, round(min(longest, median * math.exp(min(sigma * generator.gauss(0, 1), 50.0)))))
            for median, sigma, longest in (
                (parameters.prompt_median, parameters.prompt_sigma, parameters.prompt_max),
                (parameters.output_median, parameters.output_sigma, parameters.output_max),
            )
        ]
        requests.append(Request(index, arrival, *options.lengths(lengths[0], lengths[1])))
    return requests


def resembling(requests: Sequence[Request]) -> SyntheticParameters:
    """Return the synthetic parameters that resemble requests in order of arrival, at least one."""
    if not requests:
        raise ConfigurationError("a workload needs at least 1 request, got 0")
    gaps = [later.arrival_s - earlier.arrival_s for earlier, later in itertools.pairwise(requests)]
    mean_gap = statistics.fmean(gaps) if gaps else 0.0
    found: dict[str, Any] = {"num_requests": len(requests), "rate": 1e6, "burstiness": 1.0}
    if mean_gap > 0:
        found["rate"] = _round(min(1e9, max(1e-9, 1 / mean_gap)))
        found["burstiness"] = _round(min(100.0, statistics.pstdev(gaps) / mean_gap))
    for kind, field in (("prompt", "num_prompt_tokens"), ("output", "max_new_tokens")):
        lengths = sorted(getattr(request, field) for request in requests)
        # The 10th and 90th percentile of a normal distribution lie 2.563 standard deviations apart.
        sigma = math.log(percentile(lengths, 0.9) / percentile(lengths, 0.1)) / 2.563
        found |= {f"{kind}_median": statistics.median(lengths), f"{kind}_sigma": _round(sigma)}
        found[f"{kind}_max"] = lengths[-1]
    return SyntheticParameters(**found)


def describe(requests: Sequence[Request]) -> dict[str, Any]:
    """Describe requests in order of arrival, at least one, in numbers, and by the parameters that resemble them."""
    parameters = resembling(requests)
    per_window = Counter(int(request.arrival_s // 10) for request in requests)
    return {
        "num_requests": len(requests),
        "duration_s": requests[-1].arrival_s,
        "requests_per_s": parameters.rate,
        "peak_requests_per_s": max(per_window.values()) / 10,  # of the busiest 10 s
        "burstiness": parameters.burstiness,
        "prompt_tokens": _lengths([request.num_prompt_tokens for request in requests]),
        "output_tokens": _lengths([request.max_new_tokens for request in requests]),
        "synthetic": dataclasses.asdict(parameters),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0..1) of an ascending sequence lies (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _lengths(values: list[int]) -> dict[str, float]:
    ordered = sorted(values)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        "total": sum(values),
        "mean": round(statistics.fmean(values), 1),
        **{name: percentile(ordered, share) for name, share in shares.items()},
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")
