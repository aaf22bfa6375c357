"""Words and formats of a run's figures, shared by terminal, report and trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CAUSE_WORDS = {
    "other_prompts": "waiting while another rank runs a prompt",
    "uneven_generation": "waiting for a rank that generates for more requests",
    "no_requests": "no request to work on",
    "padding": "computing dummy and padding rows",
    "agreement": "agreeing on the step",
}
"""Each cause of `StepTable.lost_by_cause`, in words."""

ACTIVITIES = {
    "prefill": "running prompts",
    "decode": "generating tokens",
    "serving": "running experts for other ranks",
    "filler": "dummy or padding rows",
    "waiting": "waiting for other ranks",
}
"""What a rank does during a step, in words, by the name of its colour."""

CLOCK_WORDS = {
    "steps": "Arrivals follow virtual time (--clock steps); time to first token counts from the step of arrival.",
    "wall": "Arrivals follow real time (--clock wall); time to first token counts from the moment of arrival.",
}
"""What a run's clock means for its latencies."""

FIGURE_WORDS = {
    "tokens_per_s": "tokens per second",
    "duration_s": "duration (s)",
    **{name: name for name in ("requests", "ranks", "steps", "rank", "text")},
    "real_tokens": "rows of requests",
    "real_rows": "rows of requests",
    "prefill_tokens": "prompt tokens",
    "decode_tokens": "decode tokens",
    "new_tokens": "new tokens",
    "dummy_rows": "dummy rows",
    "padding_rows": "padding rows",
    "preempted": "requests preempted",
    "overrun_rows": "overrun rows",
    "cached_tokens": "cached prompt tokens",
    "ttft_s_p50": "TTFT p50 (s)",
    "ttft_s_p99": "TTFT p99 (s)",
    "tpot_s_p50": "TPOT p50 (s)",
    "tpot_s_p99": "TPOT p99 (s)",
    "lost_fraction": "time lost to uneven work",
    **{f"lost.{cause}": f"  {words}" for cause, words in CAUSE_WORDS.items() if cause != "no_requests"},
    "no_requests_fraction": "time without requests",
    "request_id": "request",
    "num_prompt_tokens": "prompt tokens",
    "num_cached_tokens": "of them cached",
    "num_new_tokens": "new tokens",
    "queue_steps": "queue (steps)",
    "ttft_steps": "TTFT (steps)",
    "queue_s": "queue (s)",
    "ttft_s": "TTFT (s)",
    "tpot_s": "TPOT (s)",
}
"""Figures of a run, of a comparison and of a request, by their names in JSON."""

SHOWN_WHERE_ANY = ("dummy_rows", "padding_rows", "preempted", "overrun_rows", "cached_tokens")
"""Figures that are usually 0 and left out then."""


def share(fraction: float) -> str:
    """Format a share as it is shown everywhere: `28.5 %`."""
    return f"{100 * fraction:.1f} %"


def headline(num_ranks: int, num_steps: int, num_requests: int, loss: Mapping[str, Any]) -> str:
    """Say in a sentence or two what a run was and where its time went; `loss` is from `loss_figures`."""
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
            f"{share(uneven)} of the ranks' time was lost to uneven work, most of it {CAUSE_WORDS[worst]} "
            f"({share(lost[worst])})"
        )
    return what + (f"; for another {share(idle)} they had no request to work on." if idle >= 0.005 else ".")


def setting_cells(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the figures of simulated settings as they are shown, by heading; times are p50/p99 in ms."""
    filler = [name for name in ("dummy_rows", "padding_rows") if any(item[name] for item in settings)]
    return [
        {
            "tok/s": f"{item['tokens_per_s']:,.0f}",
            "lost": share(item["lost_fraction"]),
            "no requests": share(item["no_requests_fraction"]),
            **{FIGURE_WORDS[name]: f"{item[name]:,}" for name in filler},
            "TTFT": _milliseconds(item["ttft_s"]),
            "TPOT": _milliseconds(item["tpot_s"]),
            "queue": _milliseconds(item["queue_s"]),
        }
        for item in settings
    ]


def _milliseconds(seconds: Mapping[str, float]) -> str:
    p50, p99 = 1e3 * seconds["p50"], 1e3 * seconds["p99"]
    return f"{p50:,.0f}/{p99:,.0f}" if p99 >= 10 else f"{p50:.1f}/{p99:.1f}"
