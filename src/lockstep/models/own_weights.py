"""Guards this rank's part of a spread model: wrappers may overwrite its experts without an error."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor

from lockstep.errors import ConfigurationError
from lockstep.models import transformers_internals as internals
from lockstep.models.adapters import ExpertsAdapters
from lockstep.models.experts_modules import find_experts, plain_name
from lockstep.moe.experts import LocalExperts
from lockstep.moe.fp8 import is_fp8

EXPERTS_IMPLEMENTATION = "lockstep"  # among Transformers' experts implementations; `generate` never switches it

_VALUES_PER_EXPERT = 4
_OVERWRITTEN = (
    "{model}'s {weight} {what} after it was spread over the ranks, so that this rank no longer has its own part: "
    "DistributedDataParallel, Lightning's Trainer, FSDP, DeepSpeed and load_state_dict do that. Load the model anew "
    "and use it without them; if every rank has written its own part on purpose, call "
    "lockstep.parallel_of(model).accept_weights()"
)


class _Weight:
    """A weight's present state; `local` is this rank's part of a DTensor."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter
        self.kind = type(parameter), parameter.shape
        self.local = _local(parameter)
        # Tensors made under inference_mode have no count of writes.
        self.version = None if self.local.is_inference() else self.local._version
        self.address = 0 if self.local.is_meta else self.local.data_ptr()
        self.values = torch.zeros(0)  # spread evenly over the weight, on the host
        if self.address:
            flat = self.local.detach().reshape(-1)
            count = _VALUES_PER_EXPERT * max(16, self.local.shape[0])
            values = flat[:: max(1, flat.numel() // count)].cpu().clone()
            self.values = values.float() if values.itemsize == 1 else values  # fp8 cannot be compared


class Seal:
    """The state, since they were spread, of one module's weights that differ from rank to rank."""

    def __init__(self, model: str, name: str, module: Any, adapters: ExpertsAdapters | None = None) -> None:
        self._model, self._name, self._module = model, name, module
        self._adapters = adapters  # around the module; what they merge into its weights is each rank's own part
        self.accept()

    def accept(self) -> None:
        """Accept the present weights as correct."""
        self._sealed = self._look()
        self._count = len(self._module._parameters)

    def check(self) -> None:
        """Raise if a weight was written, moved or replaced. Cheap enough for every step, since no values are read."""
        found = self._module._parameters
        for name, weight in self._sealed.items():
            if found.get(name) is not weight.parameter:
                self._complain(name, "was replaced")
            if weight.version is not None and weight.local._version != weight.version:
                self._complain(name, "was written in place")
            if weight.local.data_ptr() != weight.address or weight.local is not _local(weight.parameter):
                self._complain(name, "was moved or cast inside of join")
        if len(found) != self._count:
            self._complain(list(found)[-1], "was added")
        if self._adapters is not None and self._adapters.changed():
            raise ConfigurationError(
                f"the adapters of {self._model}'s {self._name} were changed inside of join, which the ranks that idle "
                "may not have done: leave the block first, and switch, load or merge adapters of experts on every rank"
            )

    def check_values(self) -> None:
        """Raise if weights changed between steps by more than a move or a cast; reads a few values of each expert."""
        if self._adapters is not None and self._adapters.settle():
            self.accept()  # what PEFT has merged is this rank's own
            return
        now = self._look()
        for name, before in self._sealed.items():
            weight = now.get(name)
            if weight is None or (type(weight.parameter), weight.parameter.shape) != before.kind:
                self._complain(name, "was replaced")
            if weight.parameter.is_meta:
                raise ConfigurationError(
                    f"{self._model}'s {self._name}.{name} is not there any more (offloaded to the meta device): "
                    "keep the model on its device, without accelerate's cpu_offload, disk_offload or dispatch_model"
                )
            is_fp8(self._module)  # raises where fp8 was cast: its values mean nothing without their scales
            if weight.parameter is before.parameter and weight.version != before.version:
                self._complain(name, "was written in place")
            expected = before.values.to(weight.values.dtype)
            if not torch.allclose(weight.values, expected, rtol=0, atol=0, equal_nan=True):
                self._complain(name, "has other values")
        if added := now.keys() - self._sealed.keys():
            self._complain(min(added), "was added")
        self._sealed = now  # moved or cast

    @torch.no_grad()
    def _look(self) -> dict[str, _Weight]:
        return {name: _Weight(weight) for name, weight in self._module._parameters.items() if weight is not None}

    def _complain(self, name: str, what: str) -> NoReturn:
        raise ConfigurationError(_OVERWRITTEN.format(model=self._model, weight=f"{self._name}.{name}", what=what))


def weights_are_there(model: torch.nn.Module) -> None:
    """Raise unless all weights are in memory."""
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ConfigurationError(
                f"the weights of {type(model).__name__} are not there ({name} is on the meta device): load it without "
                "offloading, on one device, or let lockstep.from_pretrained load it"
            )


def _local(weight: torch.Tensor) -> torch.Tensor:
    part: torch.Tensor = getattr(weight, "_local_tensor", weight)
    return part


class OwnWeights:
    """This rank's own part of a model: experts and their adapters by layer, and the layers' names without wrappers."""

    def __init__(self, model: Any) -> None:
        weights_are_there(model)
        self._model = model
        self._kind = type(model).__name__
        self.names: list[str] = []
        self.adapters: list[ExpertsAdapters] = []
        self.experts: list[LocalExperts] = []
        self._seals: list[Seal] = []
        for name, module in find_experts(model):
            self.names.append(plain_name(name))
            self.adapters.append(ExpertsAdapters(model, self.names[-1], module))
            self._seals.append(Seal(self._kind, self.names[-1], module, self.adapters[-1]))
            self.experts.append(LocalExperts(module, check_weights=self._seals[-1].check))
        self._read_adapters()
        self._seals += [
            Seal(self._kind, name, module)
            for name, module in model.named_modules()
            if any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        ]

    def place(self) -> tuple[Any, ...]:
        """Return what layers depend on: the model's present dtype and device, and which layers have adapters."""
        weight = self._model.get_input_embeddings().weight
        return weight.dtype, weight.device, *(bool(experts.adapters) for experts in self.experts)

    def adapters_summary(self) -> str:
        """Return the adapters of the experts as text, to be compared over the ranks."""
        return "; ".join(sorted({text for one in self.adapters if (text := one.summary())})) or "none"

    def _read_adapters(self) -> None:
        for name, experts, adapters in zip(self.names, self.experts, self.adapters, strict=True):
            experts.adapters = adapters.read()
            if adapters.summary() and is_fp8(experts.module):
                raise ConfigurationError(
                    f"{self._kind}'s {name} are held in fp8, and adapters of experts need 16 or 32 bits: load the "
                    "model with quantize_experts='none', or target other layers"
                )

    def check(self) -> None:
        """Raise if weights were written, or if experts run by another implementation. Cheap enough for every step."""
        for seal in self._seals:
            seal.check()
        checked: Any = None
        for name, experts in zip(self.names, self.experts, strict=True):
            if experts.module.config is checked:  # one for all layers, as a rule; reading its attributes takes 2 us
                continue
            checked, route = experts.module.config, internals.experts_route(experts.module)
            if route != EXPERTS_IMPLEMENTATION:
                raise ConfigurationError(
                    f"{self._kind}'s {name} was set to experts_implementation={route!r}, which knows this rank's "
                    f"experts only: leave {EXPERTS_IMPLEMENTATION!r} in place (no set_experts_implementation)"
                )

    def accept(self) -> None:
        """Accept the present weights as correct."""
        for seal in self._seals:
            seal.accept()

    def complaint(self) -> str:
        """Return what is wrong with this rank's weights, to be told to all ranks; empty if nothing is."""
        try:
            for seal in self._seals:
                seal.check_values()
            self._read_adapters()
        except ConfigurationError as error:
            return str(error)
        return ""
