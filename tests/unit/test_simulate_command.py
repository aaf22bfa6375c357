import contextlib
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import typer
from typer.testing import CliRunner

from lockstep.cli import app
from lockstep.cli_types import seconds, several, whole
from lockstep.commands.calibrate import execute_calibration
from lockstep.commands.compare import compare_runs
from lockstep.errors import ConfigurationError
from lockstep.moe.placement import ExpertLoad
from lockstep.report.perfetto import write_trace
from lockstep.report.terminal import Terminal, progress
from lockstep.simulation.cost import CostConstants, cost_columns, fit, join_runs, validate
from lockstep.simulation.simulator import SimulationConfig, simulate
from lockstep.simulation.sweep import BEST_RULE, Grid, best, setting, sweep
from lockstep.steplog.files import StepColumns, StepLogWriter, read_parquet_columns, read_step_columns
from lockstep.steplog.record import StepLogRecord
from lockstep.workload import Request, SyntheticParameters, synthetic_requests

SYNTHETIC = "num_requests=150,rate=40,prompt_median=300,output_median=40"


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def summary(tokens_per_s=100.0, imbalance=0.1, p99=1.0, tpot=0.02):
    return {
        "tokens_per_s": tokens_per_s,
        "lost_fraction": imbalance,
        **{name: {"mean": tpot, "p99": p99} for name in ("ttft_s", "tpot_s", "queue_s")},
    }


def test_a_grid_is_every_combination():
    grid = Grid([2, 4], ["round-robin", "least-tokens"], [0, 10], max_chunk_size=[None, 64])
    found = [setting(config) for config in grid.configs(SimulationConfig(1))]
    assert len(found) == 16
    assert len({str(item) for item in found}) == 16
    with pytest.raises(ConfigurationError, match="load_balancing needs at least one value, got none"):
        Grid([2], []).configs(SimulationConfig(1))
    with pytest.raises(ConfigurationError, match="max_prefill_delay_steps must be >= 0, got -1"):
        Grid([2], max_prefill_delay_steps=[-1]).configs(SimulationConfig(1))


def test_a_recorded_load_says_what_a_placement_would_gain(tmp_path):
    load = ExpertLoad("qwen3_moe", ((90, 10, 20, 30), (10, 10, 10, 10)), ((100, 50), (20, 20)))
    load.write(tmp_path / "expert_load.json")
    common = ("simulate", "--synthetic", "num_requests=5,rate=40", "--placement", str(tmp_path))
    result = invoke(*common, "--data-parallel-size", "2,3", "--num-redundant-experts", "2", "--json")
    assert result.exit_code == 0, result.output
    # Layers of 150 and 40 rows. Busiest of 2 ranks: 100 and 20, then 75 and 20; of 3: 100 and 20, then 55 and 15.
    assert json.loads(result.stdout)["placement"] == [
        {"ranks": 2, "slots": 6, "even": 1.2632, "placed": 1.0},
        {"ranks": 3, "slots": 6, "even": 1.8947, "placed": 1.1053},
    ]
    result = invoke(*common, "--data-parallel-size", "2", "--num-redundant-experts", "2")
    said = " ".join(result.stdout.split())
    assert (
        "2 ranks: the busiest has 1.26 times the mean of the experts' work, 1.00 times once placed in 6 slots" in said
    )
    result = invoke("simulate", "--placement", str(tmp_path / "nowhere"))
    assert isinstance(result.exception, ConfigurationError) or "no expert load at" in result.output


def test_all_cores_give_what_one_gives():
    requests = synthetic_requests(SyntheticParameters.parse(SYNTHETIC))
    configs = Grid([2, 3], max_prefill_delay_steps=[0, 5]).configs(SimulationConfig(1))
    done = []
    assert sweep(requests, configs, 2, done.append) == sweep(requests, configs, 1)
    assert done == sorted(done)
    assert done[-1] == pytest.approx(4)


def test_long_simulations_say_how_far_they_are(capsys):
    # Two buffers and a half of the recorder: at each full one, and at the end, the share of the rows is known.
    requests = [Request(0, 0.0, 1, 500_001)]
    shares = []
    simulate(requests, SimulationConfig(1), on_progress=shares.append)
    assert shares == pytest.approx([2**18 / 500_001, 1], rel=1e-4)
    with progress(Terminal(stderr=True), "simulating 1 setting", 1, line_every_s=0.0) as show:
        sweep([Request(0, 0.0, 1, 300_001)], [SimulationConfig(1)], 1, show)
    assert "simulating 1 setting: 87.3 % of all rows done" in capsys.readouterr().err


def test_a_trace_with_a_bad_row_is_said_once(tmp_path):
    (tmp_path / "trace").write_text('{"timestamp": 0, "input_length": 9, "output_length": 3}\n[/red]\n')
    for command in (("simulate", "--workers", "1", "--workload"), ("workload", "describe")):
        result = invoke(*command, str(tmp_path / "trace"))
        assert result.exit_code == 0, result.output
        assert result.output.count(f"{tmp_path / 'trace'}: left out 1 malformed line: line 2: not JSON") == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the processes in /proc")
def test_a_command_that_is_killed_leaves_no_simulation_behind():
    arguments = ("--length-scale", "1e5", "--data-parallel-size", "2,4", "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "lockstep.cli", "simulate", *arguments], stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        # The line comes after 5 s at the earliest, when both processes have begun.
        assert process.stderr.readline().startswith(b"simulating 2 settings: ")
        process.terminate()
        process.wait(20)
        until = time.monotonic() + 20
        while _running(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _running(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _running(session):
    """Return the processes of a session that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of_session = stat.read_text().rsplit(")", 1)[1].split()[:4]
            found += [stat.parent.name] if int(of_session) == session and state != "Z" else []
    return found


def test_the_best_setting_keeps_to_the_limits():
    settings = [summary(100, 0.4, 0.5), summary(99.9, 0.1, 2.0), summary(90, 0.0, 0.1), summary(99.8, 0.2, 1.0)]
    assert best(settings) == 1
    assert best(settings, ttft_p99_s=1.0) == 3
    assert best(settings, queue_p99_s=0.2) == 2
    assert best(settings, tpot_p99_s=0.01) is None


def test_simulate_writes_every_file_and_names_the_best(tmp_path):
    out = tmp_path / "out"
    result = invoke(
        *("simulate", "--synthetic", SYNTHETIC, "--data-parallel-size", "4", "--max-prefill-delay-steps", "0,10"),
        *("--load-balancing", "round-robin,least-tokens", "--cost", "linear", "--ttft-p99", "9s", "--workers", "1"),
        *("--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "best with ttft_p99 <= 9 s: balancing" in shown
    assert f"rule: {BEST_RULE}" in shown
    document = json.loads((out / "settings.json").read_text())
    assert document["best_rule"] == BEST_RULE
    for item in document["settings"]:  # every rank's counts
        assert [len(item["per_rank"][name]) for name in ("requests", "real_rows", "prefill_tokens")] == [4, 4, 4]
        assert sum(item["per_rank"]["requests"]) == 150
        assert sum(item["per_rank"]["real_rows"]) == item["real_tokens"]
        assert item["lost_fraction"] + item["no_requests_fraction"] == pytest.approx(sum(item["lost"].values()))
    assert f"{document['settings'][document['best']]['per_rank']['real_rows'][3]:,}" in shown
    assert len(document["settings"]) == 4
    with (out / "settings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ttft_s.p99"]) for row in rows] == [item["ttft_s"]["p99"] for item in document["settings"]]
    assert pyarrow.parquet.read_table(out / "settings.parquet").num_rows == 4
    chosen = document["settings"][document["best"]]
    assert pyarrow.parquet.read_table(out / "steps.parquet").num_rows == chosen["rank_steps"]
    assert pyarrow.parquet.read_table(out / "requests.parquet").num_rows == 150
    assert "Settings compared" in (out / "report.html").read_text()
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    assert "exists" in str(invoke("simulate", "--synthetic", SYNTHETIC, "--out", str(out)).exception)
    again = invoke("simulate", "--synthetic", SYNTHETIC, "--out", str(out), "--overwrite", "--workers", "1", "--json")
    assert json.loads(again.stdout)["best"] == 0
    comparison = compare_runs(out, out)
    assert comparison["first_different_step"] is None
    assert comparison["a"] == comparison["b"]
    assert comparison["a"]["ttft_s_p99"] > 0
    assert invoke("compare", str(out), str(out)).exit_code == 0


def test_a_limit_that_nothing_keeps_to_is_said():
    result = invoke("simulate", "--synthetic", SYNTHETIC, "--ttft-p99", "0.1ms", "--workers", "1")
    assert result.exit_code == 1
    assert "no setting meets ttft_p99 <= 0.0001 s" in result.output.replace("\n", " ")


def test_waiting_for_kv_cache_is_said():
    options = ("--kv-capacity-tokens", "16000", "--data-parallel-size", "1", "--workers", "1")
    result = invoke("simulate", "--synthetic", SYNTHETIC, *options)
    assert "because the KV cache was full" in result.output, result.output


def test_full_exchange_buffers_are_said():
    options = ("--buffer-capacity-rows", "64", "--data-parallel-size", "2", "--workers", "1")
    result = invoke("simulate", "--synthetic", SYNTHETIC, *options)
    assert "smaller chunks to fit the exchange buffers" in result.output.replace("\n", " "), result.output
    small = invoke("simulate", "--synthetic", SYNTHETIC, "--buffer-capacity-rows", "7", "--workers", "1")
    assert "buffer_capacity_rows must be >= 8" in str(small.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data-parallel-size", "0"), "--data-parallel-size must be in 1..100000, got 0"),
        (("--data-parallel-size", "two"), "--data-parallel-size must be an integer in 1..100000, got 'two'"),
        (("--max-chunk-size", "0"), "--max-chunk-size must be >= 1, got 0"),
        (("--load-balancing", "best"), "--load-balancing must be one of"),
        (("--cost", "nosuch"), "--cost must be one of"),
        (("--ttft-p99", "soon"), "--ttft-p99 must be a time > 0 such as 2s or 500ms, got 'soon'"),
        (("--synthetic", "rat=3"), "--synthetic: synthetic parameters are name=number, each once"),
        (
            ("--synthetic", "rate=3", "--workload", "trace.csv"),
            "for the workload `synthetic`, not for the file trace.csv",
        ),
        (("--validate", "nowhere"), "nowhere is not the folder of a recorded run: it has no steps.jsonl"),
        (("--rate-scale", "0"), "--rate-scale must be a number in 1e-09..1e+09, got 0"),
        (("--rate-scale", "1e308"), "--rate-scale must be a number in 1e-09..1e+09, got 1e308"),
        (("--synthetic", "rate=1e308"), "--synthetic: rate must be in 1e-9..1e9 requests per second, got 1e+308"),
        (("--length-scale", "1e9"), "--length-scale=1e+09 makes a request of "),
        (("--length-scale", "1e308"), "--length-scale=1e+308 makes a request of inf tokens, more than 2147483647"),
        (("--data-parallel-size", "8,1000000"), "--data-parallel-size must be in 1..100000, got 1000000"),
        (("--requests", "1000000000"), "--requests of a synthetic workload must be <= 10000000, got 1000000000"),
        (("--out", "{folder}/cost.json", "--overwrite"), "cost.json is no folder, so it is not overwritten"),
        (("--out", "{folder}/cost.json/below"), "cost.json/below cannot be written: Not a directory"),
        (("--cost", "{folder}/cost.json"), "cost.json: cost constant step_us is missing"),
        (("--kv-capacity-tokens", "10"), "--kv-capacity-tokens must be >= 64, one page of the KV cache, got 10"),
        (("--kv-capacity-tokens", "100"), "pages of 64, more than the 1 of --kv-capacity-tokens=100 of a rank"),
    ],
)
def test_bad_options_name_value_and_limit(options, message, tmp_path, command_line):
    (tmp_path / "cost.json").write_text("{}")
    options = [option.replace("{folder}", str(tmp_path)) for option in options]
    code, _, stderr = command_line("simulate", "--requests", "5", *options)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1


def test_lists_and_durations():
    assert several(whole(1))("1, 2,1") == [1, 2]
    assert several(whole(1), none="none")("none,4") == [None, 4]
    assert [seconds(text) for text in ("2s", "500ms", "0.5")] == [2.0, 0.5, 0.5]
    with pytest.raises(typer.BadParameter, match="must be a time > 0"):
        seconds("-1s")


def test_describe_prints_parameters_that_make_the_same_kind_of_workload(tmp_path):
    lines = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        *(f"2023-11-16 18:15:{i:02},{100 + i},{5 + i}" for i in range(50)),
    ]
    (tmp_path / "trace").write_text("\n".join([*lines, "broken"]))
    result = invoke("workload", "describe", str(tmp_path / "trace"))
    assert result.exit_code == 0
    assert "1 malformed line" in result.output
    options = result.output.replace("\n", "").split("--synthetic ")[1].strip()
    assert SyntheticParameters.parse(options).prompt_median == pytest.approx(124.5)
    document = json.loads(invoke("workload", "describe", str(tmp_path / "trace"), "--json").stdout)
    assert (document["num_requests"], document["num_malformed"], document["requests_per_s"]) == (50, 1, 1)


def test_described_lengths_of_many_digits_can_be_given_back(tmp_path):
    (tmp_path / "trace").write_text('{"timestamp": 0, "input_length": 12345678, "output_length": 1}\n')
    result = invoke("workload", "describe", str(tmp_path / "trace"))
    options = result.output.replace("\n", "").split("--synthetic ")[1].strip()
    assert SyntheticParameters.parse(options).prompt_max == 12_345_678


def records(num_steps=50, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    cost = CostConstants(2000, 10, expert_row_us=4)
    found = []
    start = 0.0
    for step in range(num_steps):
        rows = [int(count) for count in rng.integers(1, 200, 2)]
        nothing = np.zeros((1, 2))
        duration = float(cost.step_times_us(np.array([rows]), nothing, nothing, nothing, np.ones(1))[0]) / 1e6
        duration *= 1 + noise * rng.normal()
        for rank, count in enumerate(rows):
            found.append(
                StepLogRecord(
                    step, rank, count, decode_tokens=count, start_s=start, duration_s=duration, agreement_s=1e-4
                )
            )
        start += duration
    return found, cost


def write_run(folder, records):
    folder.mkdir()
    with StepLogWriter(folder / "steps.jsonl") as log:
        for record in records:
            log.write(record)
    return folder


def test_a_step_goes_from_one_agreement_to_the_next():
    # Rank 0 ends the first step at 10 and waits for rank 1 until 12; both have agreed at 13 and end the second at 20.
    # Rank 1's clock started 5 later: only differences count. The wait of 1 before the first agreement is no step's.
    found = [
        StepLogRecord(0, 0, 8, start_s=0, duration_s=10, agreement_s=1),
        StepLogRecord(0, 1, 9, start_s=5, duration_s=12, agreement_s=1),
        StepLogRecord(1, 0, 1, start_s=10, duration_s=10, agreement_s=3),
        StepLogRecord(1, 1, 1, start_s=17, duration_s=8, agreement_s=1),
    ]
    assert cost_columns(found)["duration_us"].tolist() == [12e6, 7e6]
    # Where step numbers are missing, ranks had no requests: the wait before step 7 is not step 0's.
    later = [replace(record, step=7) if record.step else record for record in found]
    assert cost_columns(later)["duration_us"].tolist() == [10e6, 7e6]
    with pytest.raises(ConfigurationError, match="not of a measured run"):
        cost_columns([StepLogRecord(0, 0, 1)])
    with pytest.raises(ConfigurationError, match="not the same number of each of 2 ranks"):
        cost_columns(found[:-1])
    for wrong in ([found[0], found[0], found[2], found[3]], [found[0], found[3], found[2], found[1]]):
        with pytest.raises(ConfigurationError, match="not have one record of each rank in step 0"):
            cost_columns(wrong)


def test_validation_compares_step_by_step(tmp_path):
    found, cost = records()
    result = validate(cost_columns(found), cost)
    assert result["total_error"] == pytest.approx(0, abs=0.01)  # the first agreement is left out
    assert result["median_step_error"] == pytest.approx(0, abs=1e-9)
    cost.save(tmp_path / "cost.json")
    run = write_run(tmp_path / "run", found)
    shown = invoke("simulate", "--validate", str(run), "--cost", str(tmp_path / "cost.json"), "--json")
    assert json.loads(shown.stdout)["steps"] == 50
    shown = invoke("simulate", "--validate", str(run), "--cost", str(tmp_path / "cost.json"))
    assert shown.exit_code == 0
    assert "50" in shown.stdout


def test_constants_fitted_to_one_run_predict_another(tmp_path):
    run = write_run(tmp_path / "run", records(300, seed=1, noise=0.05)[0])
    shown = invoke("bench", "calibrate", str(run), "--out", str(tmp_path / "cost.json"), "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["fit"]["steps"] == 300
    other = cost_columns(records(300, seed=2, noise=0.05)[0])
    result = validate(other, CostConstants.load(str(tmp_path / "cost.json")))
    assert abs(result["total_error"]) < 0.02
    assert result["median_step_error"] < 0.06
    assert invoke("bench", "calibrate", str(run), str(run), "--out", str(tmp_path / "cost.json")).exit_code == 0


def test_repeats_count_with_the_median_time_of_each_step():
    found, _ = records(20)
    slow = [replace(record, duration_s=record.duration_s * (1 + 4 * (record.step == 3))) for record in found]
    slower = [replace(record, duration_s=record.duration_s * (1 + 9 * (record.step in (3, 4)))) for record in found]
    runs = [cost_columns(run) for run in (found, slower, slow)]
    joined = join_runs(runs)
    assert all(np.array_equal(joined[name], runs[2][name], equal_nan=True) for name in joined)
    others = cost_columns(records(20, seed=1)[0])
    assert len(join_runs([runs[0], others, runs[2]])["duration_us"]) == 40
    with pytest.raises(ConfigurationError, match="must have the same ranks"):
        join_runs([runs[0], cost_columns([record for record in found if record.rank == 0])])
    with pytest.raises(ConfigurationError, match="without dummy or padding rows"):
        fit(**cost_columns([replace(record, dummy_rows=1) for record in found]))


def test_calibration_makes_its_own_runs(tmp_path, capsys):
    made = []

    def make_run(out, model, data_parallel_size, requests):
        # What `lockstep run` would do, without its model: as many requests over as many ranks as it was asked for.
        made.append(data_parallel_size)
        write_run(out, records(60, noise=0.02 * len(made))[0])

    status = execute_calibration([], "tiny", 2, 120, 3, tmp_path / "cost.json", as_json=True, make_run=make_run)
    assert (status, made) == (0, [2] * 3)
    document = json.loads(capsys.readouterr().out)
    assert document["fit"]["steps"] == 60
    assert "3 runs of tiny over 2 ranks" in document["constants"]["source"]
    missing = invoke("bench", "calibrate", "--out", str(tmp_path / "none" / "cost.json"))
    assert "does not exist" in str(missing.exception)
    (tmp_path / "thesis").write_text("years of work")
    for out in (tmp_path / "thesis", tmp_path):
        refused = invoke("bench", "calibrate", "--out", str(out))
        assert "is not overwritten: it holds no cost constants" in str(refused.exception)
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert len(made) == 3


def test_two_runs_that_differ(tmp_path):
    found, _ = records()
    other = [*found[:20], *records(seed=1)[0][20:]]
    a, b = write_run(tmp_path / "a", found), write_run(tmp_path / "b", other)
    (a / "outputs.jsonl").write_text('{"request_id": 0, "tokens": [1]}\n{"request_id": 1, "tokens": [2]}\n{"reque')
    (b / "outputs.jsonl").write_text('{"request_id": 0, "tokens": [1]}\n{"request_id": 1, "tokens": [3]}\n')
    comparison = compare_runs(a, b)
    assert comparison["first_different_step"] == 10
    assert comparison["different_outputs"] == 1
    assert "counts differ from step 10 on" in invoke("compare", str(a), str(b)).output
    (b / "summary.json").write_text('{"clock": "wall"}')
    assert compare_runs(a, b)["clock"] == {"a": None, "b": "wall"}
    shown = " ".join(invoke("compare", str(a), str(b)).output.split())
    assert "B ran with --clock wall, where steps depend on the machine's speed" in shown
    with pytest.raises(ConfigurationError, match="not the folder of a run"):
        compare_runs(a, tmp_path)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"step": ["a"], "rank": [0], "real_rows": [1]}, "column step holds string, and must hold numbers"),
        ({"step": [0], "rank": [0], "real_rows": ["1"]}, "column real_rows holds string"),
        ({"step": [0], "rank": [0], "real_rows": [1.5]}, "column real_rows has fractions or gaps"),
        ({"step": [0], "rank": [None], "real_rows": [1]}, "column rank holds null"),
        ({"step": [0, 1], "rank": [0, None], "real_rows": [1, 1]}, "column rank has fractions or gaps"),
        ({"step": [0], "rank": [-1], "real_rows": [1]}, "column rank has -1, and must be >= 0"),
        ({"step": [0], "real_rows": [1]}, "has 0 columns rank, and must have one"),
        ({"step": [0], "rank": [0], "real_rows": [1], "duration_s": ["x"]}, "column duration_s holds string"),
        ({"step": range(5000), "rank": range(5000), "real_rows": [1] * 5000}, "should have one of each rank in each"),
        (b"PAR1 and nothing more", "is no Parquet file"),
    ],
)
def test_parquet_of_something_else_is_one_sentence(tmp_path, columns, message, command_line):
    path = tmp_path / "steps.parquet"
    path.write_bytes(columns) if isinstance(columns, bytes) else write_parquet(path, **columns)
    code, _, stderr = command_line("compare", tmp_path, tmp_path)
    assert (code, stderr.count("\n")) == (2, 1)
    assert message in stderr


def test_few_bytes_of_parquet_that_stand_for_many_rows_are_not_read(tmp_path):
    write_parquet(tmp_path / "steps.parquet", step=[0] * 100, rank=[0] * 100, real_rows=[0] * 100)
    with pytest.raises(ConfigurationError, match="has 100 rows, more than 99"):
        read_parquet_columns(tmp_path / "steps.parquet", ("step", "rank", "real_rows"), most_rows=99)


@pytest.mark.parametrize("line", ["[1]", '{"tokens": [1]}', '{"request_id": []}', "[" * 100_000, "9" * 5000, "\udcff"])
def test_outputs_of_something_else_are_one_sentence(tmp_path, line, command_line):
    run = write_run(tmp_path / "run", records()[0])
    (run / "outputs.jsonl").write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    code, _, stderr = command_line("compare", run, run)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "outputs.jsonl: line 1 is not a request's output" in stderr
    (run / "outputs.jsonl").write_text('{"request_id": 1, "ttft_s": "soon"}\n{"request_id": 2, "ttft_s": NaN}\n')
    write_parquet(run / "requests.parquet", ttft_s=["soon"], tpot_s=[1.0])
    assert "column ttft_s holds string" in command_line("compare", run, run)[2]
    (run / "requests.parquet").unlink()
    assert command_line("compare", run, run)[0] == 0


def slices_of(events, rank):
    """One rank's slices in nanoseconds: Perfetto reads them as such, and leaves out what overlaps by a single one."""
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    mine = [event for event in events if event["ph"] == "X" and named[event["tid"]] == f"rank {rank}"]
    return [(event["name"], round(event["ts"] * 1e3), round(event["dur"] * 1e3)) for event in mine]


def test_trace_has_each_ranks_slices_one_after_the_other(tmp_path):
    found, _ = records(3)
    assert write_trace(tmp_path / "trace.json", found) == 3
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        slices = slices_of(events, rank)
        assert {name for name, _, _ in slices} <= {"agreement", "generating tokens", "waiting for other ranks"}
        for (_, start, length), (_, following, _) in itertools.pairwise(slices):
            assert following == start + length
        assert sum(length for _, _, length in slices) == pytest.approx(
            sum(record.duration_s for record in found[::2]) * 1e9, abs=10
        )
    assert write_trace(tmp_path / "short.json", found, max_steps=1) == 1


def test_slices_do_not_overlap_where_the_log_is_rounded(tmp_path):
    # A run's log has microseconds: of a step that began at 0.4 us and took 1.4 us it says 0 and 1, or 0 and 2.
    found, _ = records(200)
    rounded = [
        replace(record, start_s=round(record.start_s, 6), duration_s=round(record.duration_s + 4e-7, 6), busy_s=0.001)
        for record in found
    ]
    assert any(b.start_s < a.start_s + a.duration_s for a, b in itertools.pairwise(rounded[::2]))
    write_trace(tmp_path / "trace.json", rounded)
    for rank in (0, 1):
        slices = slices_of(json.loads((tmp_path / "trace.json").read_text())["traceEvents"], rank)
        assert all(later[1] >= earlier[1] + earlier[2] for earlier, later in itertools.pairwise(slices))
        assert all(length > 0 for _, _, length in slices)


def test_trace_keeps_to_the_documented_fields_of_the_trace_event_format(tmp_path):
    requests = synthetic_requests(SyntheticParameters.parse(SYNTHETIC))
    with StepColumns(tmp_path / "steps.parquet") as log:
        simulate(requests, SimulationConfig(4, max_chunk_size=64, row_shapes="dummy"), log)
    write_trace(tmp_path / "trace.json", read_step_columns(tmp_path / "steps.parquet"))
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document.keys() == {"displayTimeUnit", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    # Of each phase: the keys that it must have, and the only ones that it may have.
    keys = {
        "X": {"ph", "pid", "tid", "name", "cname", "ts", "dur", "args"},
        "C": {"ph", "pid", "name", "ts", "args"},
    }
    metadata = {"process_name": {"name"}, "thread_name": {"name"}, "thread_sort_index": {"sort_index"}}
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert all(type(event[key]) is int for key in ("pid", "tid") if key in event)
        assert all(isinstance(event[key], int | float) and event[key] >= 0 for key in ("ts", "dur") if key in event)
        if event["ph"] == "M":
            assert event.keys() - {"tid"} == {"ph", "pid", "name", "args"}
            assert event["args"].keys() == metadata[event["name"]]
            continue
        assert event.keys() == keys[event["ph"]], event
        # Perfetto takes thread 0, and one with the process's number, for the process's main thread.
        assert event.get("tid", 1) not in (0, event["pid"])
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    assert {event["ph"] for event in document["traceEvents"]} == {"X", "C", "M"}


def test_report_of_one_simulation_is_that_of_its_steps():
    requests = synthetic_requests(SyntheticParameters.parse(SYNTHETIC))
    result = simulate(requests, SimulationConfig(4))
    assert result.steps.num_steps == result.summary["steps"]
    assert result.steps.lost_by_cause() == result.summary["lost"]


def test_a_file_that_is_not_there_is_named_without_numbers_of_the_system(command_line):
    said = "lockstep: error: nowhere.csv: No such file or directory\n"
    assert command_line("simulate", "--workload", "nowhere.csv") == (2, "", said)
