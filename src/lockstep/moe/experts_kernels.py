# mypy: disable-error-code="no-untyped-def"
"""The local experts on a GPU from counts that only the device knows: no host wait, no padding, no permuted copy.

Few rows per expert (decoding): `few_rows_experts`, two Triton launches that stream each used expert's weights once and
fetch rows through the gather index. Many rows per expert (prefill): `many_rows_experts`, PyTorch's `grouped_mm` between
two small kernels that touch real pairs only. docs/benchmarks/gpu.md says where one overtakes the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _load_rows(rows, scales, index, k, inside, stride, groups, FP8: tl.constexpr):
    """Return a tile `[k, pairs]` of rows in bfloat16; in fp8 a tile spans one scale group."""
    values = tl.load(rows + index.to(tl.int64)[None, :] * stride + k[:, None], inside, other=0.0)
    if FP8:
        scale = tl.load(scales + index * groups + tl.min(k, 0) // 128)
        values = (values.to(tl.float32) * scale[None, :]).to(tl.bfloat16)
    return values


@triton.jit
def _gate_up_tile(
    rows, scales, gather_index, weights, inner, expert, column, start, end, stride, groups,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, FP8: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    used = n < INTERMEDIATE
    gate = weights + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN) + n[:, None] * HIDDEN
    for first in range(start, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        index = tl.load(gather_index + pair, pair < end, other=0)
        g = tl.zeros((COLUMNS, PAIRS), tl.float32)
        u = tl.zeros((COLUMNS, PAIRS), tl.float32)
        for k0 in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < HIDDEN
            x = _load_rows(rows, scales, index, k, inside[:, None] & (pair < end)[None, :], stride, groups, FP8)
            mask = used[:, None] & inside[None, :]
            wg = tl.load(gate + k[None, :], mask, other=0.0)
            wu = tl.load(gate + INTERMEDIATE * HIDDEN + k[None, :], mask, other=0.0)
            g = tl.dot(wg, x, g)
            u = tl.dot(wu, x, u)
        h = g * tl.sigmoid(g) * u
        at = pair.to(tl.int64)[None, :] * INTERMEDIATE + n[:, None]
        tl.store(inner + at, h.to(tl.bfloat16), used[:, None] & (pair < end)[None, :])


@triton.jit
def gate_up_kernel(
    rows, scales, gather_index, expert_offsets, weights, inner, stride, groups,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, FP8: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`inner[p] = silu(gate(x[p])) * up(x[p])` for the pairs of one expert and `COLUMNS` inner columns per program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    # The weights are the wide operand; 16 pairs are the narrowest tile of the matrix units.
    if end - start > 16:
        _gate_up_tile(
            rows, scales, gather_index, weights, inner, expert, column, start, end, stride, groups, HIDDEN,
            INTERMEDIATE, FP8, 32, COLUMNS, BLOCK_K, STAGES,
        )  # fmt: skip
    elif end > start:
        _gate_up_tile(
            rows, scales, gather_index, weights, inner, expert, column, start, end, stride, groups, HIDDEN,
            INTERMEDIATE, FP8, 16, COLUMNS, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit
def _down_tile(
    inner, weights, output, expert, column, start, end,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    used = n < HIDDEN
    base = weights + expert.to(tl.int64) * (INTERMEDIATE * HIDDEN) + n[:, None] * INTERMEDIATE
    for first in range(start, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        total = tl.zeros((COLUMNS, PAIRS), tl.float32)
        for k0 in tl.range(0, INTERMEDIATE, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < INTERMEDIATE
            x_at = pair.to(tl.int64)[None, :] * INTERMEDIATE + k[:, None]
            x = tl.load(inner + x_at, inside[:, None] & (pair < end)[None, :], other=0.0)
            w = tl.load(base + k[None, :], used[:, None] & inside[None, :], other=0.0)
            total = tl.dot(w, x, total)
        at = pair.to(tl.int64)[None, :] * HIDDEN + n[:, None]
        tl.store(output + at, total.to(tl.bfloat16), used[:, None] & (pair < end)[None, :])


@triton.jit
def down_kernel(
    inner, expert_offsets, weights, output,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`output[p] = down(inner[p])` for the pairs of one expert and `COLUMNS` hidden columns per program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    if end - start > 16:
        _down_tile(
            inner, weights, output, expert, column, start, end, HIDDEN, INTERMEDIATE, 32, COLUMNS, BLOCK_K, STAGES
        )  # fmt: skip
    elif end > start:
        _down_tile(
            inner, weights, output, expert, column, start, end, HIDDEN, INTERMEDIATE, 16, COLUMNS, BLOCK_K, STAGES
        )  # fmt: skip


@triton.jit
def gather_kernel(
    rows, scales, gather_index, num_pairs, output, stride, groups,
    HIDDEN: tl.constexpr, FP8: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`output[p] = rows[gather_index[p]]` in bfloat16 for the pairs that exist."""
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    end = tl.load(num_pairs)
    for task in range(tl.program_id(0), tl.cdiv(end, PAIRS) * blocks, tl.num_programs(0)):
        pair = (task // blocks) * PAIRS + tl.arange(0, PAIRS)
        column = (task % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        mask = (pair < end)[:, None] & (column < HIDDEN)[None, :]
        index = tl.load(gather_index + pair, pair < end, other=0)
        values = tl.load(rows + index.to(tl.int64)[:, None] * stride + column[None, :], mask, other=0.0)
        if FP8:
            scale = tl.load(scales + index[:, None] * groups + (column // 128)[None, :], mask, other=0.0)
            values = (values.to(tl.float32) * scale).to(tl.bfloat16)
        tl.store(output + pair.to(tl.int64)[:, None] * HIDDEN + column[None, :], values, mask)


@triton.jit
def silu_mul_kernel(gate_up, num_pairs, inner, INTERMEDIATE: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    """`inner[p] = silu(gate_up[p, :I]) * gate_up[p, I:]` for the pairs that exist."""
    blocks: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    end = tl.load(num_pairs)
    for task in range(tl.program_id(0), tl.cdiv(end, PAIRS) * blocks, tl.num_programs(0)):
        pair = (task // blocks) * PAIRS + tl.arange(0, PAIRS)
        column = (task % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        mask = (pair < end)[:, None] & (column < INTERMEDIATE)[None, :]
        at = pair.to(tl.int64)[:, None] * (2 * INTERMEDIATE) + column[None, :]
        g = tl.load(gate_up + at, mask, other=0.0).to(tl.float32)
        u = tl.load(gate_up + at + INTERMEDIATE, mask, other=0.0).to(tl.float32)
        h = (g * tl.sigmoid(g)).to(tl.bfloat16).to(tl.float32) * u
        tl.store(inner + pair.to(tl.int64)[:, None] * INTERMEDIATE + column[None, :], h.to(tl.bfloat16), mask)


def few_rows_experts(
    hidden_states: torch.Tensor, scales: torch.Tensor | None, gather_index: torch.Tensor, expert_offsets: torch.Tensor,
    gate_up_proj: torch.Tensor, down_proj: torch.Tensor, *, tile: tuple[int, int, int] = (32, 128, 4),
) -> torch.Tensor:  # fmt: skip
    """Run each pair through its expert, reading used experts once per 32 pairs: `[capacity, hidden]`, not weighted."""
    experts, hidden, intermediate = down_proj.shape
    capacity = gather_index.shape[0]
    columns, block_k, stages = tile
    inner = torch.empty(capacity, intermediate, dtype=torch.bfloat16, device=down_proj.device)
    output = torch.empty(capacity, hidden, dtype=torch.bfloat16, device=down_proj.device)
    gate_up_kernel[(experts * triton.cdiv(intermediate, columns),)](
        hidden_states, scales, gather_index, expert_offsets, gate_up_proj, inner, hidden_states.stride(0),
        0 if scales is None else scales.stride(0), HIDDEN=hidden, INTERMEDIATE=intermediate, FP8=scales is not None,
        COLUMNS=columns, BLOCK_K=block_k, STAGES=stages, PDL=True, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    down_kernel[(experts * triton.cdiv(hidden, 2 * columns),)](
        inner, expert_offsets, down_proj, output, HIDDEN=hidden, INTERMEDIATE=intermediate,
        COLUMNS=2 * columns, BLOCK_K=block_k, STAGES=stages, PDL=True, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return output


def many_rows_experts(
    hidden_states: torch.Tensor, scales: torch.Tensor | None, gather_index: torch.Tensor, expert_offsets: torch.Tensor,
    gate_up_proj: torch.Tensor, down_proj: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The same as `few_rows_experts` by `grouped_mm`: rows gathered once, then two grouped products."""
    experts, hidden, intermediate = down_proj.shape
    capacity = gather_index.shape[0]
    blocks = (8 * torch.cuda.get_device_properties(down_proj.device).multi_processor_count,)
    num_pairs, ends = expert_offsets[experts:], expert_offsets[1:]
    gathered = torch.empty(capacity, hidden, dtype=torch.bfloat16, device=down_proj.device)
    gather_kernel[blocks](
        hidden_states, scales, gather_index, num_pairs, gathered, hidden_states.stride(0),
        0 if scales is None else scales.stride(0), HIDDEN=hidden, FP8=scales is not None, PAIRS=4, COLUMNS=1024,
    )  # fmt: skip
    gate_up = torch.nn.functional.grouped_mm(gathered, gate_up_proj.transpose(1, 2), offs=ends)
    inner = torch.empty(capacity, intermediate, dtype=torch.bfloat16, device=down_proj.device)
    silu_mul_kernel[blocks](gate_up, num_pairs, inner, INTERMEDIATE=intermediate, PAIRS=4, COLUMNS=1024)
    return torch.nn.functional.grouped_mm(inner, down_proj.transpose(1, 2), offs=ends)
