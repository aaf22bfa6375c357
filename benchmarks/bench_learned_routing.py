"""What routing that was learned looks like: load of experts, ties, agreement of lower precisions, gain of a placement.

    python benchmarks/bench_learned_routing.py examples/small_moe [--device cuda] [--random]

Runs on one device by Transformers; experts in fp8 by Lockstep. `--random` gives the router and the experts random
weights of the same shape, for comparison, without variants of fp8 experts. The last line is one JSON document.
"""

import argparse
import json
from pydoc_data import topics

import torch
from transformers import AutoTokenizer

import lockstep
from lockstep.moe.placement import Placement, place

SEQUENCE, NUM_RANKS, BLOCK = 256, 4, 128


def fp8_rows(rows: torch.Tensor) -> torch.Tensor:
    """Round rows to float8_e4m3fn and back, with a scale per 128 values, as they are on their way to the experts."""
    runs = torch.nn.functional.pad(rows.float(), (0, -rows.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = runs.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    rounded = (runs / scales).to(torch.float8_e4m3fn).float() * scales
    return rounded.flatten(-2)[..., : rows.shape[-1]].to(rows.dtype)


def logits_and_routers(model, windows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits `[tokens, vocabulary]` and each layer's router logits `[tokens, num_experts]`."""
    with torch.no_grad():
        outputs = [model(window[None], output_router_logits=True) for window in windows]
    logits = torch.cat([output.logits[0].float() for output in outputs])
    layers = zip(*(output.router_logits for output in outputs), strict=True)
    return logits, [torch.cat(layer) for layer in layers]


def variants(path: str, device: str, random: bool):
    """Yield a name and a model: float32, bfloat16, and bfloat16 with rows rounded to fp8 or experts held in fp8."""
    for name in ("float32", "bfloat16", "fp8 rows", "fp8 experts", "fp8 rows and experts"):
        dtype = torch.float32 if name == "float32" else torch.bfloat16
        torch.manual_seed(0)
        in_fp8 = name.endswith("experts")
        if random and in_fp8:
            continue
        model = lockstep.from_pretrained(path, dtype=dtype, device=device, quantize_experts="fp8" if in_fp8 else "none")
        if random:
            for key, parameter in model.named_parameters():
                if ".mlp." in key:
                    parameter.data.copy_(torch.randn(parameter.shape) * 0.02)
        for layer in model.model.layers:
            if name.startswith("fp8 rows"):
                layer.mlp.experts.register_forward_pre_hook(lambda _module, given: (fp8_rows(given[0]), *given[1:]))
        yield name, model


def loads_of(routers: list[torch.Tensor], top_k: int) -> list[list[int]]:
    """Return the rows that each expert gets, `[layers][num_experts]`."""
    return [
        torch.bincount(router.topk(top_k).indices.flatten(), minlength=router.shape[1]).tolist() for router in routers
    ]


def median_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the median over the tokens of the largest difference of a logit, over the token's largest logit."""
    return float(((logits - reference).abs().amax(-1) / reference.abs().amax(-1)).median())


def main() -> None:
    """Measure, and print a table and a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=64, help="Windows of 256 bytes.")
    parser.add_argument("--random", action="store_true")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    held_out = [topics.topics[name].strip() for name in sorted(topics.topics)][19::20]
    seen = topics.topics["specialnames"]
    tokens = torch.tensor(tokenizer("\n".join([*held_out, seen])).input_ids)
    windows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)[: arguments.windows].to(arguments.device)
    result: dict[str, object] = {"checkpoint": arguments.checkpoint, "random": arguments.random}
    for name, model in variants(arguments.checkpoint, arguments.device, arguments.random):
        logits, routers = logits_and_routers(model, windows)
        top_k = model.config.num_experts_per_tok
        if name == "float32":
            reference, expected, half = logits, routers, len(routers[0]) // 2
            loads = loads_of(routers, top_k)
            for layer, load in enumerate(loads):
                mean = sum(load) / len(load)
                print(f"layer {layer}: busiest expert {max(load) / mean:.2f} of the mean, least {min(load) / mean:.2f}")
            earlier = loads_of([router[:half] for router in routers], top_k)
            later = loads_of([router[half:] for router in routers], top_k)
            experts = len(loads[0])
            even = Placement.even(len(loads), experts, NUM_RANKS)
            result["load"] = loads
            result["busiest over mean"] = {"even": even.busiest_over_mean(later)}
            for spare in (0, 1, 2):
                placed = place(earlier, NUM_RANKS, -(-experts // NUM_RANKS) + spare)
                result["busiest over mean"][f"placed, {spare} spare per rank"] = placed.busiest_over_mean(later)
            for key, value in result["busiest over mean"].items():
                print(f"{NUM_RANKS} ranks, {key}: busiest rank {value:.3f} of the mean (load of the text's other half)")
            continue
        if name == "bfloat16":
            bfloat16 = logits
        ordered = [router.float().sort(-1, descending=True).values for router in routers]
        same_experts = [
            (router.topk(top_k).indices.sort().values == other.topk(top_k).indices.sort().values).all(-1)
            for router, other in zip(routers, expected, strict=True)
        ]
        found = {
            "equal greedy tokens": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
            "median logit error": median_error(logits, reference),
            "median logit error against bfloat16": median_error(logits, bfloat16),
            "equal experts": float(torch.stack(same_experts).float().mean()),
            "ties at the last expert": float(
                torch.stack([(one[:, top_k - 1] == one[:, top_k]).float().mean() for one in ordered]).mean()
            ),
        }
        result[name] = found
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
