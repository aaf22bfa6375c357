"""Attention over paged keys and values, for all rows of a step at once.

A layer's keys are in pages of 64 tokens; the block table lists each request's pages. Which request a row belongs to and
how many keys it sees are read from device memory, so one CUDA graph serves every step of its size. On GPUs the kernels
are ours, in Triton; elsewhere PyTorch's `scaled_dot_product_attention` runs over gathered keys. `attention_name` says
which of them a device gets, and why.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

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
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class DecodeWorkspace:
    """Memory for pieces of rows, kept from call to call. Calls that share one must be on the same stream.

    Attributes:
        partials: unnormalised sums of values, float32.
        stats: their largest score and sum of weights, float32.
        arrivals: pieces that have arrived, per row and key head, int32; zeros between calls.
    """

    partials: torch.Tensor
    stats: torch.Tensor
    arrivals: torch.Tensor


def decode_workspace(
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    value_dim: int,
    device: torch.device | str,
    *,
    programs: int | None = None,
) -> DecodeWorkspace | None:
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
    if _uses_triton(device) is not None:
        return None
    from lockstep.engine import attention_kernels

    programs = programs or attention_kernels.max_programs(device, attention_kernels.DecodeTiles())
    group_pad = attention_kernels.group_pad(num_heads // num_kv_heads)
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
    reason = _uses_triton(torch.device(device))
    return "Triton over pages" if reason is None else f"scaled_dot_product_attention ({reason})"


def write_keys(
    key: torch.Tensor, value: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, slots: torch.Tensor
) -> None:
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
    if _uses_triton(key.device) is None:
        from lockstep.engine import attention_kernels

        attention_kernels.write_keys(_dense_rows(key), _dense_rows(value), key_pages, value_pages, slots)
        return
    kept = slots >= 0
    places = slots[kept].long()
    for rows, pages in ((key, key_pages), (value, value_pages)):
        pages.view(-1, *pages.shape[2:])[places] = rows[kept].to(pages.dtype)


def attend_decode(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    row_seqs: torch.Tensor,
    lengths: torch.Tensor,
    options: AttentionOptions,
    *,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    tables_ready: bool = False,
) -> torch.Tensor:
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
    _check(query, key_pages, value_pages, block_table, lengths, options)
    if out is None:
        out = query.new_empty(*query.shape[:2], value_pages.shape[3])
    if not query.shape[0]:
        return out
    if _uses_triton(query.device) is not None:
        return _decode_dense(query, key_pages, value_pages, block_table, row_seqs, lengths, options, out)
    from lockstep.engine import attention_kernels

    if workspace is None:
        num_heads, (num_kv_heads, value_dim) = query.shape[1], value_pages.shape[2:]
        workspace = decode_workspace(query.shape[0], num_heads, num_kv_heads, value_dim, query.device)
    assert workspace is not None
    attention_kernels.attend_decode(
        _dense_rows(query), key_pages, value_pages, block_table, row_seqs, lengths, options, out,
        workspace.partials, workspace.stats, workspace.arrivals, tables_ready=tables_ready,
    )  # fmt: skip
    return out


def attend_prompts(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    seqs: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    options: AttentionOptions,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the last rows of some requests, packed; their own keys are in pages already.

    Row `j` of a request with `n` rows and length `l` is at position `l - n + j` and sees the keys up to its own. On a
    GPU nothing is read by the host, and the launch depends on the shapes only.

    Args:
        query: `[rows, num_heads, head_dim]`.
        key_pages: `[num_pages, 64, num_kv_heads, head_dim]`.
        value_pages: `[num_pages, 64, num_kv_heads, value_dim]`.
        block_table: page numbers per request, `[max_seqs, max_pages]` int32.
        seqs: each request's row of the block table, `[n]` int32.
        cu_rows: where each request's rows begin, and their end, `[n + 1]` int32. Rows of `query` before its first and
            beyond its last entry are not touched.
        lengths: keys of each request, own rows included, `[n]` int32.
        options: of the layer.
        out: contiguous `[rows, num_heads, value_dim]`, written if given.

    Returns:
        `[rows, num_heads, value_dim]`.

    Raises:
        ConfigurationError: for shapes that do not fit together.
    """
    _check(query, key_pages, value_pages, block_table, lengths, options)
    if out is None:
        out = query.new_empty(*query.shape[:2], value_pages.shape[3])
    if not query.shape[0]:
        return out
    if _uses_triton(query.device) is not None:
        return _prompts_dense(query, key_pages, value_pages, block_table, seqs, cu_rows, lengths, options, out)
    from lockstep.engine import attention_kernels

    attention_kernels.attend_prompts(
        _dense_rows(query), key_pages, value_pages, block_table, seqs, cu_rows, lengths, options, out
    )
    return out


def _check(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    options: AttentionOptions,
) -> None:
    """Shapes and dtypes, which cost the host nothing to look at."""
    _, num_heads, head_dim = query.shape
    num_kv_heads = key_pages.shape[2]
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.dim() != 4 or pages.shape[1] != PAGE_SIZE or pages.shape[2] != num_kv_heads:
            raise ConfigurationError(
                f"{name} must be [num_pages, {PAGE_SIZE}, {num_kv_heads}, dim], got {list(pages.shape)}"
            )
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


def _dense_rows(rows: torch.Tensor) -> torch.Tensor:
    """A head's numbers next to each other; any strides of rows and heads."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


# Which kernels


def _uses_triton(device: torch.device) -> str | None:
    """None if the Triton kernels run on this device, else why they do not."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return "the Triton kernels need a CUDA GPU"
    if not _has_triton():
        return "Triton is not installed"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _entries(block_table: torch.Tensor, seqs: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Where the first `width` keys of each request are, `[n, width]` int64, in a cache seen as `[num_pages * 64, ...]`.

    Beyond a request's length its last key again: memory that nobody wrote may hold NaN, which no mask takes out.
    """
    position = torch.arange(width, device=block_table.device)
    position = torch.minimum(position[None, :], (lengths[:, None] - 1).clamp_min(0))
    pages = block_table[seqs.long()].long().gather(1, position // PAGE_SIZE)
    return pages * PAGE_SIZE + position % PAGE_SIZE


def _gather(pages: torch.Tensor, entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys of some requests, `[n, num_kv_heads, width, dim]`."""
    rows = pages.view(-1, *pages.shape[2:]).index_select(0, entries.flatten())
    return rows.view(*entries.shape, *rows.shape[1:]).transpose(1, 2).to(dtype)


def _decode_dense(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    row_seqs: torch.Tensor,
    lengths: torch.Tensor,
    options: AttentionOptions,
    out: torch.Tensor,
) -> torch.Tensor:
    """Rows of similar length in batched calls: lengths of one differ at most by a factor of two."""
    num_kv_heads, value_dim = value_pages.shape[2:]
    num_heads, head_dim = query.shape[1:]
    table, key_bytes = block_table.long(), num_kv_heads * head_dim * query.element_size()
    classes: dict[int, list[tuple[int, int, int, int]]] = {}
    for row, (seq, length) in enumerate(zip(row_seqs.tolist(), lengths.tolist(), strict=True)):
        length = 0 if seq < 0 else length
        seen = min(length, options.sliding_window or length)
        classes.setdefault(seen.bit_length(), []).append((row, seq, length, seen))
    for bits, all_members in classes.items():
        if not bits:
            out[[row for row, *_ in all_members]] = 0
            continue
        rows_per_call = max(1, CPU_CALL_BYTES // (key_bytes << bits))
        for i in range(0, len(all_members), rows_per_call):
            rows, seqs, keys, seen_keys = torch.tensor(all_members[i : i + rows_per_call], device=query.device).unbind(
                1
            )
            counts = [seen for *_, seen in all_members[i : i + rows_per_call]]
            lane = torch.arange(max(counts), device=query.device)
            # Beyond a row's keys its last one again, as in `_entries`.
            position = torch.minimum((keys - seen_keys)[:, None] + lane, keys[:, None] - 1)
            pages = table[seqs[:, None], position // PAGE_SIZE]
            entries = pages * PAGE_SIZE + position % PAGE_SIZE
            # The heads of one key head become rows of one product: keys are not repeated.
            result = attend_batch(
                query[rows].view(len(counts), num_kv_heads, -1, head_dim),
                _gather(key_pages, entries, query.dtype),
                _gather(value_pages, entries, query.dtype),
                (lane < seen_keys[:, None])[:, None, None, :] if min(counts) < max(counts) else None,
                options,
                False,
            )
            out[rows] = result.reshape(len(counts), num_heads, value_dim)
    return out


def _prompts_dense(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    seqs: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    options: AttentionOptions,
    out: torch.Tensor,
) -> torch.Tensor:
    """Request by request."""
    groups = query.shape[1] // value_pages.shape[2]
    ends = cu_rows.tolist()
    for i, length in enumerate(lengths.tolist()):
        start, stop = ends[i], ends[i + 1]
        num_rows = stop - start
        if not num_rows:
            continue
        # The first row sees the window's keys before it; earlier ones are seen by no row.
        first = max(0, length - num_rows + 1 - options.sliding_window) if options.sliding_window else 0
        entries = _entries(block_table, seqs[i : i + 1], lengths[i : i + 1], length)[:, first:]
        key, value = _gather(key_pages, entries, query.dtype), _gather(value_pages, entries, query.dtype)
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mask = None
        if num_rows > 1 and not (num_rows == length <= (options.sliding_window or length)):
            position = torch.arange(length - num_rows, length, device=query.device)[:, None]
            seen = torch.arange(first, length, device=query.device)[None, :]
            mask = (seen <= position) & (seen > position - (options.sliding_window or length))
        rows = query[start:stop].transpose(0, 1)[None]
        attended = attend_batch(rows, key, value, mask, options, num_rows > 1 and mask is None)
        out[start:stop] = attended[0].transpose(0, 1)
    return out


def attend_batch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    is_causal: bool,
) -> torch.Tensor:
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
