"""Names of Transformers that no release promises to keep: all that Lockstep uses, in one file, each with a test.

Tried with 5.17 to 5.24. Where a name differs between those releases, the difference is resolved here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lockstep.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_WRAPPERS_WITH_COLLECTIVES = ("DataParallel", "DeepSpeedEngine", "DistributedDataParallel", "FullyShardedDataParallel")

ASYNC_LOAD_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"
"""Environment variable that makes Transformers read each weight when it is due, not ahead of time."""


def sharding_class(
    model_class: Any,
    *,
    distribute: Callable[[Any], None],
    on_loaded: Callable[[Any, Any], None],
    on_finished: Callable[[Any, Any], None],
    local_parameters_of: Sequence[str],
) -> Any:
    """Make a subclass whose `from_pretrained` calls us in Transformers' own place for distributing a model.

    Transformers' loader asks of each parameter whether it is a DTensor and then reads only its local part, for every
    layout and through every conversion. `DistributedConfig` itself cannot express data parallelism with whole dense
    weights, hence the override of the class methods that would read it.

    Args:
        model_class: of Transformers, or of code that comes with a checkpoint.
        distribute: gets the empty model, on the meta device.
        on_loaded: gets the model and Transformers' loading info (`missing_keys`, `mismatched_keys`,
            `conversion_errors`), before what is missing is filled with random numbers.
        on_finished: gets both once Transformers has taken out the `unexpected_keys` that the architecture ignores.
        local_parameters_of: names of modules; read after `distribute`, which may fill it. For their parameters
            `get_parameter` returns this rank's part.

    Returns:
        The class. Call its `from_pretrained` with `distributed_config=no_distribution()`.
    """

    class Sharding(model_class):
        @classmethod
        def prepare_distribute_model(
            cls, distributed_config: Any, *, device_map: Any = None, **_: Any
        ) -> tuple[Any, Any, None]:
            # Up to 5.18 it takes and returns a device mesh, later a mesh manager.
            return distributed_config, device_map, None

        @classmethod
        def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
            distribute(model)
            return model

        def get_parameter(self, target: str) -> Any:
            # Conversions compare what was read, this rank's part, with the parameter's shape.
            parameter = super().get_parameter(target)
            is_local = target.rpartition(".")[0] in local_parameters_of
            return getattr(parameter, "_local_tensor", parameter) if is_local else parameter

        @staticmethod
        def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
            on_loaded(model, loading_info)
            loading_info = model_class._finalize_model_loading(model, load_config, loading_info)
            on_finished(model, loading_info)
            return loading_info

    # Transformers keeps tables by the class's printed name, which must be the same when the class is put back.
    Sharding.__module__, Sharding.__name__ = model_class.__module__, model_class.__name__
    Sharding.__qualname__, Sharding.__doc__ = model_class.__qualname__, model_class.__doc__
    return Sharding


def no_distribution() -> Any:
    """Return a `DistributedConfig` that asks for nothing; without one the loader does not distribute at all."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig()


def split_attention(model: Any, tp_mesh: DeviceMesh, expert_names: Iterable[str]) -> None:
    """Apply an empty model's own tensor-parallel plan over a one-dimensional mesh, all but its rules for experts."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    # Rules are written for all layers at once: `model.layers.*.mlp.experts`.
    without = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in expert_names}
    plan = {
        rule: style
        for rule, style in (model.tp_plan or {}).items()
        if not any(rule == name or rule.startswith(f"{name}.") for name in without)
    }
    if hasattr(model, "_expand_parallel_plan"):  # since 5.23: one rule per module
        apply_tensor_parallelism(model, tp_mesh, model._expand_parallel_plan(plan))
        return
    # Older releases refuse to split an output that the ranks do not divide and that is gathered: it stays whole.
    for name, module in model.named_modules():
        if "gather" in plan.get(name, "") and module.weight.shape[0] % tp_mesh.size():
            del plan[name]
    if "tp_plan" in inspect.signature(apply_tensor_parallelism).parameters:  # since 5.19
        apply_tensor_parallelism(model, tp_mesh, plan)
    else:
        whole, model._tp_plan = model._tp_plan, plan
        try:
            apply_tensor_parallelism(model, tp_mesh)
        finally:
            model._tp_plan = whole


def mark_loaded(parameter: torch.nn.Parameter) -> None:
    """Tell Transformers that a parameter has its values, so that it makes none up."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def may_be_missing(model: Any, key: str) -> bool:
    """Say whether a weight that the files lack is no fault: it is tied to another, or the architecture says so."""
    if key in getattr(model, "all_tied_weights_keys", {}):
        return True
    return any(re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_missing or ())


def text_class_of(config: Any) -> Any:
    """Return the class that generates text with a config; None where Transformers has none."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None


def class_from_folder(reference: str, folder: str) -> Any:
    """Import a class from code that comes with a checkpoint."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, folder)


def dequantisation_config(method: str, settings: dict[str, Any]) -> Any:
    """Return what makes the loader undo a quantisation by Transformers' method of that name, such as `fp8`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return AUTO_QUANTIZATION_CONFIG_MAPPING[method].from_dict(settings | {"dequantize": True})


def register_experts(name: str, function: Callable[..., torch.Tensor]) -> None:
    """Make a function one of Transformers' experts implementations."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def route_experts(module: Any, name: str) -> None:
    """Let an experts module run by the implementation of that name."""
    module.config._experts_implementation = name


def experts_route(module: Any) -> str | None:
    """Return the name of the implementation that an experts module runs by."""
    return module.config._experts_implementation


def is_experts_module(module: torch.nn.Module) -> bool:
    """Say whether a module holds routed experts: it has what `use_experts_implementation` sets, and 3-D weights."""
    down_proj = module._parameters.get("down_proj")
    return (
        hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
        and isinstance(down_proj, torch.Tensor)
        and down_proj.ndim == 3
    )


def transformers_model_in(model: Any) -> Any:
    """Return the Transformers model that a wrapper such as PEFT's holds; the model itself if it is one, or has none.

    Raises:
        ConfigurationError: a wrapper that runs collectives of its own, or no module at all.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        held = [name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, torch.nn.Module)]
        hint = f": pass its .{held[0]}" if held else f": {model!r:.80}"
        raise ConfigurationError(f"a model of Transformers, or a module that holds one, is needed, got {kind}{hint}")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
        if type(module).__name__ in _WRAPPERS_WITH_COLLECTIVES:
            raise ConfigurationError(
                f"{type(module).__name__} waits for all ranks in every call and sends weights to them: pass the model "
                "that it holds (its .module), without it"
            )
    return model
