"""The report of a run: one HTML file, readable offline, that shows who worked when and where the time went."""

from __future__ import annotations

import base64
import json
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lockstep._version import __version__
from lockstep.moe.placement import ExpertLoad, Placement, busiest_over_mean
from lockstep.report.figures import ACTIVITIES, CAUSE_WORDS, CLOCK_WORDS, FIGURE_WORDS, SHOWN_WHERE_ANY, headline, share
from lockstep.steplog.record import StepLogRecord
from lockstep.steplog.table import StepTable, loss_figures
from lockstep.workload.synthetic import percentile

# Maximum cells (step x rank) in a page, about 2 MB packed; beyond it, steps are added up in equal groups.
_MAX_CELLS = 2_000_000
_MAX_LISTED_REQUESTS = 200
_MAX_CURVE_POINTS = 300

_CARDS = ("tokens_per_s", "requests", "ranks", "steps", "real_tokens", *SHOWN_WHERE_ANY)
_REQUEST_COLUMNS = (
    *("request_id", "rank", "num_prompt_tokens", "num_cached_tokens", "num_new_tokens", "queue_steps", "ttft_steps"),
    *("queue_s", "ttft_s", "tpot_s", "text"),
)
_CURVES = {"ttft": "to first token", "queue": "in the queue", "tpot": "per further token"}
_TTFT_READING = (
    "TTFT: from a request's arrival to its first generated token. The queue is the part before its first step."
)
_LATENCIES = (
    # title, how to read it, unit, keys of a request
    ("Time to first token", _TTFT_READING, "s", ("ttft", "queue")),
    ("Time per further token", "TPOT: a request's mean time between tokens after its first.", "s", ("tpot",)),
    ("Steps to first token", _TTFT_READING, "steps", ("ttft", "queue")),
)


def write_report(
    path: str | Path, summary: Mapping[str, Any], steps: Sequence[StepLogRecord] | StepTable,
    requests: Sequence[Mapping[str, Any]] = (), settings: Sequence[Mapping[str, Any]] = (), *,
    expert_load: ExpertLoad | None = None, title: str = "Lockstep run", command: str = "",
) -> None:  # fmt: skip
    """Write `report.html`, replacing one that exists. Every text from outside (prompts, paths, names) is escaped."""
    table = steps if isinstance(steps, StepTable) else StepTable.from_records(steps)
    data = _page_data(table, requests, settings, expert_load)
    folder = Path(__file__).parent
    template, css, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    document = template.format(
        title=escape(title),
        css=css,
        body="\n".join(_body(table, summary, requests, settings, expert_load, data, title, command)),
        # "</script>" inside the data would end it, so "<" is written as a JSON escape.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False, default=str).replace("<", "\\u003c"),
        script=script,
        version=escape(__version__),
    )
    # Bytes of a path that are not UTF-8 are shown as escapes.
    Path(path).write_text(document, encoding="utf-8", errors="backslashreplace")


def _page_data(
    table: StepTable, requests: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]],
    expert_load: ExpertLoad | None,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that the page's script draws from."""
    filler = table.dummy_rows + table.padding_rows
    merge = -(-table.real_rows.size // _MAX_CELLS) if table.num_steps else 1
    shown = table.merged(merge)
    arrays = {
        "prefill": _packed(shown.prefill_tokens),
        "decode": _packed(np.maximum(shown.real_rows - shown.prefill_tokens, 0)),
        "busy": _packed(np.rint(shown.busy_share() * 255)),
        "weight": _packed(shown.weights.astype(np.float32)),
    }
    if filler.any():
        # The share of a step that filler rows take, merged and weighted by time as the busy share is.
        longest = np.maximum((table.real_rows + filler).max(axis=1, initial=0, keepdims=True), 1)
        filler_s = filler / longest * table.weights[:, None]
        filler_s = np.add.reduceat(filler_s, np.arange(0, table.num_rows, merge), axis=0)
        of_step = filler_s / np.maximum(shown.weights, 1e-12)[:, None]
        arrays["filler"] = _packed(np.rint(np.clip(of_step, 0, 1) * 255))
    if expert_load is not None:
        arrays["experts"] = _packed(_over_mean(expert_load).astype(np.float32))
    kinds = (("real_rows", "decode"), ("dummy_rows", "bad"), ("padding_rows", "filler"))
    return {
        "num_ranks": table.num_ranks,
        "num_rows": shown.num_rows,
        "num_steps": table.num_steps,
        "steps_per_row": shown.steps_per_row,
        "arrays": arrays,
        "activities": {
            name: words
            for name, words in ACTIVITIES.items()
            if (name != "filler" or filler.any())
            and (name != "serving" or (table.busy_share()[table.real_rows == 0] > 0.002).any())
        },
        "num_experts": len(expert_load.pairs[0]) if expert_load is not None else 0,
        "loss": [[CAUSE_WORDS[cause], 100 * part] for cause, part in table.lost_by_cause().items() if part > 5e-5],
        "row_kinds": [[FIGURE_WORDS[name], shade, getattr(table, name).sum(axis=0).tolist()] for name, shade in kinds],
        "latencies": _latencies(requests),
        "settings": [{key: item[key] for key in ("name", "group", "label", "x", "y")} for item in settings],
        "settings_axes": ["TTFT p99 (s)", "time lost to uneven work (%)"],
    }


def _packed(values: np.ndarray) -> dict[str, str]:
    """Return an array in the form that the page unpacks: little-endian, deflated, base64."""
    top = int(values.max(initial=0))
    kind = "f4" if values.dtype == np.float32 else "u1" if top < 2**8 else "u2" if top < 2**16 else "u4"
    packed = zlib.compress(values.astype("<" + kind).tobytes(), 6)
    return {"type": kind, "data": base64.b64encode(packed).decode()}


def _latencies(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the latencies that the requests have, as cumulative curves of at most 300 points."""
    found = []
    for title, reading, unit, keys in _LATENCIES:
        curves = []
        for name in keys:
            found_values = (request.get(f"{name}_{unit}") for request in requests)
            values = np.sort([value for value in found_values if value is not None])
            if len(values):
                shares = np.linspace(0, 1, min(len(values), _MAX_CURVE_POINTS) + 1)[1:]
                at = np.maximum(np.ceil(shares * len(values)).astype(int) - 1, 0)
                curves.append({"name": _CURVES[name], "values": values[at].tolist(), "shares": shares.tolist()})
        if curves:
            half, most = (percentile(curves[0]["values"], part) for part in (0.5, 0.99))
            reading += f" p50 is {half:.3g} {unit}, p99 {most:.3g} {unit}."
            found.append({"title": title, "reading": reading, "unit": unit, "curves": curves})
    # Where seconds are known, steps add nothing.
    return found[:2] if any(item["unit"] == "s" for item in found) else found


def _body(
    table: StepTable, summary: Mapping[str, Any], requests: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]], expert_load: ExpertLoad | None, data: dict[str, Any], title: str,
    command: str,
) -> Iterable[str]:  # fmt: skip
    loss = loss_figures(table.lost_by_cause())
    says = headline(table.num_ranks, table.num_steps, len(requests), loss).replace(" %", "\N{NO-BREAK SPACE}%")
    yield f'<h1>{escape(title)}</h1><p class="headline">{escape(says)}</p>'
    if command:
        words = " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))
        yield f'<p class="quiet"><code>{words}</code></p>'
    cards = "".join(
        f'<div class="{kind}"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for value, words, kind in _cards(summary, table, loss)
    )
    yield f'<div class="cards">{cards}</div><p id="failure" class="screen" hidden></p>'
    if settings:
        rows = [(list(item["columns"].values()), bool(item.get("best"))) for item in settings]
        yield _section(
            "Settings compared",
            "Each point is one setting: the lower, the less time is lost to uneven work; the further left, the sooner "
            "requests get their first token. Times in the table are p50/p99 in ms.",
            '<div id="settings"></div>' + _table(list(settings[0]["columns"]), rows),
        )
    if table.num_steps:
        yield _step_sections(table, data, sum(loss["lost"].values()))
    if expert_load is not None:
        yield _section("Rows per expert", _reading_of(expert_load), '<div id="experts"></div>')
    if data["latencies"]:
        clock = CLOCK_WORDS.get(summary.get("clock", ""), "")
        sections = (
            _section(item["title"], f"{item['reading']} {'' if index else clock}", f'<div id="latency{index}"></div>')
            for index, item in enumerate(data["latencies"])
        )
        yield f'<div class="columns">{"".join(sections)}</div>'
    if requests:
        yield _requests_table(requests)
    if summary:
        listing = _table(["name", "value"], [(pair, False) for pair in _flat(summary)], text=("value",))
        yield f"<details><summary>All figures and options</summary>{listing}</details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield names and values, those of a nested mapping as `outer.inner`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, "none" if value is None else value


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def _step_sections(table: StepTable, data: Mapping[str, Any], lost: float) -> str:
    height = "The coloured height is the share of the step in which the rank worked."
    if np.isnan(table.busy_s).all():
        height = "The coloured height compares the rank's rows with those of the longest rank in the same step."
    has_filler = "filler" in data["activities"]
    hidden = {"filler": " hidden" * has_filler, "no_filler": " hidden" * (not has_filler)}
    template = Path(__file__).with_name("steps.html").read_text(encoding="utf-8")
    return template.format(height=height, work=share(1 - lost), **hidden)


def _over_mean(load: ExpertLoad) -> np.ndarray:
    """Return each expert's rows relative to the mean of its layer, `[layers, experts]`."""
    pairs = np.array(load.pairs, dtype=float)
    return pairs / np.maximum(pairs.mean(axis=1, keepdims=True), 1e-12)


def _reading_of(load: ExpertLoad) -> str:
    over_mean, num_ranks = _over_mean(load), len(load.rank_pairs[0])
    num_layers, num_experts = over_mean.shape
    even = Placement.even(num_layers, num_experts, num_ranks).busiest_over_mean(load.pairs)
    had = busiest_over_mean(load.rank_pairs)
    layer, expert = np.unravel_index(over_mean.argmax(), over_mean.shape)
    unplaced = "" if round(had, 2) == round(even, 2) else f"; with equal shares of experts, it would be {even:.2f}"
    return (
        "Rows that chose each expert, compared with the mean of its layer. "
        f"The hottest is expert {expert} of MoE layer {layer}, with {over_mean[layer, expert]:.1f} times the mean. "
        f"Over all layers, the busiest of {num_ranks} ranks had <b>{had:.2f} times</b> the ranks' mean{unplaced}."
    )


def _cards(summary: Mapping[str, Any], table: StepTable, loss: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield value, words and CSS class of what the page shows at the top."""
    if "verified" in summary:
        differ = f"verified: {summary.get('mismatches')} outputs differ"
        within = "" if summary.get("dtype") == "float32" else ", within the tolerance"
        yield {
            True: ("yes", f"verified against one process{within}", "card"),
            False: ("NO", differ, "card bad"),
            None: ("not compared", "outputs", "card"),
        }[summary["verified"]]
    if table.num_steps:
        yield share(loss["lost_fraction"]), "of the time lost to uneven work", "card"
        yield share(loss["no_requests_fraction"]), "of the time without requests", "card"
    for name in _CARDS:
        if isinstance(summary.get(name), int | float) and (summary[name] or name not in SHOWN_WHERE_ANY):
            yield _number(summary[name]), FIGURE_WORDS[name], "card"


def _number(value: Any) -> str:
    """Format a table's cell: whole numbers in full, others with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(headings: Sequence[str], rows: Sequence[tuple[Sequence[Any], bool]], text: Sequence[str] = ()) -> str:
    """Return an HTML table of rows, each with whether it is the best; columns named in `text` are left-aligned."""
    kind = [' class="text"' if heading in text else "" for heading in headings]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(headings, kind, strict=True))
    body = "".join(
        f"<tr{' class=best' if best else ''}>"
        + "".join(f"<td{mark}>{escape(_number(cell))}</td>" for cell, mark in zip(cells, kind, strict=True))
        + "</tr>"
        for cells, best in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _requests_table(requests: Sequence[Mapping[str, Any]]) -> str:
    listed = [{**request, "text": _readable(request.get("text"))} for request in requests[:_MAX_LISTED_REQUESTS]]
    used = [name for name in _REQUEST_COLUMNS if any(request.get(name) is not None for request in listed)]
    if not any(request.get("num_cached_tokens") for request in listed):
        used = [name for name in used if name != "num_cached_tokens"]
    rows = [([_request_cell(request.get(name)) for name in used], False) for request in listed]
    count = f"the first {len(rows)} of {len(requests):,}" if len(rows) < len(requests) else f"{len(rows)}"
    listing = _table([FIGURE_WORDS[name] for name in used], rows, text=("text",))
    return f"<details><summary>Requests ({count})</summary>{listing}</details>"


def _request_cell(value: Any) -> Any:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else value


def _readable(text: str | None) -> str | None:
    """Return the beginning of a text; None for bytes that are not text, such as an untrained model's output."""
    kinds = {unicodedata.category(letter) for letter in text or "" if letter not in "\n\r\t"}
    if not text or "\ufffd" in text or kinds & {"Cc", "Cn", "Co", "Cs"}:
        return None
    return text if len(text) <= 80 else text[:79] + "…"
