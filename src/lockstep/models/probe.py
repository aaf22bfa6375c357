"""What a model's experts are called with, found by one forward pass, and a checksum of what all ranks have alike."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch

from lockstep.dispatch.base import ExpertsShape
from lockstep.errors import ConfigurationError
from lockstep.models.adapters import plain_name
from lockstep.models.experts_modules import find_experts
from lockstep.moe.experts import LocalExperts


@torch.no_grad()
def experts_shapes(model: Any, forward: Callable[..., Any], num_ranks: int) -> list[ExpertsShape]:
    """Send one token through the model with experts that only look, and return what each was called with, in order.

    No config names these the same in all architectures, and the order of the calls is known for certain.

    Args:
        model: whose experts modules hold one rank's experts.
        forward: the model's own.
        num_ranks: that hold as many experts each.

    Raises:
        ConfigurationError: a model that does not call each of its MoE layers once and in order.
    """
    modules = [module for _, module in find_experts(model)]
    called: list[Any] = []
    shapes: list[ExpertsShape] = []

    def look(module: Any, rows: torch.Tensor, topk_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        called.append(module)
        num_experts = LocalExperts(module).num_local_experts * num_ranks
        shapes.append(ExpertsShape(num_experts, rows.shape[-1], topk_ids.shape[-1], rows.dtype, rows.device))
        return torch.zeros_like(rows)

    for module in modules:
        module.forward = functools.partial(look, module)
    try:
        forward(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for module in modules:
            del module.forward
    if called != modules:
        raise ConfigurationError(
            f"{type(model).__name__} does not call each of its {len(modules)} MoE layers once and in order: "
            f"{[modules.index(module) for module in called]}"
        )
    return shapes


@torch.no_grad()
def dense_checksum(model: Any) -> int:
    """Hash the first values of every weight that all ranks must have alike: unlike seeds or checkpoints show up."""
    names = [plain_name(name) for name, _ in find_experts(model)]  # with their adapters
    experts = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    parts = [p.detach().flatten()[:16].float() for p in model.parameters() if id(p) not in experts]
    return zlib.crc32(torch.cat(parts).cpu().numpy().tobytes())
