"""What Transformers' `from_pretrained` takes: handed on, taken, or refused by name with what to do instead."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.errors import ConfigurationError

_DTYPE_BYTES = 2  # weights of fewer bytes are quantised: without their scales they mean nothing

HANDED_ON = ("attn_implementation", "disable_mmap", "generation_config", "key_mapping", "tqdm_class")
"""Reach Transformers' `from_pretrained` as they are."""

HUB = ("cache_dir", "force_download", "token")
"""Reach the download of a Hub id; for a folder they mean nothing."""

WITHOUT_EFFECT = (
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "low_cpu_mem_usage", "mirror", "offload_state_dict",
    "resume_download", "weights_only",
)  # fmt: skip
"""Mean nothing for safetensors files, or nothing any more in Transformers itself."""

_QUANTISE = (
    "weights are held in 16 or 32 bits: leave it out (a checkpoint in mxfp4 or fp8 is dequantised on load by itself)"
)
_ONE_DEVICE = "each rank holds its weights on one device: use more ranks, or tensor_parallel_size, for a smaller part"
_TP = "pass tensor_parallel_size=N to lockstep.from_pretrained instead"
_KERNELS = "kernels from the Hub may replace the experts: leave it out"
_CONVERT = "only safetensors files are read: load the checkpoint with Transformers once and call save_pretrained"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_kwargs": ((None, {}), "load the base model, then the adapter with PEFT"),
    "adapter_name": ((None, "default"), "load the base model, then the adapter with PEFT"),
    "allow_all_kernels": ((None, False), _KERNELS),
    "code_revision": ((None, "main"), "the code is taken from the checkpoint's own revision: pass revision"),
    "device_mesh": ((None,), _TP),
    "distributed_config": ((None,), _TP),
    "experts_implementation": ((None,), "the experts are run by Lockstep: leave it out"),
    "from_flax": ((None, False), _CONVERT),
    "from_tf": ((None, False), _CONVERT),
    "fusion_config": ((None, {}), "leave it out; fuse_norms=True fuses the norms"),
    "gguf_file": ((None,), _CONVERT),
    "ignore_mismatched_sizes": ((None, False), "a weight of another shape would be made up of random numbers"),
    "kernel_config": ((None,), _KERNELS),
    "load_in_4bit": ((None, False), _QUANTISE),
    "load_in_8bit": ((None, False), _QUANTISE),
    "max_memory": ((None, {}), _ONE_DEVICE),
    "offload_buffers": ((None, False), _ONE_DEVICE),
    "offload_folder": ((None,), _ONE_DEVICE),
    "proxies": ((None, {}), "set the environment variable HTTPS_PROXY"),
    "quantization_config": ((None,), _QUANTISE),
    "state_dict": ((None,), "put the weights into a Transformers model and call lockstep.parallelize(model)"),
    "tp_plan": ((None,), _TP),
    "tp_size": ((None,), _TP),
    "use_kernels": ((None, False), _KERNELS),
    "use_safetensors": ((None, True), _CONVERT),
    "variant": ((None,), "copy the files of that variant into a folder of their own, under their plain names"),
}
"""Name: the values that ask for nothing, and what to do instead of the others."""

_TAKEN = (
    "config", "device", "device_map", "dtype", "local_files_only", "output_loading_info", "revision", "subfolder",
    "torch_dtype", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Arguments of Transformers' `from_pretrained`, sorted by what becomes of them.

    Attributes:
        dtype: of the weights.
        device: one device; None where none was named.
        config: a config or where to read one; None for the checkpoint's own.
        subfolder: of the checkpoint, where its files are.
        output_loading_info: return Transformers' loading info beside the model.
        hub: for the download.
        handed_on: for Transformers.
        config_changes: attributes of the config; whether it has them is known once it is read.
    """

    dtype: Any
    device: torch.device | str | None
    config: Any
    subfolder: str
    output_loading_info: bool
    hub: dict[str, Any]
    handed_on: dict[str, Any]
    config_changes: dict[str, Any]


def read_arguments(kwargs: dict[str, Any], dtype: Any = "auto", device: Any = None) -> Arguments:
    """Sort what was passed beyond the named arguments.

    Args:
        kwargs: names and values.
        dtype: what was passed by our name, "auto" by default.
        device: what was passed by our name, None by default.

    Raises:
        ConfigurationError: for what cannot be done for a model that is spread over ranks, with what to do instead, and
            for arguments that contradict each other.

    Example:
        >>> read_arguments({"torch_dtype": "bfloat16", "device_map": {"": "cpu"}, "gguf_file": None}).dtype
        'bfloat16'
    """
    rest = dict(kwargs)
    taken = {
        "config": rest.pop("config", None),
        "subfolder": rest.pop("subfolder", None) or "",
        "output_loading_info": bool(rest.pop("output_loading_info", False)),
        "dtype": _one_dtype(dtype, rest.pop("torch_dtype", None)),
        "device": _one_device(device, rest.pop("device_map", None)),
    }
    for name in WITHOUT_EFFECT:
        rest.pop(name, None)
    hub = {name: value for name in HUB if (value := rest.pop(name, None)) is not None}
    handed_on = {name: value for name in HANDED_ON if (value := rest.pop(name, None)) is not None}
    for name, (harmless, instead) in REFUSED.items():
        value = rest.pop(name, None)
        if not any(value is allowed or (type(value) is type(allowed) and value == allowed) for allowed in harmless):
            raise ConfigurationError(f"from_pretrained does not take {name}={value!r:.80}: {instead}")
    return Arguments(**taken, hub=hub, handed_on=handed_on, config_changes=rest)


def change_config(config: Any, changes: dict[str, Any]) -> None:
    """Set attributes of a config in place, as Transformers does with arguments that are none of its own.

    Raises:
        ConfigurationError: naming an argument that is no attribute of the config.
    """
    for name in changes:
        if not hasattr(config, name):
            known = [*_TAKEN, *HANDED_ON, *HUB, *REFUSED, *(key for key in config.to_dict() if isinstance(key, str))]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"from_pretrained got {name!r}, which neither Transformers' from_pretrained takes nor "
                f"{type(config).__name__} has{hint}"
            )
    for name, value in changes.items():
        setattr(config, name, value)


def _one_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """`dtype`, or its older name in Transformers."""
    named = [value for value in (dtype, torch_dtype) if value not in (None, "auto")]
    if len(named) == 2 and _as_dtype(named[0]) != _as_dtype(named[1]):
        raise ConfigurationError(f"dtype={named[0]!r} and torch_dtype={named[1]!r} contradict each other: pass dtype")
    chosen = named[0] if named else "auto"
    found = _as_dtype(chosen)
    if isinstance(found, torch.dtype) and not (found.is_floating_point and found.itemsize >= _DTYPE_BYTES):
        raise ConfigurationError(f"dtype must be a floating-point type of 16 bits or more, got {chosen!r}")
    if isinstance(found, str) and found != "auto":
        raise ConfigurationError(f"dtype must be a dtype of torch or 'auto', got {chosen!r}")
    return chosen


def _as_dtype(value: Any) -> Any:
    if isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else value
    return value


def _one_device(device: Any, device_map: Any) -> Any:
    """The one device that a `device_map` means; "auto" leaves the choice to each rank."""
    if device_map is None or device_map == "auto":
        return device
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    spread = len(set(map(str, places))) != 1
    if spread or places[0] in ("balanced", "balanced_low_0", "sequential", "disk", "meta"):
        raise ConfigurationError(f"from_pretrained does not take device_map={device_map!r:.120}: {_ONE_DEVICE}")
    meant = f"cuda:{places[0]}" if isinstance(places[0], int) else places[0]
    if device is not None and torch.device(device) != torch.device(meant):
        raise ConfigurationError(f"device={str(device)!r} and device_map={str(places[0])!r} contradict each other")
    return meant
