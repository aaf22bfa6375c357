"""The local experts' grouped matrix products: every row through the expert that its router chose."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lockstep.errors import ConfigurationError
from lockstep.moe.fp8 import BLOCK, SCALES, dequantise, is_fp8

if TYPE_CHECKING:
    from lockstep.moe.experts_kernels import Extras

FEW_ROWS = 32  # rows per expert up to which streaming its weights beats `grouped_mm` (docs/benchmarks/gpu.md)
# The dtypes that `torch.nn.functional.grouped_mm` takes on a CPU and on a GPU alike (torch 2.13: float64 is refused).
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


Adapters = dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]]
"""Per weight `(A [local experts, r, in], B [local experts, out, r], scaling)`: `x W^T + scaling * (x A^T) B^T`."""


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of rows `[n, 2 * intermediate]`, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class LocalExperts:
    """This rank's experts as one function of rows: gate and up product, activation, down product; not weighted.

    Works on any module that follows the experts interface of Transformers (`use_experts_implementation`), by its
    attributes: `gate_up_proj` or `up_proj`, `down_proj`, their `_bias`es where `has_bias`, `_apply_gate` or `act_fn`,
    `is_transposed`, `post_expert_norm` where `has_post_expert_norm`. Parameters are read at every call, so that a model
    may be moved or cast after this object was made.

    Args:
        module: such a module; its parameters hold this rank's experts only, `[num_local_experts, ...]`.
        check_weights: called before the experts run; raises if the parameters are no longer this rank's own.

    Attributes:
        adapters: LoRA beside the weights; run as products of their own, not by kernels that take counts on the device.
    """

    def __init__(self, module: Any, check_weights: Callable[[], None] | None = None) -> None:
        self.module = module
        self._check_weights = check_weights
        self.adapters: Adapters = {}
        up_name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        missing = [name for name in (up_name, "down_proj") if getattr(module, name, None) is None]
        if missing:
            raise ConfigurationError(f"experts of class {type(module).__name__} have no parameter {missing[0]!r}")

    @classmethod
    def from_tensors(cls, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> LocalExperts:
        """Make gated SiLU experts: `[experts, 2 * inner, hidden]`, gate rows first, and `[experts, hidden, inner]`."""
        return cls(SimpleNamespace(gate_up_proj=gate_up_proj, down_proj=down_proj, _apply_gate=silu_and_multiply))

    @property
    def num_local_experts(self) -> int:
        """How many experts the parameters hold."""
        return int(self.module.down_proj.shape[0])

    def __call__(
        self, hidden_states: torch.Tensor, gather_index: torch.Tensor, tokens_per_expert: torch.Tensor | Sequence[int]
    ) -> torch.Tensor:
        """Run each (row, expert) pair through its expert: `[num_pairs, hidden]`, in the rows' dtype, not yet weighted.

        Args:
            hidden_states: rows that this rank received, `[num_rows, hidden]`.
            gather_index: the row of each pair, pairs sorted by local expert, `[num_pairs]`, integers.
            tokens_per_expert: pairs of each local expert. A tensor is not read back where `grouped_mm` serves.
        """
        if self._check_weights is not None:
            self._check_weights()
        module = self.module
        if (got := len(tokens_per_expert)) != (has := self.num_local_experts):
            raise ConfigurationError(f"tokens_per_expert must have one entry per local expert ({has}), got {got}")
        num_pairs = gather_index.shape[0]
        if num_pairs == 0:
            return hidden_states.new_zeros((0, hidden_states.shape[1]))
        counts = torch.as_tensor(tokens_per_expert, device=hidden_states.device)
        offsets = counts.cumsum(0, dtype=torch.int32)
        is_bfloat16 = hidden_states.dtype is torch.bfloat16
        if is_bfloat16 and kernels_read_fp8(hidden_states.device) and is_fp8(module) and self.run_on_device:
            starts = torch.nn.functional.pad(offsets, (1, 0))
            return self.on_device(hidden_states, None, gather_index.to(torch.int32), starts, num_pairs / has)
        is_transposed = getattr(module, "is_transposed", False)

        def linear(rows: torch.Tensor, name: str) -> torch.Tensor:
            scales = getattr(module, f"{name}{SCALES}") if is_fp8(module) else None
            output = _grouped_linear(rows, getattr(module, name), offsets, is_transposed, scales)
            for lora_a, lora_b, scaling in self.adapters.get(name, ()):
                inner = _grouped_linear(rows, lora_a, offsets)
                output = output + scaling * _grouped_linear(inner, lora_b, offsets)
            if not getattr(module, "has_bias", False):
                return output
            bias = getattr(module, f"{name}_bias")
            return output + bias.repeat_interleave(counts, dim=0, output_size=num_pairs)

        rows = hidden_states.index_select(0, gather_index)
        if getattr(module, "has_gate", True):
            rows = module._apply_gate(linear(rows, "gate_up_proj"))
        else:
            rows = module.act_fn(linear(rows, "up_proj"))
        rows = linear(rows, "down_proj")
        if getattr(module, "has_post_expert_norm", False):
            rows = module.post_expert_norm(rows)
        return rows.to(hidden_states.dtype)

    # Unlike `torch.compiler.disable`, this does not import torch._dynamo now: modules that come with it keep the
    # default process group as a parameter's default, and gloo's threads would abort the end of a script.
    @torch._disable_dynamo
    def alone(self, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Run a layer whose experts are all here: weighted sums, `[num_rows, hidden]`. No count leaves the device."""
        num_rows, top_k = topk_ids.shape
        ids, pairs = topk_ids.flatten().sort(stable=True)
        offsets = torch.searchsorted(ids, torch.arange(self.num_local_experts + 1, dtype=ids.dtype, device=ids.device))
        outputs = self(rows, pairs // top_k, offsets.diff()).float() * topk_weights.flatten()[pairs, None]
        by_choice = torch.empty_like(outputs).index_copy_(0, pairs, outputs)
        return by_choice.view(num_rows, top_k, rows.shape[1]).sum(1).to(rows.dtype)

    @functools.cached_property
    def _clamp(self) -> tuple[float, float] | None:
        """The gate's `Extras.clamp`, found by a trial on sample values; None if our kernels cannot compute the gate."""
        module = self.module
        gate = torch.tensor([0.0, 0.3, -0.7, 1.0, -2.0, 3.0, -5.0, 8.0, -13.0, 40.0, -900.0, 1000.0])
        up = gate.roll(5)
        interleaved = not getattr(module, "is_concatenated", True)
        found = module._apply_gate(torch.stack([gate, up], 1).flatten() if interleaved else torch.cat([gate, up]))
        alpha = float(getattr(module, "alpha", None) or getattr(module, "swiglu_alpha", None) or 0)
        limit = float(getattr(module, "limit", None) or getattr(module, "swiglu_limit", None) or 0)
        bounded = gate.clamp(max=limit)
        clamped = (up.clamp(-limit, limit) + 1) * bounded * torch.sigmoid(alpha * bounded)
        for clamp, expected in (((0.0, 0.0), silu_and_multiply(torch.cat([gate, up]))), ((alpha, limit), clamped)):
            if torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-4):
                return clamp
        return None

    @property
    def run_on_device(self) -> bool:
        """Whether `on_device` can run these experts: bfloat16 or fp8, a gate that our kernels compute, no adapters."""
        module = self.module
        if self.adapters or not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
            return False
        sizes = module.down_proj.shape[1:]
        weights_fit = module.down_proj.dtype is torch.bfloat16
        if is_fp8(module):
            scales = module.down_proj_scale_inv.shape[1:]
            weights_fit = all(size == BLOCK * number for size, number in zip(sizes, scales, strict=True))
        return weights_fit and self._clamp is not None

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, Extras]:
        """Both weights as `[experts, out, in]`, and the kernels' further arguments."""
        from lockstep.moe.experts_kernels import NO_EXTRAS, Extras

        module = self.module
        gate_up, down = module.gate_up_proj, module.down_proj
        has_bias, scaled = getattr(module, "has_bias", False), is_fp8(module)
        interleaved, clamp = not getattr(module, "is_concatenated", True), self._clamp or (0.0, 0.0)
        if getattr(module, "is_transposed", False):
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        if not (has_bias or scaled or interleaved or any(clamp)):
            return gate_up, down, NO_EXTRAS
        extras = Extras(
            gate_up_scales=module.gate_up_proj_scale_inv if scaled else None,
            down_scales=module.down_proj_scale_inv if scaled else None,
            gate_up_bias=module.gate_up_proj_bias if has_bias else None,
            down_bias=module.down_proj_bias if has_bias else None,
            interleaved=interleaved,
            clamp=clamp,
        )
        return gate_up, down, extras

    def on_device(
        self,
        hidden_states: torch.Tensor,
        scales: torch.Tensor | None,
        gather_index: torch.Tensor,
        expert_offsets: torch.Tensor,
        rows_per_expert: float,
    ) -> torch.Tensor:
        """Run pairs whose number only the device knows; `rows_per_expert`, an estimate, only chooses the kernel."""
        from lockstep.moe.experts_kernels import few_rows_experts, many_rows_experts

        if self._check_weights is not None:
            self._check_weights()
        run = few_rows_experts if rows_per_expert <= FEW_ROWS else many_rows_experts
        return run(hidden_states, scales, gather_index, expert_offsets, *self._weights())

    def warm_up(self, capacity: int, fp8: bool) -> None:
        """Load the kernels of `on_device` for gather indices `[capacity]`, so that no step waits for a compiler."""
        weight = self.module.down_proj
        num_local_experts, *sizes = weight.shape
        hidden = sizes[1 if getattr(self.module, "is_transposed", False) else 0]
        stride = -(-hidden // 16) * 16
        rows = torch.zeros(1, stride * (1 if fp8 else 2), dtype=torch.uint8, device=weight.device)
        rows = rows.view(torch.float8_e4m3fn if fp8 else torch.bfloat16)[:, :hidden]
        scales = torch.ones(1, -(-hidden // 128), device=weight.device) if fp8 else None
        index = torch.zeros(capacity, dtype=torch.int32, device=weight.device)
        offsets = torch.ones(num_local_experts + 1, dtype=torch.int32, device=weight.device)
        offsets[0] = 0
        for rows_per_expert in (0, FEW_ROWS + 1):
            self.on_device(rows, scales, index, offsets, rows_per_expert)


def _grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, is_transposed: bool = False,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Multiply each row by its expert's weight: `[num_rows, in]` to `[num_rows, out]`.

    Rows are sorted by expert; `offsets[e]` is where the rows of expert e end. The weight is `[experts, out, in]`, or
    `[experts, in, out]` if transposed, and rows are cast to its dtype. With `scales` the weight is fp8: each expert
    that has rows is dequantised to the dtype of the rows.
    """
    per_expert = weight if is_transposed else weight.transpose(-2, -1)
    if scales is None:
        rows = rows.to(weight.dtype)
        if _grouped_mm_serves(rows, weight):
            return torch.nn.functional.grouped_mm(rows, per_expert, offs=offsets)
    output = rows.new_empty((rows.shape[0], per_expert.shape[2]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            own = per_expert[expert] if scales is None else dequantise(weight[expert], scales[expert], rows.dtype).T
            output[start:end] = rows[start:end] @ own
        start = end
    return output


@functools.cache
def kernels_read_fp8(device: torch.device) -> bool:
    """Return whether our kernels read fp8 on a device: a GPU of compute capability 9.0 or later, with Triton."""
    is_new = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return is_new and importlib.util.find_spec("triton") is not None


def _grouped_mm_serves(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `grouped_mm` takes these operands: supported dtypes, rows aligned to 16 bytes on both sides."""
    nbytes = [length * weight.element_size() for length in (rows.shape[1], *weight.shape[1:])]
    return (
        weight.dtype in _GROUPED_DTYPES
        and not any(number % 16 for number in (*nbytes, weight.data_ptr(), rows.data_ptr()))
        and rows.is_contiguous()
        and (weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) >= (8, 0))
    )
