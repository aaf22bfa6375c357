"""The same workload and options give the same counts, step by step, in a real run and in the simulator."""

import json

import pytest
from command import Command

from lockstep.simulation.simulator import SimulationConfig, simulate
from lockstep.steplog.files import StepColumns, read_step_columns, read_step_log
from lockstep.workload import SchedulerConfig, WorkloadOptions, load_trace, synthetic_requests

NAMES = (
    *(
        "step",
        "rank",
        "real_rows",
        "prefill_tokens",
        "decode_tokens",
        "prefill_context_tokens",
        "decode_context_tokens",
    ),
    *("num_waiting", "prefills_held", "num_chunks", "dummy_rows", "padding_rows", "preempted", "overrun_rows"),
    "cached_tokens",
)


def counts(path):
    return [
        tuple(getattr(record, name) for name in NAMES)
        for record in (read_step_log if path.suffix else read_step_columns)(path)
    ]


@pytest.mark.ranks(4)
def test_counts_of_a_run_are_those_of_the_simulator(tmp_path):
    options = WorkloadOptions(rate_scale=6, length_scale=0.05, num_requests=30)
    scheduler = SchedulerConfig("least-tokens", max_num_batched_tokens=48, max_num_seqs=6, max_prefill_delay_steps=4)
    command = Command(
        *("run", "--no-verify", "--out", tmp_path / "run", "--seed", "3"),
        *("--data-parallel-size", "4", "--requests", "30", "--rate-scale", "6", "--max-chunk-size", "20"),
        *("--load-balancing", "least-tokens", "--max-num-batched-tokens", "48", "--max-num-seqs", "6"),
        *("--max-prefill-delay-steps", "4", "--length-scale", "0.05"),
    )
    assert command.wait(250) == 0
    config = SimulationConfig(4, scheduler, max_chunk_size=20, clock="steps")
    with StepColumns(tmp_path / "simulated") as log:
        simulate(synthetic_requests(None, options, seed=3), config, log)
    ran = counts(tmp_path / "run" / "steps.jsonl")
    assert ran == counts(tmp_path / "simulated")
    assert any(row[NAMES.index("prefills_held")] for row in ran)
    assert len({row[NAMES.index("real_rows")] for row in ran}) > 5


@pytest.mark.ranks(2)
def test_a_run_that_preempts_is_that_of_the_simulator_and_equals_one_process(tmp_path, capsys):
    # Three pages for two or three requests that cross from their first page into a second one as they generate.
    trace = tmp_path / "trace.jsonl"
    lengths = [(60, 12), (58, 10), (20, 9), (62, 70), (61, 14), (59, 12), (100, 5), (30, 40), (57, 11), (63, 8)]
    lines = [{"timestamp": 50 * i, "input_length": p, "output_length": n} for i, (p, n) in enumerate(lengths)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = Command(
        *("run", "--workload", trace, "--out", tmp_path / "run", "--data-parallel-size", "2", "--length-scale", "1"),
        *("--load-balancing", "least-tokens", "--max-num-batched-tokens", "80", "--kv-capacity-tokens", "200"),
        *("--max-prefill-delay-steps", "3"),
    )
    assert command.wait(250) == 0
    scheduler = SchedulerConfig("least-tokens", 80, max_prefill_delay_steps=3, kv_capacity_tokens=200)
    with StepColumns(tmp_path / "simulated") as log:
        config = SimulationConfig(2, scheduler, clock="steps")
        summary = simulate(load_trace(trace).requests, config, log).summary
    assert counts(tmp_path / "run" / "steps.jsonl") == counts(tmp_path / "simulated")
    assert summary["preempted"] >= 3
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["verified"]
    assert document["compared_tokens"] == sum(n for _, n in lengths)
    assert document["preempted"] == summary["preempted"]
    capsys.readouterr()
    assert Command("simulate", "--replay", tmp_path / "run").wait(60) == 0
    shown = capsys.readouterr().out
    assert f"executed equals planned in all {summary['steps']:,} steps" in shown
    assert f"because the KV cache was full, and computed again: {summary['preempted']}" in shown


@pytest.mark.ranks(2)
def test_a_run_with_prefix_pages_is_that_of_the_simulator_and_equals_one_process(tmp_path, capsys):
    # Four conversations: each turn begins with the blocks of the turn before. Eight pages for each rank are too few.
    trace = tmp_path / "trace.jsonl"
    lines = []
    for turn in range(5):
        for talk in range(4):
            blocks = [0, *(10 * talk + block for block in range(1, turn + 1))]  # 512 tokens each before they are scaled
            length = 512 * turn + 300 + 100 * talk
            lines.append({"timestamp": 2000 * turn + 100 * talk, "input_length": length, "output_length": 30})
            lines[-1]["hash_ids"] = blocks[: -(-length // 512)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--length-scale", "0.2", "--max-num-batched-tokens", "150", "--kv-capacity-tokens", "640")
    run = ("run", "--workload", trace, "--data-parallel-size", "2", "--load-balancing", "least-tokens", *options)
    assert Command(*run, "--out", tmp_path / "run").wait(250) == 0
    shown = " ".join(capsys.readouterr().out.split())
    scheduler = SchedulerConfig("least-tokens", 150, kv_capacity_tokens=640)
    requests = load_trace(trace, WorkloadOptions(length_scale=0.2)).requests
    with StepColumns(tmp_path / "simulated") as log:
        summary = simulate(requests, SimulationConfig(2, scheduler, clock="steps"), log).summary
    assert counts(tmp_path / "run" / "steps.jsonl") == counts(tmp_path / "simulated")
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["verified"] is True
    assert document["cached_tokens"] == summary["cached_tokens"] >= 10 * 64
    assert document["scheduler"]["enable_prefix_caching"] is True
    outputs = [json.loads(line) for line in (tmp_path / "run" / "outputs.jsonl").read_text().splitlines()]
    assert sum(output["num_cached_tokens"] for output in outputs) == document["cached_tokens"]
    told = f"prompt tokens taken from the KV cache of earlier requests: {summary['cached_tokens']:,}"
    assert told in shown
    assert "cached prompt tokens" in (tmp_path / "run" / "report.html").read_text()
    # What the run logged is enough to plan it again, without the trace.
    assert Command("simulate", "--replay", tmp_path / "run").wait(60) == 0
    assert told in " ".join(capsys.readouterr().out.split())
    assert Command(*run, "--no-prefix-caching", "--no-verify", "--out", tmp_path / "without").wait(250) == 0
    without = [json.loads(line) for line in (tmp_path / "without" / "outputs.jsonl").read_text().splitlines()]
    assert [output["tokens"] for output in without] == [output["tokens"] for output in outputs]
    assert json.loads((tmp_path / "without" / "summary.json").read_text())["cached_tokens"] == 0
