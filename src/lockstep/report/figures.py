"""What the figures of a run mean, in the words that terminal, report and JSON share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CAUSE_WORDS = {
    "other_prompts": "waiting while another rank runs a prompt",
    "uneven_generation": "waiting for a rank with more requests that generate",
    "no_requests": "no request to work on",
    "padding": "computing dummy and padding rows",
    "agreement": "agreeing on the step",
}
"""Each of `StepTable.lost_by_cause`'s causes as a heading."""

CLOCK_WORDS = {
    "steps": "Arrivals follow virtual time (--clock steps); seconds to the first token count from the step of arrival.",
    "wall": "Arrivals follow real time (--clock wall); seconds to the first token count from the moment of arrival.",
}
"""What a run's clock means for its latencies, in terminal and report."""

CAUSE_REASONS = {
    "other_prompts": "ranks waited while another ran a prompt",
    "uneven_generation": "ranks waited for one with more requests that generate",
    "no_requests": "ranks had no request to work on",
    "padding": "ranks computed dummy and padding rows",
    "agreement": "all ranks had to agree on each step",
}
"""The same as the end of a sentence."""

FIGURE_WORDS = {
    "duration_s": "duration (s)",
    "real_rows": "rows of requests",
    "prefill_tokens": "prompt tokens",
    "decode_tokens": "tokens that generate",
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
}


def share(fraction: float) -> str:
    """Return a share as it is printed everywhere.

    Example:
        >>> share(0.2849)
        '28.5 %'
    """
    return f"{100 * fraction:.1f} %"


def headline(num_ranks: int, num_steps: int, num_requests: int, loss: Mapping[str, Any]) -> str:
    """Say in a sentence or two what a run was and where its time went.

    Args:
        num_ranks: ranks of the run.
        num_steps: its steps.
        num_requests: its requests; 0 where they are not known.
        loss: with `lost_fraction`, `no_requests_fraction` and `lost`, see `loss_figures`.
    """
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
            f"{share(uneven)} of the ranks' time was lost to uneven work, most of it because {CAUSE_REASONS[worst]} "
            f"({share(lost[worst])})"
        )
    return what + (f"; in another {share(idle)} ranks had no request to work on." if idle >= 0.005 else ".")
