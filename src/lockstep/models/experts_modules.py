"""Modules that hold a model's routed experts: found, cut to this rank's slots, and probed for their inputs."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lockstep.dispatch.base import ExpertsShape
from lockstep.errors import ConfigurationError
from lockstep.models import transformers_internals as internals
from lockstep.moe.experts import LocalExperts
from lockstep.moe.fp8 import BLOCK, SCALES, WEIGHTS, quantise
from lockstep.moe.placement import EMPTY, Placement


def find_experts(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return `(qualified name, module)` of every MoE layer's experts, at least one, in forward order."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(f"a model of Transformers is needed, got {type(model).__name__}: {model!r:.80}")
    found = [(name, module) for name, module in model.named_modules() if internals.is_experts_module(module)]
    if not found:
        raise ConfigurationError(
            f"{type(model).__name__} has no MoE layer that follows Transformers' experts interface "
            "(docs/reference/architectures.md lists the models that do)"
        )
    return found


def plain_name(name: str) -> str:
    """Return the name of a layer's experts without what PEFT adds for each wrapper around them."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def slots_of(
    found: Sequence[tuple[str, Any]], layer: int, ep_rank: int, ep_size: int, placement: Placement | None
) -> tuple[int, ...]:
    """Return the expert of each slot of a rank in a layer: by a placement that fits the model, or by equal shares."""
    name, module = found[layer]
    num_experts = int(module.down_proj.shape[0])
    if placement is not None:
        wanted, has = (placement.num_layers, placement.num_experts), (len(found), num_experts)
        if (*wanted, placement.num_ranks) != (*has, ep_size):
            raise ConfigurationError(
                f"a placement of {wanted[0]} layers of {wanted[1]} experts over {placement.num_ranks} ranks does not "
                f"fit {has[0]} layers of {has[1]} ({name}) over {ep_size}"
            )
    if placement is None or ep_size == 1:
        return Placement.even(1, num_experts, ep_size).slots_of(0, ep_rank)
    return placement.slots_of(layer, ep_rank)


def shard_experts(module: Any, slots: Sequence[int]) -> None:
    """Keep the experts of these slots as plain tensors, of a whole module or of DTensors that hold exactly these."""
    for name, parameter in expert_parameters(module):
        rows, held = parameter.detach(), list(range(len(parameter)))
        if isinstance(rows, DTensor):
            rows, held = rows._local_tensor, _held(slots)
        _set(module, name, parameter, take(rows, [held.index(e) if e != EMPTY else EMPTY for e in slots]))
    _hold(module, slots, module.num_experts)


def shard_empty(module: Any, slots: Sequence[int], device_type: str) -> None:
    """Prepare a module on the meta device so that the loader reads only the experts in this rank's slots."""
    for name, parameter in expert_parameters(module):
        part = internals.part_of_experts(parameter.detach(), _held(slots), device_type)
        module._parameters[name] = torch.nn.Parameter(part, requires_grad=parameter.requires_grad)


def expect_fp8(module: Any) -> None:
    """Prepare a module on the meta device so that the loader reads weights in fp8, and their scales."""
    for name in [name for name in WEIGHTS if module._parameters.get(name) is not None]:
        weight = module._parameters[name]
        num_experts, num_out, num_in = weight.shape
        scales = torch.empty(num_experts, num_out // BLOCK, num_in // BLOCK, device="meta")
        values = torch.empty_like(weight, dtype=torch.float8_e4m3fn, device="meta")
        module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
        module._parameters[f"{name}{SCALES}"] = torch.nn.Parameter(scales, requires_grad=False)


@contextlib.contextmanager
def quantising(modules: dict[str, Any]) -> Iterator[None]:
    """Round each weight of the experts to fp8 as soon as the loader sets it, so that at most one is in 16 bits."""

    def quantise_weight(module: Any, name: str, parameter: Any) -> Any:
        weight = getattr(parameter, "_local_tensor", parameter)
        if module not in modules.values() or name not in WEIGHTS or weight is None or weight.is_meta:
            return None
        values, scales = (internals.like_part(part, parameter) for part in quantise(weight.detach()))
        _set(module, f"{name}{SCALES}", parameter, scales)
        _set(module, name, parameter, values)
        return module._parameters[name]

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(quantise_weight)
    try:
        yield
    finally:
        handle.remove()


def change_slots(module: Any, slots: Sequence[int], read: Callable[[str, int, torch.Tensor], None]) -> None:
    """Give a module that was cut other experts; `read(name, expert, weight)` writes a weight that the module lacks.

    If only empty slots are filled, the weights stay in place, so that CUDA graphs remain valid.
    """
    (held, num_experts), in_place = slots_held(module), only_fills(module, slots)
    for name, parameter in expert_parameters(module):
        before = parameter.detach()
        after = before if in_place else before.new_zeros(len(slots), *before.shape[1:])
        for slot, expert in enumerate(slots):
            if expert not in (*held, EMPTY):
                read(name, expert, after[slot])
            elif expert != EMPTY and not in_place:
                after[slot] = before[held.index(expert)]
        if not in_place:
            _set(module, name, parameter, after)
    _hold(module, slots, num_experts)


def only_fills(module: Any, slots: Sequence[int]) -> bool:
    """Return whether a module that was cut can take the experts of `slots` by filling empty slots only."""
    held, _ = slots_held(module)
    return len(slots) == len(held) and all(old in (new, EMPTY) for new, old in zip(slots, held, strict=True))


def slots_held(module: Any) -> tuple[tuple[int, ...], int]:
    """Return the expert of each slot of a module that was cut, and the layer's number of experts over all ranks."""
    held: tuple[tuple[int, ...], int] = module._lockstep_slots
    return held


def _hold(module: Any, slots: Sequence[int], num_experts: int) -> None:
    module._lockstep_slots, module.num_experts = (tuple(slots), num_experts), len(slots)


def take(rows: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """Return the wanted rows, zeros for `EMPTY`; a copy, unless all rows are wanted in order."""
    if list(wanted) == list(range(len(rows))):
        return rows
    taken = rows[[max(0, row) for row in wanted]]
    for slot, row in enumerate(wanted):
        if row == EMPTY:
            taken[slot].zero_()
    return taken


def _set(module: Any, name: str, before: torch.nn.Parameter, weight: torch.Tensor) -> None:
    module._parameters[name] = torch.nn.Parameter(weight, requires_grad=before.requires_grad)
    internals.mark_loaded(module._parameters[name])


def _held(slots: Sequence[int]) -> list[int]:
    """Return the experts in a rank's slots, ascending; at least one, since loaders make no empty weights."""
    return sorted(expert for expert in slots if expert != EMPTY) or [0]


def expert_parameters(module: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Return an experts module's own parameters that have one entry per expert."""
    num_experts = module.down_proj.shape[0]
    return [
        (name, parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 1 and parameter.shape[0] == num_experts
    ]


@torch.no_grad()
def experts_shapes(model: Any, forward: Callable[..., Any], num_ranks: int) -> list[ExpertsShape]:
    """Send one token through the model and return what each of its MoE layers was called with, in order."""
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
    """Hash the first values of every weight that all ranks share, to detect different seeds or checkpoints."""
    names = [plain_name(name) for name, _ in find_experts(model)]  # with their adapters
    experts = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    parts = [p.detach().flatten()[:16].float() for p in model.parameters() if id(p) not in experts]
    return zlib.crc32(torch.cat(parts).cpu().numpy().tobytes())
