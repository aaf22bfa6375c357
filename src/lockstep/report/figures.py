"""What the figures of a run mean, in the words that terminal, report and JSON share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CAUSES = {
    "other_prompts": ("waiting while another rank runs a prompt", "ranks waited while another ran a prompt"),
    "uneven_generation": (
        "waiting for a rank with more requests that generate",
        "ranks waited for one with more requests that generate",
    ),
    "no_requests": ("no request to work on", "ranks had no request to work on"),
    "padding": ("computing dummy and padding rows", "ranks computed dummy and padding rows"),
    "agreement": ("agreeing on the step", "all ranks had to agree on each step"),
}
CAUSE_WORDS = {cause: heading for cause, (heading, _) in _CAUSES.items()}
"""Each of `StepTable.lost_by_cause`'s causes as a heading; `_CAUSES` also has it as the end of a sentence."""

CLOCK_WORDS = {
    "steps": "Arrivals follow virtual time (--clock steps); seconds to the first token count from the step of arrival.",
    "wall": "Arrivals follow real time (--clock wall); seconds to the first token count from the moment of arrival.",
}
"""What a run's clock means for its latencies."""

FIGURE_WORDS = {
    "tokens_per_s": "tokens per second",
    "duration_s": "duration (s)",
    **{name: name for name in ("requests", "ranks", "steps", "rank", "text")},
    "real_tokens": "rows of requests",
    "real_rows": "rows of requests",
    "prefill_tokens": "prompt tokens",
    "decode_tokens": "tokens that generate",
    "new_tokens": "new tokens",
    "dummy_rows": "dummy rows",
    "padding_rows": "padding rows",
    "preempted": "requests preempted",
    "overrun_rows": "overrun rows",
    "cached_tokens": "prompt tokens from known pages",
    "ttft_s_p50": "first token: half within (s)",
    "ttft_s_p99": "first token: 99 % within (s)",
    "tpot_s_p50": "per further token: half within (s)",
    "tpot_s_p99": "per further token: 99 % within (s)",
    "lost_fraction": "time lost to uneven work",
    **{f"lost.{cause}": f"  {words}" for cause, words in CAUSE_WORDS.items() if cause != "no_requests"},
    "no_requests_fraction": "time without requests",
    "request_id": "request",
    "num_prompt_tokens": "prompt tokens",
    "num_cached_tokens": "of them from known pages",
    "num_new_tokens": "new tokens",
    "queue_steps": "steps in the queue",
    "ttft_steps": "steps to first token",
    "queue_s": "s in the queue",
    "ttft_s": "s to first token",
    "tpot_s": "s per further token",
}
"""Figures of a run, of a comparison and of a request, by their names in JSON."""

SHOWN_WHERE_ANY = ("dummy_rows", "padding_rows", "preempted", "overrun_rows", "cached_tokens")
"""Figures that are usually 0, and left out then."""


def share(fraction: float) -> str:
    """Return a share as it is printed everywhere: `28.5 %`."""
    return f"{100 * fraction:.1f} %"


def headline(num_ranks: int, num_steps: int, num_requests: int, loss: Mapping[str, Any]) -> str:
    """Say in a sentence or two what a run was and where its time went; `loss` as `loss_figures` returns it."""
    if not num_steps:
        return "No step was run."
    what = f"{num_ranks} rank{'s' * (num_ranks != 1)} ran {num_steps:,} step{'s' * (num_steps != 1)}"
    what += f" for {num_requests:,} request{'s' * (num_requests != 1)}. " if num_requests else ". "
    lost, uneven, idle = loss["lost"], loss["lost_fraction"], loss["no_requests_fraction"]
    worst = max((cause for cause in lost if cause != "no_requests"), key=lambda cause: lost[cause])
    if uneven < 0.005:
        what += "Hardly any of the ranks' time was lost to uneven work"
    else:
        what += (
            f"{share(uneven)} of the ranks' time was lost to uneven work, most of it because {_CAUSES[worst][1]} "
            f"({share(lost[worst])})"
        )
    return what + (f"; in another {share(idle)} ranks had no request to work on." if idle >= 0.005 else ".")
