"""This rank's own part of a spread model: its experts and its slices, sealed against being overwritten in silence."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lockstep.errors import ConfigurationError
from lockstep.models import transformers_internals as internals
from lockstep.models.experts_modules import find_experts
from lockstep.models.seal import Seal, weights_are_there
from lockstep.moe.experts import LocalExperts

EXPERTS_IMPLEMENTATION = "lockstep"
"""Our name among Transformers' experts implementations. Being none of its own, `generate` never switches it."""


class OwnWeights:
    """What only this rank has of a model.

    Args:
        model: whose experts modules hold this rank's experts only.

    Attributes:
        names: of the experts modules, in forward order.
        experts: of this rank, `[layers]`.

    Raises:
        ConfigurationError: weights that are not in memory.
    """

    def __init__(self, model: Any) -> None:
        weights_are_there(model)
        self._model = model
        self._kind = type(model).__name__
        found = find_experts(model)
        self.names = [name for name, _ in found]
        self._seals = [Seal(self._kind, name, module) for name, module in found]
        self.experts = [
            LocalExperts(module, check_weights=seal.check) for (_, module), seal in zip(found, self._seals, strict=True)
        ]
        self._seals += [
            Seal(self._kind, name, module)
            for name, module in model.named_modules()
            if any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        ]

    def place(self) -> tuple[torch.dtype, torch.device]:
        """Return the dtype and device that the model has now."""
        weight = self._model.get_input_embeddings().weight
        return weight.dtype, weight.device

    def check(self) -> None:
        """Check that nobody has written the weights, and that the experts run over the ranks; cheap, for every step.

        Raises:
            ConfigurationError: naming the weight and what was done to it, or the experts implementation.
        """
        for seal in self._seals:
            seal.check()
        for name, experts in zip(self.names, self.experts, strict=True):
            route = internals.experts_route(experts.module)
            if route != EXPERTS_IMPLEMENTATION:
                raise ConfigurationError(
                    f"{self._kind}'s {name} was set to experts_implementation={route!r}, which knows this rank's "
                    f"experts only: leave {EXPERTS_IMPLEMENTATION!r} in place (no set_experts_implementation)"
                )

    def accept(self) -> None:
        """Take the weights as they are now for right."""
        for seal in self._seals:
            seal.accept()

    def complaint(self) -> str:
        """Return what is wrong with this rank's weights, for all ranks to hear; empty where nothing is."""
        try:
            for seal in self._seals:
                seal.check_values()
            self._refuse_wrapped_experts()
        except ConfigurationError as error:
            return str(error)
        return ""

    def _refuse_wrapped_experts(self) -> None:
        """Adapters on experts would have the sizes of all of them, or of one rank's."""
        now = dict(self._model.named_modules(remove_duplicate=False))
        for name, experts in zip(self.names, self.experts, strict=True):
            if now.get(name) is not experts.module:
                found = type(now[name]).__name__ if name in now else "nothing"
                raise ConfigurationError(
                    f"{name} of {self._kind} was replaced by {found}: experts that are spread over ranks take no "
                    "adapters; leave them out of target_modules and target_parameters, or merge the adapter into the "
                    "whole model (merge_and_unload) before lockstep.parallelize"
                )
