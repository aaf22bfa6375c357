# mypy: disable-error-code="no-untyped-def"
"""The small operations between a decoder layer's matrix products: three kernels for some 30 of Transformers'."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MOST_HEADS = 8  # heads of one program


@triton.jit
def add_rms_norm_kernel(
    rows, residual, weight, total, normed,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """`total = residual + rows; normed = rms_norm(total) * weight` for one row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    x = tl.load(rows + row * HIDDEN + column, inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(residual + row * HIDDEN + column, inside, other=0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty)  # the sum is rounded before it is normed, as two operations would
        tl.store(total + row * HIDDEN + column, x, inside)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / HIDDEN + EPS)
    w = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    tl.store(normed + row * HIDDEN + column, (x * scale * w).to(normed.dtype.element_ty), inside)


def add_rms_norm(
    rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rms_norm(rows + residual) * weight` and `rows + residual`, contiguous `[num_rows, hidden]` each."""
    num_rows, hidden = rows.shape
    normed = torch.empty_like(rows)
    total = rows if residual is None else torch.empty_like(rows)
    if num_rows:
        block = triton.next_power_of_2(hidden)
        add_rms_norm_kernel[(num_rows,)](
            rows, rows if residual is None else residual, weight, total, normed, HIDDEN=hidden, BLOCK=block, EPS=eps,
            ADDS=residual is not None, num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return normed, total


@triton.jit
def rope_and_write_kernel(
    qkv, cos, sin, q_weight, k_weight, slots, query, key_pages, value_pages,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_POW2: tl.constexpr, HEADS: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Norm and rotate up to `HEADS` heads of one row; queries go to `query`, keys and values into their pages."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    dim: tl.constexpr = 2 * HALF
    width: tl.constexpr = (Q_HEADS + 2 * KV_HEADS) * dim
    lane = tl.arange(0, HALF_POW2)
    used = lane < HALF
    slot = tl.load(slots + row).to(tl.int64)
    if block < q_blocks + kv_blocks:
        is_query = block < q_blocks
        head = tl.arange(0, HEADS) + tl.where(is_query, block, block - q_blocks) * HEADS
        num_heads = tl.where(is_query, Q_HEADS, KV_HEADS)
        mask = (head < num_heads)[:, None] & used[None, :]
        at = row * width + (head + tl.where(is_query, 0, Q_HEADS))[:, None] * dim + lane[None, :]
        first = tl.load(qkv + at, mask, other=0.0).to(tl.float32)
        second = tl.load(qkv + at + HALF, mask, other=0.0).to(tl.float32)
        if NORM:
            mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / dim
            scale = tl.rsqrt(mean + EPS)[:, None]
            q1, k1 = tl.load(q_weight + lane, used, other=0.0), tl.load(k_weight + lane, used, other=0.0)
            q2, k2 = tl.load(q_weight + HALF + lane, used, other=0.0), tl.load(k_weight + HALF + lane, used, other=0.0)
            w1, w2 = tl.where(is_query, q1, k1), tl.where(is_query, q2, k2)
            # As the two modules round: after the norm, before the rotation.
            first = (first * scale * w1.to(tl.float32)[None, :]).to(qkv.dtype.element_ty).to(tl.float32)
            second = (second * scale * w2.to(tl.float32)[None, :]).to(qkv.dtype.element_ty).to(tl.float32)
        c1 = tl.load(cos + row * dim + lane, used, other=0.0).to(tl.float32)[None, :]
        s1 = tl.load(sin + row * dim + lane, used, other=0.0).to(tl.float32)[None, :]
        c2 = tl.load(cos + row * dim + HALF + lane, used, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(sin + row * dim + HALF + lane, used, other=0.0).to(tl.float32)[None, :]
        rotated1 = (first * c1 - second * s1).to(query.dtype.element_ty)
        rotated2 = (second * c2 + first * s2).to(query.dtype.element_ty)
        if is_query:
            to = (row * Q_HEADS + head)[:, None] * dim + lane[None, :]
            tl.store(query + to, rotated1, mask)
            tl.store(query + to + HALF, rotated2, mask)
        else:
            to = (slot * KV_HEADS + head)[:, None] * dim + lane[None, :]
            tl.store(key_pages + to, rotated1, mask & (slot >= 0))
            tl.store(key_pages + to + HALF, rotated2, mask & (slot >= 0))
    else:
        head = tl.arange(0, HEADS) + (block - q_blocks - kv_blocks) * HEADS
        mask = (head < KV_HEADS)[:, None] & used[None, :]
        at = row * width + (head + Q_HEADS + KV_HEADS)[:, None] * dim + lane[None, :]
        to = (slot * KV_HEADS + head)[:, None] * dim + lane[None, :]
        tl.store(value_pages + to, tl.load(qkv + at, mask, other=0.0), mask & (slot >= 0))
        tl.store(value_pages + to + HALF, tl.load(qkv + at + HALF, mask, other=0.0), mask & (slot >= 0))


def rope_and_write(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    eps: float, slots: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, num_heads: int,
) -> torch.Tensor:  # fmt: skip
    """Norm and rotate queries and keys, write keys and values into their pages; return the queries, split by heads.

    `qkv` is `[num_rows, (num_heads + 2 * kv_heads) * head_dim]`, `cos` and `sin` `[num_rows, head_dim]`, all
    contiguous; norms are `[head_dim]` or None; a negative one of `slots` writes nothing.
    """
    num_rows, kv_heads, head_dim = qkv.shape[0], key_pages.shape[2], key_pages.shape[3]
    query = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if not num_rows:
        return query
    heads = min(_MOST_HEADS, triton.next_power_of_2(max(num_heads, kv_heads)))
    blocks = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(kv_heads, heads)
    rope_and_write_kernel[(num_rows, blocks)](
        qkv, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, slots, query, key_pages,
        value_pages, Q_HEADS=num_heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        HALF_POW2=triton.next_power_of_2(head_dim // 2), HEADS=heads, EPS=eps, NORM=q_norm is not None, num_warps=2,
    )  # fmt: skip
    return query


@triton.jit
def route_kernel(
    logits, ids, weights,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """The `TOPK` largest of one row's softmax; of equal ones the lowest expert first."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    x = tl.load(logits + row * EXPERTS + expert, expert < EXPERTS, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x))
    probability = x / tl.sum(x)
    rank = tl.arange(0, TOPK_POW2)
    chosen = tl.zeros((TOPK_POW2,), tl.int32)
    share = tl.zeros((TOPK_POW2,), tl.float32)
    left = tl.where(expert < EXPERTS, probability, -1.0)
    for k in tl.static_range(TOPK):
        best = tl.max(left)
        index = tl.min(tl.where(left == best, expert, BLOCK))
        chosen = tl.where(rank == k, index, chosen)
        share = tl.where(rank == k, best, share)
        left = tl.where(expert == index, -1.0, left)
    if RENORMALIZE:
        share = share / tl.sum(share)
    # Weights are rounded to the model's dtype, as its router rounds them.
    share = share.to(logits.dtype.element_ty).to(tl.float32)
    tl.store(ids + row * TOPK + rank, chosen, rank < TOPK)
    tl.store(weights + row * TOPK + rank, share, rank < TOPK)


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights, `[num_rows, top_k]`, by softmax and top-k of contiguous `[num_rows, num_experts]`."""
    num_rows, num_experts = logits.shape
    ids = torch.empty(num_rows, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_rows, top_k, dtype=torch.float32, device=logits.device)
    if num_rows:
        route_kernel[(num_rows,)](
            logits, ids, weights, EXPERTS=num_experts, BLOCK=triton.next_power_of_2(num_experts), TOPK=top_k,
            TOPK_POW2=triton.next_power_of_2(top_k), RENORMALIZE=renormalize, num_warps=1,
        )  # fmt: skip
    return ids, weights
