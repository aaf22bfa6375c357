"""Weights that differ by rank, and whether anybody has written them since they were spread: wrappers do, in silence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import torch

from lockstep.errors import ConfigurationError

_VALUES_PER_EXPERT = 4
_OVERWRITTEN = (
    "{model}'s {weight} {what} after it was spread over the ranks, so that this rank no longer has its own part: "
    "DistributedDataParallel, Lightning's Trainer, FSDP, DeepSpeed and load_state_dict do that. Load the model anew "
    "and use it without them; if every rank has written its own part on purpose, call "
    "lockstep.models.parallel.parallel_of(model).accept_weights()"
)


class _Weight(NamedTuple):
    """A weight as it was when it was sealed."""

    name: str
    parameter: torch.Tensor
    local: torch.Tensor
    version: int | None
    address: int
    values: torch.Tensor


class Seal:
    """The weights of one module that each rank has another part of, as they were when they were spread.

    Args:
        model: name of the model's class, for messages.
        name: of the module.
        module: whose own parameters are sealed.
    """

    def __init__(self, model: str, name: str, module: Any) -> None:
        self._model, self._name, self._module = model, name, module
        self.accept()

    def accept(self) -> None:
        """Take the weights as they are now for right."""
        self._sealed = [
            _Weight(name, weight, _local(weight), _version(weight), _address(weight), self._sample(weight))
            for name, weight in self._parameters()
        ]
        self._count = len(self._module._parameters)

    def check(self) -> None:
        """Check that nobody has written, moved or replaced the weights, without reading them: cheap, for every step.

        Raises:
            ConfigurationError: naming the weight.
        """
        found = self._module._parameters
        for weight in self._sealed:
            if found.get(weight.name) is not weight.parameter:
                self._complain(weight.name, "was replaced")
            local = weight.local
            if weight.version is not None and local._version != weight.version:
                self._complain(weight.name, "was written in place")
            if local.data_ptr() != weight.address or local is not _local(weight.parameter):
                self._complain(weight.name, "was moved or cast inside of join")
        if len(found) != self._count:
            self._complain(list(found)[-1], "was added")

    def check_values(self) -> None:
        """Check the weights between steps, where they may have been moved or cast; reads a few values of each expert.

        Raises:
            ConfigurationError: naming the weight.
        """
        now = dict(self._parameters())
        is_as_before = True
        for weight in self._sealed:
            found = now.pop(weight.name, None)
            if found is None or type(found) is not type(weight.parameter) or found.shape != weight.parameter.shape:
                self._complain(weight.name, "was replaced")
            if found.is_meta:
                raise ConfigurationError(
                    f"{self._model}'s {self._name}.{weight.name} is not there any more (offloaded to the meta device): "
                    "keep the model on its device, without accelerate's cpu_offload, disk_offload or dispatch_model"
                )
            if found is weight.parameter and _version(found) != weight.version:
                self._complain(weight.name, "was written in place")
            values = self._sample(found)
            expected = weight.values.to(values.dtype)
            if not bool(((expected == values) | (expected.isnan() & values.isnan())).all()):
                self._complain(weight.name, "has other values")
            is_as_before &= found is weight.parameter and _address(found) == weight.address
        if now:
            self._complain(min(now), "was added")
        if not is_as_before:  # moved or cast
            self.accept()

    def _parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, weight) for name, weight in self._module._parameters.items() if weight is not None)

    def _complain(self, name: str, what: str) -> NoReturn:
        raise ConfigurationError(_OVERWRITTEN.format(model=self._model, weight=f"{self._name}.{name}", what=what))

    @staticmethod
    @torch.no_grad()
    def _sample(parameter: torch.Tensor) -> torch.Tensor:
        """Values spread evenly over the weight, on the host."""
        local = _local(parameter).detach()
        if local.is_meta or not local.numel():
            return torch.zeros(0)
        count = _VALUES_PER_EXPERT * max(16, local.shape[0])
        flat = local.reshape(-1) if local.is_contiguous() else local.flatten()
        return flat[:: max(1, flat.numel() // count)].cpu().clone()


def weights_are_there(model: torch.nn.Module) -> None:
    """Check that no weight is on the meta device.

    Args:
        model: to be spread over the ranks.

    Raises:
        ConfigurationError: naming the first that is not there.
    """
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ConfigurationError(
                f"the weights of {type(model).__name__} are not there ({name} is on the meta device): load it without "
                "offloading, on one device, or let lockstep.from_pretrained load it"
            )


def _local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor."""
    part: torch.Tensor = getattr(weight, "_local_tensor", weight)
    return part


def _version(weight: torch.Tensor) -> int | None:
    """How often the weight was written; None for one made under inference_mode, whose writes nobody counts."""
    local = _local(weight)
    return None if local.is_inference() else local._version


def _address(weight: torch.Tensor) -> int:
    local = _local(weight)
    return 0 if local.is_meta else local.data_ptr()
