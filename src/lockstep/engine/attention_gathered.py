"""The functions of `attention.py` by PyTorch's `scaled_dot_product_attention`: keys are gathered first."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lockstep.engine.attention import AttentionOptions
from lockstep.workload import PAGE_SIZE

_CALL_BYTES = 4 << 20  # of keys that one call copies out of their pages: more than the caches hold costs more time


def decode_workspace(*_: object) -> None:
    """Return None: no workspace is needed."""


def write_keys(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """Scatter the rows whose slot is not negative."""
    kept = slots >= 0
    places = slots[kept].long()
    for rows, pages in ((key, key_pages), (value, value_pages)):
        pages.view(-1, *pages.shape[2:])[places] = rows[kept].to(pages.dtype)


def attend_decode(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, row_seqs: Tensor, lengths: Tensor,
    options: AttentionOptions, out: Tensor, *_: object,
) -> None:  # fmt: skip
    """Attend in batches of rows whose numbers of keys differ at most by a factor of two."""
    key_bytes = key_pages.shape[2] * key_pages.shape[3] * query.element_size()
    classes: dict[int, list[int]] = {}
    for row, (seq, length) in enumerate(zip(row_seqs.tolist(), lengths.tolist(), strict=True)):
        seen = 0 if seq < 0 else min(length, options.sliding_window or length)
        classes.setdefault(seen.bit_length(), []).append(row)
    out[classes.pop(0, [])] = 0
    for bits, all_rows in classes.items():
        rows_per_call = max(1, _CALL_BYTES // (key_bytes << bits))
        for start in range(0, len(all_rows), rows_per_call):
            rows = all_rows[start : start + rows_per_call]
            requests = row_seqs[rows], lengths[rows]
            pages = key_pages, value_pages, block_table
            out[rows] = _attend_requests(query[rows].unsqueeze(1), *pages, *requests, options)[:, 0]


def attend_prompts(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, seqs: Tensor, cu_rows: Tensor,
    lengths: Tensor, options: AttentionOptions, out: Tensor,
) -> None:  # fmt: skip
    """One request after another."""
    for i, (start, stop) in enumerate(itertools.pairwise(cu_rows.tolist())):
        if start < stop:
            request = seqs[i : i + 1], lengths[i : i + 1]
            pages = key_pages, value_pages, block_table
            out[start:stop] = _attend_requests(query[None, start:stop], *pages, *request, options)[0]


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
    """Attention of equal numbers of heads, `[batch, heads, rows, value_dim]`; rows may be heads of one key head."""
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
