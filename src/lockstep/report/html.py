"""The report of a run: one HTML file that needs no network and says who worked when, and where the time went."""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep._version import __version__
from lockstep.report.figures import CAUSE_WORDS, CLOCK_WORDS, headline, share
from lockstep.steplog.record import StepLogRecord
from lockstep.steplog.table import StepTable, loss_figures
from lockstep.workload.synthetic import percentile

# Cells (step x rank) that a page carries; beyond it, steps are added up in equal groups. About 2 MB packed.
_MAX_CELLS = 2_000_000
_MAX_LISTED_REQUESTS = 200
_MAX_CURVE_POINTS = 300

_SUMMARY_WORDS = {
    "tokens_per_s": "tokens per second",
    "requests": "requests",
    "ranks": "ranks",
    "steps": "steps",
    "real_tokens": "rows of requests",
    "dummy_rows": "dummy rows",
    "padding_rows": "padding rows",
    "preempted": "requests preempted",
    "overrun_rows": "overrun rows",
    "cached_tokens": "prompt tokens from known pages",
}
_SHOWN_WHERE_ANY = ("dummy_rows", "padding_rows", "preempted", "overrun_rows", "cached_tokens")
_LATENCIES = (
    # title, how to read it, axis, unit, [(key of a request, curve's name)]
    (
        "Time to the first token",
        "From a request's arrival to its first generated token, and the part of it spent in the queue.",
        "seconds",
        "s",
        (("ttft_s", "first token"), ("queue_s", "of it, in the queue")),
    ),
    (
        "Time per further token",
        "The mean time between a request's tokens after its first.",
        "seconds per token",
        "s",
        (("tpot_s", "per token"),),
    ),
    (
        "Steps to the first token",
        "From a request's arrival to its first generated token, counted in steps.",
        "steps",
        "steps",
        (("ttft_steps", "first token"), ("queue_steps", "of it, in the queue")),
    ),
)


def write_report(
    path: str | Path, summary: Mapping[str, Any], steps: Sequence[StepLogRecord] | StepTable,
    requests: Sequence[Mapping[str, Any]] = (), settings: Sequence[Mapping[str, Any]] = (), *,
    title: str = "Lockstep run", command: str = "",
) -> None:  # fmt: skip
    """Write `report.html`.

    Every text that comes from outside (prompts, paths, names) is escaped; the page may not load anything from a
    network.

    Args:
        path: the file, replaced where it exists.
        summary: the run's figures by name. `verified` (True, False or None), `mismatches`, `tokens_per_s`, `requests`,
            `dummy_rows`, `padding_rows` and the like are shown at the top, everything else in a table at the end.
        steps: the step log, as records or as a table; may be empty.
        requests: one mapping each; of its keys `request_id`, `rank`, `num_prompt_tokens`, `num_new_tokens`, `ttft_s`,
            `tpot_s`, `queue_s`, `ttft_steps`, `queue_steps` and `text`, those present are shown.
        settings: for a comparison of settings, one mapping each: `name`, `group` (settings joined by a line), `label`
            (at the point), `x` and `y` (seconds of waiting, lost share in %), `best` (bool), and `columns` (what the
            table shows, by heading).
        title: the page's heading.
        command: the command line that made it, shown so that it can be repeated.
    """
    from plotly.offline import get_plotlyjs

    table = steps if isinstance(steps, StepTable) else StepTable.from_records(steps)
    data = _page_data(table, requests, settings)
    folder = Path(__file__).parent
    document = _TEMPLATE.format(
        title=html.escape(title),
        css=(folder / "page.css").read_text(encoding="utf-8"),
        body="\n".join(_sections(table, summary, requests, settings, data, title, command)),
        # "</script>" inside the data would end it; JSON may write "<" as an escape.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False, default=str).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        version=html.escape(__version__),
    )
    # A path may have bytes that are no UTF-8: they are shown as escapes.
    Path(path).write_text(document, encoding="utf-8", errors="backslashreplace")


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src
'unsafe-inline'; img-src data: blob:"> <meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
<p class="quiet">Written by Lockstep {version}. This file needs no network.</p>
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _page_data(
    table: StepTable, requests: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return everything that the page's script draws from."""
    filler = table.dummy_rows + table.padding_rows
    longest = np.maximum((table.real_rows + filler).max(axis=1, initial=0, keepdims=True), 1)
    has_filler = bool(filler.any())
    weights = table.weights
    lost = table.lost_by_cause()
    kinds = [
        ("rows of requests", "decode", table.real_rows),
        ("dummy rows", "bad", table.dummy_rows),
        ("padding rows", "filler", table.padding_rows),
    ]
    merge = -(-table.real_rows.size // _MAX_CELLS) if table.num_steps else 1
    shown = table.merged(merge)
    # The share of a step that filler rows take, next to the busy share; merged like it, weighted by time.
    filler_share = filler / longest * weights[:, None]
    if merge > 1:
        filler_share = np.add.reduceat(filler_share, np.arange(0, table.num_rows, merge), axis=0)
    arrays = {
        "prefill": _packed(shown.prefill_tokens),
        "decode": _packed(np.maximum(shown.real_rows - shown.prefill_tokens, 0)),
        "busy": _packed(np.rint(shown.busy_share() * 255)),
        "weight": _packed(shown.weights.astype(np.float32)),
    }
    if has_filler:
        of_step = filler_share / np.maximum(shown.weights, 1e-12)[:, None]
        arrays["filler"] = _packed(np.rint(np.clip(of_step, 0, 1) * 255))
    return {
        "num_ranks": table.num_ranks,
        "rank_names": [str(rank) for rank in range(table.num_ranks)],
        "num_rows": shown.num_rows,
        "num_steps": table.num_steps,
        "steps_per_row": shown.steps_per_row,
        "arrays": arrays,
        "has_filler": has_filler,
        "has_serving": bool((table.busy_share()[table.real_rows == 0] > 0.002).any()),
        "loss": [[CAUSE_WORDS[cause], 100 * part] for cause, part in lost.items() if part > 5e-5],
        "loss_axis": "share of all ranks' time (%)",
        "row_kinds": [[name, shade, values.sum(axis=0).tolist()] for name, shade, values in kinds],
        "latencies": _latencies(requests),
        "settings": [{key: item[key] for key in ("name", "group", "label", "x", "y")} for item in settings],
        "settings_axes": ["time to first token, 99th percentile (s)", "time lost to uneven work (%)"],
    }


def _packed(values: np.ndarray) -> dict[str, str]:
    """Return an array as the page unpacks it: little-endian, deflated, base64."""
    if values.dtype == np.float32:
        kind = "f4"
    else:
        top = int(values.max(initial=0))
        kind = "u1" if top < 2**8 else "u2" if top < 2**16 else "u4"
    packed = zlib.compress(values.astype("<" + kind).tobytes(), 6)
    return {"type": kind, "data": base64.b64encode(packed).decode()}


def _latencies(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the distributions that the requests have figures for, as cumulative curves of at most 300 points."""
    found = []
    for title, reading, axis, unit, keys in _LATENCIES:
        curves = []
        for key, name in keys:
            values = np.sort([request[key] for request in requests if request.get(key) is not None])
            if not len(values):
                continue
            shares = np.linspace(0, 1, min(len(values), _MAX_CURVE_POINTS) + 1)[1:]
            at = np.maximum(np.ceil(shares * len(values)).astype(int) - 1, 0)
            curves.append({"name": name, "values": values[at].tolist(), "shares": shares.tolist()})
        if curves:
            half, most = (percentile(curves[0]["values"], part) for part in (0.5, 0.99))
            reading += f" Half within {half:.3g} {unit}, 99 % within {most:.3g} {unit}."
            found.append({"title": title, "reading": reading, "axis": axis, "unit": unit, "curves": curves})
    # Steps say nothing more where seconds are known.
    return found[:2] if any(item["unit"] == "s" for item in found) else found


def _sections(
    table: StepTable, summary: Mapping[str, Any], requests: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]], data: dict[str, Any], title: str, command: str,
) -> list[str]:  # fmt: skip
    loss = loss_figures(table.lost_by_cause())
    lost = loss["lost"]
    says = headline(table.num_ranks, table.num_steps, len(requests), loss)
    if settings and not table.num_steps:
        best = next((item["name"] for item in settings if item.get("best")), None)
        says = f"{len(settings)} settings compared." + (f" Best: {best}." if best else "")
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="headline">{html.escape(says)}</p>',
        f'<p class="quiet"><code>{html.escape(command)}</code></p>' if command else "",
        f'<div class="cards">{"".join(_cards(summary, table, loss))}</div>',
        '<p id="failure" class="screen" hidden></p>',
    ]
    if settings:
        parts += [
            "<section><h2>Settings compared</h2><p>Each point is one setting. Lower loses less time to uneven work; "
            "further left lets requests wait less. The lower left is best.</p>"
            f'<div id="settings"></div>{_settings_table(settings)}</section>'
        ]
    if table.num_steps:
        measured = not np.isnan(table.busy_s).all()
        how = (
            "The coloured height is the share of the step in which the rank worked."
            if measured
            else "The coloured height compares the rank's rows with those of the longest rank in the same step."
        )
        legend = "".join(
            f'<span><span class="swatch" style="background:var(--{shade})"></span>{words}</span>'
            for shade, words in (
                ("prefill", "running prompts"),
                ("decode", "generating tokens"),
                ("serving", "running experts for other ranks"),
                ("filler", "dummy or padding rows"),
                ("waiting", "waiting for the longest rank"),
            )
            if (shade != "filler" or data["has_filler"]) and (shade != "serving" or data["has_serving"])
        )
        parts += [
            "<section><h2>Who worked when</h2>"
            f"<p>One lane per rank. All ranks leave a step together, when the last one is done. {how} "
            '<span id="grain"></span></p>'
            f'<div class="legend">{legend}</div><div id="timeline"></div>'
            '<div class="readout screen" id="readout">Point at a place in the chart to read it.</div></section>',
            "<section><h2>Rows per rank</h2><p>How many tokens each rank took into a step: where the lines part, ranks "
            'wait for each other.</p><div id="rows"></div></section>',
            '<div class="columns"><section><h2>Each rank\'s time</h2><p>What share of the whole run each rank spent '
            'how.</p><div id="ranks"></div></section>',
            "<section><h2>Where the time was lost</h2><p>Of all ranks' time together, "
            f"{share(1 - sum(lost.values()))} was work on requests. The rest went to:</p>"
            '<div id="loss"></div></section></div>',
        ]
        if data["has_filler"] and table.num_ranks <= 128:
            parts.append(
                "<section><h2>Rows of requests, dummy and padding rows</h2><p>Dummy rows are sent only so that a rank "
                'takes part; padding rows only make shapes equal.</p><div id="kinds"></div></section>'
            )
        elif not data["has_filler"]:
            parts.append("<p>No rank computed a dummy or padding row: all rows were of requests.</p>")
    if data["latencies"]:
        sections = "".join(
            f'<section><h2>{item["title"]}</h2><p>{item["reading"]}</p><div id="latency{index}"></div></section>'
            for index, item in enumerate(data["latencies"])
        )
        if summary.get("clock") in CLOCK_WORDS:
            parts.append(f"<p>{CLOCK_WORDS[summary['clock']]}</p>")
        parts.append(f'<div class="columns">{sections}</div>')
    if requests:
        parts.append(_requests_table(requests))
    parts.append(_summary_table(summary))
    return [part for part in parts if part]


def _cards(summary: Mapping[str, Any], table: StepTable, loss: Mapping[str, Any]) -> list[str]:
    cards = []
    if "verified" in summary:
        verified = summary["verified"]
        words = {True: "yes", False: "NO", None: "not compared"}[verified]
        told = (
            f"{summary.get('mismatches')} outputs differ" if verified is False else "every output equals one process's"
        )
        cards.append(_card(words, "verified: " + told if verified is not None else "outputs", verified is False))
    if table.num_steps:
        cards.append(_card(share(loss["lost_fraction"]), "of the time lost to uneven work"))
        cards.append(_card(share(loss["no_requests_fraction"]), "of the time without requests"))
    for key, words in _SUMMARY_WORDS.items():
        if isinstance(summary.get(key), int | float) and (summary[key] or key not in _SHOWN_WHERE_ANY):
            cards.append(_card(_number(summary[key]), words))
    return cards


def _card(value: str, words: str, bad: bool = False) -> str:
    kind = "card bad" if bad else "card"
    return f'<div class="{kind}"><b>{html.escape(value)}</b><span>{html.escape(words)}</span></div>'


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(headings: Sequence[str], rows: Sequence[tuple[Sequence[Any], bool]], text: Sequence[str] = ()) -> str:
    """Return an HTML table; each row comes with whether it stands out."""
    kind = [' class="text"' if heading in text else "" for heading in headings]
    head = "".join(f"<th{mark}>{html.escape(name)}</th>" for name, mark in zip(headings, kind, strict=True))
    body = "".join(
        f"<tr{' class=best' if best else ''}>"
        + "".join(f"<td{mark}>{html.escape(_number(cell))}</td>" for cell, mark in zip(cells, kind, strict=True))
        + "</tr>"
        for cells, best in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _settings_table(settings: Sequence[Mapping[str, Any]]) -> str:
    headings = list(settings[0]["columns"])
    return _table(headings, [(list(item["columns"].values()), bool(item.get("best"))) for item in settings])


def _requests_table(requests: Sequence[Mapping[str, Any]]) -> str:
    keys = {
        "request_id": "request",
        "rank": "rank",
        "num_prompt_tokens": "prompt tokens",
        "num_cached_tokens": "of them from known pages",
        "num_new_tokens": "new tokens",
        "queue_steps": "steps in the queue",
        "ttft_steps": "steps to first token",
        "queue_s": "s in the queue",
        "ttft_s": "s to first token",
        "tpot_s": "s per further token",
        "text": "text",
    }
    listed_requests = requests[:_MAX_LISTED_REQUESTS]
    used = [key for key in keys if any(request.get(key) is not None for request in listed_requests)]
    if not any(request.get("num_cached_tokens") for request in listed_requests):
        used = [key for key in used if key != "num_cached_tokens"]

    def cell(request: Mapping[str, Any], key: str) -> Any:
        value = request.get(key)
        if value is None:
            return ""
        return value if key != "text" or len(value) <= 80 else value[:79] + "…"

    rows = [([cell(request, key) for key in used], False) for request in requests[:_MAX_LISTED_REQUESTS]]
    listed = f"the first {len(rows)} of {len(requests):,}" if len(rows) < len(requests) else f"{len(rows)}"
    listing = _table([keys[key] for key in used], rows, text=("text",))
    return f"<details><summary>Requests ({listed})</summary>{listing}</details>"


def _summary_table(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    rows = [([name, json.dumps(value, default=str)], False) for name, value in summary.items()]
    listing = _table(["name", "value"], rows, text=("value",))
    return f"<details><summary>All figures and options</summary>{listing}</details>"
