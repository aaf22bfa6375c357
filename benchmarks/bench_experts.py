"""The local experts on one GPU: our kernels for few rows, `grouped_mm`, and sorting and padding first.

    python benchmarks/bench_experts.py --out experts.jsonl

Checked against a loop over the experts, then timed from CUDA graphs over several weight sets, so that nothing stays in
cache. `weights_tbs` counts the weights of the experts that have rows, once, in the bytes that they have: "fp8" and "fp8
rows too" hold them in float8_e4m3fn with a scale per 128 x 128 values. `copy_tbs`, in the same run, is what the GPU
copies: bytes read and written.
"""

# ruff: noqa: B023 - the closures are called within their own turn of the loop
from __future__ import annotations

import argparse
import json
import statistics

import torch

SHAPES = {"deepseek-v3": (7168, 2048, 32), "qwen3-30b-a3b": (2048, 768, 64)}


def padded_experts(rows, gather_index, tokens_per_expert, gate_up, down, longest):
    """Sort, pad each expert to the longest, one batched product: what is done without grouped kernels."""
    starts = torch.cumsum(tokens_per_expert, 0) - tokens_per_expert
    lane = torch.arange(longest, device=rows.device)
    pair = (starts[:, None] + lane).clamp_max(gather_index.shape[0] - 1)
    x = rows[gather_index[pair].long()]
    g, u = torch.bmm(x, gate_up.transpose(1, 2)).chunk(2, -1)
    return torch.bmm(torch.nn.functional.silu(g) * u, down.transpose(1, 2))


def time_us(step, sets, samples=9):
    for i in range(sets):
        step(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            step(i)
    graph.replay()
    times = []
    for _ in range(samples):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / sets)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="experts.jsonl")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--tiles", type=json.loads, default=[(32, 128, 4)], help="[[columns, block_k, stages], ...]")
    parser.add_argument("--rows", type=float, nargs="*", default=(0.5, 1, 2, 4, 8, 16, 32, 64, 128, 512))
    options = parser.parse_args()
    options.tiles = [tuple(tile) for tile in options.tiles]
    from lockstep.moe.experts_kernels import Extras, few_rows_experts, many_rows_experts
    from lockstep.moe.fp8 import dequantise, quantise

    device = torch.device("cuda")
    copied = torch.zeros(2, 2**30, dtype=torch.uint8, device=device)
    copy_tbs = round(copied.numel() / time_us(lambda i: copied[1].copy_(copied[0]), 1) / 1e6, 3)
    print(f"copies {copy_tbs} TB/s")
    for shape, (hidden, intermediate, experts) in SHAPES.items():
        sets = 3
        weights = [
            (
                torch.randn(experts, 2 * intermediate, hidden, device=device, dtype=torch.bfloat16) / hidden**0.5,
                torch.randn(experts, hidden, intermediate, device=device, dtype=torch.bfloat16) / intermediate**0.5,
            )
            for _ in range(sets)
        ]
        in_fp8 = []
        for i, (gate_up, down) in enumerate(weights):
            (gate_up, gate_up_scales), (down, down_scales) = quantise(gate_up), quantise(down)
            in_fp8.append((gate_up, down, Extras(gate_up_scales=gate_up_scales, down_scales=down_scales)))
            # All that is compared computes with the same values.
            weights[i] = (
                dequantise(gate_up, gate_up_scales, torch.bfloat16), dequantise(down, down_scales, torch.bfloat16)
            )  # fmt: skip
        for mean in options.rows:
            total = int(mean * experts)
            chosen = torch.randint(experts, (total,), device=device)
            counts = torch.bincount(chosen, minlength=experts)
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
            num_rows = max(1, total // 2)
            rows = torch.randn(num_rows, hidden, device=device, dtype=torch.bfloat16)
            runs = rows.float().unflatten(1, (-1, 128))
            row_scales = runs.abs().amax(2) / 448
            rows_fp8 = (runs / row_scales[..., None]).flatten(1).to(torch.float8_e4m3fn)
            index = torch.randint(num_rows, (2 * total,), device=device, dtype=torch.int32)  # twice the pairs
            longest = int(counts.max())
            reference = torch.cat(
                [
                    (torch.nn.functional.silu(x @ gu[:intermediate].T) * (x @ gu[intermediate:].T)) @ d.T
                    for gu, d, x in zip(
                        *(w.float() for w in weights[0]), rows.float()[index[:total]].split(counts.tolist()),
                        strict=True,
                    )
                ]
            )  # fmt: skip
            steps = {
                **{
                    f"few_rows{t}": lambda i, t=t: few_rows_experts(rows, None, index, offsets, *weights[i], tile=t)
                    for t in options.tiles
                },
                "grouped_mm": lambda i: many_rows_experts(rows, None, index, offsets, *weights[i]),
                **{
                    f"few_rows{t} fp8": lambda i, t=t: few_rows_experts(rows, None, index, offsets, *in_fp8[i], tile=t)
                    for t in options.tiles
                },
                **{
                    f"few_rows{t} fp8, rows too": lambda i, t=t: few_rows_experts(
                        rows_fp8, row_scales, index, offsets, *in_fp8[i], tile=t
                    )
                    for t in options.tiles
                },
                "grouped_mm fp8": lambda i: many_rows_experts(rows, None, index, offsets, *in_fp8[i]),
                "padded": lambda i: padded_experts(rows, index, counts, *weights[i], longest),
            }
            values = int((counts > 0).sum()) * 3 * hidden * intermediate
            flops = total * 6 * hidden * intermediate
            line = []
            for name, step in steps.items():
                if name != "padded":
                    error = (step(0)[:total].float() - reference).norm() / reference.norm()
                    assert error < (5e-2 if "rows too" in name else 1e-2), f"{name}: relative error {error}"
                us, used = time_us(step, sets), values if "fp8" in name else 2 * values
                record = {
                    "shape": shape, "experts": experts, "rows_per_expert": mean, "backend": name, "us": round(us, 1),
                    "weights_tbs": round(used / us / 1e6, 3), "copy_tbs": copy_tbs,
                    "tflops": round(flops / us / 1e6, 1),
                    "hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": options.commit,
                }  # fmt: skip
                with open(options.out, "a") as file:
                    file.write(json.dumps(record) + "\n")
                line.append(f"{name} {us:8.1f} us {used / us / 1e6:5.2f} TB/s {flops / us / 1e6:6.1f} TFLOP/s")
            print(f"{shape} {mean:>5} rows/expert  " + "   ".join(line), flush=True)


if __name__ == "__main__":
    main()
