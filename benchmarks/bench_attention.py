"""Attention over pages on one GPU: ours, `fa3-fwd` and PyTorch's on keys that lie in order.

    python benchmarks/bench_attention.py --out attention.jsonl

32 query heads, 4 key heads of 128, bfloat16. Each backend is checked against float32, then timed: a CUDA graph of
several calls, each on keys of its own, after the L2 cache was overwritten, as the layers of a model find it. Each line
is the median of several replays. `tbs` counts every key and value that is seen once. Decode baselines have equal
lengths only, and their keys lie in order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from lockstep.engine import attention, attention_launch
from lockstep.engine.attention import PAGE_SIZE, AttentionOptions
from lockstep.engine.attention_launch import DecodeTiles, PromptTiles

HEADS, KV_HEADS, DIM = 32, 4, 128
OPTIONS = AttentionOptions(DIM**-0.5)
KEY_BYTES = 2 * KV_HEADS * DIM * 2  # a token's key and value
DECODE_TILES = [  # tile, stages, num_warps, programs_per_sm, max_pieces
    (64, 3, 4, 2, 32),
    (64, 3, 4, 3, 32),
    (64, 3, 4, 2, 16),
    (64, 3, 4, 2, 64),
    (64, 4, 4, 2, 32),
    (64, 2, 4, 4, 32),
    (32, 4, 4, 4, 32),
    (32, 3, 2, 5, 32),
    (64, 3, 8, 2, 32),
]
PROMPT_TILES = [(128, 64, 3, 8), (128, 64, 2, 8), (64, 64, 3, 4), (128, 32, 3, 4)]  # block_m, tile, stages, num_warps
UNEVEN = {
    "1 of 8192, 63 of 64": [8192] + [64] * 63,
    "64 log-uniform to 4096": [int(64 ** (1 + i / 126)) for i in range(64)],
    "20 of 1024, 44 padding": [1024] * 20 + [0] * 44,
}
PROMPTS = [  # requests, rows of each, keys before them
    (1, 4096, 0),
    (4, 1024, 0),
    (64, 64, 0),
    (1, 4096, 4096),
    (4, 128, 4096),
    (64, 4, 1020),
]
MAX_CALLS = 16


class Pool:
    """Pages for every case, and numbers of them in random order."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        shape = (num_pages, PAGE_SIZE, KV_HEADS, DIM)
        self.keys = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        self.values = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def tables(self, lengths: list[int]) -> list[torch.Tensor]:
        """One block table per call, on pages of its own while there are enough."""
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        calls = max(1, min(MAX_CALLS, self.num_pages // max(1, sum(counts))))
        order = torch.randperm(self.num_pages, dtype=torch.int32).tolist()
        tables = []
        for _ in range(calls):
            rows = [[order.pop() for _ in range(count)] for count in counts]
            tables.append([row + [0] * (max(counts) - len(row)) for row in rows])
        return [torch.tensor(table, dtype=torch.int32, device="cuda") for table in tables]

    def in_order(self, call: int, requests: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one call whose requests lie one after another, `[requests, length, kv_heads, dim]`."""
        count = requests * length
        start = call * count
        return tuple(
            pages.view(-1, KV_HEADS, DIM)[start : start + count].view(requests, length, KV_HEADS, DIM)
            for pages in (self.keys, self.values)
        )


def time_us(step, calls: int, pool: Pool, samples: int = 7) -> float:
    """Return the median time of one call of `step(call)`, us."""
    step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            step(call)
    times = []
    for sample in range(samples + 1):
        pool.flush.fill_(sample)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times[1:])


def plainly(query, keys, values, causal_rows: int = 1):
    """In float32: a request's last rows, `[rows, heads, dim]`, over its keys, `[length, kv_heads, dim]`."""
    keys, values = (x.float().repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    scores = torch.einsum("rhd,khd->hrk", query.float(), keys) * OPTIONS.scaling
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device="cuda").tril(keys.shape[0] - query.shape[0])
    return torch.einsum("hrk,khd->rhd", torch.softmax(scores.masked_fill(~seen, float("-inf")), -1), values)


def check(out, expected, name: str) -> None:
    error = ((out.float() - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"{name}: relative error {error}"


def fa3_module():
    """FlashAttention 3's interface, or None."""
    try:
        import fa3_fwd_interface
    except ImportError:
        return None

    return fa3_fwd_interface


def decode_case(pool: Pool, case: str, lengths: list[int], tiles: list[DecodeTiles], fa3):
    """Yield `(backend, us)` of one batch of decode rows."""
    rows = len(lengths)
    tables = pool.tables(lengths)
    calls = len(tables)
    query = torch.randn(rows, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    sees = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    row_seqs = torch.arange(rows, dtype=torch.int32, device="cuda").masked_fill(sees == 0, -1)
    out = torch.empty_like(query)
    workspace = attention.decode_workspace(rows, HEADS, KV_HEADS, DIM, "cuda", programs=132 * 8)
    checked = sorted({0, rows // 2, rows - 1, lengths.index(max(lengths))})
    expected = {}
    for row in checked:
        pages = tables[0][row, : -(-lengths[row] // PAGE_SIZE)].long()
        keys, values = (p[pages].view(-1, KV_HEADS, DIM)[: lengths[row]] for p in (pool.keys, pool.values))
        expected[row] = plainly(query[row : row + 1], keys, values)[0] if lengths[row] else out[row].float() * 0
    for tile, ready in [(tiles[0], True), *((tile, False) for tile in tiles)]:

        def step(call, tile=tile, ready=ready):
            attention_launch.attend_decode(
                query, pool.keys, pool.values, tables[call], row_seqs, sees, OPTIONS, out, workspace, ready, tile
            )

        out.fill_(float("nan"))
        step(0)
        for row in checked:
            if lengths[row]:
                check(out[row], expected[row], f"{tile} {case} row {row}")
            else:
                assert not out[row].any(), "a padding row is not zero"
        yield f"triton {tuple(vars(tile).values())}" + " ready" * ready, time_us(step, calls, pool)
    if len(set(lengths)) > 1 or not lengths[0]:
        return
    caches = [pool.in_order(call, rows, lengths[0]) for call in range(calls)]
    grouped = query.view(rows, KV_HEADS, HEADS // KV_HEADS, DIM)

    def sdpa(call):
        keys, values = (x.transpose(1, 2) for x in caches[call])
        return torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, scale=OPTIONS.scaling)

    wanted = plainly(query[:1], caches[0][0][0], caches[0][1][0])[0]
    check(sdpa(0)[0].reshape(HEADS, DIM), wanted, "sdpa")
    yield "sdpa, keys in order", time_us(sdpa, calls, pool)
    if fa3 is not None:

        def flash(call):
            return fa3.flash_attn_with_kvcache(
                query[:, None], *caches[call], cache_seqlens=sees, softmax_scale=OPTIONS.scaling, causal=True
            )

        check(flash(0)[0, 0], wanted, "fa3")
        yield "fa3-fwd, keys in order", time_us(flash, calls, pool)


def prompt_case(pool: Pool, requests: int, rows: int, past: int, tiles: list[PromptTiles], fa3):
    """Yield `(backend, us)` of `requests` prompts of `rows` rows each, behind `past` keys."""
    length = past + rows
    tables = pool.tables([length] * requests)[:4]
    calls = len(tables)
    query = torch.randn(requests * rows, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    seqs = torch.arange(requests, dtype=torch.int32, device="cuda")
    cu_rows = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * rows
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    position = torch.arange(length, device="cuda")
    entries = tables[0][:, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
    keys, values = (p.view(-1, KV_HEADS, DIM)[entries[-1]] for p in (pool.keys, pool.values))
    few = min(rows, 256)
    expected = plainly(query[-few:], keys, values)
    out = torch.empty_like(query)
    for tile in tiles:

        def step(call, tile=tile):
            attention_launch.attend_prompts(
                query, pool.keys, pool.values, tables[call], seqs, cu_rows, lengths, OPTIONS, out, tile
            )

        step(0)
        check(out[-few:], expected, f"{tile} {requests} x {rows}")
        yield f"triton {tuple(vars(tile).values())}", time_us(step, calls, pool, 5)
    if fa3 is not None and not past:
        order = [table[:, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE for table in tables]
        fresh = [tuple(p.view(-1, KV_HEADS, DIM)[o.flatten()] for p in (pool.keys, pool.values)) for o in order]

        def flash(call):
            return fa3.flash_attn_varlen_func(
                query, *fresh[call], cu_rows, cu_rows, rows, rows, softmax_scale=OPTIONS.scaling, causal=True
            )

        check(flash(0)[-few:], expected, "fa3")
        yield "fa3-fwd", time_us(flash, calls, pool, 5)
    if not past:
        rows_first = query.view(requests, rows, HEADS, DIM).transpose(1, 2)
        caches = [[x.transpose(1, 2) for x in pool.in_order(call, requests, rows)] for call in range(calls)]

        def sdpa(call):
            return torch.nn.functional.scaled_dot_product_attention(
                rows_first, *caches[call], is_causal=True, scale=OPTIONS.scaling, enable_gqa=True
            )

        yield "sdpa, keys in order", time_us(sdpa, calls, pool, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="attention.jsonl")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 4, 64, 256))
    parser.add_argument("--lengths", type=int, nargs="*", default=(64, 1024, 4096, 8192))
    parser.add_argument(
        "--decode-tiles", type=json.loads, default=DECODE_TILES, help="[[tile, stages, warps, ...], ...]"
    )
    parser.add_argument("--prompt-tiles", type=json.loads, default=PROMPT_TILES)
    parser.add_argument("--max-gb", type=float, default=8.0, help="memory for keys and values")
    options = parser.parse_args()
    decode_tiles = [DecodeTiles(*tile) for tile in options.decode_tiles]
    prompt_tiles = [PromptTiles(*tile) for tile in options.prompt_tiles]
    began = time.monotonic()
    pool, fa3 = Pool(int(options.max_gb * 1e9) // (PAGE_SIZE * KEY_BYTES)), fa3_module()
    common = {
        "hardware": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": attention_launch.triton.__version__, "commit": options.commit,
        "attention": attention.attention_name("cuda"),
    }  # fmt: skip
    print(common, flush=True)

    def report(what, case, results, num_bytes, flops):
        for backend, us in results:
            record = {"what": what, "case": case, "backend": backend, "us": round(us, 2)}
            record |= (
                {"tbs": round(num_bytes / us / 1e6, 3)} if what == "decode" else {"tflops": round(flops / us / 1e6)}
            )
            with open(options.out, "a") as file:
                file.write(json.dumps(record | common) + "\n")
            speed = f"{record['tbs']:6.2f} TB/s" if what == "decode" else f"{record['tflops']:5} TFLOP/s"
            print(
                f"{what:7} {case:24} {backend:34} {us:9.1f} us {speed}  ({time.monotonic() - began:.0f} s)", flush=True
            )

    cases = {f"{rows} of {length}": [length] * rows for length in options.lengths for rows in options.rows} | UNEVEN
    for case, lengths in cases.items():
        if sum(lengths) <= pool.num_pages * PAGE_SIZE:
            report("decode", case, decode_case(pool, case, lengths, decode_tiles, fa3), sum(lengths) * KEY_BYTES, 0)
    for requests, rows, past in PROMPTS:
        seen = rows * past + rows * (rows + 1) // 2
        case = f"{requests} x {rows}" + f" behind {past}" * bool(past)
        results = prompt_case(pool, requests, rows, past, prompt_tiles, fa3)
        report("prompts", case, results, 0, requests * seen * HEADS * DIM * 4)


if __name__ == "__main__":
    main()
