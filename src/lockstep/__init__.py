"""Uneven data-parallel ranks through Mixture-of-Experts layers, in lockstep."""

import importlib
from typing import TYPE_CHECKING, Any

from lockstep._version import __version__

# Where each public name lives. Imported on first use, so that `lockstep simulate --help` never waits for torch.
_PUBLIC = {
    "DPMetadata": "lockstep.metadata.dp_metadata",
    "ParallelConfig": "lockstep.metadata.config",
    "ChunkPlan": "lockstep.metadata.chunks",
    "StepRecord": "lockstep.coordination.step",
    "StepDecision": "lockstep.coordination.step",
    "decide": "lockstep.coordination.step",
    "Coordinator": "lockstep.coordination.coordinator",
    "ForwardContext": "lockstep.coordination.forward_context",
    "set_forward_context": "lockstep.coordination.forward_context",
    "get_forward_context": "lockstep.coordination.forward_context",
    "Session": "lockstep.coordination.session",
    "MoELayer": "lockstep.moe.layer",
    "from_pretrained": "lockstep.models.huggingface",
    "parallelize": "lockstep.models.huggingface",
    "join": "lockstep.models.huggingface",
    "fuse_norms": "lockstep.models.norms",
    "Engine": "lockstep.runner.engine",
    "RankEngine": "lockstep.engine.rank_engine",
    "RequestOutput": "lockstep.engine.outputs",
    "SamplingParams": "lockstep.engine.sampling_params",
    "LockstepError": "lockstep.errors",
    "ConfigurationError": "lockstep.errors",
    "TokenCountError": "lockstep.errors",
    "RankMismatchError": "lockstep.errors",
    "RankAbsentError": "lockstep.errors",
    "PeerFailedError": "lockstep.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from lockstep.coordination.coordinator import Coordinator as Coordinator
    from lockstep.coordination.forward_context import ForwardContext as ForwardContext
    from lockstep.coordination.forward_context import get_forward_context as get_forward_context
    from lockstep.coordination.forward_context import set_forward_context as set_forward_context
    from lockstep.coordination.session import Session as Session
    from lockstep.coordination.step import StepDecision as StepDecision
    from lockstep.coordination.step import StepRecord as StepRecord
    from lockstep.coordination.step import decide as decide
    from lockstep.engine.outputs import RequestOutput as RequestOutput
    from lockstep.engine.rank_engine import RankEngine as RankEngine
    from lockstep.engine.sampling_params import SamplingParams as SamplingParams
    from lockstep.errors import ConfigurationError as ConfigurationError
    from lockstep.errors import LockstepError as LockstepError
    from lockstep.errors import PeerFailedError as PeerFailedError
    from lockstep.errors import RankAbsentError as RankAbsentError
    from lockstep.errors import RankMismatchError as RankMismatchError
    from lockstep.errors import TokenCountError as TokenCountError
    from lockstep.metadata.chunks import ChunkPlan as ChunkPlan
    from lockstep.metadata.config import ParallelConfig as ParallelConfig
    from lockstep.metadata.dp_metadata import DPMetadata as DPMetadata
    from lockstep.models.huggingface import from_pretrained as from_pretrained
    from lockstep.models.huggingface import join as join
    from lockstep.models.huggingface import parallelize as parallelize
    from lockstep.models.norms import fuse_norms as fuse_norms
    from lockstep.moe.layer import MoELayer as MoELayer
    from lockstep.runner.engine import Engine as Engine


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
