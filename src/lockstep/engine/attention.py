"""Attention over paged keys and values, for all rows of a step at once.

A layer's keys are in pages of 64 tokens; the block table lists each request's pages. Which request a row belongs to and
how many keys it sees are read from device memory, so one CUDA graph serves every step of its size. On GPUs the kernels
are ours, in Triton; elsewhere PyTorch's `scaled_dot_product_attention` runs over gathered keys. `attention_name` says
which of them a device gets, and why.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.errors import ConfigurationError
from lockstep.workload import PAGE_SIZE

CPU_CALL_BYTES = 4 << 20
"""Keys that one call on a CPU copies out of their pages: more than the caches hold costs more than a call saves."""


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer's attention is, besides its shapes.

    Attributes:
        scaling: of the scores, usually `head_dim ** -0.5`.
        sliding_window: how many keys a row sees at most, its own included; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)`; None leaves them.
        sinks: one more score per head that takes its share of the weights and gives no value, `[num_heads]`.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class DecodeWorkspace:
    """Memory for pieces of rows, kept from call to call. Calls that share one must be on the same stream."""

    partials: Tensor  # unnormalised sums of values, float32
    stats: Tensor  # their largest score and sum of weights, float32
    arrivals: Tensor  # pieces that have arrived, per row and key head, int32; zeros between calls


def decode_workspace(
    max_rows: int, num_heads: int, num_kv_heads: int, value_dim: int, device: torch.device | str,
    *, programs: int | None = None,
) -> DecodeWorkspace | None:  # fmt: skip
    """Return memory for `attend_decode` calls of up to `max_rows` rows: all layers of a model can share it.

    Args:
        max_rows: most rows of a call.
        num_heads: query heads.
        num_kv_heads: key heads.
        value_dim: width of a head's values.
        device: that the calls run on.
        programs: size of the kernel's grid, None for the largest that is used.

    Returns:
        The workspace; None where the kernel of this device needs none.
    """
    device = torch.device(device)
    if _why_dense(device) is not None:
        return None
    from lockstep.engine import attention_kernels

    programs = programs or attention_kernels.max_programs(device, attention_kernels.DecodeTiles())
    group_pad = attention_kernels.power_of_2(num_heads // num_kv_heads)
    return DecodeWorkspace(
        partials=torch.empty(2 * programs * group_pad * value_dim, dtype=torch.float32, device=device),
        stats=torch.empty(4 * programs * group_pad, dtype=torch.float32, device=device),
        arrivals=torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device),
    )


def attention_name(device: torch.device | str) -> str:
    """Return which kernels attend on this device, and why, as one line for a report.

    Example:
        >>> attention_name("cpu")
        'scaled_dot_product_attention (the Triton kernels need a CUDA GPU)'
    """
    reason = _why_dense(torch.device(device))
    return "Triton over pages" if reason is None else f"scaled_dot_product_attention ({reason})"


def write_keys(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """Store new rows' keys and values in their pages.

    Args:
        key: `[rows, num_kv_heads, head_dim]`.
        value: `[rows, num_kv_heads, value_dim]`.
        key_pages: written, `[num_pages, 64, num_kv_heads, head_dim]`.
        value_pages: written, `[num_pages, 64, num_kv_heads, value_dim]`.
        slots: page * 64 + place in the page, distinct, `[rows]` int32 or int64; a row with a negative one is dropped.
    """
    if not key.shape[0]:
        return
    if _why_dense(key.device) is None:
        from lockstep.engine import attention_kernels

        attention_kernels.write_keys(_dense_heads(key), _dense_heads(value), key_pages, value_pages, slots)
        return
    kept = slots >= 0
    places = slots[kept].long()
    for rows, pages in ((key, key_pages), (value, value_pages)):
        pages.view(-1, *pages.shape[2:])[places] = rows[kept].to(pages.dtype)


def attend_decode(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, row_seqs: Tensor, lengths: Tensor,
    options: AttentionOptions, *, out: Tensor | None = None, workspace: DecodeWorkspace | None = None,
    tables_ready: bool = False,
) -> Tensor:  # fmt: skip
    """Attend with one token per row; the row's own key is in its page already.

    On a GPU nothing is read by the host, and the launch depends on the shapes only.

    Args:
        query: `[rows, num_heads, head_dim]`.
        key_pages: `[num_pages, 64, num_kv_heads, head_dim]`.
        value_pages: `[num_pages, 64, num_kv_heads, value_dim]`.
        block_table: page numbers per request, `[max_seqs, max_pages]` int32; entries beyond a request's length are
            not looked at.
        row_seqs: each row's row of the block table, `[rows]` int32; -1 for a padding row.
        lengths: how many keys each row sees, its own included, `[rows]` int32; 0 gives zeros.
        options: of the layer.
        out: contiguous `[rows, num_heads, value_dim]`, written if given.
        workspace: from `decode_workspace`; None makes one for this call.
        tables_ready: the launch just before this one (`write_keys`, usually) wrote neither `row_seqs` nor `lengths`.
            The kernel then reads them while that launch ends, about 1 us earlier.

    Returns:
        `[rows, num_heads, value_dim]`; padding rows are zeros.

    Raises:
        ConfigurationError: for shapes that do not fit together.
    """
    out = _check(query, key_pages, value_pages, block_table, lengths, options, out)
    if not query.shape[0]:
        return out
    if _why_dense(query.device) is not None:
        return _decode_dense(query, key_pages, value_pages, block_table, row_seqs, lengths, options, out)
    from lockstep.engine import attention_kernels

    if workspace is None:
        num_heads, (num_kv_heads, value_dim) = query.shape[1], value_pages.shape[2:]
        workspace = decode_workspace(query.shape[0], num_heads, num_kv_heads, value_dim, query.device)
    assert workspace is not None
    attention_kernels.attend_decode(
        _dense_heads(query), key_pages, value_pages, block_table, row_seqs, lengths, options, out, workspace,
        tables_ready=tables_ready,
    )  # fmt: skip
    return out


def attend_prompts(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, seqs: Tensor, cu_rows: Tensor,
    lengths: Tensor, options: AttentionOptions, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend with the last rows of some requests, packed; their own keys are in pages already.

    Row `j` of a request with `n` rows and length `l` is at position `l - n + j` and sees the keys up to its own. On a
    GPU nothing is read by the host, and the launch depends on the shapes only.

    Args:
        query: `[rows, num_heads, head_dim]`.
        key_pages: as for `attend_decode`, like `value_pages`, `block_table`, `options` and `out`.
        value_pages: see there.
        block_table: see there.
        seqs: each request's row of the block table, `[n]` int32.
        cu_rows: where each request's rows begin, and their end, `[n + 1]` int32. Rows of `query` before its first and
            beyond its last entry are not touched.
        lengths: keys of each request, own rows included, `[n]` int32.
        options: of the layer.
        out: see there.

    Returns:
        `[rows, num_heads, value_dim]`.

    Raises:
        ConfigurationError: for shapes that do not fit together.
    """
    out = _check(query, key_pages, value_pages, block_table, lengths, options, out)
    if not query.shape[0]:
        return out
    if _why_dense(query.device) is None:
        from lockstep.engine import attention_kernels

        attention_kernels.attend_prompts(
            _dense_heads(query), key_pages, value_pages, block_table, seqs, cu_rows, lengths, options, out
        )
        return out
    for i, (start, stop) in enumerate(itertools.pairwise(cu_rows.tolist())):
        if start < stop:
            request = seqs[i : i + 1], lengths[i : i + 1]
            pages = key_pages, value_pages, block_table
            out[start:stop] = _attend_requests(query[None, start:stop], *pages, *request, options)[0]
    return out


def _check(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, lengths: Tensor,
    options: AttentionOptions, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Look at shapes and dtypes, which costs the host nothing; return room for the result."""
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


def _dense_heads(rows: Tensor) -> Tensor:
    """A head's numbers next to each other; any strides of rows and heads."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _why_dense(device: torch.device) -> str | None:
    """None if the Triton kernels run on this device, else why they do not."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernels need a CUDA GPU"
    return None if _has_triton() else "Triton is not installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# Without Triton: keys are gathered


def _decode_dense(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, row_seqs: Tensor, lengths: Tensor,
    options: AttentionOptions, out: Tensor,
) -> Tensor:  # fmt: skip
    """Rows of similar length in batched calls: the keys that they see differ at most by a factor of two."""
    key_bytes = key_pages.shape[2] * key_pages.shape[3] * query.element_size()
    classes: dict[int, list[int]] = {}
    for row, (seq, length) in enumerate(zip(row_seqs.tolist(), lengths.tolist(), strict=True)):
        seen = 0 if seq < 0 else min(length, options.sliding_window or length)
        classes.setdefault(seen.bit_length(), []).append(row)
    out[classes.pop(0, [])] = 0
    for bits, all_rows in classes.items():
        rows_per_call = max(1, CPU_CALL_BYTES // (key_bytes << bits))
        for start in range(0, len(all_rows), rows_per_call):
            rows = all_rows[start : start + rows_per_call]
            requests = row_seqs[rows], lengths[rows]
            pages = key_pages, value_pages, block_table
            out[rows] = _attend_requests(query[rows].unsqueeze(1), *pages, *requests, options)[:, 0]
    return out


def _attend_requests(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, seqs: Tensor, lengths: Tensor,
    options: AttentionOptions,
) -> Tensor:  # fmt: skip
    """Attend with the last rows of `n` requests, `[n, rows, num_heads, head_dim]`, all of them in one product."""
    num_requests, num_rows, num_heads, head_dim = query.shape
    longest, lengths = int(lengths.max()), lengths.long()[:, None]
    window = options.sliding_window or longest
    seen = lengths.clamp(max=window + num_rows - 1)  # keys before the first row's window are seen by no row
    position = lengths - seen + torch.arange(int(seen.max()), device=query.device)
    # Beyond a request's keys its last one again: memory that nobody wrote may hold NaN, which no mask takes out.
    existing = torch.minimum(position, lengths - 1)
    entries = block_table[seqs.long()].long().gather(1, existing // PAGE_SIZE) * PAGE_SIZE + existing % PAGE_SIZE
    key, value = (
        pages.view(-1, *pages.shape[2:])[entries].transpose(1, 2).to(query.dtype) for pages in (key_pages, value_pages)
    )
    is_causal = num_requests == 1 and 1 < num_rows == longest <= window
    mask = None
    if not is_causal and (num_rows > 1 or int(seen.min()) < int(seen.max())):
        own = lengths - num_rows + torch.arange(num_rows, device=query.device)
        mask = (position[:, None] <= own[:, :, None]) & (position[:, None] > own[:, :, None] - window)
        mask = mask[:, None]
    if num_rows == 1:  # the heads of one key head become rows of one product: keys are not repeated
        heads = query.reshape(num_requests, key.shape[1], -1, head_dim)
        return attend_batch(heads, key, value, mask, options, False).reshape(num_requests, 1, num_heads, -1)
    key, value = (part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (key, value))
    return attend_batch(query.transpose(1, 2), key, value, mask, options, is_causal).transpose(1, 2)


def attend_batch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions, is_causal: bool
) -> Tensor:
    """Attention of equal numbers of heads, `[batch, heads, rows, value_dim]`.

    Query rows of decoding may be heads of one key head, so sinks are spread over heads and rows alike.
    """
    if options.sinks is None and options.softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=options.scaling
        )
    num_heads, num_rows, num_keys = query.shape[1], query.shape[2], key.shape[2]
    scores = query @ key.transpose(2, 3) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if is_causal:
        mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(1, num_heads, -1, 1).expand(query.shape[0], -1, num_rows, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :num_keys].to(value.dtype)
    return weights @ value
