"""Arguments of Transformers' `from_pretrained`: passed on, used here, or refused by name with an alternative."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.errors import ConfigurationError

_DTYPE_BYTES = 2  # weights of fewer bytes are quantised: without their scales they mean nothing

HANDED_ON = ("attn_implementation", "disable_mmap", "generation_config", "key_mapping", "tqdm_class")
"""Passed on to Transformers' `from_pretrained` unchanged."""

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Passed on to the download of a Hub id; without effect for a folder."""

WITHOUT_EFFECT = (
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "low_cpu_mem_usage", "mirror", "offload_state_dict",
    "resume_download", "weights_only",
)  # fmt: skip
"""Without effect for safetensors files, or without effect in Transformers itself by now."""

_ONE_DEVICE = "each rank holds its weights on one device: use more ranks, or tensor_parallel_size, for a smaller part"

_REFUSED_TOGETHER = {
    "load the base model, then the adapter with PEFT": ("adapter_kwargs", "adapter_name"),
    "the code is taken from the checkpoint's own revision: pass revision": ("code_revision",),
    "pass tensor_parallel_size=N to lockstep.from_pretrained instead": (
        "device_mesh", "distributed_config", "tp_plan", "tp_size",
    ),
    "the experts are run by Lockstep: leave it out": ("experts_implementation",),
    "only safetensors files are read: load the checkpoint with Transformers once and call save_pretrained": (
        "from_flax", "from_tf", "gguf_file", "use_safetensors",
    ),
    "leave it out; fuse_norms=True fuses the norms": ("fusion_config",),
    "a weight of another shape would be made up of random numbers": ("ignore_mismatched_sizes",),
    "kernels from the Hub may replace the experts: leave it out": ("allow_all_kernels", "kernel_config", "use_kernels"),
    "leave it out: checkpoints in mxfp4 and fp8 need no setting, and quantize_experts='fp8' quantises experts": (
        "load_in_4bit", "load_in_8bit", "quantization_config",
    ),
    _ONE_DEVICE: ("max_memory", "offload_buffers", "offload_folder"),
    "set the environment variable HTTPS_PROXY": ("proxies",),
    "put the weights into a Transformers model and call lockstep.parallelize(model)": ("state_dict",),
    "copy the files of that variant into a folder of their own, under their plain names": ("variant",),
}  # fmt: skip
REFUSED = {name: instead for instead, names in _REFUSED_TOGETHER.items() for name in names}  # name: what to do instead

# Transformers' defaults other than None and False; they request nothing either.
_DEFAULTS: dict[str, Any] = {
    "adapter_kwargs": {}, "adapter_name": "default", "code_revision": "main", "fusion_config": {}, "max_memory": {},
    "proxies": {}, "use_safetensors": True,
}  # fmt: skip

TAKEN = (
    "config", "device", "device_map", "dtype", "output_loading_info", "subfolder", "torch_dtype", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Arguments of Transformers' `from_pretrained`, grouped by how they are used."""

    dtype: Any
    device: torch.device | str | None  # None: not named
    config: Any  # or where to read one; None for the checkpoint's own
    subfolder: str
    trust_remote_code: bool
    output_loading_info: bool
    hub: dict[str, Any]
    handed_on: dict[str, Any]
    config_changes: dict[str, Any]  # whether the config has such attributes is known once it is read


def read_arguments(kwargs: dict[str, Any]) -> Arguments:
    """Group the arguments; refuse those that contradict each other or cannot work over ranks, with an alternative."""
    rest = dict(kwargs)
    taken = {
        "config": rest.pop("config", None),
        "subfolder": rest.pop("subfolder", None) or "",
        "trust_remote_code": bool(rest.pop("trust_remote_code", False)),
        "output_loading_info": bool(rest.pop("output_loading_info", False)),
        "dtype": _one_dtype(rest.pop("dtype", None), rest.pop("torch_dtype", None)),
        "device": _one_device(rest.pop("device", None), rest.pop("device_map", None)),
    }
    for name in WITHOUT_EFFECT:
        rest.pop(name, None)
    hub = {name: value for name in HUB if (value := rest.pop(name, None)) is not None}
    handed_on = {name: value for name in HANDED_ON if (value := rest.pop(name, None)) is not None}
    for name, instead in REFUSED.items():
        value, default = rest.pop(name, None), _DEFAULTS.get(name, False)
        if value is not None and (type(value) is not type(default) or value != default):
            raise ConfigurationError(f"from_pretrained does not take {name}={value!r:.80}: {instead}")
    return Arguments(**taken, hub=hub, handed_on=handed_on, config_changes=rest)


def change_config(config: Any, changes: dict[str, Any]) -> None:
    """Set attributes of a config in place, as Transformers does with arguments that it does not know."""
    for name in changes:
        if not hasattr(config, name):
            known = [*TAKEN, *HANDED_ON, *HUB, *REFUSED, *(key for key in config.to_dict() if isinstance(key, str))]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"from_pretrained got {name!r}, which neither Transformers' from_pretrained takes nor "
                f"{type(config).__name__} has{hint}"
            )
    for name, value in changes.items():
        setattr(config, name, value)


def _one_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """Return `dtype`, or the value of its older name in Transformers."""
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
    """Return the single device of a `device_map`; "auto" leaves the choice to each rank."""
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
