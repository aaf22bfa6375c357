"""Weights that differ by rank, and whether anybody has written them since they were spread: wrappers do, in silence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from lockstep.errors import ConfigurationError

_VALUES_PER_EXPERT = 4
_OVERWRITTEN = (
    "{model}'s {weight} {what} after it was spread over the ranks, so that this rank no longer has its own part: "
    "DistributedDataParallel, Lightning's Trainer, FSDP, DeepSpeed and load_state_dict do that. Load the model anew "
    "and use it without them; if every rank has written its own part on purpose, call "
    "lockstep.models.parallel.parallel_of(model).accept_weights()"
)


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
        self._sealed = list(self._parameters())
        self._state = self._look()
        self._values = {name: self._sample(parameter) for name, parameter in self._sealed}

    def check(self) -> None:
        """Check that nobody has written, moved or replaced the weights, without reading them: cheap, for every step.

        Raises:
            ConfigurationError: naming the weight.
        """
        if self._look() != self._state:
            self._complain(self._first_difference())

    def check_values(self) -> None:
        """Check the weights between steps, where they may have been moved or cast; reads a few values of each expert.

        Raises:
            ConfigurationError: naming the weight.
        """
        now = dict(self._parameters())
        for (name, parameter), (_, version, _) in zip(self._sealed, self._state, strict=True):
            found = now.get(name)
            if found is None or type(found) is not type(parameter) or found.shape != parameter.shape:
                self._complain((name, "was replaced"))
            if found.is_meta:
                raise ConfigurationError(
                    f"{self._model}'s {self._name}.{name} is not there any more (offloaded to the meta device): keep "
                    "the model on its device, without accelerate's cpu_offload, disk_offload or dispatch_model"
                )
            if _version(found) != version and found is parameter:
                self._complain((name, "was written in place"))
            before, values = self._values[name], self._sample(found)
            expected = before.to(values.dtype)
            if not bool(((expected == values) | (expected.isnan() & values.isnan())).all()):
                self._complain((name, "has other values"))
        if now.keys() - self._values.keys():
            self._complain((min(now.keys() - self._values.keys()), "was added"))
        if self._look() != self._state:  # moved or cast
            self.accept()

    def _parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        for name, parameter in self._module._parameters.items():
            if parameter is not None:
                yield name, parameter

    def _look(self) -> list[tuple[int, int, int]]:
        return [(id(weight), _version(weight), _address(weight)) for _, weight in self._parameters()]

    def _first_difference(self) -> tuple[str, str]:
        now = {name: (id(weight), _version(weight), _address(weight)) for name, weight in self._parameters()}
        for (name, _), before in zip(self._sealed, self._state, strict=True):
            if name not in now or now[name][0] != before[0]:
                return name, "was replaced"
            if now[name][1] != before[1]:
                return name, "was written in place"
            if now[name][2] != before[2]:
                return name, "was moved or cast inside of join"
        return next(iter(now), ""), "was added"

    def _complain(self, difference: tuple[str, str]) -> NoReturn:
        name, what = difference
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


def _version(weight: torch.Tensor) -> int:
    local = _local(weight)
    return 0 if local.is_inference() else local._version  # made under inference_mode: nobody counts its writes


def _address(weight: torch.Tensor) -> int:
    local = _local(weight)
    return 0 if local.is_meta else local.data_ptr()
