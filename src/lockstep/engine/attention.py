"""Attention over paged keys and values, for all rows of a step at once.

Each row's request and number of keys are read from device memory, so one CUDA graph serves every step of its size.
GPUs run our Triton kernels, other devices PyTorch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.errors import ConfigurationError
from lockstep.workload import PAGE_SIZE


@dataclass(frozen=True)
class AttentionOptions:
    """A layer's kind of attention, besides its shapes."""

    scaling: float  # of the scores, usually `head_dim ** -0.5`
    sliding_window: int | None = None  # maximum keys that a row sees, its own included; None for all
    softcap: float | None = None  # scores become `softcap * tanh(scores / softcap)`; None leaves them
    sinks: Tensor | None = None  # `[num_heads]`: an extra score per head, which takes weight but adds no value


@dataclass(frozen=True)
class DecodeWorkspace:
    """Memory for partial results, reused from call to call. Calls that share it must be on one stream."""

    partials: Tensor  # unnormalised sums of values, float32
    stats: Tensor  # their largest score and sum of weights, float32
    arrivals: Tensor  # pieces that have arrived, per row and key head, int32; zeros between calls


def attention_name(device: torch.device | str) -> str:
    """Return which attention kernels a device runs, and why, as one line for a report."""
    reason = _why_gathered(torch.device(device).type)
    return "Triton over pages" if reason is None else f"scaled_dot_product_attention ({reason})"


def decode_workspace(
    max_rows: int, num_heads: int, num_kv_heads: int, value_dim: int, device: torch.device | str,
    *, programs: int | None = None,
) -> DecodeWorkspace | None:  # fmt: skip
    """Return memory, if the device needs any, for `attend_decode` of up to `max_rows` rows; layers can share it."""
    device = torch.device(device)
    workspace: DecodeWorkspace | None = _implementation(device.type).decode_workspace(
        max_rows, num_heads, num_kv_heads, value_dim, device, programs
    )
    return workspace


def write_keys(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """Store rows' keys and values, `[rows, num_kv_heads, ..]`, at `slots`, page * 64 + offset; -1 is dropped."""
    if key.shape[0]:
        _implementation(key.device.type).write_keys(key, value, key_pages, value_pages, slots)


def attend_decode(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, row_seqs: Tensor, lengths: Tensor,
    options: AttentionOptions, *, out: Tensor | None = None, workspace: DecodeWorkspace | None = None,
    tables_ready: bool = False,
) -> Tensor:  # fmt: skip
    """Attend with one token per row, `[rows, num_heads, head_dim]`; the row's own key is in its page already.

    Pages are `[num_pages, 64, num_kv_heads, dim]`, the block table has those of each request, `[max_seqs, max_pages]`;
    `row_seqs` are rows of the table, -1 for padding, and `lengths` the keys that each row sees, its own included,
    `[rows]`; all int32. Padding, and length 0, give zeros. `tables_ready`: the launch just before this one wrote
    neither of the two, so that the kernel may read them while that launch ends, about 1 us earlier.
    """
    out = _check(query, key_pages, value_pages, block_table, lengths, options, out)
    if query.shape[0]:
        _implementation(query.device.type).attend_decode(
            query, key_pages, value_pages, block_table, row_seqs, lengths, options, out, workspace, tables_ready
        )
    return out


def attend_prompts(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, seqs: Tensor, cu_rows: Tensor,
    lengths: Tensor, options: AttentionOptions, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend with the last rows of `n` requests, packed; each sees the keys up to its own, which are in pages already.

    `seqs` are rows of the block table, `[n]`; `cu_rows` where their rows of `query` begin, and their end, `[n + 1]`;
    `lengths` their keys, own rows included, `[n]`; all int32. Everything else is as for `attend_decode`.
    """
    out = _check(query, key_pages, value_pages, block_table, lengths, options, out)
    if query.shape[0]:
        _implementation(query.device.type).attend_prompts(
            query, key_pages, value_pages, block_table, seqs, cu_rows, lengths, options, out
        )
    return out


def _why_gathered(device_type: str) -> str | None:
    """None if the Triton kernels run on this kind of device, else why they do not."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernels need a CUDA GPU"
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


@functools.cache
def _implementation(device_type: str) -> Any:
    """The module whose functions do the work on this kind of device."""
    kind = "launch" if _why_gathered(device_type) is None else "gathered"
    return importlib.import_module(f"lockstep.engine.attention_{kind}")


def _check(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, lengths: Tensor,
    options: AttentionOptions, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Check shapes and dtypes, which needs no wait for the device; return memory for the result."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key_pages.shape[2]
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.dim() != 4 or pages.shape[1] != PAGE_SIZE or pages.shape[2] != num_kv_heads:
            expected = f"[num_pages, {PAGE_SIZE}, {num_kv_heads}, dim]"
            raise ConfigurationError(f"{name} must be {expected}, got {list(pages.shape)}")
        if not pages.is_contiguous():
            raise ConfigurationError(f"{name} must be contiguous, got strides {pages.stride()}")
    if key_pages.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ConfigurationError(
            f"{num_heads} query heads of {head_dim} do not fit {num_kv_heads} key heads of {key_pages.shape[3]}"
        )
    if options.sliding_window is not None and options.sliding_window < 1:
        raise ConfigurationError(f"sliding_window must be >= 1 or None, got {options.sliding_window}")
    if options.sinks is not None and options.sinks.shape != (num_heads,):
        raise ConfigurationError(f"sinks must have one score per head, {num_heads}, got {list(options.sinks.shape)}")
    for name, numbers in (("block_table", block_table), ("lengths", lengths)):
        if numbers.dtype != torch.int32 or not numbers.is_contiguous():
            raise ConfigurationError(f"{name} must be contiguous int32, got {numbers.dtype}")
    return query.new_empty(num_rows, num_heads, value_pages.shape[3]) if out is None else out
