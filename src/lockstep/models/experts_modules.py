"""Modules that hold a model's routed experts: found, and cut down to this rank's experts."""

from typing import Any

import torch

from lockstep.errors import ConfigurationError
from lockstep.models import transformers_internals as internals


def find_experts(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return every module that holds routed experts, in forward order.

    Args:
        model: any Transformers model; its experts are recognised by the attributes that `use_experts_implementation`
            sets and by a three-dimensional `down_proj`.

    Returns:
        `(qualified name, module)` of each MoE layer's experts, at least one.

    Raises:
        ConfigurationError: if there are none; the message names the model's class.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(f"a model of Transformers is needed, got {type(model).__name__}: {model!r:.80}")
    found = [(name, module) for name, module in model.named_modules() if internals.is_experts_module(module)]
    if not found:
        raise ConfigurationError(
            f"{type(model).__name__} has no MoE layer that follows Transformers' experts interface "
            "(docs/architectures.md lists the models that do)"
        )
    return found


def shard_experts(model: torch.nn.Module, ep_rank: int, ep_size: int) -> list[tuple[str, Any]]:
    """Keep only this rank's experts of a model that is already in memory; the memory of the others is freed.

    Expert `e` lives on rank `e // (num_experts // ep_size)`. Each experts module's `num_experts` becomes the local
    number; routers keep all experts.

    Args:
        model: a Transformers model with whole experts.
        ep_rank: this rank's place, in `0..ep_size - 1`.
        ep_size: ranks that share the experts, >= 1.

    Returns:
        What `find_experts` returns.

    Raises:
        ConfigurationError: if the ranks do not divide the experts, or there are none.
    """
    found = find_experts(model)
    for name, module in found:
        size = num_local_experts(name, module, ep_rank, ep_size)
        for parameter_name, parameter in _expert_parameters(module):
            # clone: a view would keep the whole tensor alive.
            local = parameter.detach()[ep_rank * size : (ep_rank + 1) * size].clone()
            module._parameters[parameter_name] = torch.nn.Parameter(local, requires_grad=parameter.requires_grad)
        module.num_experts = size
    return found


def shard_empty(module: Any, ep_rank: int, ep_size: int, device_type: str) -> None:
    """Make each expert parameter of a module on the meta device a DTensor of this rank's part.

    A DTensor moves what is put into it to its mesh's kind of device, so the mesh has that of the weights.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    class RankMesh(DeviceMesh):
        """A mesh that knows this rank and needs no process group: nothing is communicated while loading."""

        def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
            return ep_rank

    # Unique mesh name: torch caches local shapes per mesh and ignores the rank.
    mesh = RankMesh(
        device_type, torch.arange(ep_size), mesh_dim_names=(f"ep{ep_rank}",), _init_backend=False, _rank=ep_rank
    )
    for name, parameter in _expert_parameters(module):
        size = parameter.shape[0] // ep_size
        local = parameter.detach()[ep_rank * size : (ep_rank + 1) * size]
        placed = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module._parameters[name] = torch.nn.Parameter(placed, requires_grad=parameter.requires_grad)


def localise(module: Any) -> None:
    """Turn the DTensors of an experts module into plain tensors of this rank's experts."""
    from torch.distributed.tensor import DTensor

    for name, parameter in list(module._parameters.items()):
        if isinstance(parameter, DTensor):
            local = torch.nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
            internals.mark_loaded(local)
            module._parameters[name] = local
    module.num_experts = int(module.down_proj.shape[0])


def _expert_parameters(module: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that have one entry per expert: all of an experts module's own ones of that length."""
    num_experts = module.down_proj.shape[0]
    return [
        (name, parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 1 and parameter.shape[0] == num_experts
    ]


def num_local_experts(name: str, module: Any, ep_rank: int, ep_size: int) -> int:
    """Return how many experts each rank holds of a module that has all; `ConfigurationError` if they do not divide."""
    num_experts = int(module.down_proj.shape[0])
    check_place(ep_rank, ep_size)
    if num_experts % ep_size:
        raise ConfigurationError(f"{num_experts} experts ({name}) cannot be divided over {ep_size} ranks")
    return num_experts // ep_size


def check_place(ep_rank: int, ep_size: int) -> None:
    """Raise unless this is a rank among those that share the experts."""
    if ep_size < 1 or not 0 <= ep_rank < ep_size:
        raise ConfigurationError(f"ep_rank must be in 0..ep_size - 1, got ep_rank {ep_rank} and ep_size {ep_size}")
