"""Private names of Transformers: every one that Lockstep uses is in this file and has a test.

Tried with 5.17 to 5.24. Where a name differs between those releases, the difference is resolved here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lockstep.errors import ConfigurationError

_WRAPPERS_WITH_COLLECTIVES = ("DataParallel", "DeepSpeedEngine", "DistributedDataParallel", "FullyShardedDataParallel")

BATCH_ROWS = "lockstep_batch_rows"  # argument of a call, see `run_batches_in_steps`
ASYNC_LOAD_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"  # environment variable: reads each weight when it is due, not ahead


def sharding_class(
    model_class: Any,
    *,
    distribute: Callable[[Any], None],
    on_loaded: Callable[[Any, Any], None],
    local_parameters_of: Collection[str],
    keeps_fp8: bool = False,
) -> Any:
    """Make a subclass whose `from_pretrained` calls `distribute` where Transformers would distribute the model.

    For a DTensor, Transformers' loader reads only the local part. `distribute` gets the empty model on the meta device;
    `on_loaded` gets the model and the loading info before missing weights are initialised.
    For modules in `local_parameters_of`, which `distribute` may fill, `get_parameter` returns this rank's part. With
    `keeps_fp8`, experts of an fp8 checkpoint are not dequantised, and their scales are parameters too.
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
            # Conversions compare the shape of what was read, this rank's part, with the parameter's.
            parameter = super().get_parameter(target)
            is_local = target.rpartition(".")[0] in local_parameters_of
            return getattr(parameter, "_local_tensor", parameter) if is_local else parameter

        @staticmethod
        def _load_pretrained_model(model: Any, state_dict: Any, files: Any, load_config: Any, *rest: Any) -> Any:
            if keeps_fp8:
                load_config.weight_mapping[:] = _experts_in_fp8(load_config.weight_mapping)
            return model_class._load_pretrained_model(model, state_dict, files, load_config, *rest)

        @staticmethod
        def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
            on_loaded(model, loading_info)
            return model_class._finalize_model_loading(model, load_config, loading_info)

    # Transformers keeps tables by the class's printed name, so the subclass must have the same name.
    Sharding.__module__, Sharding.__name__ = model_class.__module__, model_class.__name__
    Sharding.__qualname__, Sharding.__doc__ = model_class.__qualname__, model_class.__doc__
    return Sharding


def part_of_experts(parameter: torch.Tensor, experts: Sequence[int], device_type: str) -> torch.Tensor:
    """Return a DTensor on the meta device, so that Transformers' loader reads only these experts.

    Its mesh carries their numbers, and has the device type of the weights, since a DTensor moves its values there.
    """
    from transformers import core_model_loading

    _extend(core_model_loading, "DtensorShardOperation", _reading_experts)
    # A unique mesh name: torch treats equal meshes of one process as the same mesh.
    name = f"experts {experts}"
    mesh: Any = DeviceMesh(device_type, torch.arange(1), mesh_dim_names=(name,), _init_backend=False, _rank=0)
    mesh.experts = experts
    local, shape, stride = parameter[: len(experts)], parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def like_part(local: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return a DTensor divided like `parameter` with this local part; just `local` if `parameter` is no DTensor."""
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((len(parameter), *local.shape[1:]))
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=local.stride())


def _extend(owner: Any, name: str, extended: Callable[[Any], Any]) -> None:
    """Replace a class or function of Transformers by ours, made from it; no-op if that was done before."""
    original = getattr(owner, name)
    if original.__module__ != __name__:
        setattr(owner, name, extended(original))


def _reading_experts(operation: Any) -> Any:
    """Extend the loader, which can read only contiguous shares of a DTensor, to read the experts that we list."""

    class Reading(operation):
        def __init__(self, parameter: Any) -> None:
            super().__init__(parameter)
            self.experts, self.num_experts = getattr(parameter.device_mesh, "experts", None), parameter.shape[0]

        def shard_tensor(
            self, source: Any, tensor_idx: int | None = None, device: Any = None, dtype: Any = None
        ) -> Any:
            if self.experts is None:
                return super().shard_tensor(source, tensor_idx, device, dtype)
            shape = source.shape if isinstance(source, torch.Tensor) else source.get_shape()
            if tensor_idx is not None and len(shape) < self.param_ndim:  # the files have a tensor per expert
                is_own = tensor_idx % self.num_experts in self.experts
                return source[...].to(device=device, dtype=dtype) if is_own else None
            first, last = self.experts[0], self.experts[-1]
            if last - first == len(self.experts) - 1:
                return source[first : last + 1].to(device=device, dtype=dtype)
            return torch.stack([source[expert] for expert in self.experts]).to(device=device, dtype=dtype)

    return Reading


def _experts_in_fp8(mapping: Iterable[Any]) -> list[Any]:
    """Return the loader's conversions, changed to keep values and scales of experts instead of dequantising them."""
    changed: list[Any] = []
    for conversion in mapping:
        first, *others = getattr(conversion, "operations", None) or [None]
        target = conversion._original_target_patterns[0]
        if not hasattr(first, "_dequantize_one") or not re.search(r"experts\.\w+_proj$", target):
            changed.append(conversion)
            continue
        sources = conversion._original_source_patterns
        for ending, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            chosen = [source for source in sources if source.rstrip("$").endswith(f".{ending}")]
            part = type(conversion)(source_patterns=chosen, target_patterns=[target + suffix], operations=others)
            part.scope_prefix, part.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
            changed.append(part)
    return changed


def _dequantising_all(operation: Any) -> Any:
    """Correct the loader's dequantisation of fp8 checkpoints in two cases.

    Sizes that are not a multiple of the block, such as DeepSeek-V3's 576; and weights that are not in fp8, which would
    keep the dtype of the files.
    """

    class Dequantising(operation):
        def _dequantize_one(
            self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
        ) -> torch.Tensor:
            block, (rows, columns) = self.hf_quantizer.quantization_config.weight_block_size, quantized.shape[-2:]
            if block and scales.ndim >= 2:
                whole = scales.shape[-2] * block[0], scales.shape[-1] * block[1]
                if 0 <= whole[0] - rows < block[0] and 0 <= whole[1] - columns < block[1]:
                    missing = (0, whole[1] - columns, 0, whole[0] - rows)
                    quantized = torch.nn.functional.pad(quantized.float(), missing)
            return super()._dequantize_one(quantized, scales, output_dtype)[..., :rows, :columns]

        def convert(self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **kwargs: Any) -> Any:
            found = super().convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
            kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
            is_kept = any(name in full_layer_name for name in kept)
            dtype = torch.float32 if is_kept else self._get_target_dtype(model, full_layer_name)
            lists = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
            return {name: [tensor.to(dtype) for tensor in tensors] for name, tensors in lists.items()}

    return Dequantising


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that these names belong to."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def no_distribution() -> Any:
    """Return an empty `DistributedConfig`; without one the loader never calls `distribute`."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig()


def split_attention(model: Any, tp_mesh: DeviceMesh, expert_names: Iterable[str]) -> None:
    """Apply an empty model's own tensor-parallel plan, without its rules for experts, over a one-dimensional mesh."""
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
    # Older releases refuse to split a gathered output whose size the ranks do not divide: it stays whole.
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
    """Mark a parameter as loaded, so that Transformers does not initialise it."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def may_be_missing(model: Any, key: str) -> bool:
    """Return whether the files may lack a weight: it is tied to another weight, or the architecture allows it."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return key in getattr(model, "all_tied_weights_keys", {}) or any(re.search(pattern, key) for pattern in patterns)


def text_class_of(config: Any) -> Any:
    """Return the class that generates text with a config; None if Transformers has none."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def class_from_folder(reference: str, folder: str) -> Any:
    """Import a class from a checkpoint's own code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, folder)


def dequantisation_config(method: str, settings: dict[str, Any]) -> Any:
    """Return a config by which the loader undoes one of Transformers' quantisation methods, such as `fp8`."""
    from transformers.integrations import finegrained_fp8
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    _extend(finegrained_fp8, "Fp8Dequantize", _dequantising_all)
    return AUTO_QUANTIZATION_CONFIG_MAPPING[method].from_dict(settings | {"dequantize": True})


def register_experts(name: str, function: Callable[..., torch.Tensor]) -> None:
    """Register a function as one of Transformers' experts implementations."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def route_experts(module: Any, name: str) -> None:
    """Make an experts module use the implementation of that name."""
    module.config._experts_implementation = name


def experts_route(module: Any) -> str | None:
    """Return the name of an experts module's implementation."""
    return module.config._experts_implementation


def run_batches_in_steps() -> None:
    """Make continuous batching call spread models where it would replay graphs of its own; batches stay padded.

    A call says how many of its rows are real by the argument `BATCH_ROWS`. Batches that Transformers compiles are left
    to it, as are those of releases without these names: a spread model refuses to be captured.
    """
    try:
        from transformers.generation.continuous_batching.model_runner import ModelRunner
    except ImportError:
        return
    _extend(ModelRunner, "compute_batch", _in_steps)


def _in_steps(compute_batch: Any) -> Any:
    def compute_in_step(runner: Any, model: Any, batch: dict[str, Any]) -> None:
        buffers = runner.inputs_and_outputs
        buffers = buffers.io_pairs[buffers.current_pair].device_io if hasattr(buffers, "io_pairs") else buffers
        paths = runner.use_cuda_graph_varlen, runner.use_cuda_graph_decode
        compiled = runner._compiled_varlen, runner._compiled_decode
        on_decode_path = bool(buffers.use_block_table)
        if not paths[on_decode_path] or compiled[on_decode_path] or "_lockstep_parallel" not in vars(model):
            compute_batch(runner, model, batch)
            return
        runner.use_cuda_graph_varlen = runner.use_cuda_graph_decode = False
        try:
            compute_batch(runner, model, {**batch, BATCH_ROWS: buffers.total_seqlen_q})
        finally:
            runner.use_cuda_graph_varlen, runner.use_cuda_graph_decode = paths

    return compute_in_step


def is_experts_module(module: torch.nn.Module) -> bool:
    """Return whether a module holds routed experts: attributes of `use_experts_implementation`, and 3-D weights."""
    is_decorated = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    down_proj = module._parameters.get("down_proj")
    return is_decorated and isinstance(down_proj, torch.Tensor) and down_proj.ndim == 3


def transformers_model_in(model: Any) -> Any:
    """Return the Transformers model in a wrapper such as PEFT's, else `model`; refuse wrappers with collectives."""
    from transformers import PreTrainedModel

    if not isinstance(model, torch.nn.Module):
        held = [name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, torch.nn.Module)]
        got = type(model).__name__ + (f": pass its .{held[0]}" if held else f": {model!r:.80}")
        raise ConfigurationError(f"a model of Transformers, or a module that holds one, is needed, got {got}")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
        if type(module).__name__ in _WRAPPERS_WITH_COLLECTIVES:
            raise ConfigurationError(
                f"{type(module).__name__} waits for all ranks in every call and sends weights to them: pass the model "
                "that it holds (its .module), without it"
            )
    return model
