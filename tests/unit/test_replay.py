"""A recorded run is planned again from its files, ends and preemptions included."""

import json
from dataclasses import asdict

import pytest
from cluster import overrun_rows, run_cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import ConfigurationError
from lockstep.simulation.cost import CostConstants
from lockstep.simulation.replay import read_replay
from lockstep.steplog.files import StepLogWriter
from lockstep.steplog.record import StepLogRecord
from lockstep.workload import Request, SchedulerConfig, WorkloadOptions, synthetic_requests

COST = CostConstants(1000, 10)
CONFIG = SchedulerConfig("least-tokens", 64, max_num_seqs=6, max_prefill_delay_steps=3, kv_capacity_tokens=200)


def record(folder, requests, config, num_ranks, stop_before=()):
    """Write the files of a run in which these schedulers said what runs."""
    steps, _, stops = run_cluster(requests, config, num_ranks, stop_before)
    folder.mkdir(exist_ok=True)
    overrun = overrun_rows(steps, requests, stops)
    (folder / "steps.jsonl").unlink(missing_ok=True)
    with StepLogWriter(folder / "steps.jsonl") as log:
        for plans in steps:
            for rank, plan in enumerate(plans):
                log.write(
                    StepLogRecord(
                        *(plan.step, rank, plan.num_tokens),
                        prefill_tokens=plan.num_prefill_tokens,
                        decode_tokens=plan.num_decode_tokens,
                        prefill_context_tokens=plan.prefill_context_tokens,
                        decode_context_tokens=plan.decode_context_tokens,
                        num_waiting=plan.num_waiting,
                        prefills_held=plan.prefills_held,
                        preempted=len(plan.preempted),
                        overrun_rows=overrun[plan.step][rank],
                        cached_tokens=plan.num_cached_tokens,
                    )
                )
    lines = []
    for request in requests:
        stop = stops.get(request.request_id)
        line = {name: getattr(request, name) for name in Request.__slots__ if name != "prompt"}
        line["num_new_tokens"] = request.max_new_tokens if stop is None else stop.num_new_tokens
        line["stopped_step"] = None if stop is None else stop.step
        lines.append(line)
    write_outputs(folder, lines)
    summary = {"data_parallel_size": num_ranks, "tensor_parallel_size": 1, "scheduler": asdict(config)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return steps, stops


def write_outputs(folder, lines):
    (folder / "outputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run_folder(tmp_path):
    requests = [Request(i, 0.2 * i, 50 + 7 * i % 40, 20 + 11 * i % 60) for i in range(12)]
    stops = [(9, 1, 1), (30, 3, 0), (31, 4, 3), (50, 7, 1), (0, 5, 1)]
    steps, found = record(tmp_path / "run", requests, CONFIG, 2, stops)
    assert sum(len(plan.preempted) for plans in steps for plan in plans) > 2
    assert len(found) >= 3
    return tmp_path / "run"


def test_a_run_with_stops_and_preemptions_is_planned_again_exactly(run_folder):
    summary, difference = read_replay(run_folder, COST).run()
    assert difference == ""
    assert summary["preempted"] > 2
    assert summary["overrun_rows"] >= 3


def test_a_run_in_real_time_cannot_be_planned_again(run_folder):
    path = run_folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clock": "wall"}))
    with pytest.raises(ConfigurationError, match=r"was run with --clock wall: .* use a run with --clock steps"):
        read_replay(run_folder, COST)


def test_the_first_difference_is_named(run_folder):
    lines = (run_folder / "steps.jsonl").read_text().splitlines()
    changed = json.loads(lines[2 * 7 + 1])
    assert (changed["step"], changed["rank"]) == (7, 1)
    decode = changed["decode_tokens"]
    (run_folder / "steps.jsonl").write_text(
        "\n".join([*lines[:15], json.dumps({**changed, "decode_tokens": decode + 1}), *lines[16:], ""])
    )
    _, difference = read_replay(run_folder, COST).run()
    assert difference == f"step 7, rank 1: decode_tokens was {decode + 1} in the run, {decode} is planned"
    (run_folder / "steps.jsonl").write_text("\n".join([*lines[:-2], ""]))
    _, difference = read_replay(run_folder, COST).run()
    assert difference == f"the run has {len(lines) // 2 - 1} steps, {len(lines) // 2} are planned"


def test_without_its_stops_the_plan_is_another(run_folder):
    outputs = [json.loads(line) for line in (run_folder / "outputs.jsonl").read_text().splitlines()]
    write_outputs(
        run_folder, [{**line, "stopped_step": None, "num_new_tokens": line["max_new_tokens"]} for line in outputs]
    )
    _, difference = read_replay(run_folder, COST).run()
    assert difference == "step 8, rank 1: overrun_rows was 1 in the run, 0 is planned"  # request 1 stops next


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.integers(1, 90), st.integers(1, 100), st.integers(0, 2)), min_size=1, max_size=15
    ),
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 14), st.integers(0, 3)), max_size=8),
    st.integers(1, 3),
)
def test_any_run_is_planned_again_exactly(tmp_path_factory, rows, stops, num_ranks):
    requests = [Request(i, *row, block_ids=(block,)) for i, (*row, block) in enumerate(sorted(rows))]
    folder = tmp_path_factory.mktemp("run")
    record(folder, requests, CONFIG, num_ranks, [stop for stop in stops if stop[1] < len(requests)])
    assert read_replay(folder, COST).run()[1] == ""


def test_tensor_parallel_ranks_repeat_their_first(tmp_path):
    requests = synthetic_requests(None, WorkloadOptions(num_requests=10, length_scale=0.05), seed=1)
    record(tmp_path / "run", requests, SchedulerConfig(), 2)
    path = tmp_path / "run" / "steps.jsonl"
    ranks = [json.loads(line) for line in path.read_text().splitlines()]
    doubled = [{**line, "rank": 2 * line["rank"] + tp} for line in ranks for tp in (0, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in doubled))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "tensor_parallel_size": 2}))
    assert read_replay(tmp_path / "run", COST).run()[1] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stopped_step": -1}, r"outputs.jsonl: line 1: stopped_step must be a whole number in 0\.\..*, got -1"),
        ({"num_new_tokens": 10**6}, r"line 1: num_new_tokens is 1000000, above max_new_tokens, 20"),
        ({"max_new_tokens": None}, r"line 1: max_new_tokens must be a whole number in 1\.\..*, got None"),
        ({"arrival_s": float("inf")}, r"line 1: arrival_s must be a number >= 0 and < 1e12, got inf"),
        ({"block_ids": 7}, r"line 1: block_ids must be a list, got 7"),
        ({"block_ids": [0, -1]}, r"line 1: block_ids must hold whole numbers in 0\.\.2\*\*63 - 1, got -1"),
        ({"request_id": 1}, r"line 2: request_id 1 is there twice"),
    ],
)
def test_a_damaged_run_names_file_line_and_field(run_folder, change, message):
    first, *others = [json.loads(line) for line in (run_folder / "outputs.jsonl").read_text().splitlines()]
    write_outputs(run_folder, [{**first, **change}, *others])
    with pytest.raises(ConfigurationError, match=message):
        read_replay(run_folder, COST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"summary.json must be a JSON object, got \[\]"),
        ("{", "summary.json is not JSON"),
        ('{"data_parallel_size": 0}', "summary.json: data_parallel_size must be a whole number in 1.*, got 0"),
        ('{"data_parallel_size": 2, "tensor_parallel_size": 1}', "scheduler is missing: this run cannot be planned"),
        ('{"data_parallel_size": 2, "tensor_parallel_size": 1, "scheduler": {"seats": 1}}', "summary.json: .*'seats'"),
        (
            '{"data_parallel_size": 2, "tensor_parallel_size": 1, "scheduler": {"max_num_seqs": 0}}',
            "summary.json: max_num_seqs must be >= 1, got 0",
        ),
        (
            '{"data_parallel_size": 5, "tensor_parallel_size": 1, "scheduler": {}}',
            r"steps.jsonl: \d+ records are not the same number of each of 5 ranks",
        ),
    ],
)
def test_a_damaged_summary_is_named(run_folder, text, message):
    (run_folder / "summary.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_replay(run_folder, COST)


def test_runs_that_cannot_be_planned_again_are_refused(run_folder, tmp_path):
    (run_folder / "parts").mkdir()
    (run_folder / "parts" / "steps-rank0-restart1.jsonl").write_text("")
    with pytest.raises(ConfigurationError, match="were started again: such a run cannot be planned again"):
        read_replay(run_folder, COST)
    with pytest.raises(ConfigurationError, match=r"is not the folder of a finished run: it has no summary.json"):
        read_replay(tmp_path, COST)
