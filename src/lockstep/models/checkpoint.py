"""A checkpoint's safetensors files, checked by their headers: complete, unambiguous, and no tensor left out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.errors import ConfigurationError
from lockstep.moe.fp8 import BLOCK, SCALES
from lockstep.moe.placement import Placement

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_READ_BYTES = 1 << 20
# Dtypes whose values mean nothing without the scales of a quantisation.
_QUANTISED_DTYPES = ("F8_", "F6_", "F4", "I8", "U8", "I4", "U4")
_PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
# Endings of tensor names by which quantisation tools mark what belongs to a weight.
_QUANTISATION_NAMES = re.compile(
    r"(scale_inv|scales?|zero_points?|zeros|_blocks|qweight|g_idx|absmax|quant_map|quant_state[\w.]*|\.SCB|"
    r"weight_format|_packed|weight_shape|weight_scale_2|global_scale|nested_\w+|bcq_\w+|codebooks?|codes)$"
)
_EXPERT = re.compile(r"(.*\.experts\.)(\d{1,6})(\..+)$")
_EXPERT_WEIGHT = re.compile(r"\.experts\.(\d+\.[\w.]+\.weight|(gate_up|gate|up|down)_proj)$")
# Scales of quantised activations, which dequantised weights do not need.
_ACTIVATION_SCALES = re.compile(r"(input|activation|output|k|v|q|attn|prob)_(scale|zero_point)(_inv)?$")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file, bytes `start` to `end`, and its dtype (such as `BF16`) and shape from the header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def digest(self) -> tuple[str, tuple[int, ...], bytes]:
        """Return dtype, shape and a hash of the bytes, the same for equal tensors."""
        hashed = hashlib.sha256()
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            for start in range(self.start, self.end, _READ_BYTES):
                hashed.update(stream.read(min(_READ_BYTES, self.end - start)))
        return self.dtype, self.shape, hashed.digest()


def check_files(folder: Path, weights_name: str | None = None) -> dict[str, StoredTensor]:
    """Return every tensor of a folder's safetensors files by name; refuse missing, truncated and ambiguous files."""
    if weights_name is not None:
        _check_name(folder / "config.json", weights_name)
        index = folder / weights_name if weights_name.endswith(".index.json") else None
        singles = [weights_name]
    else:
        index = folder / _INDEX if (folder / _INDEX).is_file() else None
        singles = sorted(file.name for file in folder.glob("*.safetensors"))
        if _SINGLE in singles:
            singles = [_SINGLE]  # the only one that is read
            if index is not None and _SINGLE not in _weight_map(index).values():
                raise ConfigurationError(
                    f"{folder} has both {_SINGLE} and {_INDEX}, and they need not agree: delete the one that is out of "
                    "date"
                )
    if index is None:
        if not singles:
            raise ConfigurationError(f"{folder} has no safetensors files; other formats are not read")
        return _merge((folder / name for name in singles), {})
    weight_map = _weight_map(index)
    for file in weight_map.values():
        _check_name(index, file)
    tensors = _merge((folder / name for name in sorted(set(weight_map.values()))), weight_map)
    if outside := sorted(tensors.keys() - weight_map.keys()):
        raise ConfigurationError(
            f"{tensors[outside[0]].file} holds {len(outside)} tensors that {index.name} does not name, "
            f"first {outside[0]!r}: the files and the index are not of one checkpoint"
        )
    return tensors


def check_experts(tensors: dict[str, StoredTensor]) -> None:
    """Check that experts are numbered from 0 without gaps: the loader stacks them in order and ignores numbers."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in tensors:
        if parts := _EXPERT.match(name):
            numbers.setdefault((parts[1], parts[3]), set()).add(int(parts[2]))
    for (before, after), found in numbers.items():
        last = max(found)
        if missing := set(range(last)) - found:
            there, lacking = f"{before}{last}{after}", f"{before}{min(missing)}{after}"
            raise ConfigurationError(f"the files have tensor {there!r}, but lack {lacking!r}")


def refuse_two_names(model: Any, tensors: dict[str, StoredTensor]) -> None:
    """Refuse a weight that occurs with and without the prefix of the model's body, if the two copies differ."""
    prefix = f"{model.base_model_prefix}."
    for name in tensors:
        short = name.removeprefix(prefix)
        if short != name and short in tensors and tensors[short].digest() != tensors[name].digest():
            raise ConfigurationError(
                f"tensors {name!r} and {short!r} are the same weight with different values: delete the one that "
                "is out of date"
            )


def refuse_disguised(model: Any, tensors: dict[str, StoredTensor]) -> None:
    """Refuse tensors of other types, such as integers, for floating-point weights of a model that is not loaded yet."""
    own = [*model.named_parameters(), *model.named_buffers()]
    leaves = {name.rpartition(".")[2] for name, tensor in own if tensor.is_floating_point()}
    leaves -= {name.rpartition(".")[2] for name, tensor in own if not tensor.is_floating_point()}
    for name, tensor in tensors.items():
        is_checked = tensor.dtype in _PLAIN_DTYPES or tensor.dtype.startswith(_QUANTISED_DTYPES)
        if not is_checked and name.rpartition(".")[2] in leaves:
            raise ConfigurationError(
                f"tensor {name!r} in {tensor.file} is of type {tensor.dtype}, "
                "and the model needs floating-point numbers"
            )


def check_room(
    tensors: dict[str, StoredTensor], placement: Placement, device: torch.device, in_8_bits: bool = False
) -> None:
    """Refuse a placement whose slots need more memory than the device has; sizes are those in the files."""
    experts = [one for name, one in tensors.items() if ".experts." in name]
    sizes = (math.prod(one.shape) if in_8_bits else one.end - one.start for one in experts)
    slot = sum(sizes) / placement.num_experts
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    if (needed := slot * placement.num_slots_per_rank) > has:
        raise ConfigurationError(
            f"{placement.num_slots_per_rank} slots for experts in each layer take {needed / 2**30:.1f} GiB of each "
            f"rank, and {device} has {has / 2**30:.1f} GiB: fewer redundant experts, or more ranks"
        )


def check_config(file: Path) -> None:
    """Refuse a `config.json` that gives a setting twice: Transformers would silently take the last value."""
    try:
        json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None
    except (OSError, ValueError, RecursionError):
        return


def undeclared_quantisation(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuse quantised tensors if the config names no quantisation: without it their values are meaningless."""
    for name, tensor in tensors.items():
        if tensor.dtype.startswith(_QUANTISED_DTYPES):
            raise ConfigurationError(
                f"tensor {name!r} in {tensor.file} is quantised ({tensor.dtype}), but {folder / 'config.json'} has no "
                "quantization_config that says how: add the one of the original checkpoint"
            )


def check_scales(tensors: dict[str, StoredTensor], block: Sequence[int] | None) -> None:
    """Refuse quantised tensors without scales, or with a number of scales other than one, or one per block of fp8."""
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            scales = [f"{name.removesuffix('_blocks')}_scales"]
        elif tensor.dtype.startswith("F8") and not _QUANTISATION_NAMES.search(name):
            scales = [f"{name}_scale_inv", f"{name}_scale"]
        else:
            continue
        found = next((scale for scale in scales if scale in tensors), None)
        if found is None:
            raise ConfigurationError(
                f"tensor {name!r} in {tensor.file} is quantised, but its scale {scales[0]!r} is missing"
            )
        shape = tensors[found].shape
        if block is None or name.endswith("_blocks") or math.prod(shape) == 1:
            continue
        needed = (*tensor.shape[:-2], *(-(-size // part) for size, part in zip(tensor.shape[-2:], block, strict=True)))
        if shape != needed:
            raise ConfigurationError(
                f"scale {found!r} in {tensors[found].file} has shape {list(shape)}: tensor {name!r} of shape "
                f"{list(tensor.shape)} in blocks of {list(block)} needs {list(needed)}"
            )


def holds_fp8_blocks(tensors: dict[str, StoredTensor]) -> bool:
    """Return whether all experts are stored in fp8, with one scale per whole block of 128 x 128 values."""
    weights = {name: one for name, one in tensors.items() if _EXPERT_WEIGHT.search(name) and len(one.shape) >= 2}
    return bool(weights) and all(
        one.dtype == "F8_E4M3"
        and (scales := tensors.get(f"{name}{SCALES}")) is not None
        and scales.dtype in (*_PLAIN_DTYPES, "F8_E8M0")
        and one.shape == (*scales.shape[:-2], *(BLOCK * number for number in scales.shape[-2:]))
        for name, one in weights.items()
    )


def refuse_part_blocks(tensors: dict[str, StoredTensor]) -> None:
    """Refuse to hold experts in fp8 if one of their sizes is not a multiple of 128, the side of a block."""
    for name, one in tensors.items():
        if _EXPERT_WEIGHT.search(name) and any(size % BLOCK for size in one.shape[-2:]):
            raise ConfigurationError(
                f"tensor {name!r} in {one.file} has shape {list(one.shape)}: experts in fp8 need sizes that are "
                f"multiples of {BLOCK}; quantize_experts='none' holds them in 16 or 32 bits"
            )


def refuse_leftovers(model: Any, unexpected: Iterable[str], is_dequantised: bool) -> None:
    """Refuse tensors that the model has a module but no parameter for, such as a scale, a bias or an adapter."""
    modules = dict(model.named_modules())
    for key in sorted(unexpected):
        name, _, leaf = key.rpartition(".")
        if is_dequantised and _ACTIVATION_SCALES.search(leaf):
            continue
        if name in modules and leaf in modules[name]._buffers:
            continue
        while name and name not in modules:  # an adapter hangs below the layer that it changes
            name = name.rpartition(".")[0]
        module = modules.get(name)
        if _QUANTISATION_NAMES.search(key):
            raise ConfigurationError(
                f"tensor {key!r} of the files belongs to a quantisation that is not undone on load; without it the "
                "weights would be wrong"
            )
        if module is not None and any(weight is not None for weight in module._parameters.values()):
            raise ConfigurationError(
                f"the files have tensor {key!r}, but {type(module).__name__} {name!r} of the model has no such weight: "
                "the config does not fit the files"
            )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(), object_pairs_hook=_unique)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"{index} is not an index of safetensors files: {error!r}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dict; a name that occurs twice with different values is an error."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise ConfigurationError(f"{name!r} comes twice")
        found[name] = value
    return found


def _check_name(where: Path, file: Any) -> None:
    if not isinstance(file, str) or Path(file).name != file or file in ("", "..", "."):
        raise ConfigurationError(f"{where} names {file!r:.80}, which is no file of its folder")


def _merge(files: Iterable[Path], weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    """Return all tensors of the files; copies of a tensor must be equal, since Transformers may load either."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        own = _tensors_of(file)
        if missing := sorted(name for name, place in weight_map.items() if place == file.name and name not in own):
            raise ConfigurationError(f"{file} lacks {len(missing)} tensors of the index, first {missing[0]!r}")
        for name, tensor in own.items():
            other = tensors.setdefault(name, tensor)
            if other is not tensor and other.digest() != tensor.digest():
                named = f"; the index names {weight_map[name]}" if name in weight_map else ""
                raise ConfigurationError(
                    f"tensor {name!r} is in {other.file.name} and in {file.name} with different values{named}: "
                    f"delete the one that is out of date"
                )
    return tensors


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a safetensors file's header; refuse a file whose length does not match it."""
    if not file.is_file():
        what = "is no file" if file.exists() or file.is_symlink() else "is missing"
        raise ConfigurationError(f"{file} {what}: the checkpoint needs it")
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        begin = 8 + int.from_bytes(first, "little")
        if len(first) < 8 or begin > size:
            raise ConfigurationError(f"{file} is truncated: {size} bytes, its header alone needs {begin}")
        try:
            header = json.loads(stream.read(begin - 8), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                start, end = (begin + offset for offset in entry["data_offsets"])
                tensors[name] = StoredTensor(file, str(entry["dtype"]), tuple(entry["shape"]), start, end)
            needed = max((tensor.end for tensor in tensors.values()), default=begin)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ConfigurationError(f"{file} has no readable safetensors header: {error!r}") from error
    if size != needed:
        raise ConfigurationError(f"{file} is truncated or damaged: {size} bytes, its header says {needed}")
    return tensors
