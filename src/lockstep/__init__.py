"""Uneven data-parallel ranks through Mixture-of-Experts layers, in lockstep."""

import importlib
from typing import TYPE_CHECKING, Any

from lockstep._version import __version__

# Where the public names live. Imported on first use, so that `lockstep simulate --help` never waits for torch.
_MODULES = {
    "lockstep.metadata.dp_metadata": ("DPMetadata",),
    "lockstep.metadata.config": ("ParallelConfig",),
    "lockstep.metadata.chunks": ("ChunkPlan",),
    "lockstep.coordination.step": ("StepRecord", "StepDecision", "decide"),
    "lockstep.coordination.coordinator": ("Coordinator",),
    "lockstep.metadata.forward_context": ("ForwardContext", "set_forward_context", "get_forward_context"),
    "lockstep.coordination.session": ("Session",),
    "lockstep.dispatch.base": ("Dispatcher", "ExpertsShape", "Route"),
    "lockstep.dispatch.choose": ("DispatcherOptions", "make_dispatcher", "register_dispatcher"),
    "lockstep.moe.experts": ("LocalExperts",),
    "lockstep.moe.layer": ("MoELayer",),
    "lockstep.moe.layers": ("MoELayers",),
    "lockstep.moe.step": ("Step", "current_step"),
    "lockstep.models.parallel": ("ModelParallel", "parallel_of"),
    "lockstep.models.options": ("ParallelOptions",),
    "lockstep.models.huggingface": ("from_pretrained", "parallelize", "join"),
    "lockstep.runner.engine": ("Engine",),
    "lockstep.engine.rank_engine": ("RankEngine",),
    "lockstep.engine.stopping": ("RequestOutput",),
    "lockstep.engine.sampling_params": ("SamplingParams",),
    "lockstep.errors": (
        "LockstepError",
        "ConfigurationError",
        "TokenCountError",
        "RankMismatchError",
        "RankAbsentError",
        "PeerFailedError",
    ),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from lockstep.coordination.coordinator import Coordinator as Coordinator
    from lockstep.coordination.session import Session as Session
    from lockstep.coordination.step import StepDecision as StepDecision
    from lockstep.coordination.step import StepRecord as StepRecord
    from lockstep.coordination.step import decide as decide
    from lockstep.dispatch.base import Dispatcher as Dispatcher
    from lockstep.dispatch.base import ExpertsShape as ExpertsShape
    from lockstep.dispatch.base import Route as Route
    from lockstep.dispatch.choose import DispatcherOptions as DispatcherOptions
    from lockstep.dispatch.choose import make_dispatcher as make_dispatcher
    from lockstep.dispatch.choose import register_dispatcher as register_dispatcher
    from lockstep.engine.rank_engine import RankEngine as RankEngine
    from lockstep.engine.sampling_params import SamplingParams as SamplingParams
    from lockstep.engine.stopping import RequestOutput as RequestOutput
    from lockstep.errors import ConfigurationError as ConfigurationError
    from lockstep.errors import LockstepError as LockstepError
    from lockstep.errors import PeerFailedError as PeerFailedError
    from lockstep.errors import RankAbsentError as RankAbsentError
    from lockstep.errors import RankMismatchError as RankMismatchError
    from lockstep.errors import TokenCountError as TokenCountError
    from lockstep.metadata.chunks import ChunkPlan as ChunkPlan
    from lockstep.metadata.config import ParallelConfig as ParallelConfig
    from lockstep.metadata.dp_metadata import DPMetadata as DPMetadata
    from lockstep.metadata.forward_context import ForwardContext as ForwardContext
    from lockstep.metadata.forward_context import get_forward_context as get_forward_context
    from lockstep.metadata.forward_context import set_forward_context as set_forward_context
    from lockstep.models.huggingface import from_pretrained as from_pretrained
    from lockstep.models.huggingface import join as join
    from lockstep.models.huggingface import parallelize as parallelize
    from lockstep.models.options import ParallelOptions as ParallelOptions
    from lockstep.models.parallel import ModelParallel as ModelParallel
    from lockstep.models.parallel import parallel_of as parallel_of
    from lockstep.moe.experts import LocalExperts as LocalExperts
    from lockstep.moe.layer import MoELayer as MoELayer
    from lockstep.moe.layers import MoELayers as MoELayers
    from lockstep.moe.step import Step as Step
    from lockstep.moe.step import current_step as current_step
    from lockstep.runner.engine import Engine as Engine


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        from lockstep.extras import lacking

        if error.name is None or not (says := lacking(error.name.partition(".")[0])):
            raise
        raise ModuleNotFoundError(says.format(f"lockstep.{name}"), name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
