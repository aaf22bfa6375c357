"""A rank of `lockstep run` is killed: finished requests are kept, the others run, the outputs are the same."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lockstep.coordination.step_log import read_step_log
from lockstep.models.tiny import make_tiny
from lockstep.runner.run import mend_lines

pytestmark = pytest.mark.timeout(180)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
REQUESTS = 14


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A checkpoint, a workload, and the outputs of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("restart")
    make_tiny(folder / "tiny", num_layers=2, num_experts=12)
    lines = [
        {"prompt": "One of us is killed. " * (1 + n % 4), "max_new_tokens": 4 + 3 * n, "arrival_s": 0.2 * n}
        for n in range(REQUESTS)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert start(folder, "undisturbed").wait(120) == 0
    return folder, outputs_of(folder / "undisturbed")


def start(folder, out, *more, launcher=()):
    command = [
        sys.executable, *launcher, "-m", "lockstep.cli", "run", "--model", folder / "tiny", "--workload",
        folder / "prompts.jsonl", "--data-parallel-size", 3, "--out", folder / out, "--json", "--deadline", 10, *more,
    ]  # fmt: skip
    log = (folder / f"{out.replace(chr(47), chr(45))}.log").open("w")
    return subprocess.Popen([str(part) for part in command], env=ENVIRONMENT, stdout=log, stderr=log)


def outputs_of(out):
    """What does not depend on when and where a request ran."""
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    return [(line["request_id"], line["num_prompt_tokens"], line["tokens"], line["text"]) for line in lines]


def finished(out):
    parts = list((out / "parts").glob("outputs-rank*.jsonl"))
    return {json.loads(line)["request_id"] for part in parts for line in part.read_text().splitlines(True)
            if line.endswith("\n")}  # fmt: skip


def pid_of_rank(process, out, rank):
    """The rank that has its part open."""
    path = str(out / "parts" / f"outputs-rank{rank}.jsonl")
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(file.path == path for file in child.open_files()):
                return child.pid
        except psutil.Error:
            continue
    return None


def kill_in_the_middle(process, out, rank, torn=b""):
    """Kill a rank once some requests are finished, in the middle of a line if `torn`; return which were."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        if (out / "parts").exists() and len(finished(out)) >= 3:
            pid = pid_of_rank(process, out, rank)
            if pid is not None:
                os.kill(pid, signal.SIGSTOP)
                done = finished(out)
                if torn:
                    with (out / "parts" / f"outputs-rank{rank}.jsonl").open("ab") as file:
                        file.write(torn)
                os.kill(pid, signal.SIGKILL)
                return done
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.01)
    raise AssertionError("no requests were finished in time")


def times_written(out):
    """How often each request was run to its end, over all starts."""
    counts = {}
    for part in (out / "parts").glob("outputs-rank*.jsonl"):
        for line in part.read_text().splitlines():
            request_id = json.loads(line)["request_id"]
            counts[request_id] = counts.get(request_id, 0) + 1
    return counts


def check(folder, name, expected, done):
    out = folder / name
    log = (folder / f"{name}.log").read_text()
    assert outputs_of(out) == expected, log
    assert times_written(out) == dict.fromkeys(range(REQUESTS), 1)
    records = read_step_log(out / "steps.jsonl").records
    assert [record.rank for record in records] == [0, 1, 2] * (len(records) // 3)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["requests"], summary["verified"], summary["mismatches"]) == (REQUESTS, True, 0)
    assert not list(out.glob("*.part"))
    assert len(done) >= 3
    return log


@pytest.mark.ranks(3)
@pytest.mark.parametrize(("rank", "torn"), [(1, b""), (0, b""), (2, b'{"request_id": 5, "tok')])
def test_kill_minus_nine_costs_a_restart_and_no_output(setting, rank, torn):
    folder, expected = setting
    name = f"killed{rank}"
    process = start(folder, name)
    done = kill_in_the_middle(process, folder / name, rank, torn)
    assert process.wait(120) == 0, (folder / f"{name}.log").read_text()
    log = check(folder, name, expected, done)
    assert "starting all ranks again, 1 of 3 times" in log
    assert f"rank {rank} failed: its process ended with exit code -9" in log


@pytest.mark.ranks(3)
def test_under_torchrun_elastic_restarts_do_the_same(setting):
    folder, expected = setting
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=2")
    process = start(folder, "torchrun", launcher=launcher)
    done = kill_in_the_middle(process, folder / "torchrun", 1)
    assert process.wait(150) == 0, (folder / "torchrun.log").read_text()
    assert "restart 1:" in check(folder, "torchrun", expected, done)


@pytest.mark.ranks(3)
def test_without_restarts_the_rank_is_named_and_what_was_done_is_whole(setting):
    folder, _ = setting
    process = start(folder, "once", "--max-restarts", 0)
    done = kill_in_the_middle(process, folder / "once", 1)
    assert process.wait(60) == 1
    assert "PeerFailedError: rank 1 failed: its process ended with exit code -9" in (folder / "once.log").read_text()
    assert done <= finished(folder / "once")
    assert not (folder / "once" / "outputs.jsonl").exists()


@pytest.mark.ranks(3)
def test_a_full_disk_ends_the_run_with_what_was_done_intact(setting):
    folder, expected = setting
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        started = time.monotonic()
        process = start(folder, "disk/out")
        code = process.wait(100)
        log = (folder / "disk-out.log").read_text()
        assert code in (1, 2), log
        assert time.monotonic() - started < 60
        by_id = {request_id: rest for request_id, *rest in expected}
        for part in (disk / "out" / "parts").glob("outputs-rank*.jsonl"):
            for line in mend_lines(part).splitlines():
                output = json.loads(line)
                assert by_id[output["request_id"]] == [output["num_prompt_tokens"], output["tokens"], output["text"]]
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


@pytest.mark.parametrize(
    ("data", "whole"),
    [(b"", b""), (b"{}\n{}\n", b"{}\n{}\n"), (b'{}\n{"a', b"{}\n"), (b'{"a', b""), (b"{}\n\0\0", b"{}\n")],
)
def test_a_torn_last_line_is_cut_off(tmp_path, data, whole):
    path = tmp_path / "lines.jsonl"
    assert mend_lines(path) == b""
    path.write_bytes(data)
    assert mend_lines(path) == whole
    assert path.read_bytes() == whole
