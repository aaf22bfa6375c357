"""Cost model of dispatch and combine: a few constants per machine, either shipped or measured there and stored."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from lockstep.errors import ConfigurationError

PATH_VARIABLE = "LOCKSTEP_DISPATCH_CONSTANTS"  # path of a constants file to read instead of the stored one

_FIRST_MB = 2.0  # see `BackendConstants`; of 0.5, 1, 2 and 4, the value with the smallest errors over all backends

BACKENDS = {"allgather": True, "alltoall": False, "nvlink": False}
"""Backends to choose from, and whether each sends every row to every rank. The first wins a tie."""


@dataclass(frozen=True)
class Exchange:
    """One dispatch and its combine, as agreed: rows of every rank, `[ranks]`, and the bytes of one row each way."""

    sizes: tuple[int, ...]
    num_experts: int
    top_k: int
    dispatch_row_bytes: int
    combine_row_bytes: int


@dataclass(frozen=True)
class BackendConstants:
    """One backend's time for a dispatch and its combine on the slowest rank: the sum of these terms."""

    latency_us: float  # without any rows
    count_exchange_us: float = 0.0  # extra, if ranks first exchange how many rows they send
    row_us: float = 0.0  # per row of all ranks, independent of its length: ordering the experts' rows
    dispatch_us_per_mb: float = 0.0  # per 10**6 bytes to experts on the busiest rank's link, in its fuller direction
    combine_us_per_mb: float = 0.0  # likewise on the way back; 1000 / bandwidth in GB/s
    total_us_per_mb: float = 0.0  # per 10**6 bytes of all ranks, both ways
    first_us_per_mb: float = 0.0  # extra for the first 2 MB on the busiest link, before it reaches full speed

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
                raise ConfigurationError(f"dispatch constant {item.name} must be a number in [0, 1e9), got {value!r}")

    def predict_us(self, name: str, exchange: Exchange) -> float:
        """Return the expected time of the slowest rank, us; the backend's `name` decides how many bytes move."""
        per_mb = (self.dispatch_us_per_mb, self.combine_us_per_mb, self.total_us_per_mb, self.first_us_per_mb)
        constants = (self.latency_us + self.count_exchange_us, self.row_us, *per_mb)
        return sum(constant * amount for constant, amount in zip(constants, features(name, exchange), strict=True))


@dataclass(frozen=True, eq=False)  # hashed by identity, so that choices can be cached
class DispatchConstants:
    """One machine's constants by backend of `BACKENDS`, and their `source`. All ranks must use the same."""

    backends: Mapping[str, BackendConstants]
    source: str = ""

    @property
    def summary(self) -> str:
        """Source and checksum; ranks compare them, or they might choose different backends."""
        numbers = json.dumps(asdict(self)["backends"], sort_keys=True)
        return f"{self.source} ({zlib.crc32(numbers.encode()):08x})"

    @classmethod
    def load(cls, path: str | Path) -> DispatchConstants:
        """Read constants from a JSON file; `ConfigurationError` if it is missing or invalid."""
        try:
            text = json.loads(Path(path).read_text(encoding="utf-8"))
            backends = {name: BackendConstants(**values) for name, values in text["backends"].items()}
            source = str(text["source"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(
                f"{path}: not a set of dispatch constants ({error}); benchmarks/calibrate_dispatch.py writes one"
            ) from None
        if not backends or not set(backends) <= set(BACKENDS):
            raise ConfigurationError(f"{path}: backends must be of {', '.join(BACKENDS)}, got {sorted(backends)}")
        return cls(backends, source)


def features(name: str, exchange: Exchange) -> tuple[float, float, float, float, float, float]:
    """Return the constants' factors: 1, rows, MB to experts, MB back, MB of all ranks, the first 2 MB."""
    sizes, num_ranks = exchange.sizes, len(exchange.sizes)
    total = sum(sizes)
    needed = expected_ranks_per_row(exchange.num_experts, exchange.top_k, num_ranks)
    share = 1.0 if BACKENDS[name] else needed / num_ranks
    # A rank sends its rows to the other ranks and receives theirs; a link carries both directions at once.
    busiest = share * max(max(size * (num_ranks - 1), total - size) for size in sizes)
    dispatch, combine = exchange.dispatch_row_bytes / 1e6, exchange.combine_row_bytes / 1e6
    first = min(busiest * (dispatch + combine), _FIRST_MB)
    return 1.0, float(total), busiest * dispatch, busiest * combine, share * total * (dispatch + combine), first


def expected_ranks_per_row(num_experts: int, top_k: int, num_ranks: int) -> float:
    """Return the expected number of ranks that hold a row's experts, if all experts are equally likely."""
    elsewhere = math.comb(num_experts - num_experts // num_ranks, top_k) / math.comb(num_experts, top_k)
    return num_ranks * (1 - elsewhere)


def machine_name(device_type: str) -> str:
    """Return the machine's name for file names: number and kind of GPUs, or processor and cores."""
    if device_type == "cuda":
        name = f"{torch.cuda.device_count()}x-{torch.cuda.get_device_name()}"
    else:
        name = f"cpu-{platform.machine()}-{os.cpu_count()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stored_path(device_type: str) -> Path:
    """Return where this machine's constants are stored: `PATH_VARIABLE`, or in the user's configuration folder."""
    named = os.environ.get(PATH_VARIABLE)
    if named:
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder, "lockstep", f"dispatch-{machine_name(device_type)}.json")


def constants_for(device_type: str) -> DispatchConstants:
    """Return this machine's stored constants, or the shipped ones if there is no file and no `PATH_VARIABLE`."""
    path = stored_path(device_type)
    if os.environ.get(PATH_VARIABLE) or path.is_file():
        return DispatchConstants.load(path)
    return SHIPPED[device_type]


# By device type, for machines without a calibration.
SHIPPED = {
    # gloo moves about 1 GB/s between processes of one host; exchanging counts took 0.4 ms, wait included
    # (benchmarks/bench_alltoall.py). Only differences between backends matter.
    "cpu": DispatchConstants(
        {
            "allgather": BackendConstants(400.0, dispatch_us_per_mb=1000.0, combine_us_per_mb=1000.0),
            "alltoall": BackendConstants(400.0, 400.0, dispatch_us_per_mb=1000.0, combine_us_per_mb=1000.0),
        },
        "shipped, for gloo on one host",
    ),
    # Two H200s, CUDA graphs, bfloat16 and fp8 rows, no weighted sums, fitted to
    # benchmarks/results/dispatch_h200x2_2026-11-23_8024bae.jsonl (repeated by tests/unit/test_choose.py): `allgather`
    # to agv_rsv, `alltoall` to a2av. a2av is given its counts; exchanging them costs as much as an NCCL all-reduce of
    # a few integers and its copy to the host: 104 us there.
    "cuda": DispatchConstants(
        {
            "allgather": BackendConstants(21.28, 0.0, 0.002366, 0.9758, 1.073, 2.205, 5.902),
            "alltoall": BackendConstants(32.58, 104.0, 0.0001749, 2.299, 2.330, 0.7942, 2.155),
            "nvlink": BackendConstants(5.352, 0.0, 0.001785, 2.219, 3.372, 0.08511, 3.710),
        },
        "shipped, for H200",
    ),
}
