"""Experts' weights in float8_e4m3fn with a float32 scale per block of 128 x 128: quantise, dequantise, recognise."""

from __future__ import annotations

from typing import Any

import torch

from lockstep.errors import ConfigurationError

BLOCK = 128
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
SCALES = "_scale_inv"  # ending of the parameter that holds a weight's scales; the weight is values times scales
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `[experts, out, in]`, sizes in whole blocks; return values and scales `[experts, out / 128, in / 128]`."""
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    num_experts, num_out, num_in = weight.shape
    scales = torch.empty(num_experts, num_out // BLOCK, num_in // BLOCK, device=weight.device)
    for expert in range(num_experts):  # one at a time: in float32 an expert takes four times the memory
        blocks = weight[expert].float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        largest = blocks.abs().amax((1, 3))
        scales[expert] = torch.where(largest > 0, largest / _LARGEST, 1.0)
        rounded = (blocks / scales[expert][:, None, :, None]).clamp(-_LARGEST, _LARGEST)
        values[expert] = rounded.flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    return values, scales


def dequantise(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `values * scales`, `[..., out, in]`; scales are per block, the last of which may be partial."""
    num_out, num_in = values.shape[-2:]
    spread = scales.repeat_interleave(BLOCK, -2)[..., :num_out, :].repeat_interleave(BLOCK, -1)[..., :num_in]
    return (values.float() * spread).to(dtype)


def is_fp8(module: Any) -> bool:
    """Return whether an experts module holds its weights in fp8; raise if they were cast since."""
    if getattr(module, f"down_proj{SCALES}", None) is None:
        return False
    if module.down_proj.dtype is not torch.float8_e4m3fn or module.down_proj_scale_inv.dtype is not torch.float32:
        raise ConfigurationError(
            f"experts of class {type(module).__name__}, held in fp8, were cast to {module.down_proj.dtype}: choose the "
            "dtype as the model is loaded (dtype=...), and move it only between devices afterwards"
        )
    return True


def dequantise_experts(module: Any, dtype: torch.dtype) -> None:
    """Turn a module's experts from fp8 into `dtype`, in place."""
    for name in [name for name in module._parameters if f"{name}{SCALES}" in module._parameters]:
        scales = module._parameters.pop(f"{name}{SCALES}")
        weight = dequantise(module._parameters[name].detach(), scales.detach(), dtype)
        module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
