"""Compare a run's outputs with one process that holds all experts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.errors import ConfigurationError
from lockstep.models.loading import load_pretrained
from lockstep.models.packed import PackedEngine, top2_gap
from lockstep.runner.options import RunOptions
from lockstep.runner.run import DTYPES, load_requests, load_tokenizer, prompt_ids
from lockstep.workload import Request, SchedulerConfig, WorkloadScheduler

LOGIT_TOLERANCE = {"bfloat16": 0.15, "float16": 0.05}
"""How far logits may lie apart, as a share of the largest logit of the position. In float32 tokens are compared."""
OUTSIDE_SHARE = 0.03
"""Share of tokens that may lie outside of it in dtypes that round. A router whose scores tie within rounding sends a
token to another expert, after which logits differ by any amount: one process in bfloat16 differs from itself in float32
by 0.03 at the 90th and 0.34 at the 99th percentile (tiny model, 240 tokens)."""


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes:
        verified: True where every request was compared and none differs; None where nothing was compared.
        compared_tokens: generated tokens that were compared.
        outside_tolerance: tokens that lay further off than `LOGIT_TOLERANCE`, in dtypes that round.
        mismatches: requests that differ, are missing, or have another length; in dtypes that round, only where more
            than `OUTSIDE_SHARE` of all tokens lie outside of the tolerance.
        first: of these the first, in words.
    """

    verified: bool | None
    compared_tokens: int = 0
    outside_tolerance: int = 0
    mismatches: int = 0
    first: str = ""


def verify(options: RunOptions, on_progress: Callable[[int, int], None] | None = None) -> Verification:
    """Run the workload of `options` in this process with all experts, and compare with its `outputs.jsonl`.

    In float32 the tokens must be the same, each one. In other dtypes the reference follows the run's own tokens; a
    token that differs counts only where the reference's two best logits lie further apart than the tolerance, and the
    logit of each chosen token must agree within it.

    Args:
        options: of the run.
        on_progress: called with compared and all tokens.

    Raises:
        ConfigurationError: `outputs.jsonl` is not there or is damaged.
    """
    tokenizer = load_tokenizer(options.model)
    requests = load_requests(options, tokenizer)
    outputs = _read_outputs(Path(options.out, "outputs.jsonl"))
    if not outputs or not requests:
        return Verification(None)
    model = load_pretrained(options.model, dtype=DTYPES[options.dtype], device=options.device or "cpu")
    engine = PackedEngine(model)
    problems: dict[int, str] = {}
    differing: dict[int, str] = {}
    for request in requests:
        output = outputs.get(request.request_id)
        if output is None:
            problems[request.request_id] = "is missing"
        elif len(output["tokens"]) != request.max_new_tokens:
            problems[request.request_id] = f"has {len(output['tokens'])} tokens in place of {request.max_new_tokens}"
    comparable = [request for request in requests if request.request_id not in problems]
    total = sum(request.max_new_tokens for request in comparable)
    # One rank with all requests: other steps and other neighbours than in the run, so an error in either would show.
    scheduler = WorkloadScheduler(
        comparable, SchedulerConfig(seconds_per_step=options.scheduler.seconds_per_step), 1, 0
    )
    states, compared, outside = scheduler.initial_states(), 0, 0
    while not scheduler.done(states):
        plan = scheduler.next_step(states)
        states = [scheduler.state()]
        for entry in plan.entries:
            if entry.start == 0:
                _add(engine, comparable, entry.request_id, tokenizer, model, options)
        forced = {
            entry.request_id: outputs[entry.request_id]["tokens"][len(engine.tokens(entry.request_id))]
            for entry in plan.entries
            if entry.samples
        }
        chosen = engine.step([(entry.request_id, entry.num_tokens, entry.samples) for entry in plan.entries], forced)
        for entry in plan.entries:
            if not entry.samples:
                continue
            request_id = entry.request_id
            position = len(engine.tokens(request_id)) - 1
            output = outputs[request_id]
            run_logit = output["logits"][position] if "logits" in output else None
            problem = _compare(
                chosen[request_id], forced[request_id], engine.logits[request_id], run_logit, options.dtype
            )
            if problem:
                outside += 1
                differing.setdefault(request_id, f"differs at token {position}: {problem}")
            compared += 1
            if entry.finishes:
                engine.remove(request_id)
        if on_progress is not None:
            on_progress(compared, total)
    if options.dtype == "float32" or outside > OUTSIDE_SHARE * compared:
        problems.update(differing)
    first = f"request {min(problems)} {problems[min(problems)]}" if problems else ""
    return Verification(not problems, compared, outside, len(problems), first)


def _compare(expected: int, got: int, logits: torch.Tensor, run_logit: float | None, dtype: str) -> str:
    """What is wrong with one token; an empty string if nothing is."""
    if dtype == "float32":
        return "" if got == expected else f"{got}, one process generates {expected}"
    tolerance = LOGIT_TOLERANCE[dtype] * float(logits.abs().max())
    if got != expected and top2_gap(logits) > tolerance:
        return (
            f"{got}, one process generates {expected} and leads by {top2_gap(logits):.3g} (tolerance {tolerance:.3g})"
        )
    if run_logit is not None and abs(run_logit - float(logits[got])) > tolerance:
        return f"logit {run_logit:.4g}, one process has {float(logits[got]):.4g} (tolerance {tolerance:.3g})"
    return ""


def _add(
    engine: PackedEngine, requests: list[Request], request_id: int, tokenizer: Any, model: Any, options: RunOptions
) -> None:
    request = next(request for request in requests if request.request_id == request_id)
    ids = prompt_ids(request, tokenizer, model.config.get_text_config().vocab_size, options.seed)
    engine.add_request(request_id, ids, request.max_new_tokens, options.seed + request_id)


def _read_outputs(path: Path) -> dict[int, dict[str, Any]]:
    outputs = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                output = json.loads(line)
                if not all(isinstance(token, int) for token in output["tokens"]):
                    raise TypeError("tokens must be integers")
                outputs[int(output["request_id"])] = output
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigurationError(f"{path}: line {number} is not an output ({error!r:.200})") from None
    return outputs
