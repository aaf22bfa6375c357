"""A Transformers MoE model of which each rank holds the dense weights and its own experts, and reads nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lockstep.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Quantisations that Transformers undoes while it loads, in a way that was tried with experts split over ranks.
_DEQUANTISED_ON_LOAD = ("mxfp4", "fp8")
_MESSAGE_BYTES = 2048


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
    found = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
        and isinstance(module._parameters.get("down_proj"), torch.Tensor)
        and module.down_proj.ndim == 3
    ]
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
        size = _num_local_experts(name, module, ep_rank, ep_size)
        for parameter_name, parameter in _expert_parameters(module):
            # clone: a view would keep the whole tensor alive.
            local = parameter.detach()[ep_rank * size : (ep_rank + 1) * size].clone()
            module._parameters[parameter_name] = torch.nn.Parameter(local, requires_grad=parameter.requires_grad)
        module.num_experts = size
    return found


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    ep_rank: int = 0,
    ep_size: int = 1,
    tp_mesh: DeviceMesh | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    process_group: ProcessGroup | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint so that this rank holds the dense weights and its own experts.

    Only this rank's experts are read from the safetensors files, whichever layout these have. Without a conversion of
    the dtype, dense weights on a CPU stay views of the files, shared with every other process that maps them.

    Args:
        path: a folder, or a Hub id; with `local_files_only` or `HF_HUB_OFFLINE=1` from the local cache only.
        ep_rank: this rank's place among those that share the experts, in `0..ep_size - 1`.
        ep_size: ranks that share the experts, >= 1.
        tp_mesh: the ranks that share this rank's requests, one-dimensional; attention is split over them by the model's
            own plan, and replicated where that has no rule. None or one rank: all dense weights are whole.
        dtype: of the weights; "auto" is what the checkpoint says.
        device: where to put them.
        revision: branch, tag or commit of a Hub id.
        local_files_only: never ask the Hub.
        trust_remote_code: run code that comes with the checkpoint. Off unless asked for.
        process_group: with it, what is wrong on one rank is raised on all of them, in the same words.
        **kwargs: handed to Transformers' `from_pretrained`.

    Returns:
        The model, in evaluation mode. Its experts modules hold `num_experts / ep_size` experts each.

    Raises:
        ConfigurationError: for a checkpoint that is missing, truncated or does not fit the model, a quantisation that
            is not undone on load, or ranks that do not divide the experts.
    """
    if ep_size < 1 or not 0 <= ep_rank < ep_size:
        raise ConfigurationError(f"ep_rank must be in 0..ep_size - 1, got ep_rank {ep_rank} and ep_size {ep_size}")

    def look() -> tuple[Path, Any, Any]:
        folder = _resolve(path, revision, local_files_only)
        config, model_class = _config_and_class(folder, trust_remote_code)
        if quantization := _dequantisation(config, folder):
            kwargs["quantization_config"] = quantization
        check_files(folder)
        return folder, config, model_class

    folder, config, model_class = _together(look, process_group)

    def load() -> Any:
        loading_class = _sharding_class(model_class, ep_rank, ep_size, tp_mesh, torch.device(device).type)
        with _progress_bar(ep_rank == 0), _one_after_another(), _as_configuration_error(folder):
            model = loading_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": str(device)},
                # Any object will do: the sharding class arranges the ranks itself.
                distributed_config=_no_distributed_config(),
                use_safetensors=True,
                **kwargs,
            )
        model.__class__ = model_class
        model.config.distributed_config = None
        return model

    return _together(load, process_group)


def check_files(folder: Path) -> None:
    """Check that a folder's safetensors files are all there and whole, from their headers alone.

    Args:
        folder: the checkpoint.

    Raises:
        ConfigurationError: naming the file, and the tensor or the bytes that are missing.
    """
    index = folder / "model.safetensors.index.json"
    expected: dict[str, set[str]] = {}
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigurationError(f"{index} is not an index of safetensors files: {error!r}") from error
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ConfigurationError(f"{index} names {file!r:.80}, which is no file of its folder")
            expected.setdefault(file, set()).add(tensor)
    else:
        expected = {file.name: set() for file in sorted(folder.glob("*.safetensors"))}
    if not expected:
        raise ConfigurationError(f"{folder} has no safetensors files; other formats are not read")
    for file, tensors in expected.items():
        present = _tensors_of(folder / file)
        if missing := sorted(tensors - present):
            raise ConfigurationError(f"{folder / file} lacks {len(missing)} tensors of the index, first {missing[0]!r}")


def _tensors_of(file: Path) -> set[str]:
    """Names in a safetensors file's header; an error where the file is not as long as the header says."""
    if not file.is_file():
        raise ConfigurationError(f"{file} is missing: the checkpoint's index names it")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        header_size = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + header_size > size:
            raise ConfigurationError(f"{file} is truncated: {size} bytes, its header alone needs {8 + header_size}")
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            needed = 8 + header_size + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ConfigurationError(f"{file} has no readable safetensors header: {error!r}") from error
    if size != needed:
        raise ConfigurationError(f"{file} is truncated or damaged: {size} bytes, its header says {needed}")
    return set(header) - {"__metadata__"}


def _resolve(path: str | os.PathLike[str], revision: str | None, local_files_only: bool) -> Path:
    """The folder of a checkpoint; a Hub id becomes its folder in the local cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith("."):
        raise ConfigurationError(f"no checkpoint at {folder}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(path),
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"],
            )
        )
    except Exception as error:
        raise ConfigurationError(
            f"no checkpoint {str(path)!r}: there is no such folder, and as a Hub id (revision {revision or 'main'}) "
            f"it could not be had: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _config_and_class(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """The checkpoint's config and the class that generates text with it."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that is a list, a number, ... : whatever comes of taking it for a mapping
        raise ConfigurationError(f"{folder} has no config.json that Transformers reads: {error}") from error
    reference = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in reference:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return config, get_class_from_dynamic_module(reference["AutoModelForCausalLM"], str(folder))
    for name in config.architectures or ():
        if name.endswith(("ForCausalLM", "ForConditionalGeneration")) and hasattr(transformers, name):
            return config, getattr(transformers, name)
    try:
        return config, AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ConfigurationError(
            f"{folder} is a {config.model_type!r} model, for which Transformers has no class that generates text"
        ) from None


def _dequantisation(config: Any, folder: Path) -> Any:
    """What makes Transformers undo the checkpoint's quantisation on load; None where there is none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    settings = dict(found) if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method")
    method = str(getattr(method, "value", method))
    if method not in _DEQUANTISED_ON_LOAD:
        raise ConfigurationError(
            f"{folder} is quantised with {method!r}; only {' and '.join(_DEQUANTISED_ON_LOAD)} are undone on load"
        )
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return AUTO_QUANTIZATION_CONFIG_MAPPING[method].from_dict(settings | {"dequantize": True})


def _sharding_class(model_class: Any, ep_rank: int, ep_size: int, tp_mesh: DeviceMesh | None, device_type: str) -> Any:
    """A subclass whose `from_pretrained` shards the empty model in Transformers' own place for that.

    Transformers' loader asks of each parameter whether it is a DTensor and then reads only its local part, for every
    layout and through every conversion. `DistributedConfig` itself cannot express data parallelism with whole dense
    weights, hence the override of the two class methods that would read it.
    """
    expert_names: list[str] = []

    class Sharding(model_class):
        @classmethod
        def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> tuple[Any, Any, None]:
            return distributed_config, device_map, None

        @classmethod
        def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
            found = find_experts(model)
            for name, module in found:
                _num_local_experts(name, module, ep_rank, ep_size)
                expert_names.append(name)
            if tp_mesh is not None and tp_mesh.size() > 1:
                _split_attention(model, tp_mesh, expert_names)
            if ep_size > 1:
                for _, module in found:
                    _shard_empty(module, ep_rank, ep_size, device_type)
            return model

        def get_parameter(self, target: str) -> Any:
            # Conversions compare what was read, this rank's part, with the parameter's shape.
            parameter = super().get_parameter(target)
            is_expert = target.rpartition(".")[0] in expert_names
            return getattr(parameter, "_local_tensor", parameter) if is_expert else parameter

        @staticmethod
        def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
            # Before Transformers fills what is missing with random numbers, which on a split model would be a
            # collective that only the ranks with something missing join.
            _refuse_incomplete(model, loading_info)
            for _, module in find_experts(model):
                _localise(module)
            return model_class._finalize_model_loading(model, load_config, loading_info)

    # Transformers keeps tables by the class's printed name, which must be the same when the class is put back.
    Sharding.__module__, Sharding.__name__ = model_class.__module__, model_class.__name__
    Sharding.__qualname__, Sharding.__doc__ = model_class.__qualname__, model_class.__doc__
    return Sharding


def _split_attention(model: Any, tp_mesh: DeviceMesh, expert_names: list[str]) -> None:
    """Apply the model's own tensor-parallel plan, all but its rules for experts, which EP takes whole."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = {
        name: style
        for name, style in model._expand_parallel_plan(model.tp_plan or {}).items()
        if not any(name == expert or name.startswith(f"{expert}.") for expert in expert_names)
    }
    apply_tensor_parallelism(model, tp_mesh, plan)


def _shard_empty(module: Any, ep_rank: int, ep_size: int, device_type: str) -> None:
    """Make each expert parameter of a model on the meta device a DTensor of this rank's part.

    A DTensor moves what is put into it to its mesh's kind of device, so the mesh has that of the weights.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    class Place(DeviceMesh):
        """A mesh that knows this rank's place and needs no process group: nothing is communicated while loading."""

        def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
            return ep_rank

    # The name tells the places of one process apart: torch keeps the local shapes of equal meshes, whatever their rank.
    mesh = Place(
        device_type, torch.arange(ep_size), mesh_dim_names=(f"ep{ep_rank}",), _init_backend=False, _rank=ep_rank
    )
    for name, parameter in _expert_parameters(module):
        size = parameter.shape[0] // ep_size
        local = parameter.detach()[ep_rank * size : (ep_rank + 1) * size]
        placed = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module._parameters[name] = torch.nn.Parameter(placed, requires_grad=parameter.requires_grad)


def _localise(module: Any) -> None:
    """Turn the DTensors of an experts module into plain tensors of this rank's experts."""
    from torch.distributed.tensor import DTensor

    for name, parameter in list(module._parameters.items()):
        if isinstance(parameter, DTensor):
            local = torch.nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
            local._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[name] = local
    module.num_experts = int(module.down_proj.shape[0])


def _refuse_incomplete(model: Any, loading_info: Any) -> None:
    """An error where the files lack a weight of the model, or have one of another shape."""
    ignored = list(model._keys_to_ignore_on_load_missing or ())
    missing = sorted(
        key
        for key in loading_info.missing_keys - set(getattr(model, "all_tied_weights_keys", {}))
        if not any(re.search(pattern, key) for pattern in ignored)
    )
    if loading_info.conversion_errors:
        key, message = next(iter(loading_info.conversion_errors.items()))
        raise ConfigurationError(f"the files do not make up weight {key!r} of the model: {str(message).strip()}")
    if missing:
        raise ConfigurationError(f"the files lack {len(missing)} weights of the model, first {missing[0]!r}")
    for key, found, expected in sorted(loading_info.mismatched_keys, key=str):
        raise ConfigurationError(
            f"weight {key!r} has shape {list(found)} in the files, the model needs {list(expected)}"
        )


def _expert_parameters(module: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that have one entry per expert: all of an experts module's own ones of that length."""
    num_experts = module.down_proj.shape[0]
    return [
        (name, parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 1 and parameter.shape[0] == num_experts
    ]


def _num_local_experts(name: str, module: Any, ep_rank: int, ep_size: int) -> int:
    num_experts = int(module.down_proj.shape[0])
    if ep_size < 1 or not 0 <= ep_rank < ep_size:
        raise ConfigurationError(f"ep_rank must be in 0..ep_size - 1, got ep_rank {ep_rank} and ep_size {ep_size}")
    if num_experts % ep_size:
        raise ConfigurationError(f"{num_experts} experts ({name}) cannot be divided over {ep_size} ranks")
    return num_experts // ep_size


def _no_distributed_config() -> Any:
    from transformers.distributed import DistributedConfig

    return DistributedConfig()


@contextlib.contextmanager
def _progress_bar(enabled: bool) -> Iterator[None]:
    """Transformers' progress bar on one rank only, and its setting as it was afterwards."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    if not enabled:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_after_another() -> Iterator[None]:
    """Let Transformers read each weight when it is due.

    Its reading threads run ahead otherwise, and hold single experts until their layer is put together: with a
    conversion of the dtype, peak memory was 1.6 times that of the loaded weights.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Give freed heap back to the system, where the C library can: pieces of weights are below its own threshold."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _as_configuration_error(folder: Path) -> Iterator[None]:
    """Whatever is wrong with a checkpoint is raised as one kind of error that names it."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"checkpoint {folder}: {error}") from error
    except Exception as error:
        raise ConfigurationError(f"checkpoint {folder}: {type(error).__name__}: {error}") from error


def _together(action: Callable[[], Any], process_group: ProcessGroup | None) -> Any:
    """Run `action` on every rank of the group; if it fails on any, the same error is raised on all of them."""
    result, own = None, None
    try:
        result = action()
    except ConfigurationError as error:
        own = error
    if process_group is None or torch.distributed.get_world_size(process_group) == 1:
        if own is not None:
            raise own
        return result
    messages = _exchange("" if own is None else str(own), process_group)
    failed = [rank for rank, message in enumerate(messages) if message]
    if failed:
        ranks = "every rank" if len(failed) == len(messages) else f"rank {', '.join(map(str, failed))}"
        raise ConfigurationError(f"{messages[failed[0]]} (seen on {ranks})") from own
    return result


def _exchange(message: str, process_group: ProcessGroup) -> list[str]:
    """Every rank's message, in rank order; fixed size, so that no count has to be agreed first."""
    device = "cuda" if torch.distributed.get_backend(process_group) == "nccl" else "cpu"
    encoded = message.encode()[: _MESSAGE_BYTES - 1]
    own = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    size = torch.distributed.get_world_size(process_group)
    gathered = [torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=device) for _ in range(size)]
    torch.distributed.all_gather(gathered, own.to(device), group=process_group)
    return [bytes(entry.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for entry in gathered]
