"""LoRA on experts (PEFT's `target_parameters`): cut to this rank's experts, and applied to the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import slots_held, take
from lockstep.moe.experts import Adapters
from lockstep.moe.fp8 import WEIGHTS

_State = tuple[tuple[str, ...], list[tuple[str, int | None, int | None]]]  # merged adapters; active ones, with writes


def wrappers_around(outermost: Any) -> tuple[list[Any], Any]:
    """Return PEFT's wrappers around a layer's experts, from the outside in, and the experts module."""
    wrappers = []
    while "base_layer" in getattr(outermost, "_modules", {}):
        wrappers.append(outermost)
        outermost = outermost.base_layer
    return wrappers, outermost


class ExpertsAdapters:
    """The LoRA adapters of one layer's experts on this rank; `name` is the name of the experts without wrappers."""

    def __init__(self, model: Any, name: str, module: Any) -> None:
        self._model, self._name, self._module = model, name, module
        self._seen: dict[Any, _State] = {}  # wrappers, with the state in which each was read

    def read(self) -> Adapters:
        """Return the active adapters and make their wrappers pass calls through; refuse adapters other than LoRA."""
        outermost = self._outermost()
        wrappers, innermost = wrappers_around(outermost)
        of_others = [one for one in wrappers if getattr(one, "parameter_name", None) not in WEIGHTS]
        if innermost is not self._module or of_others:
            found = "nothing" if outermost is None else type(of_others[0] if of_others else outermost).__name__
            raise ConfigurationError(
                f"{self._name} of {type(self._model).__name__} was replaced by {found}: experts that are spread over "
                f"ranks take LoRA on {', '.join(WEIGHTS)} (target_parameters); merge any other adapter into the whole "
                "model (merge_and_unload) before lockstep.parallelize"
            )
        self._seen = {wrapper: _state_of(wrapper) for wrapper in wrappers}
        adapters: Adapters = {}
        for wrapper in wrappers:
            wrapper.forward = self._module.__call__
            weight = getattr(self._module, wrapper.parameter_name)
            for name in _active(wrapper):
                lora_a, lora_b = wrapper.lora_A[name].weight.detach(), wrapper.lora_B[name].weight.detach()
                by_expert_a = lora_a.reshape(len(weight), -1, lora_a.shape[1]).to(weight.dtype)
                by_expert_b = lora_b.reshape(lora_b.shape[0], -1, len(weight)).permute(2, 0, 1).to(weight.dtype)
                entry = by_expert_a.contiguous(), by_expert_b.contiguous(), float(wrapper.scaling[name])
                adapters.setdefault(wrapper.parameter_name, []).append(entry)
        return adapters

    def settle(self) -> bool:
        """Return whether an adapter was merged or unmerged since `read`."""
        self._notice()
        for wrapper in self._seen:
            if wrapper.disable_adapters and wrapper.merged:  # as PEFT's own forward does
                wrapper.unmerge()
        return any(tuple(wrapper.merged_adapters) != merged for wrapper, (merged, _) in self._seen.items())

    def changed(self) -> bool:
        """Return whether adapters were activated, merged or written since `read`."""
        # Called for every layer of every step, where most models have no adapters: no generator is made for nothing.
        return bool(self._seen) and any(_state_of(wrapper) != state for wrapper, state in self._seen.items())

    def _outermost(self) -> Any:
        try:
            return self._model.get_submodule(self._name)
        except AttributeError:
            return None

    def _notice(self) -> None:
        """Remember the present wrappers, because PEFT removes them when it merges adapters."""
        for wrapper in wrappers_around(self._outermost())[0]:
            self._seen.setdefault(wrapper, ((), []))

    def summary(self) -> str:
        """Return which adapters are active and merged on each weight; it must be equal on all ranks."""
        return "; ".join(
            f"{wrapper.parameter_name}: {_active(wrapper)} active, {wrapper.merged_adapters} merged"
            for wrapper in self._seen
        )

    def cut_loaded(self, parent: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Cut this layer's adapters to this rank's slots, in place, in a state dict that is about to be loaded.

        `parent` is the module that holds the experts; PEFT does not replace it. Weights of the experts themselves are
        refused, and adapters whose shape fits neither the whole model nor this rank; the error has both shapes.
        """
        self._notice()
        slots, num_experts = slots_held(self._module)
        parameters = dict(parent.named_parameters())
        for key in [key for key in state_dict if key.startswith(f"{prefix}{self._name.rpartition('.')[2]}.")]:
            name = key.removeprefix(prefix)
            part = next((part for part in ("lora_A", "lora_B") if f".{part}." in name), "")
            if not part or name not in parameters:
                raise ConfigurationError(
                    f"load_state_dict: {key!r} belongs to experts of which each rank holds its own part only: load "
                    "weights of experts into the whole model before lockstep.parallelize, or by from_pretrained"
                )
            found, own_shape = state_dict[key], list(parameters[name].shape)
            whole_shape, by_expert = list(own_shape), 0 if part == "lora_A" else 1
            whole_shape[by_expert] = own_shape[by_expert] // len(slots) * num_experts
            if list(found.shape) == whole_shape:
                state_dict[key] = own_part(part, found, slots, num_experts)
            elif list(found.shape) != own_shape:
                raise ConfigurationError(
                    f"adapter {key!r} has shape {list(found.shape)}: a rank with {len(slots)} of {num_experts} experts "
                    f"takes {whole_shape} of all experts, or {own_shape} of its own"
                )


def shard_adapters(outermost: Any, slots: Sequence[int]) -> None:
    """Cut the whole adapters around a layer's experts to the experts in this rank's slots."""
    for wrapper in wrappers_around(outermost)[0]:
        for part in ("lora_A", "lora_B"):
            for linear in getattr(wrapper, part).values():
                local = own_part(part, linear.weight.detach(), slots, wrapper.num_experts)
                linear.weight = torch.nn.Parameter(local, requires_grad=False)
                linear.out_features, linear.in_features = local.shape
        wrapper.num_experts = len(slots)


def own_part(part: str, whole: torch.Tensor, slots: Sequence[int], num_experts: int) -> torch.Tensor:
    """Cut `lora_A [experts * r, in]` or `lora_B [out, r * experts]`, experts innermost, to the experts in the slots."""
    if part == "lora_A":
        return take(whole.reshape(num_experts, -1, whole.shape[1]), slots).reshape(-1, whole.shape[1])
    by_expert = take(whole.reshape(whole.shape[0], -1, num_experts).permute(2, 0, 1), slots)
    return by_expert.permute(1, 2, 0).reshape(whole.shape[0], -1)


def _state_of(wrapper: Any) -> _State:
    writes = [(name, _writes(wrapper.lora_A[name]), _writes(wrapper.lora_B[name])) for name in _active(wrapper)]
    return tuple(wrapper.merged_adapters), writes


def _active(wrapper: Any) -> list[str]:
    """Names of the adapters that are added to the rows' results, not merged into the weights."""
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _writes(linear: Any) -> int | None:
    """Return torch's count of writes to the weight; None for inference tensors, which have no count."""
    return None if linear.weight.is_inference() else linear.weight._version
