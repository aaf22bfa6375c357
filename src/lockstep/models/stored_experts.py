"""Reads single experts straight from a checkpoint's files; the loader visits every tensor and is ten times slower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lockstep.errors import ConfigurationError
from lockstep.models.checkpoint import StoredTensor, check_files
from lockstep.models.experts_modules import expert_parameters, slots_held
from lockstep.moe.fp8 import SCALES
from lockstep.moe.placement import EMPTY

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # of a module's weight, in the files
_BUFFERS, _BUFFER_BYTES = 2, 1 << 23  # one is read into while the GPU copies the other


class StoredExperts:
    """The routed experts in a folder's files, if the files hold the same values as the modules.

    `of` compares one expert of each module with the files, and returns None if any differs.
    """

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    @classmethod
    def of(cls, path: str, modules: Sequence[tuple[str, Any]]) -> StoredExperts | None:
        """Find the experts of modules, `(qualified name, module)`, in the files; None if they differ."""
        try:
            stored = cls(check_files(Path(path))) if Path(path).is_dir() else None
        except (ConfigurationError, OSError):
            return None
        return stored if stored is not None and all(stored._holds(*one) for one in modules) else None

    def read(self, module_name: str, name: str, expert: int, weight: torch.Tensor) -> None:
        """Read an expert's part of a parameter into `weight`, which is contiguous. The copy to a GPU may still run."""
        parts = self._stored(module_name, name, expert)
        for part, target in zip(parts, weight.chunk(len(parts)), strict=True):
            self._read(part, target)

    def _stored(self, module_name: str, name: str, expert: int) -> list[StoredTensor]:
        """Return where the parts of an expert are stored; `KeyError` if they have other names."""
        suffix = "weight_scale_inv" if name.endswith(SCALES) else "weight"
        return [self._tensors[f"{module_name}.{expert}.{part}.{suffix}"] for part in _PARTS[name.removesuffix(SCALES)]]

    def _holds(self, module_name: str, module: Any) -> bool:
        held, _ = slots_held(module)
        slot = next((slot for slot, expert in enumerate(held) if expert != EMPTY), None)
        if slot is None:
            return True
        for name, parameter in expert_parameters(module):
            weight = parameter.detach()[slot]
            try:
                parts = self._stored(module_name, name, held[slot])
            except KeyError:
                return False
            each = weight.shape[0] // len(parts), *weight.shape[1:]
            if any((_DTYPES.get(part.dtype), part.shape) != (weight.dtype, each) for part in parts):
                return False
            found = torch.empty_like(weight)
            self.read(module_name, name, held[slot], found)
            if not torch.equal(found.view(torch.uint8), weight.contiguous().view(torch.uint8)):
                return False
        return True

    def _read(self, part: StoredTensor, target: torch.Tensor) -> None:
        bytes_of = target.view(torch.uint8).flatten()
        with part.file.open("rb", buffering=0) as file:
            file.seek(part.start)
            if target.device.type == "cpu":
                _fill(file, bytes_of)
                return
            for start in range(0, len(bytes_of), _BUFFER_BYTES):
                piece = bytes_of[start : start + _BUFFER_BYTES]
                buffer, copied = self._next_buffer()
                _fill(file, buffer[: len(piece)])
                piece.copy_(buffer[: len(piece)], non_blocking=True)
                copied.record()

    def _next_buffer(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        if len(self._buffers) < _BUFFERS:
            buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            self._buffers.append((buffer, torch.cuda.Event()))
        else:
            self._buffers.append(self._buffers.pop(0))
        buffer, copied = self._buffers[-1]
        copied.synchronize()
        return buffer, copied


def _fill(file: Any, target: torch.Tensor) -> None:
    """Fill a tensor on the host with the next bytes of a file."""
    view = target.numpy().data
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ConfigurationError(f"{file.name} ends within a tensor")
        view = view[count:]
