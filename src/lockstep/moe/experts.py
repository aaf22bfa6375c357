"""The local experts' grouped matrix products: every row through the expert that its router chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lockstep.errors import ConfigurationError

FEW_ROWS = 32  # rows per expert up to which streaming its weights beats `grouped_mm` (docs/benchmarks/gpu.md)
# The dtypes that `torch.nn.functional.grouped_mm` takes on a CPU and on a GPU alike (torch 2.13: float64 is refused).
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of rows `[n, 2 * intermediate]`, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class LocalExperts:
    """This rank's experts as one function of rows: gate and up product, activation, down product. No weights of pairs.

    Works on any module that follows the experts interface of Transformers (`use_experts_implementation`), by its
    attributes: `gate_up_proj` or `up_proj`, `down_proj`, their `_bias`es where `has_bias`, `_apply_gate` or `act_fn`,
    `is_transposed`, `post_expert_norm` where `has_post_expert_norm`. Parameters are read at every call, so that a model
    may be moved or cast after this object was made.

    Args:
        module: such a module; its parameters hold this rank's experts only, `[num_local_experts, ...]`.
        check_weights: called before the experts run; raises if the parameters are no longer this rank's own.

    Attributes:
        adapters: LoRA beside the weights; per weight's name `(A [local experts, r, in], B [local experts, out, r],
            scaling)` of each adapter. They run as products of their own, not by kernels that take counts on the device.
    """

    def __init__(self, module: Any, check_weights: Callable[[], None] | None = None) -> None:
        self.module = module
        self._check_weights = check_weights
        self.adapters: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
        up_name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        missing = [name for name in (up_name, "down_proj") if getattr(module, name, None) is None]
        if missing:
            raise ConfigurationError(f"experts of class {type(module).__name__} have no parameter {missing[0]!r}")

    @classmethod
    def from_tensors(cls, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> LocalExperts:
        """Make gated SiLU experts of `[experts, 2 * intermediate, hidden]`, gate first, and the down product's."""
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
        is_transposed = getattr(module, "is_transposed", False)

        def linear(rows: torch.Tensor, name: str) -> torch.Tensor:
            output = _grouped_linear(rows, getattr(module, name), offsets, is_transposed)
            for lora_a, lora_b, scaling in self.adapters.get(name, ()):
                inner = _grouped_linear(rows, lora_a, offsets, is_transposed=False)
                output = output + scaling * _grouped_linear(inner, lora_b, offsets, is_transposed=False)
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

    @property
    def run_on_device(self) -> bool:
        """Whether `on_device` can run these experts: gated SiLU experts in bfloat16 without biases or adapters."""
        module = self.module
        activation = getattr(module, "act_fn", None)
        return bool(
            not self.adapters
            and getattr(module, "has_gate", True)
            and not getattr(module, "has_bias", False)
            and not getattr(module, "is_transposed", False)
            and not getattr(module, "has_post_expert_norm", False)
            and getattr(module, "is_concatenated", True)
            and (activation is None or "silu" in type(activation).__name__.lower())
            and module.down_proj.dtype == torch.bfloat16
        )

    def on_device(
        self,
        hidden_states: torch.Tensor,
        scales: torch.Tensor | None,
        gather_index: torch.Tensor,
        expert_offsets: torch.Tensor,
        rows_per_expert: float,
    ) -> torch.Tensor:
        """Run pairs whose number only the device knows; `rows_per_expert`, as expected, chooses the kernel alone."""
        from lockstep.moe.experts_kernels import few_rows_experts, many_rows_experts

        if self._check_weights is not None:
            self._check_weights()
        run = few_rows_experts if rows_per_expert <= FEW_ROWS else many_rows_experts
        weights = (self.module.gate_up_proj, self.module.down_proj)
        return run(hidden_states, scales, gather_index, expert_offsets, *weights)

    def warm_up(self, capacity: int, fp8: bool) -> None:
        """Load the kernels of `on_device` for gather indices of `capacity`, before a step that peers wait in."""
        weight = self.module.down_proj
        num_local_experts, hidden, _ = weight.shape
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
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, is_transposed: bool
) -> torch.Tensor:
    """`rows[i] @ weight[expert of i]`; the weight is `[experts, out, in]`, or `[experts, in, out]` if transposed."""
    rows = rows.to(weight.dtype)
    per_expert = weight if is_transposed else weight.transpose(-2, -1)
    if _grouped_mm_serves(rows, weight):
        return torch.nn.functional.grouped_mm(rows, per_expert, offs=offsets)
    output = rows.new_empty((rows.shape[0], per_expert.shape[2]))
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        output[start:end] = rows[start:end] @ per_expert[expert]
        start = end
    return output


def _grouped_mm_serves(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `grouped_mm` takes these operands: its dtypes, and rows of whole 16 bytes on both sides."""
    nbytes = [length * weight.element_size() for length in (rows.shape[1], *weight.shape[1:])]
    return (
        weight.dtype in _GROUPED_DTYPES
        and not any(number % 16 for number in (*nbytes, weight.data_ptr(), rows.data_ptr()))
        and rows.is_contiguous()
        and (weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) >= (8, 0))
    )
