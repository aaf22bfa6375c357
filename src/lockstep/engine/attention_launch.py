"""The functions of `attention.py` by Triton kernels: tiles, launches, workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lockstep.engine.attention import AttentionOptions, DecodeWorkspace
from lockstep.engine.attention_kernels import decode_kernel, prompt_kernel, write_kernel
from lockstep.errors import ConfigurationError
from lockstep.workload import PAGE_SIZE


@dataclass(frozen=True)
class DecodeTiles:
    """How the decode kernel is cut."""

    tile: int = 64  # keys per step of a program; divides the page size
    stages: int = 4  # tiles in flight per program, plus one
    num_warps: int = 4
    programs_per_sm: int = 2  # programs that share a multiprocessor; the grid is at most that many times their number
    max_pieces: int = 32  # of a row, about. More pieces spread one long row better, but take longer to merge


@dataclass(frozen=True)
class PromptTiles:
    """How the prompt kernel is cut: query rows per program, keys per step, tiles in flight plus one, warps."""

    block_m: int = 64
    tile: int = 64
    stages: int = 3
    num_warps: int = 4


def decode_tiles(dtype: torch.dtype, head_dim: int, value_dim: int) -> DecodeTiles:
    """Return the tiles that keep two programs' keys in flight within a multiprocessor's shared memory."""
    stage_bytes = PAGE_SIZE * (power_of_2(head_dim) + power_of_2(value_dim)) * dtype.itemsize
    return DecodeTiles(tile=64 if stage_bytes <= 32 << 10 else 32 if stage_bytes <= 64 << 10 else 16)


def prompt_tiles(dtype: torch.dtype, head_dim: int, value_dim: int) -> PromptTiles:
    """Return tiles that fit into the registers and the shared memory of a multiprocessor."""
    if dtype == torch.float32:  # without tensor cores, bit by bit in float32
        return PromptTiles(block_m=32, tile=16, stages=1, num_warps=8)
    if max(head_dim, value_dim) <= 128:
        return PromptTiles()
    return PromptTiles(block_m=128, tile=32, stages=2, num_warps=8)


def power_of_2(number: int) -> int:
    """Return the least power of two that the matrix units take and `number` fits into: at least 16."""
    return max(16, triton.next_power_of_2(number))


def max_programs(device: torch.device, tiles: DecodeTiles) -> int:
    """Return the size of the decode kernel's grid on this device, before small batches cut it."""
    if device.type != "cuda":
        return 2 * tiles.programs_per_sm  # Triton's interpreter: some pieces, some programs with several rows
    return torch.cuda.get_device_properties(device).multi_processor_count * tiles.programs_per_sm


def _dense_heads(rows: Tensor) -> Tensor:
    """Return rows whose heads are contiguous; rows and heads may have any strides."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch_options(device: torch.device) -> dict[str, bool]:
    """Programmatic dependent launch (begin while the kernel before ends) where the GPU has it."""
    has_pdl = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}


def decode_workspace(
    max_rows: int, num_heads: int, num_kv_heads: int, value_dim: int, device: torch.device, programs: int | None
) -> DecodeWorkspace:
    """Allocate memory for the partial results of up to `programs` programs; None for the largest grid."""
    programs = programs or max_programs(device, DecodeTiles())
    group_pad = power_of_2(num_heads // num_kv_heads)
    return DecodeWorkspace(
        partials=torch.empty(2 * programs * group_pad * value_dim, dtype=torch.float32, device=device),
        stats=torch.empty(4 * programs * group_pad, dtype=torch.float32, device=device),
        arrivals=torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device),
    )


def write_keys(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """Launch `write_kernel`."""
    key, value = _dense_heads(key), _dense_heads(value)
    rows, kv_heads, head_dim = key.shape
    value_dim = value.shape[2]
    write_kernel[(rows,)](
        key, value, key_pages, value_pages, slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        key_pages.stride(0), value_pages.stride(0), KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        HEAD_PAD=power_of_2(head_dim), VALUE_DIM=value_dim, VALUE_PAD=power_of_2(value_dim),
        HEADS_PAD=triton.next_power_of_2(kv_heads), PAGE=PAGE_SIZE, num_warps=4, **_launch_options(key.device),
    )  # fmt: skip


def attend_decode(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, row_seqs: Tensor, lengths: Tensor,
    options: AttentionOptions, out: Tensor, workspace: DecodeWorkspace | None, tables_ready: bool = False,
    tiles: DecodeTiles | None = None,
) -> None:  # fmt: skip
    """Launch `decode_kernel`; `tiles` None takes this dtype's and width's own."""
    query = _dense_heads(query)
    rows, num_heads, head_dim = query.shape
    kv_heads, value_dim = value_pages.shape[2:]
    workspace = workspace or decode_workspace(rows, num_heads, kv_heads, value_dim, query.device, None)
    tiles = tiles or decode_tiles(query.dtype, head_dim, value_dim)
    group = num_heads // kv_heads
    group_pad, room = power_of_2(group), workspace.arrivals.numel()
    if room < rows * kv_heads:
        raise ConfigurationError(f"the workspace is for {room // kv_heads} rows, got {rows}")
    programs = min(
        max_programs(query.device, tiles),
        rows * kv_heads * block_table.shape[1] * PAGE_SIZE // tiles.tile,
        workspace.stats.numel() // (4 * group_pad),
    )
    decode_kernel[(programs,)](
        query, key_pages, value_pages, block_table, row_seqs, lengths, options.sinks, out, workspace.partials,
        workspace.stats, workspace.arrivals, rows, block_table.shape[1], options.sliding_window or 0, query.stride(0),
        query.stride(1), key_pages.stride(0), value_pages.stride(0), options.scaling, options.softcap or 1.0,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=group_pad, GROUP_ROWS=triton.next_power_of_2(group),
        HEAD_DIM=head_dim, HEAD_PAD=power_of_2(head_dim), VALUE_DIM=value_dim, VALUE_PAD=power_of_2(value_dim),
        # At least 256: the graphs of all usual sizes share one compiled kernel.
        ROWS=max(256, triton.next_power_of_2(rows)), PAGE=PAGE_SIZE, TILE=tiles.tile, MAX_PIECES=tiles.max_pieces,
        STAGES=tiles.stages, HAS_WINDOW=options.sliding_window is not None, HAS_SOFTCAP=options.softcap is not None,
        HAS_SINKS=options.sinks is not None, num_warps=tiles.num_warps, TABLES_READY=tables_ready,
        **_launch_options(query.device),
    )  # fmt: skip


def attend_prompts(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, seqs: Tensor, cu_rows: Tensor,
    lengths: Tensor, options: AttentionOptions, out: Tensor, tiles: PromptTiles | None = None,
) -> None:  # fmt: skip
    """Launch `prompt_kernel`; `tiles` None takes this dtype's and width's own."""
    query = _dense_heads(query)
    rows, num_heads, head_dim = query.shape
    kv_heads, value_dim = value_pages.shape[2:]
    tiles = tiles or prompt_tiles(query.dtype, head_dim, value_dim)
    group = num_heads // kv_heads
    padded = triton.next_power_of_2(group)
    block_m = max(tiles.block_m, padded)
    # The most blocks that these rows can make: each request may have one that is not full.
    blocks = min(rows, rows * padded // block_m + seqs.shape[0])
    prompt_kernel[(blocks, kv_heads)](
        query, key_pages, value_pages, block_table, seqs, cu_rows, lengths, options.sinks, out, seqs.shape[0],
        block_table.shape[1], options.sliding_window or 0, query.stride(0), query.stride(1), key_pages.stride(0),
        value_pages.stride(0), options.scaling, options.softcap or 1.0, KV_HEADS=kv_heads, GROUP=group,
        GROUP_PAD=padded, HEAD_DIM=head_dim, HEAD_PAD=power_of_2(head_dim), VALUE_DIM=value_dim,
        VALUE_PAD=power_of_2(value_dim), REQUESTS=max(64, triton.next_power_of_2(seqs.shape[0])), BLOCK_M=block_m,
        PAGE=PAGE_SIZE, TILE=tiles.tile, STAGES=tiles.stages, HAS_WINDOW=options.sliding_window is not None,
        HAS_SOFTCAP=options.softcap is not None, HAS_SINKS=options.sinks is not None, num_warps=tiles.num_warps,
    )  # fmt: skip
