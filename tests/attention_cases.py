"""Random steps over paged keys, checked against plain float64: on CPUs, in Triton's interpreter and on GPUs."""

import random
from dataclasses import dataclass

import torch

from lockstep.engine.attention import PAGE_SIZE, AttentionOptions, attend_decode, attend_prompts, write_keys


@dataclass(frozen=True)
class Shape:
    """A layer: heads, widths, and what its scores go through."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    value_dim: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def __str__(self):
        name = f"{self.kv_heads}x{self.group}x{self.head_dim}-{self.value_dim}"
        return name + f"-w{self.window}" * bool(self.window) + "-cap" * bool(self.softcap) + "-sinks" * self.sinks


SHAPES = [
    Shape(),
    Shape(kv_heads=4, group=8, head_dim=128, value_dim=128),
    Shape(kv_heads=3, group=1, head_dim=192, value_dim=128),
    Shape(kv_heads=1, group=7, head_dim=64, value_dim=64, window=100),
    Shape(kv_heads=2, group=8, window=128, sinks=True),
    Shape(kv_heads=2, group=2, head_dim=256, value_dim=256, softcap=30.0, window=65),
    Shape(kv_heads=1, group=20, head_dim=96, value_dim=80, softcap=20.0, sinks=True),
    Shape(kv_heads=2, group=1, head_dim=72, value_dim=40, window=1),
]
LENGTHS = [  # of decode rows; 0 is a padding row
    [1],
    [0],
    [1000],
    [0, 1, 63, 64, 65, 1000],
    [64, 0, 0, 640, 1, 300, 2, 128],
]
PROMPTS = [  # (past, rows) of each request
    [(0, 1)],
    [(0, 65)],
    [(0, 64), (0, 130), (0, 1)],
    [(935, 65), (0, 3), (63, 1), (64, 64), (1, 0)],
]


def device_tensor(numbers, device):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


class Cache:
    """Pages in shuffled order. Every place that no token was written to holds NaN."""

    def __init__(self, shape, lengths, dtype, device, seed=0, spare_pages=3, max_pages=None):
        draw = random.Random(seed)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.shape, self.device, self.dtype, self.generator = shape, device, dtype, generator
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        num_pages = sum(counts) + spare_pages
        free = list(range(num_pages))
        draw.shuffle(free)
        self.max_pages = max_pages or max([1, *counts]) + 1
        unused = free[-1]
        table = [[free.pop(0) for _ in range(count)] for count in counts]
        self.order = list(range(len(lengths)))
        draw.shuffle(self.order)  # request i has row `order[i]` of the table
        rows = [[]] * len(lengths)
        for i, row in enumerate(self.order):
            rows[row] = table[i] + [unused] * (self.max_pages - counts[i])
        self.block_table = device_tensor(rows, device)
        sizes = (num_pages, PAGE_SIZE, shape.kv_heads)
        self.key_pages = torch.full((*sizes, shape.head_dim), float("nan"), dtype=dtype, device=device)
        self.value_pages = torch.full((*sizes, shape.value_dim), float("nan"), dtype=dtype, device=device)
        self.keys = [self.randn(length, shape.kv_heads, shape.head_dim) for length in lengths]
        self.values = [self.randn(length, shape.kv_heads, shape.value_dim) for length in lengths]
        slots = [table[i][j // PAGE_SIZE] * PAGE_SIZE + j % PAGE_SIZE for i, n in enumerate(lengths) for j in range(n)]
        # Two rows without a slot, which would poison a page if they were written.
        poison = torch.full((2, shape.kv_heads, shape.head_dim), float("inf"), dtype=dtype, device=device)
        key = torch.cat([*self.keys, poison])
        value = torch.cat([*self.values, poison[..., :1].expand(-1, -1, shape.value_dim)])
        write_keys(key, value, self.key_pages, self.value_pages, device_tensor([*slots, -1, -64], device))

    def randn(self, *sizes):
        return torch.randn(*sizes, generator=self.generator).to(self.device, self.dtype)

    def options(self):
        shape = self.shape
        sinks = self.randn(shape.kv_heads * shape.group) if shape.sinks else None
        return AttentionOptions(1.7 * shape.head_dim**-0.5, shape.window, shape.softcap, sinks)


def attend_plainly(query, keys, values, options):
    """A request's last rows, `[rows, heads, head_dim]`, over its keys, in float64: `[rows, heads, value_dim]`."""
    num_rows, num_keys, group = query.shape[0], keys.shape[0], query.shape[1] // keys.shape[1]
    if not num_keys:
        return query.new_zeros(*query.shape[:2], values.shape[2], dtype=torch.float64)
    keys, values = keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
    scores = torch.einsum("rhd,khd->rhk", query.double(), keys) * options.scaling
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    position = torch.arange(num_keys, device=query.device)
    behind = position[num_keys - num_rows :, None] - position[None, :]
    seen = (behind >= 0) & (behind < (options.sliding_window or num_keys))
    scores = scores.masked_fill(~seen[:, None, :], float("-inf"))
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks.double()[None, :, None].expand(num_rows, -1, 1)], 2)
    return torch.einsum("rhk,khd->rhd", torch.softmax(scores, 2)[..., :num_keys], values)


def tolerance(dtype):
    return {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}[dtype]


def assert_near(out, expected, dtype):
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    error = (out.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error < tolerance(dtype), f"largest error {error}"


def check_decode(shape, lengths, dtype=torch.float32, device="cpu", seed=0, attend=attend_decode):
    """Decode rows against the reference. The query is a view of a wider tensor, as a fused projection gives it."""
    cache = Cache(shape, lengths, dtype, device, seed)
    options, heads = cache.options(), shape.kv_heads * shape.group
    query = cache.randn(len(lengths), heads + 2, shape.head_dim)[:, 1:-1]
    rows = [row if length else -1 for row, length in zip(cache.order, lengths, strict=True)]
    out = attend(
        query, cache.key_pages, cache.value_pages, cache.block_table, device_tensor(rows, device),
        device_tensor(lengths, device), options,
    )  # fmt: skip
    expected = [attend_plainly(query[i : i + 1], cache.keys[i], cache.values[i], options) for i in range(len(lengths))]
    assert_near(out, torch.cat(expected), dtype)
    assert not out[[i for i, length in enumerate(lengths) if not length]].any()


def check_prompts(shape, prompts, dtype=torch.float32, device="cpu", seed=0, attend=attend_prompts):
    """Rows at the end of requests against the reference."""
    lengths = [past + rows for past, rows in prompts]
    cache = Cache(shape, lengths, dtype, device, seed)
    options, heads = cache.options(), shape.kv_heads * shape.group
    num_rows = [rows for _, rows in prompts]
    query = cache.randn(sum(num_rows), heads, shape.head_dim)
    cu_rows = [sum(num_rows[:i]) for i in range(len(prompts) + 1)]
    out = attend(
        query, cache.key_pages, cache.value_pages, cache.block_table, device_tensor(cache.order, device),
        device_tensor(cu_rows, device), device_tensor(lengths, device), options,
    )  # fmt: skip
    expected = [
        attend_plainly(query[start:stop], keys, values, options)
        for start, stop, keys, values in zip(cu_rows[:-1], cu_rows[1:], cache.keys, cache.values, strict=True)
    ]
    assert_near(out, torch.cat(expected), dtype)
