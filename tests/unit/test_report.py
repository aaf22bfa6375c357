import base64
import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lockstep.commands.compare import compare_runs
from lockstep.errors import ConfigurationError
from lockstep.moe.placement import ExpertLoad
from lockstep.report.figures import headline
from lockstep.report.html import write_report
from lockstep.report.tables import print_run
from lockstep.report.terminal import Terminal
from lockstep.steplog.files import StepLogWriter
from lockstep.steplog.record import StepLogRecord
from lockstep.steplog.table import StepTable, loss_figures

RECORDS = [
    StepLogRecord(0, 0, real_rows=8, prefill_tokens=8, duration_s=2.0),
    StepLogRecord(0, 1, real_rows=2, decode_tokens=2, duration_s=2.0),
    StepLogRecord(1, 0, real_rows=1, decode_tokens=1, start_s=2.0, duration_s=1.0),
    StepLogRecord(1, 1, real_rows=0, start_s=2.0, duration_s=1.0),
    StepLogRecord(2, 0, real_rows=4, decode_tokens=4, start_s=3.0, duration_s=1.0),
    StepLogRecord(2, 1, real_rows=1, decode_tokens=1, padding_rows=3, start_s=3.0, duration_s=1.0),
]


def summary_of(records, **changed):
    loss = loss_figures(StepTable.from_records(records).lost_by_cause())
    found = {
        "requests": 2,
        "ranks": 2,
        "steps": 3,
        "dummy_rows": 0,
        "padding_rows": 3,
        "generated_tokens": 4,
        "wall_s": 1.0,
        "tokens_per_s": 4.0,
        "verified": True,
        "compared_tokens": 4,
        "dtype": "float32",
    }
    return {**found, **loss, **changed}


def test_terminal_report_and_json_say_the_same_of_one_run(tmp_path, capsys):
    requests = [{"request_id": 0, "rank": 0}, {"request_id": 1, "rank": 1}]
    summary = summary_of(RECORDS)
    print_run(summary, RECORDS, tmp_path / "report.html")
    shown = " ".join(capsys.readouterr().out.split())
    write_report(tmp_path / "report.html", summary, RECORDS, requests)
    text, _ = page_data(tmp_path / "report.html")
    sentence = headline(2, 3, 2, summary)
    assert sentence == (
        "2 ranks ran 3 steps for 2 requests. 28.1 % of the ranks' time was lost to uneven work, most of it waiting "
        "while another rank runs a prompt (18.8 %); for another 12.5 % they had no request to work on."
    )
    assert sentence in shown
    assert html.escape(sentence) in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "<b>28.1 %</b>" in text
    assert (summary["lost_fraction"], summary["no_requests_fraction"]) == (0.28125, 0.125)
    write_steps(tmp_path)
    compared = compare_runs(tmp_path, tmp_path)["a"]
    assert all(compared[name] == summary[name] for name in ("lost_fraction", "no_requests_fraction"))


def test_preempted_requests_and_overrun_rows_are_shown_where_there_are_any(tmp_path, capsys):
    some = [replace(RECORDS[0], preempted=2), replace(RECORDS[1], overrun_rows=1), *RECORDS[2:]]
    for records, counts in ((RECORDS, (0, 0)), (some, (2, 1))):
        summary = summary_of(records, preempted=counts[0], overrun_rows=counts[1])
        print_run(summary, records, Path("report.html"), Terminal(width=200))  # headings on one line
        write_report(tmp_path / "report.html", summary, records)
        shown = capsys.readouterr().out
        text, _ = page_data(tmp_path / "report.html")
        for words, count in zip(("requests preempted", "overrun rows"), counts, strict=True):
            assert (words in shown) == (count > 0)
            assert (f"<b>{count}</b><span>{words}</span>" in text) == (count > 0)


def test_columns_that_are_always_zero_are_left_out_and_the_readme_shows_what_is_printed(tmp_path, capsys):
    print_run(summary_of(RECORDS), RECORDS, tmp_path)
    assert "padding rows" in capsys.readouterr().out
    plain = [replace(record, padding_rows=0) for record in RECORDS]
    print_run(summary_of(plain, padding_rows=0), plain, tmp_path)
    shown = capsys.readouterr().out
    assert "padding" not in shown
    assert "dummy" not in shown
    (heading,) = [line for line in shown.splitlines() if "rows of requests" in line]
    assert heading in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def write_steps(folder):
    with StepLogWriter(folder / "steps.jsonl") as log:
        for record in RECORDS:
            log.write(record)


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))


def unpacked(array):
    raw = zlib.decompress(base64.b64decode(array["data"]))
    code = {"u1": "B", "u2": "H", "u4": "I", "f4": "f"}[array["type"]]
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw))


def test_loss_by_cause_worked_by_hand():
    lost = StepTable.from_records(RECORDS).lost_by_cause()
    # 8 rank-seconds; rank 1 waits 2 * 6/8 for a prompt, 1 without a request, and pads 1 * 3/4.
    assert lost == pytest.approx(
        {"other_prompts": 1.5 / 8, "uneven_generation": 0, "no_requests": 1 / 8, "padding": 0.75 / 8, "agreement": 0}
    )


def test_measured_work_goes_before_rows():
    records = [
        StepLogRecord(0, 0, real_rows=8, decode_tokens=8, duration_s=1.0, busy_s=0.5, agreement_s=0.1),
        StepLogRecord(0, 1, real_rows=8, decode_tokens=8, duration_s=1.0, busy_s=0.9, agreement_s=0.2),
    ]
    lost = StepTable.from_records(records).lost_by_cause()
    assert lost == pytest.approx(
        {"other_prompts": 0, "uneven_generation": 0.2, "no_requests": 0, "padding": 0, "agreement": 0.1}
    )


def test_without_durations_every_step_counts_the_same():
    records = [StepLogRecord(0, 0, 4), StepLogRecord(0, 1, 2), StepLogRecord(1, 0, 1), StepLogRecord(1, 1, 1)]
    table = StepTable.from_records(records)
    assert sum(table.lost_by_cause().values()) == pytest.approx(0.125)


def test_merging_steps_keeps_sums_and_shares():
    table = StepTable.from_records(RECORDS)
    merged = table.merged(2)
    assert (merged.num_rows, merged.num_steps) == (2, 3)
    assert merged.real_rows.sum() == table.real_rows.sum()
    assert merged.weights.tolist() == [3.0, 1.0]
    total = (table.busy_share() * table.weights[:, None]).sum()
    assert (merged.busy_share() * merged.weights[:, None]).sum() == pytest.approx(total)


def test_a_rank_missing_in_a_step_had_no_rows_and_a_record_twice_is_refused():
    assert StepTable.from_records([RECORDS[0], RECORDS[3]]).real_rows.tolist() == [[8, 0], [0, 0]]
    with pytest.raises(ConfigurationError, match="two records of one step and rank"):
        StepTable.from_records([RECORDS[0], RECORDS[0]])
    assert StepTable.from_records([]).lost_by_cause()["padding"] == 0


def test_page_holds_the_counts_of_every_step_and_rank(tmp_path):
    write_report(tmp_path / "report.html", {"verified": None}, RECORDS)
    _, data = page_data(tmp_path / "report.html")
    assert unpacked(data["arrays"]["prefill"]) == [8, 0, 0, 0, 0, 0]
    assert unpacked(data["arrays"]["decode"]) == [0, 2, 1, 0, 4, 1]
    assert unpacked(data["arrays"]["weight"]) == [2, 1, 1]
    assert unpacked(data["arrays"]["filler"]) == [0, 0, 0, 0, 0, round(0.75 * 255)]
    assert [share for _, share in data["loss"]] == pytest.approx([18.75, 12.5, 9.375])


def test_texts_from_outside_are_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    write_report(
        tmp_path / "report.html",
        {"model": evil, evil: 1, "verified": False, "mismatches": evil},
        RECORDS,
        [{"request_id": 0, "rank": 0, "text": evil}],
        [{"name": evil, "group": evil, "label": evil, "x": 1, "y": 2, "best": True, "columns": {evil: evil}}],
        title=evil,
        command=evil,
    )
    text, data = page_data(tmp_path / "report.html")
    assert "alert(1)</script><img" not in text
    assert "<img src" not in text.replace("".join(re.findall(r"<script>.*?</script>", text, re.S)), "")
    assert data["settings"][0]["name"] == evil


def test_page_asks_the_network_for_nothing(tmp_path):
    write_report(tmp_path / "report.html", {}, RECORDS)
    text, _ = page_data(tmp_path / "report.html")
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=", text)


def test_empty_run_and_run_without_durations(tmp_path):
    write_report(tmp_path / "a.html", {}, [])
    assert "No step was run" in (tmp_path / "a.html").read_text(encoding="utf-8")
    write_report(tmp_path / "b.html", {}, [StepLogRecord(0, 0, 4), StepLogRecord(0, 1, 4)])
    assert "Hardly any" in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_long_runs_are_added_up_before_they_are_packed(tmp_path):
    steps, ranks = 300_000, 8
    rng = np.random.default_rng(0)
    columns = {
        "step": np.repeat(np.arange(steps), ranks),
        "rank": np.tile(np.arange(ranks), steps),
        "real_rows": rng.integers(0, 60, steps * ranks),
        "duration_s": np.full(steps * ranks, 0.02),
    }
    columns["decode_tokens"] = columns["real_rows"]
    write_report(tmp_path / "report.html", {}, StepTable.from_columns(columns))
    text, data = page_data(tmp_path / "report.html")
    assert (data["steps_per_row"], data["num_rows"], data["num_steps"]) == (2, 150_000, 300_000)
    assert sum(unpacked(data["arrays"]["decode"])) == columns["real_rows"].sum()
    assert len(text) < 12e6


def test_texts_are_shown_only_where_they_are_texts(tmp_path):
    def shown(*texts):
        requests = [{"request_id": index, "rank": 0, "text": text} for index, text in enumerate(texts)]
        write_report(tmp_path / "report.html", {"verified": None}, RECORDS, requests)
        return page_data(tmp_path / "report.html")[0].split("<summary>Requests")[1].split("</details>")[0]

    mixed = shown("plain words,\nin two lines", "\ufffd\x01q", "Grüße 你好")
    assert "plain words" in mixed
    assert "Grüße 你好" in mixed
    assert "\ufffd" not in mixed
    assert "\x01" not in mixed
    assert ">text<" not in shown("\ufffd\x01q", "\x00")


def test_a_small_page_is_small_and_explains_its_words(tmp_path):
    summary = {"verified": True, "model": "tiny"}
    write_report(tmp_path / "report.html", summary, RECORDS, [{"request_id": 0, "rank": 0, "ttft_s": 1.0}])
    assert (tmp_path / "report.html").stat().st_size < 100_000
    text, _ = page_data(tmp_path / "report.html")
    for word in ("step", "dummy row", "padding row", "time lost to uneven work", "overrun row"):
        assert f"<dt>{word}</dt>" in text
    assert '<td class="text">tiny</td>' in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium that could show the page")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_draws_its_charts_and_never_scrolls_sideways(width, tmp_path):
    words = "a-long-name-without-any-space-in-it-that-cannot-be-broken-where-a-line-ends" * 2
    requests = [{"request_id": index, "rank": 0, "ttft_s": 1.0 + index, "text": words} for index in range(3)]
    columns = {f"heading {index}": "12,345 tokens" for index in range(9)}
    settings = [{"name": words, "group": words, "label": "delay 0", "x": 1, "y": 2, "best": True, "columns": columns}]
    said = {"expert_load": ExpertLoad("any", ((0, 9), (4, 5)), ((4, 5), (4, 5))), "title": words, "command": words}
    write_report(tmp_path / "report.html", {"model": words}, RECORDS, requests, settings, **said)
    (tmp_path / "frame.html").write_text(
        f"""<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><script>
        setTimeout(() => {{
          const page = document.querySelector("iframe").contentDocument;
          page.querySelectorAll("details").forEach((each) => {{ each.open = true; }});
          const charts = ["settings", "timeline", "rows", "ranks", "kinds", "experts", "latency0"];
          const drawn = charts.every((id) => page.querySelector("#" + id + " svg")) && page.querySelector("#loss .bar");
          const fits = page.documentElement.scrollWidth <= page.documentElement.clientWidth;
          document.title = `fits ${{fits}}, drawn ${{Boolean(drawn)}}`;
        }}, 2000);</script>"""
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    options += ("--virtual-time-budget=6000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    address = (tmp_path / "frame.html").as_uri()
    shown = subprocess.run(["chromium", *options, address], capture_output=True, text=True, timeout=120, check=True)
    assert "<title>fits true, drawn true</title>" in shown.stdout


def test_requests_of_one_token_have_no_time_per_further_token(tmp_path):
    one = {"request_id": 0, "rank": 0, "num_prompt_tokens": 8, "num_new_tokens": 1, "ttft_s": 2.0, "tpot_s": None}
    more = {"request_id": 1, "rank": 1, "num_prompt_tokens": 2, "num_new_tokens": 3, "ttft_s": 2.0, "tpot_s": 0.5}
    write_report(tmp_path / "report.html", {"verified": None}, RECORDS, [one])
    assert [item["title"] for item in page_data(tmp_path / "report.html")[1]["latencies"]] == ["Time to first token"]
    write_report(tmp_path / "report.html", {"verified": None}, RECORDS, [one, more])
    text, data = page_data(tmp_path / "report.html")
    assert data["latencies"][1]["curves"][0]["values"] == [0.5]
    assert "None" not in text.split('<script type="application/json"')[0]
    write_steps(tmp_path)
    (tmp_path / "outputs.jsonl").write_text(json.dumps(one) + "\n")
    assert "tpot_s_p50" not in compare_runs(tmp_path, tmp_path)["a"]
    (tmp_path / "outputs.jsonl").write_text(json.dumps(one) + "\n" + json.dumps(more) + "\n")
    assert compare_runs(tmp_path, tmp_path)["a"]["tpot_s_p99"] == 0.5


def test_the_heat_map_has_a_cell_per_layer_and_expert_and_says_how_uneven_the_ranks_were(tmp_path):
    pairs = ((0, 10, 10, 60), (20, 20, 20, 20))

    def shown(rank_pairs):
        load = ExpertLoad("any", pairs, rank_pairs)
        write_report(tmp_path / "report.html", {}, RECORDS, expert_load=load)
        return page_data(tmp_path / "report.html")

    text, data = shown(((70, 10), (40, 40)))
    assert (data["num_experts"], unpacked(data["arrays"]["experts"])) == (4, [0, 0.5, 0.5, 3, 1, 1, 1, 1])
    assert "The hottest is expert 3 of MoE layer 0, with 3.0 times the mean" in text
    assert "<b>1.38 times</b> the ranks' mean" in text and "it would be 1.38" not in text  # (70 + 40) * 2 / 160
    placed, _ = shown(((40, 40), (40, 40)))
    assert "<b>1.00 times</b>" in placed and "it would be 1.38" in placed
