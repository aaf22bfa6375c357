"""Compare a run's outputs with one process that holds all experts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.models.experts_modules import find_experts
from lockstep.models.loading import load_pretrained
from lockstep.moe.fp8 import dequantise_experts
from lockstep.runner.options import RunOptions
from lockstep.runner.ranks import load_tokenizer
from lockstep.runner.run import load_requests, prompt_ids

LOGIT_TOLERANCE = {"bfloat16": 0.15, "float16": 0.05}
"""Logit tolerance, as a share of the position's largest logit. In float32 tokens are compared."""
OUTSIDE_SHARE = 0.03
"""Share of tokens that may lie outside of it in dtypes that round. A router whose scores tie within rounding sends a
token to another expert, after which logits differ by any amount: one process in bfloat16 differs from itself in float32
by 0.03 at the 90th and 0.34 at the 99th percentile (tiny model, 240 tokens)."""


@dataclass(frozen=True)
class Verification:
    """Result of a comparison.

    `verified` is None where nothing was compared. `mismatches` are requests that differ, are missing, or have another
    length, `first` says what is wrong with the first; in dtypes that round, tokens count that are further off than
    `LOGIT_TOLERANCE`, and requests differ only where more than `OUTSIDE_SHARE` of all tokens are.
    """

    verified: bool | None
    compared_tokens: int = 0
    outside_tolerance: int = 0
    mismatches: int = 0
    first: str = ""


def verify(options: RunOptions, on_progress: Callable[[int, int], None] | None = None) -> Verification:
    """Compare a run's `outputs.jsonl` with the whole model in this process, by Transformers alone.

    Each request is one forward pass over its prompt and the run's tokens, so every token is compared with the one that
    the model prefers after those before it. In float32 all must be equal. In other dtypes a token that differs counts
    only where the two best logits lie further apart than the tolerance, and the logprob of each chosen token must agree
    within it. `on_progress` is called with compared and all tokens.
    """
    tokenizer = load_tokenizer(options.model)
    requests = load_requests(options, tokenizer)
    lines = Path(options.out, "outputs.jsonl").read_bytes().splitlines()
    outputs = {output["request_id"]: output for output in map(json.loads, lines)}
    if not outputs or not requests:
        return Verification(None)
    dtype, device = getattr(torch, options.dtype), options.device or "cpu"
    model = load_pretrained(options.model, dtype=dtype, device=device, quantize_experts=options.quantize_experts)
    for _, module in find_experts(model):
        dequantise_experts(module, dtype)  # Transformers runs no experts in fp8 on a CPU
    problems: dict[int, str] = {}
    differing: dict[int, str] = {}
    for request in requests:
        number, output = request.request_id, outputs.get(request.request_id)
        if output is None:
            problems[number] = "is missing"
        elif len(output["tokens"]) != request.max_new_tokens:
            problems[number] = f"has {len(output['tokens'])} tokens in place of {request.max_new_tokens}"
    comparable = [request for request in requests if request.request_id not in problems]
    total = sum(request.max_new_tokens for request in comparable)
    compared = outside = 0
    vocab_size = model.config.get_text_config().vocab_size
    for request in comparable:
        tokens, logprobs = outputs[request.request_id]["tokens"], outputs[request.request_id].get("logprobs")
        rows = _logits(model, prompt_ids(request, tokenizer, vocab_size, options.seed), tokens)
        for position, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            problem = _compare(token, row, logprobs[position] if logprobs else None, options.dtype)
            if problem:
                outside += 1
                differing.setdefault(request.request_id, f"differs at token {position}: {problem}")
        compared += len(tokens)
        if on_progress is not None:
            on_progress(compared, total)
    if options.dtype == "float32" or outside > OUTSIDE_SHARE * compared:
        problems.update(differing)
    first = f"request {min(problems)} {problems[min(problems)]}" if problems else ""
    return Verification(not problems, compared, outside, len(problems), first)


@torch.no_grad()
def _logits(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the model's logits before each of `tokens`, `[num_tokens, vocabulary]`, float32."""
    ids = torch.tensor([prompt + tokens[:-1]], device=model.get_input_embeddings().weight.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return logits[-len(tokens) :].float()


def _compare(got: int, logits: torch.Tensor, run_logprob: float | None, dtype: str) -> str:
    """Return the error of one token, or an empty string."""
    (first, second), (expected, _) = (values.tolist() for values in torch.topk(logits, 2))
    if dtype == "float32":
        return "" if got == expected else f"{got}, one process generates {expected}"
    tolerance = LOGIT_TOLERANCE[dtype] * float(logits.abs().max())
    if got != expected and first - second > tolerance:
        return f"{got}, one process generates {expected} and leads by {first - second:.3g} (tolerance {tolerance:.3g})"
    logprob = float(logits[got] - logits.logsumexp(0))
    if run_logprob is not None and abs(run_logprob - logprob) > tolerance:
        return f"logprob {run_logprob:.4g}, one process has {logprob:.4g} (tolerance {tolerance:.3g})"
    return ""
