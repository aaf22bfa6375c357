# mypy: disable-error-code="no-untyped-def"
"""The local experts on a GPU from counts that only the device knows: no host wait, no padding, no permuted copy.

Few rows per expert (decoding): `few_rows_experts`, two Triton launches that stream each used expert's weights once and
fetch rows through the gather index. Many rows per expert (prefill): `many_rows_experts`, PyTorch's `grouped_mm` between
two small kernels that touch real pairs only. docs/benchmarks/gpu.md says where one overtakes the other.

Weights in fp8 have a scale per 128 x 128 values. `few_rows_experts` multiplies the values as they are, rows in fp8 too,
and scales the products of each 128 values in float32. `many_rows_experts` first writes one layer's weights out in
bfloat16: PyTorch's `_scaled_grouped_mm` takes scales per row, or powers of two per 32 values, not per block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True)
class Extras:
    """Further arguments of the experts' kernels; by default bfloat16 weights, no biases and `silu(gate) * up`.

    Attributes:
        gate_up_scales: scales of fp8 weights, one per block of 128 x 128 values, float32,
            `[experts, 2 * intermediate / 128, hidden / 128]`. Both weights must be float8_e4m3fn.
        down_scales: the same for the down product, `[experts, hidden / 128, intermediate / 128]`.
        gate_up_bias: `[experts, 2 * intermediate]`, in the order of the weight's rows.
        down_bias: `[experts, hidden]`.
        interleaved: gate and up rows alternate; by default all gate rows come first.
        clamp: `(alpha, limit)` of gpt-oss's gate: `(up + 1) * gate * sigmoid(alpha * gate)`, with gate clamped to at
            most `limit` and up to `-limit..limit`. `(0, 0)` is `silu(gate) * up`.
    """

    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    interleaved: bool = False
    clamp: tuple[float, float] = (0.0, 0.0)


NO_EXTRAS = Extras()


@triton.jit
def _load_rows(rows, scales, index, k, inside, stride, groups, FP8: tl.constexpr):
    """Return a tile `[k, pairs]` of rows in bfloat16; in fp8 a tile spans one scale group."""
    values = tl.load(rows + index.to(tl.int64)[None, :] * stride + k[:, None], inside, other=0.0)
    if FP8:
        scale = tl.load(scales + index * groups + tl.min(k, 0) // 128)
        values = (values.to(tl.float32) * scale[None, :]).to(tl.bfloat16)
    return values


@triton.jit
def _activate(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """`silu(g) * u`, or with a limit gpt-oss's gate."""
    if LIMIT > 0:
        g = tl.minimum(g, LIMIT)
        u = tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
        h = (u + 1) * g * tl.sigmoid(g * ALPHA)
    else:
        h = g * tl.sigmoid(g) * u
    return h


@triton.jit
def _add_product(w, x, total, scale, SCALED: tl.constexpr):
    """`total + w @ x`; values in fp8 are multiplied as they are, and the product is scaled."""
    if SCALED:
        total += tl.dot(w.to(x.dtype), x) * scale  # fp8 to bfloat16 is exact
    else:
        total = tl.dot(w, x, total)
    return total


@triton.jit
def _gate_up_tile(
    rows, scales, gather_index, weights, weight_scales, bias, inner, expert, column, start, end, stride, groups,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, FP8: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    used = n < INTERMEDIATE
    step: tl.constexpr = 2 if INTERLEAVED else 1  # from one gate row to the next, and from a gate row to its up row
    to_up: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE
    gate = weights + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN) + n[:, None] * (step * N_STRIDE)
    if SCALED:
        groups_k: tl.constexpr = HIDDEN // 128
        gate_scale = weight_scales + (expert * (2 * INTERMEDIATE // 128) + column * COLUMNS // 128) * groups_k
    for first in range(start, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        index = tl.load(gather_index + pair, pair < end, other=0)
        g = tl.zeros((COLUMNS, PAIRS), tl.float32)
        u = tl.zeros((COLUMNS, PAIRS), tl.float32)
        for k0 in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < HIDDEN
            there = inside[:, None] & (pair < end)[None, :]
            x = _load_rows(rows, scales, index, k, there, stride, groups, FP8 and not SCALED)
            mask = used[:, None] & inside[None, :]
            wg = tl.load(gate + k[None, :] * K_STRIDE, mask, other=0.0)
            wu = tl.load(gate + to_up * N_STRIDE + k[None, :] * K_STRIDE, mask, other=0.0)
            scale_g = 1.0
            scale_u = 1.0
            if SCALED:
                scale_g = tl.load(gate_scale + k0 // 128)
                scale_u = tl.load(gate_scale + (INTERMEDIATE // 128) * groups_k + k0 // 128)
                if FP8:
                    scale_x = tl.load(scales + index * groups + k0 // 128)[None, :]
                    scale_g = scale_g * scale_x
                    scale_u = scale_u * scale_x
            g = _add_product(wg, x, g, scale_g, SCALED)
            u = _add_product(wu, x, u, scale_u, SCALED)
        if BIAS:
            bias_at = bias + expert * (2 * INTERMEDIATE) + n * step
            g += tl.load(bias_at, used, other=0.0).to(tl.float32)[:, None]
            u += tl.load(bias_at + to_up, used, other=0.0).to(tl.float32)[:, None]
        h = _activate(g, u, ALPHA, LIMIT)
        at = pair.to(tl.int64)[None, :] * INTERMEDIATE + n[:, None]
        tl.store(inner + at, h.to(tl.bfloat16), used[:, None] & (pair < end)[None, :])


@triton.jit
def gate_up_kernel(
    rows, scales, gather_index, expert_offsets, weights, weight_scales, bias, inner, stride, groups,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, FP8: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`inner[p] = activation(gate(x[p]), up(x[p]))` for one expert's pairs and `COLUMNS` inner columns per program."""
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
            rows, scales, gather_index, weights, weight_scales, bias, inner, expert, column, start, end, stride,
            groups, HIDDEN, INTERMEDIATE, FP8, SCALED, BIAS, INTERLEAVED, N_STRIDE, K_STRIDE, ALPHA, LIMIT, 32,
            COLUMNS, BLOCK_K, STAGES,
        )  # fmt: skip
    elif end > start:
        _gate_up_tile(
            rows, scales, gather_index, weights, weight_scales, bias, inner, expert, column, start, end, stride,
            groups, HIDDEN, INTERMEDIATE, FP8, SCALED, BIAS, INTERLEAVED, N_STRIDE, K_STRIDE, ALPHA, LIMIT, 16,
            COLUMNS, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit
def _down_tile(
    inner, weights, weight_scales, bias, output, expert, column, start, end,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    used = n < HIDDEN
    base = weights + expert.to(tl.int64) * (INTERMEDIATE * HIDDEN) + n[:, None] * N_STRIDE
    if SCALED:
        scale_at = weight_scales + (expert * (HIDDEN // 128) + column * COLUMNS // 128) * (INTERMEDIATE // 128)
    for first in range(start, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        total = tl.zeros((COLUMNS, PAIRS), tl.float32)
        for k0 in tl.range(0, INTERMEDIATE, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < INTERMEDIATE
            x_at = pair.to(tl.int64)[None, :] * INTERMEDIATE + k[:, None]
            x = tl.load(inner + x_at, inside[:, None] & (pair < end)[None, :], other=0.0)
            w = tl.load(base + k[None, :] * K_STRIDE, used[:, None] & inside[None, :], other=0.0)
            scale = 1.0
            if SCALED:
                scale = tl.load(scale_at + k0 // 128)
            total = _add_product(w, x, total, scale, SCALED)
        if BIAS:
            total += tl.load(bias + expert * HIDDEN + n, used, other=0.0).to(tl.float32)[:, None]
        at = pair.to(tl.int64)[None, :] * HIDDEN + n[:, None]
        tl.store(output + at, total.to(tl.bfloat16), used[:, None] & (pair < end)[None, :])


@triton.jit
def down_kernel(
    inner, expert_offsets, weights, weight_scales, bias, output,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
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
            inner, weights, weight_scales, bias, output, expert, column, start, end, HIDDEN, INTERMEDIATE, SCALED,
            BIAS, N_STRIDE, K_STRIDE, 32, COLUMNS, BLOCK_K, STAGES,
        )  # fmt: skip
    elif end > start:
        _down_tile(
            inner, weights, weight_scales, bias, output, expert, column, start, end, HIDDEN, INTERMEDIATE, SCALED,
            BIAS, N_STRIDE, K_STRIDE, 16, COLUMNS, BLOCK_K, STAGES,
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
def activation_kernel(
    gate_up, expert_of_pair, bias, num_pairs, inner,
    INTERMEDIATE: tl.constexpr, BIAS: tl.constexpr, INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`inner[p] = activation(gate, up)` of `gate_up[p]`, its expert's bias added, for the pairs that exist."""
    blocks: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    step: tl.constexpr = 2 if INTERLEAVED else 1
    to_up: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE
    end = tl.load(num_pairs)
    for task in range(tl.program_id(0), tl.cdiv(end, PAIRS) * blocks, tl.num_programs(0)):
        pair = (task // blocks) * PAIRS + tl.arange(0, PAIRS)
        column = (task % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        mask = (pair < end)[:, None] & (column < INTERMEDIATE)[None, :]
        at = pair.to(tl.int64)[:, None] * (2 * INTERMEDIATE) + column[None, :] * step
        g = tl.load(gate_up + at, mask, other=0.0).to(tl.float32)
        u = tl.load(gate_up + at + to_up, mask, other=0.0).to(tl.float32)
        if BIAS:
            expert = tl.load(expert_of_pair + pair, pair < end, other=0)
            bias_at = bias + expert[:, None] * (2 * INTERMEDIATE) + column[None, :] * step
            g += tl.load(bias_at, mask, other=0.0).to(tl.float32)
            u += tl.load(bias_at + to_up, mask, other=0.0).to(tl.float32)
        if LIMIT > 0:  # noqa: SIM108 - decided when the kernel is compiled
            h = _activate(g, u, ALPHA, LIMIT)
        else:
            h = (g * tl.sigmoid(g)).to(tl.bfloat16).to(tl.float32) * u
        tl.store(inner + pair.to(tl.int64)[:, None] * INTERMEDIATE + column[None, :], h.to(tl.bfloat16), mask)


@triton.jit
def dequantise_kernel(values, scales, expert_offsets, output, OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr):
    """`output = values * scales` in bfloat16 for `ROWS` rows of 128 values per program, of experts that have pairs."""
    blocks: tl.constexpr = (OUT // ROWS) * (IN // 128)
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if tl.load(expert_offsets + expert + 1) > tl.load(expert_offsets + expert):
        first, group = (block // (IN // 128)) * ROWS, block % (IN // 128)
        row, column = first + tl.arange(0, ROWS), group * 128 + tl.arange(0, 128)
        scale = tl.load(scales + (expert * (OUT // 128) + first // 128) * (IN // 128) + group)
        at = expert.to(tl.int64) * (OUT * IN) + row[:, None] * IN + column[None, :]
        tl.store(output + at, (tl.load(values + at).to(tl.float32) * scale).to(tl.bfloat16))


@triton.jit
def bias_kernel(
    output, expert_of_pair, bias, num_pairs, HIDDEN: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """`output[p] += bias[expert of p]` for the pairs that exist."""
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    end = tl.load(num_pairs)
    for task in range(tl.program_id(0), tl.cdiv(end, PAIRS) * blocks, tl.num_programs(0)):
        pair = (task // blocks) * PAIRS + tl.arange(0, PAIRS)
        column = (task % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        mask = (pair < end)[:, None] & (column < HIDDEN)[None, :]
        at = output + pair.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        expert = tl.load(expert_of_pair + pair, pair < end, other=0)
        added = tl.load(bias + expert[:, None] * HIDDEN + column[None, :], mask, other=0.0).to(tl.float32)
        tl.store(at, (tl.load(at, mask, other=0.0).to(tl.float32) + added).to(tl.bfloat16), mask)


def few_rows_experts(
    hidden_states: torch.Tensor, scales: torch.Tensor | None, gather_index: torch.Tensor, expert_offsets: torch.Tensor,
    gate_up_proj: torch.Tensor, down_proj: torch.Tensor, extras: Extras = NO_EXTRAS, *,
    tile: tuple[int, int, int] = (32, 128, 4),
) -> torch.Tensor:  # fmt: skip
    """Run each pair through its expert, reading used experts once per 32 pairs: `[capacity, hidden]`, not weighted."""
    experts, hidden, intermediate = down_proj.shape
    capacity = gather_index.shape[0]
    columns, block_k, stages = tile
    alpha, limit = extras.clamp
    inner = torch.empty(capacity, intermediate, dtype=torch.bfloat16, device=down_proj.device)
    output = torch.empty(capacity, hidden, dtype=torch.bfloat16, device=down_proj.device)
    gate_up_kernel[(experts * triton.cdiv(intermediate, columns),)](
        hidden_states, scales, gather_index, expert_offsets, gate_up_proj, extras.gate_up_scales, extras.gate_up_bias,
        inner, hidden_states.stride(0), 0 if scales is None else scales.stride(0), HIDDEN=hidden,
        INTERMEDIATE=intermediate, FP8=scales is not None, SCALED=extras.gate_up_scales is not None,
        BIAS=extras.gate_up_bias is not None, INTERLEAVED=extras.interleaved, N_STRIDE=gate_up_proj.stride(1),
        K_STRIDE=gate_up_proj.stride(2), ALPHA=alpha, LIMIT=limit,
        COLUMNS=columns, BLOCK_K=block_k, STAGES=stages, PDL=True, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    down_kernel[(experts * triton.cdiv(hidden, 2 * columns),)](
        inner, expert_offsets, down_proj, extras.down_scales, extras.down_bias, output, HIDDEN=hidden,
        INTERMEDIATE=intermediate, SCALED=extras.down_scales is not None, BIAS=extras.down_bias is not None,
        N_STRIDE=down_proj.stride(1), K_STRIDE=down_proj.stride(2),
        COLUMNS=2 * columns, BLOCK_K=block_k, STAGES=stages, PDL=True, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return output


def many_rows_experts(
    hidden_states: torch.Tensor, scales: torch.Tensor | None, gather_index: torch.Tensor, expert_offsets: torch.Tensor,
    gate_up_proj: torch.Tensor, down_proj: torch.Tensor, extras: Extras = NO_EXTRAS,
) -> torch.Tensor:  # fmt: skip
    """The same as `few_rows_experts` by `grouped_mm`: rows gathered once, then two grouped products."""
    experts, hidden, intermediate = down_proj.shape
    capacity = gather_index.shape[0]
    blocks = (8 * torch.cuda.get_device_properties(down_proj.device).multi_processor_count,)
    num_pairs, ends = expert_offsets[experts:], expert_offsets[1:]
    alpha, limit = extras.clamp
    expert_of_pair = None
    if extras.down_bias is not None:
        pairs = torch.arange(capacity, dtype=torch.int32, device=ends.device)
        expert_of_pair = torch.searchsorted(ends, pairs, right=True, out_int32=True)
    gathered = torch.empty(capacity, hidden, dtype=torch.bfloat16, device=down_proj.device)
    gather_kernel[blocks](
        hidden_states, scales, gather_index, num_pairs, gathered, hidden_states.stride(0),
        0 if scales is None else scales.stride(0), HIDDEN=hidden, FP8=scales is not None, PAIRS=4, COLUMNS=1024,
    )  # fmt: skip
    weight = _in_bfloat16(gate_up_proj, extras.gate_up_scales, expert_offsets)
    gate_up = torch.nn.functional.grouped_mm(gathered, weight.transpose(1, 2), offs=ends)
    del weight  # its memory serves for the down product's
    inner = torch.empty(capacity, intermediate, dtype=torch.bfloat16, device=down_proj.device)
    activation_kernel[blocks](
        gate_up, expert_of_pair, extras.gate_up_bias, num_pairs, inner, INTERMEDIATE=intermediate,
        BIAS=extras.gate_up_bias is not None, INTERLEAVED=extras.interleaved, ALPHA=alpha, LIMIT=limit, PAIRS=4,
        COLUMNS=1024,
    )  # fmt: skip
    weight = _in_bfloat16(down_proj, extras.down_scales, expert_offsets)
    output = torch.nn.functional.grouped_mm(inner, weight.transpose(1, 2), offs=ends)
    if extras.down_bias is not None:
        bias_kernel[blocks](output, expert_of_pair, extras.down_bias, num_pairs, HIDDEN=hidden, PAIRS=4, COLUMNS=1024)
    return output


def _in_bfloat16(weight: torch.Tensor, scales: torch.Tensor | None, expert_offsets: torch.Tensor) -> torch.Tensor:
    """Return a weight `[experts, out, in]` in bfloat16; fp8 is written out, for experts that have pairs."""
    if scales is None:
        return weight
    experts, num_out, num_in = weight.shape
    output = torch.empty_like(weight, dtype=torch.bfloat16)
    dequantise_kernel[(experts * (num_out // 32) * (num_in // 128),)](
        weight, scales, expert_offsets, output, OUT=num_out, IN=num_in, ROWS=32
    )
    return output
