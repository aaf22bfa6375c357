"""Ranks of `lockstep run` are killed: finished requests are kept, the others run, the outputs are the same.

The ranks that are left go on; where none is left, or under torchrun, all are started again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from command import Command

from lockstep.models.tiny import make_tiny
from lockstep.runner.parts import mend_lines
from lockstep.steplog.files import read_step_log

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
REQUESTS, RANKS = 14, 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A checkpoint, a workload, and the outputs of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("restart")
    make_tiny(folder / "tiny", num_layers=2, num_experts=12)
    lines = [
        {"prompt": "One of us is killed. " * (1 + n % 4), "max_new_tokens": 20 + 12 * n, "arrival_s": 0.1 * n}
        for n in range(REQUESTS)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert start(folder, "undisturbed").wait(120) == 0
    return folder, outputs_of(folder / "undisturbed")


def arguments(folder, out, num_ranks):
    """By the wall clock: requests come for 1.3 s on a machine of any speed, so that ranks are killed before the end."""
    return [
        "run", "--model", folder / "tiny", "--workload", folder / "prompts.jsonl", "--data-parallel-size", num_ranks,
        "--out", folder / out, "--json", "--clock", "wall",
    ]  # fmt: skip


def start(folder, out, *more):
    return Command(*arguments(folder, out, RANKS), *more)


def outputs_of(out):
    """What does not depend on when and where a request ran."""
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    return [(line["request_id"], line["num_prompt_tokens"], line["tokens"], line["text"]) for line in lines]


def finished(out):
    parts = list((out / "parts").glob("outputs-rank*.jsonl"))
    return {json.loads(line)["request_id"] for part in parts for line in part.read_text().splitlines(True)
            if line.endswith("\n")}  # fmt: skip


def pid_of_rank(out, rank):
    """The rank that has its part open, if it is there."""
    path = str(out / "parts" / f"outputs-rank{rank}.jsonl")
    for child in psutil.Process().children(recursive=True):
        try:
            if any(file.path == path for file in child.open_files()):
                return child.pid
        except psutil.Error:
            continue
    return None


def kill_in_the_middle(has_ended, out, *ranks, torn=b"", when=3):
    """Kill ranks once some requests are finished, in the middle of a line if `torn`; return which were."""
    until, pids = time.monotonic() + 100, [None]
    while time.monotonic() < until:
        if None in pids and (out / "parts").exists():
            pids = [pid_of_rank(out, rank) for rank in ranks]
        if None not in pids and len(finished(out)) >= when:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            done = finished(out)
            if torn:
                with (out / "parts" / f"outputs-rank{ranks[0]}.jsonl").open("ab") as file:
                    file.write(torn)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            return done
        assert not has_ended(), "the run ended too early"
        time.sleep(0.005)
    raise AssertionError("no requests were finished in time")


def times_written(out):
    """How often each request was run to its end, over all starts."""
    counts = {}
    for part in (out / "parts").glob("outputs-rank*.jsonl"):
        for line in part.read_text().splitlines():
            request_id = json.loads(line)["request_id"]
            counts[request_id] = counts.get(request_id, 0) + 1
    return counts


def starts_of(out):
    """Ranks and starts that have generated tokens of each request; no token was generated twice."""
    seen, starts = set(), {}
    for part in (out / "parts").glob("tokens-rank*.jsonl"):
        start = 0
        for line in map(json.loads, part.read_text().splitlines()):
            start += "run_began" in line
            for request_id, position, _, _ in line.get("tokens", ()):
                assert (request_id, position) not in seen, f"token {position} of request {request_id} came twice"
                seen.add((request_id, position))
                starts.setdefault(request_id, set()).add((part.stem, start))
    return starts


def check(out, expected, done, num_ranks):
    assert outputs_of(out) == expected
    assert any(len(starts) > 1 for starts in starts_of(out).values()), "no request went on from its tokens"
    assert times_written(out) == dict.fromkeys(range(REQUESTS), 1)
    records = read_step_log(out / "steps.jsonl")
    assert [record.rank for record in records] == list(range(num_ranks)) * (len(records) // num_ranks)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["requests"], summary["verified"], summary["mismatches"]) == (REQUESTS, True, 0)
    assert not list(out.glob("*.part"))
    assert len(done) >= 3


@pytest.mark.ranks(3)
@pytest.mark.parametrize(("rank", "torn"), [(1, b""), (0, b""), (2, b'{"request_id": 5, "tok')])
def test_the_others_go_on_where_a_rank_is_killed(setting, caplog, rank, torn):
    folder, expected = setting
    out = folder / f"killed{rank}"
    command = start(folder, out.name)
    done = kill_in_the_middle(lambda: not command.is_alive(), out, rank, torn=torn)
    assert command.wait(120) == 0
    check(out, expected, done, RANKS)
    left = ", ".join(str(other) for other in range(RANKS) if other != rank)
    said = f"rank {rank} failed: its process was ended by signal 9 (SIGKILL); going on with ranks {left}"
    assert said in caplog.text and "again" not in caplog.text
    records = read_step_log(out / "steps.jsonl")
    assert sum(record.real_rows for record in records if record.rank == rank) > 0
    assert not any(record.real_rows for record in records[-RANKS:] if record.rank == rank)


@pytest.mark.ranks(3)
def test_one_rank_is_left_after_two_losses(setting, caplog, capfd):
    folder, expected = setting
    out = folder / "twice"
    command = start(folder, out.name, "--survive", 1, "--expert-load", "--metrics-port", 0)
    kill_in_the_middle(lambda: not command.is_alive(), out, 0)
    done = kill_in_the_middle(lambda: not command.is_alive(), out, 2, when=6)
    assert command.wait(120) == 0
    check(out, expected, done, RANKS)
    assert "going on with ranks 1, 2" in caplog.text and "going on with rank 1" in caplog.text
    said = capfd.readouterr().err
    assert "expert_load.json counts rows from step" in said
    # The first rank that is left goes on to show the progress.
    assert re.findall(r"^metrics: http|^\d ranks? on cpu", said, re.MULTILINE) == [
        "metrics: http", "3 ranks on cpu", "metrics: http", "2 ranks on cpu", "1 rank on cpu"
    ]  # fmt: skip


@pytest.mark.ranks(3)
def test_a_lost_rank_comes_back_and_runs_requests_again(tmp_path, caplog):
    """The first rank is lost, comes back behind the others, and another one is lost."""
    make_tiny(tmp_path / "tiny", num_layers=2, num_experts=12)
    lines = [{"prompt": "Back again.", "max_new_tokens": 60, "arrival_s": 0.04 * n} for n in range(400)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "back"
    command = Command(*arguments(tmp_path, out.name, RANKS), "--restart-ranks", 1, "--metrics-port", 0)
    has_ended = lambda: not command.is_alive()  # noqa: E731
    kill_in_the_middle(has_ended, out, 0)
    until = time.monotonic() + 100
    while "rank 0 is back; going on with ranks 0, 1, 2" not in caplog.text:
        assert not has_ended() and time.monotonic() < until, caplog.text
        time.sleep(0.01)
    kill_in_the_middle(has_ended, out, 1)
    assert command.wait(300) == 0
    starts_of(out)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["requests"], summary["verified"], summary["mismatches"]) == (len(lines), True, 0)
    rows = [sum(record.real_rows for record in read_step_log(path)) for path in sorted(out.glob("parts/steps-rank0*"))]
    assert len(rows) > 1 and rows[1] > 0, "the rank that was back had no rows"
    assert len((out / "outputs.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.ranks(3)
def test_all_ranks_are_started_again_where_none_is_left(setting, caplog):
    folder, expected = setting
    out = folder / "all"
    command = start(folder, out.name)
    done = kill_in_the_middle(lambda: not command.is_alive(), out, 0, 1, 2, torn=b'{"request_id": 5, "tok')
    assert command.wait(120) == 0
    check(out, expected, done, RANKS)
    assert "starting all ranks again, 1 of 3 times" in caplog.text


@pytest.mark.ranks(2)
def test_under_torchrun_elastic_restarts_do_the_same(setting):
    folder, expected = setting
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command = [*launcher, "-m", "lockstep.cli", *map(str, arguments(folder, "torchrun", 2))]
    log = folder / "torchrun.log"
    with log.open("w") as file, subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file) as process:
        done = kill_in_the_middle(lambda: process.poll() is not None, folder / "torchrun", 1)
        assert process.wait(150) == 0, log.read_text()
    check(folder / "torchrun", expected, done, 2)
    assert "restart 1:" in log.read_text()


@pytest.mark.ranks(3)
def test_without_restarts_a_rank_is_named_and_what_was_done_is_whole(setting, capsys):
    folder, _ = setting
    out = folder / "once"
    command = start(folder, out.name, "--max-restarts", 0)
    done = kill_in_the_middle(lambda: not command.is_alive(), out, 1, 0, 2)
    assert command.wait(60) == 1
    said = capsys.readouterr().err
    assert re.search(r"PeerFailedError: rank \d failed: its process was ended by signal 9 \(SIGKILL\)", said), said
    assert done <= finished(out)
    assert not (out / "outputs.jsonl").exists()


@pytest.mark.ranks(3)
def test_a_full_disk_ends_the_run_with_what_was_done_intact(setting, capsys):
    folder, expected = setting
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        started = time.monotonic()
        code = start(folder, "disk/out").wait(100)
        assert code in (1, 2), capsys.readouterr().err
        assert time.monotonic() - started < 60
        by_id = {request_id: rest for request_id, *rest in expected}
        for part in (disk / "out" / "parts").glob("outputs-rank*.jsonl"):
            for line in mend_lines(part).splitlines():
                output = json.loads(line)
                assert by_id[output["request_id"]] == [output["num_prompt_tokens"], output["tokens"], output["text"]]
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
