"""`lockstep run` as a user starts it: outputs, figures, wrong outputs, wrong input, Ctrl-C, torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from command import Command

from lockstep.coordination.groups import own_device, parallel_config
from lockstep.steplog.files import read_step_log

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _command(*arguments, launcher=()):
    return [sys.executable, *launcher, "-m", "lockstep.cli", *map(str, arguments)]


def _lockstep(*arguments, launcher=(), folder=None):
    return subprocess.run(
        _command(*arguments, launcher=launcher),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=250,
        cwd=folder,
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """One run of uneven prompts over four ranks, with chunks, that several tests look at."""
    folder = tmp_path_factory.mktemp("run")
    workload = folder / "prompts.jsonl"
    lines = [
        {"prompt": "Tokens go to their experts and back. " * n, "max_new_tokens": 2 + n % 5, "arrival_s": 0.3 * n}
        for n in (1, 4, 1, 2, 0, 3, 1)
        if n
    ]
    workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = _lockstep(
        "run",
        "--workload",
        workload,
        "--data-parallel-size",
        4,
        "--max-chunk-size",
        16,
        "--out",
        folder / "out",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    (folder / "stderr").write_text(result.stderr)
    return folder / "out", json.loads(result.stdout), len(lines)


@pytest.mark.ranks(4)
def test_the_json_document_has_the_figures_and_all_tokens_are_verified(run_folder):
    out, document, num_requests = run_folder
    assert document["requests"] == num_requests
    assert document["ranks"] == 4
    assert document["verified"] is True
    assert document["mismatches"] == 0
    assert document["compared_tokens"] == document["generated_tokens"] > 0
    assert document["dummy_rows"] == document["padding_rows"] == 0
    assert 0 < document["lost_fraction"] + document["no_requests_fraction"] < 1
    assert document["tokens_per_s"] > 0
    assert json.loads((out / "summary.json").read_text()) == document


@pytest.mark.ranks(4)
def test_what_was_chosen_and_why_is_said_once_and_kept(run_folder):
    out, document, _ = run_folder
    expected = {
        "dispatcher": "auto",
        "dispatcher_note": "allgather, alltoall; not nvlink: it needs GPUs",
        "dtype": "float32",  # the checkpoint's
        "device": "cpu",
        "layers": "Transformers'",
        "graphs": False,
        "graphs_note": "they need a GPU",
        "kv_capacity_tokens": None,
        "max_model_len": 32768,
    }
    assert {name: document[name] for name in expected} == expected
    assert document["attention_name"].startswith("scaled_dot_product_attention")
    said = (out.parent / "stderr").read_text()
    assert said.count("4 ranks on cpu, float32; dispatcher auto (allgather, alltoall; not nvlink: it needs GPUs)") == 1
    report = (out / "report.html").read_text()
    assert "dispatcher_note" in report and "attention_name" in report


@pytest.mark.ranks(4)
def test_what_was_executed_is_what_was_planned(run_folder):
    out, document, _ = run_folder
    records = read_step_log(out / "steps.jsonl")
    assert len(records) == 4 * document["steps"]
    outputs = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    # Every row of every request was computed once: its prompt, and every token but the last.
    planned = sum(output["num_prompt_tokens"] + output["num_new_tokens"] - 1 for output in outputs)
    assert sum(record.real_rows for record in records) == planned == document["real_tokens"]
    assert all(record.num_chunks == records[4 * (index // 4)].num_chunks for index, record in enumerate(records))
    assert max(record.num_chunks for record in records) > 1
    for record in records:
        assert 0 <= record.busy_s <= record.duration_s
    assert {output["rank"] for output in outputs} == {0, 1, 2, 3}
    assert all(output["text"] for output in outputs)


@pytest.mark.ranks(4)
def test_the_report_stands_alone(run_folder):
    page = (run_folder[0] / "report.html").read_text()
    assert "default-src 'none'" in page  # the browser itself refuses to load anything
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)


@pytest.mark.ranks(2)
def test_a_run_in_real_time_waits_for_arrivals_and_counts_latencies_from_them(tmp_path):
    workload = tmp_path / "prompts.jsonl"
    arrivals = [0, 0.2, 6.0, 6.0, 6.1]
    lines = [{"prompt": "Tokens wait for their time.", "max_new_tokens": 4, "arrival_s": at} for at in arrivals]
    workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = Command("run", "--workload", workload, "--clock", "wall", "--out", tmp_path / "out")
    assert command.wait(250) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["clock"] == "wall"
    assert summary["verified"] is True
    assert summary["wall_s"] > 5  # ranks start their clocks apart, on a loaded machine by some tenths of a second
    outputs = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert [output["rank"] for output in outputs] == [0, 1, 0, 1, 0]
    assert all(0 < output["ttft_s"] < 60 for output in outputs)
    records = read_step_log(tmp_path / "out" / "steps.jsonl")
    for output in outputs:
        begins = min(r.start_s for r in records if r.step == output["steps"][0] and r.rank == output["rank"])
        assert begins > output["arrival_s"] - 1
    assert "--clock wall" in (tmp_path / "out" / "report.html").read_text()
    steps = sorted({record.step for record in records})
    assert steps[-1] - len(steps) < 100  # agreements of idle ranks: some per second, not thousands


def test_verification_finds_a_changed_token(run_folder, tmp_path):
    from lockstep.runner.run import RunOptions
    from lockstep.runner.verify import verify

    out, document, num_requests = run_folder
    lines = (out / "outputs.jsonl").read_text().splitlines()
    changed = json.loads(lines[3])
    changed["tokens"][-1] ^= 1
    options = RunOptions(document["model"], workload=document["workload"], out=str(tmp_path), dtype=document["dtype"])
    (tmp_path / "outputs.jsonl").write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]) + "\n")
    found = verify(options)
    assert (found.verified, found.mismatches) == (False, 1)
    assert "request 3 differs at token" in found.first
    (tmp_path / "outputs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    found = verify(options)
    assert (found.verified, found.mismatches, found.first) == (False, 1, f"request {num_requests - 1} is missing")
    (tmp_path / "outputs.jsonl").write_text("")
    assert verify(options).verified is None


@pytest.mark.ranks(2)
def test_under_torchrun_it_is_one_of_the_ranks(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    result = _lockstep(
        "run", "--data-parallel-size", 2, "--requests", 4, "--max-new-tokens", 3, "--max-prompt-tokens", 40,
        "--dtype", "bfloat16", "--json", "--out", tmp_path / "out", launcher=torchrun,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["requests"], document["ranks"], document["verified"]) == (4, 2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-parallel-size", "0"], "--data-parallel-size must be >= 1, got 0"),
        (["--max-chunk-size", "0"], "--max-chunk-size must be >= 1, got 0"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens must be >= 1, got 0"),
        (["--max-model-len", "0"], "--max-model-len must be >= 1, got 0"),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization must be a number"),
        (["--gpu-memory-utilization", "1.1"], "--gpu-memory-utilization must be a number"),
        (["--requests", "-1"], "--requests must be >= 1, got -1"),
        (["--dtype", "int3"], "--dtype: 'int3' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["--dispatcher", "pigeon"], "--dispatcher: 'pigeon' is not one of 'allgather'"),
        (["--device", "pigeon"], "--device must be cpu, cuda or cuda:N, got 'pigeon'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--workload", "nowhere.csv"], "nowhere.csv"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--deadline", "0"], "--deadline must be a number > 0"),
        (["--deadline", "inf"], "--deadline must be a number > 0, got 'inf'"),
        (["--seed", "99999999999999999999"], "--seed must be in 0..4294967295"),
        (["--workload", "."], "no workload at ."),
        (["--data-parallel-size", "100000"], "100000 ranks on this host, but at most"),
        (["--expert-load", "--data-parallel-size", "1"], "--expert-load needs ranks that share the experts"),
        (["--load-balancing", "luck"], "--load-balancing: 'luck' is not one of 'round-robin'"),
        (["--metrics-port", "99999"], "--metrics-port must be in 0..65535, got 99999"),
        (["--out", "."], "the output folder . exists"),
        (["--out", "something/below"], "the output folder something/below cannot be written: Not a directory"),
        (["--out", "something", "--overwrite"], "something is no folder, so it is not overwritten"),
        (["--out", ".", "--overwrite"], "not empty, and Lockstep did not make it"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, tmp_path, monkeypatch, command_line):
    (tmp_path / "something").write_text("of mine")
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command_line("run", *arguments)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1
    assert (tmp_path / "something").read_text() == "of mine"
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--device", "cuda:1"], ["--dispatcher", "nvlink"]])
def test_gpus_that_are_not_there_are_missed_before_anything_starts(arguments, tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command_line("run", *arguments)
    assert code == 2
    assert " needs " in stderr
    assert not list(tmp_path.iterdir())


def test_of_gpus_without_a_number_each_rank_takes_its_own(gpus_are_there, environment):
    environment(LOCAL_RANK=3)
    for meant, device in ((None, "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert str(own_device(meant)) == device


def test_a_rank_works_on_the_gpu_of_its_model_though_its_script_has_chosen_none(tmp_path, monkeypatch):
    from lockstep.models import parallel
    from lockstep.models.loading import load_pretrained
    from lockstep.models.tiny import make_tiny

    class Chosen(Exception):
        pass

    def choose(device):
        raise Chosen(device)

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = load_pretrained(str(make_tiny(tmp_path / "tiny", num_layers=1)))
        options = parallel.ParallelOptions(dispatcher="nvlink")
        rank = parallel.ModelParallel(model, parallel_config(None, 1), dist.group.WORLD, options)
        rank.device = torch.device("cuda", 1)
        with pytest.raises(Chosen, match="cuda:1"):  # before anything else that needs a GPU
            rank.open()
    finally:
        dist.destroy_process_group()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("ends", "number", "status", "word"),
    [
        (os.killpg, signal.SIGINT, 130, "interrupted"),
        (os.killpg, signal.SIGTERM, 143, "terminated"),
        (os.kill, signal.SIGTERM, 143, "terminated"),
    ],
)
def test_ctrl_c_and_sigterm_end_all_ranks_and_say_how_far_it_came(tmp_path, ends, number, status, word):
    out = tmp_path / "out"
    trace = tmp_path / "trace"
    lines = [f'{{"timestamp": {i}, "input_length": 30, "output_length": 5}}' for i in range(500)]
    trace.write_text("\n".join([*lines, "broken"]))
    process = subprocess.Popen(
        _command("run", "--workload", trace, "--data-parallel-size", 2, "--length-scale", 1, "--out", out),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while not any(part.stat().st_size for part in out.glob("parts/outputs-rank*.jsonl")):
            assert time.monotonic() < until, "no request finished in 200 s"
            time.sleep(0.1)
        interrupted = time.monotonic()
        ends(process.pid, number)
        _, stderr = process.communicate(timeout=20)
        seconds = time.monotonic() - interrupted
    finally:
        process.kill()
    assert process.returncode == status
    assert f"{word} after" in stderr
    assert "requests were finished" in stderr
    assert "Traceback" not in stderr
    # Each rank has read the workload as well.
    assert stderr.count("left out 1 malformed line") == 1
    assert seconds < 10  # two on an idle machine: ranks that do not end by themselves are ended after one
    finished = [line for part in out.glob("parts/outputs-rank*.jsonl") for line in part.read_text().splitlines()]
    assert all(json.loads(line)["tokens"] for line in finished)
    with pytest.raises(ProcessLookupError):  # its session is empty: no rank is left, nor the server of ranks
        until = time.monotonic() + 10
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
