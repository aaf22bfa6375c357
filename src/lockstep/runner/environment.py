"""This machine's GPUs, links and versions, and the backends that work, each proven by checked exchanges."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.choose import DispatcherOptions, backend_names, make_dispatcher, maps_memory
from lockstep.dispatch.constants import constants_for, stored_path
from lockstep.errors import ConfigurationError, LockstepError

_COUNTS = ((5, 3), (4, 0), (0, 1))  # rows of two ranks: uneven, and none
_NUM_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE = 8, 2, 128, 128
_DEADLINE_S = 10.0
# Of one proof: the first starts the server of all, those on GPUs open them, and nvlink's compiles kernels.
_LIMIT_S = {"gloo": 20.0, "nccl": 25.0, "GPU memory": 45.0}
_ALL_S = 75.0  # of all proofs together
_PRELOAD = (__name__, "lockstep.moe.layer")  # without Transformers, whose import takes longer than all proofs
_COPY_BYTES = 256 * 2**20
_ADVICE = {
    "gpus": "nvlink and NCCL need two or more NVIDIA GPUs of one host; between processes of this one gloo serves",
    "triton": "install Triton (it comes with torch's builds for CUDA)",
    "peers": "these GPUs cannot reach each other's memory: use dispatcher allgather or alltoall, which go through NCCL",
    "nccl": "this build of torch has no NCCL: install one for CUDA",
    "gloo": "ranks talk over the loopback interface: see that it is up and that GLOO_SOCKET_IFNAME names it",
    "time": "see to those first, then look again",
    "cuda": "see that NCCL works at all (NCCL_DEBUG=INFO), then that GPUs may map each other's memory in containers",
}


def examine() -> dict[str, Any]:
    """Examine the machine and try every backend between two local ranks; return the output of `lockstep env --json`.

    Of each of the `backends`, `works` says whether it does (None: could not be tried), `advice` what to do if not.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    until = time.monotonic() + _ALL_S
    has = {
        "nccl": dist.is_nccl_available(),
        "triton": importlib.util.find_spec("triton") is not None,
        "peers": num_gpus > 1 and _reaches(0, 1) and _reaches(1, 0),
    }
    backends = [try_backend(name, "cpu", until) for name in backend_names(can_map=False)]
    backends += [try_backend(name, "cuda", until, lacking(name, num_gpus, **has)) for name in backend_names()]
    processor = platform.processor() or platform.machine()
    return {
        "versions": _versions(has["nccl"]),
        "machine": {"system": platform.platform(), "processor": processor, "cores": os.cpu_count()},
        "gpus": [_gpu(index) for index in range(num_gpus)],
        "links": _links(num_gpus),
        "peer_bandwidth_gbps": _peer_bandwidth_gbps(num_gpus),
        "nccl": {"available": has["nccl"]},
        "dispatch_constants": _constants("cuda" if num_gpus else "cpu"),
        "backends": backends,
    }


def all_work(document: dict[str, Any]) -> bool:
    """Say whether every backend that could be tried works."""
    return all(backend["works"] is not False for backend in document["backends"])


def describe(document: dict[str, Any]) -> str:
    """Return the result of `examine` as text for a terminal."""
    lines = ["  ".join(f"{name} {version or '-'}" for name, version in document["versions"].items())]
    machine = document["machine"]
    lines.append(f"{machine['system']}, {machine['processor']}, {machine['cores']} cores")
    gpus = document["gpus"]
    lines.extend(f"GPU {gpu['index']}: {gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['capability']}" for gpu in gpus)
    if not gpus:
        lines.append("no GPUs")
    links = document["links"]
    if links["table"]:
        lines.extend([f"links ({links['source']}):", links["table"].rstrip()])
    if document["peer_bandwidth_gbps"]:
        lines.append("copies between GPUs, GB/s, from row to column:")
        for row in document["peer_bandwidth_gbps"]:
            lines.append("  " + " ".join("     -" if value is None else f"{value:6.1f}" for value in row))
    constants = document["dispatch_constants"]
    measured = f"a measured set would be {constants['path']}"
    lines.append(f"constants by which `auto` chooses: {constants['source']} ({measured})")
    lines.append("backends, tried between two ranks of this machine:")
    for backend in document["backends"]:
        verdict = {True: "works", False: "FAILS", None: "not tried"}[backend["works"]]
        lines.append(f"  {backend['name']:<10} over {backend['transport']:<10} {verdict:<10} {backend['detail']}")
        if backend["advice"]:
            lines.append(f"  {'':<10} {backend['advice']}")
    return "\n".join(lines)


def prove(name: str, device_type: str) -> float:
    """Run an MoE layer of two ranks through one backend, compare with the reference, and return the largest error.

    Runs on each rank: on "cpu" in float32 over gloo, on "cuda" in bfloat16 over NCCL or mapped memory. Raises
    `LockstepError` for results that differ from the reference.
    """
    from lockstep.metadata.config import ParallelConfig
    from lockstep.moe.experts import LocalExperts
    from lockstep.moe.layer import MoELayer
    from lockstep.moe.layers import MoELayers
    from lockstep.moe.reference import moe_reference

    rank, cuda = dist.get_rank(), device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    group = dist.new_group(backend="nccl" if cuda else "gloo")
    shape = ExpertsShape(_NUM_EXPERTS, _HIDDEN, _TOP_K, dtype, device)
    dispatcher = make_dispatcher(name, group, shape, DispatcherOptions(_DEADLINE_S, max_rows_per_rank=64))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate_up = (random(_NUM_EXPERTS, 2 * _INTERMEDIATE, _HIDDEN) / _HIDDEN**0.5).to(dtype)
    down = (random(_NUM_EXPERTS, _HIDDEN, _INTERMEDIATE) / _INTERMEDIATE**0.5).to(dtype)
    mine = slice(rank * _NUM_EXPERTS // 2, (rank + 1) * _NUM_EXPERTS // 2)
    config = ParallelConfig(data_parallel_size=2, data_parallel_rank=rank)
    experts = LocalExperts.from_tensors(gate_up[mine].to(device), down[mine].to(device))
    if dispatcher.abilities.counts_on_device:
        experts.warm_up(2 * 64 * _TOP_K, fp8=False)
    layer = MoELayer(experts, dispatcher, config, shape, deadline_s=_DEADLINE_S)
    layers = MoELayers([layer], max_chunk_size_per_rank=4)
    worst = 0.0
    for counts in _COUNTS:
        rows = [random(count, _HIDDEN).to(dtype) for count in counts]
        ids = [random(count, _NUM_EXPERTS).topk(_TOP_K).indices for count in counts]
        weights = [random(count, _TOP_K).softmax(1) for count in counts]
        with layers.begin(counts) as step:
            output = step.run_layer(0, rows[rank].to(device), ids[rank].to(device), weights[rank].to(device)).cpu()
        expected = moe_reference(rows, ids, weights, gate_up, down)[rank]
        worst = max([worst, *(output.float() - expected.float()).abs().flatten().tolist()])
        tolerance = 0.05 if cuda else 1e-4
        if not torch.allclose(output.float(), expected.float(), rtol=tolerance, atol=tolerance):
            raise LockstepError(f"rank {rank}: results for {counts} rows are off by up to {worst:g}")
    return worst


def try_backend(
    name: str, device_type: str, until: float, missing: tuple[str, str] | None = None, *,
    proof: Callable[[str, str], float] = prove, limit_s: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Prove a backend, unless it lacks something or the total time is used up; `limit_s` is for one proof."""
    from lockstep.runner.launcher import launch

    transport = "GPU memory" if maps_memory(name) else "gloo" if device_type == "cpu" else "nccl"
    started = time.perf_counter()
    limit_s = min(limit_s or _LIMIT_S[transport], until - time.monotonic())
    if limit_s < 5:
        missing = missing or (f"the other backends have used up the {_ALL_S:g} s for all", "time")
    works: bool | None = None
    if missing is not None:
        detail, advice = missing
    else:
        try:
            error = launch(2, proof, name, device_type, limit_s=limit_s, preload=_PRELOAD)
            works, detail = True, f"{len(_COUNTS)} uneven exchanges equal the reference, off by at most {error:.1g}"
            advice = ""
        except (LockstepError, OSError) as failure:
            works, detail, advice = False, str(failure), "gloo" if device_type == "cpu" else "cuda"
    return {
        "name": name, "transport": transport, "works": works, "detail": detail,
        "seconds": round(time.perf_counter() - started, 2), "advice": _ADVICE.get(advice, ""),
    }  # fmt: skip


def lacking(name: str, num_gpus: int, *, nccl: bool, triton: bool, peers: bool) -> tuple[str, str] | None:
    """Return what a GPU backend lacks here, and the key of the advice; None if it can be tried."""
    if num_gpus < 2:
        return f"{num_gpus or 'no'} GPU{'' if num_gpus == 1 else 's'} here", "gpus"
    if not maps_memory(name):
        return None if nccl else ("no NCCL", "nccl")
    if not triton:
        return "no Triton", "triton"
    return None if peers else ("GPUs 0 and 1 have no peer access", "peers")


def _versions(has_nccl: bool) -> dict[str, str | None]:
    from lockstep._version import __version__

    found: dict[str, str | None] = {"lockstep": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["torch"] = str(torch.__version__)  # with the build, such as +cu130, which a wheel's name may omit
    found["cuda"] = torch.version.cuda
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl and torch.cuda.is_available() else None
    return found


def _gpu(index: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(index)
    memory_gib, capability = round(gpu.total_memory / 2**30, 1), f"{gpu.major}{gpu.minor}"
    about = {"index": index, "name": gpu.name, "memory_gib": memory_gib, "capability": capability}
    return {**about, "multiprocessors": gpu.multi_processor_count}


def _reaches(gpu: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(gpu, other)


def _links(num_gpus: int) -> dict[str, str]:
    """How GPUs are connected, from nvidia-smi; without it, which GPUs can reach each other's memory."""
    command, gpus = shutil.which("nvidia-smi"), range(num_gpus)
    if num_gpus and command:
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # fall back to torch
            shown = subprocess.run([command, "topo", "-m"], capture_output=True, text=True, timeout=10, check=True)
            return {"source": "nvidia-smi topo -m", "table": shown.stdout}
    rows = [" ".join("-" if a == b else "peer" if _reaches(a, b) else "none" for b in gpus) for a in gpus]
    return {"source": "peer access as torch sees it" if rows else "", "table": "\n".join(rows)}


def _peer_bandwidth_gbps(num_gpus: int) -> list[list[float | None]]:
    """Bandwidth of a copy of 256 MiB from each GPU to each other, GB/s, the best of 5; [] with fewer than two GPUs."""
    gpus = range(num_gpus) if num_gpus > 1 else ()
    buffers = [torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}") for index in gpus]

    def copy_s(source: int, target: int) -> float:
        for device in (source, target):
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        buffers[target].copy_(buffers[source])
        for device in (source, target):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    def gbps(source: int, target: int) -> float:
        # The first of six sets up the access.
        return round(_COPY_BYTES / min([copy_s(source, target) for _ in range(6)][1:]) / 1e9, 1)

    return [[None if source == target else gbps(source, target) for target in gpus] for source in gpus]


def _constants(device_type: str) -> dict[str, str]:
    try:
        source = constants_for(device_type).source
    except ConfigurationError as error:
        source = str(error)
    return {"source": source, "path": str(stored_path(device_type))}
