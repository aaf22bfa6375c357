"""On 2 GPUs: a rank that stops or dies inside a step is named by the other in time; a killed one costs no output."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lockstep
from lockstep.errors import RankAbsentError
from lockstep.models.parallel import parallel_of
from lockstep.models.tiny import make_tiny
from lockstep.testing import Fault, inject, run_ranks

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
DEADLINE_S = 3.0

pytestmark = [
    pytest.mark.gpu(2),
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}"),
    pytest.mark.timeout(300),
]


def broken_steps(folder, dispatcher):
    """On every rank: a good step; rank 1 sleeps in its experts; a good step on new groups; rank 1 is killed there."""
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    model = lockstep.from_pretrained(
        f"{folder}/tiny", dispatcher=dispatcher, deadline_s=60, dtype=torch.bfloat16,
        max_chunk_size_per_rank=64, device=torch.device("cuda", rank),
    )  # fmt: skip
    ids = torch.randint(0, 256, (2 + rank, 5), generator=torch.Generator().manual_seed(rank)).to(model.device)

    def step():
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.float().cpu()

    def broken_step(action):
        started = time.monotonic()
        try:
            with lockstep.join(model):
                step()  # so that all is compiled and connected
                with inject(model, Fault(1, 0, "experts", action, layer=0, seconds=DEADLINE_S + 2)):
                    started = time.monotonic()
                    step()
        except RankAbsentError as error:
            return str(error), error.absent_ranks, time.monotonic() - started
        return "no error", (), 0.0

    with lockstep.join(model):  # one rank may compile for longer than the other
        first = step()
    parallel = parallel_of(model)
    parallel.options = dataclasses.replace(parallel.options, deadline_s=DEADLINE_S)
    parallel_of(model).close()
    late = broken_step("delay")
    torch.cuda.synchronize()  # nothing on the GPU waits any more
    dist.barrier()
    with lockstep.join(model):
        again = step()
    gone = broken_step("kill")
    started = time.monotonic()
    torch.cuda.synchronize()
    parallel_of(model).close()
    return late, gone, torch.equal(first, again), time.monotonic() - started


@pytest.mark.parametrize("dispatcher", ["allgather", "nvlink"])
def test_a_rank_that_stops_inside_a_step_is_named_and_the_other_ends(tmp_path, dispatcher):
    make_tiny(tmp_path / "tiny", hidden_size=128, num_layers=2, dtype=torch.bfloat16)
    results = run_ranks(2, broken_steps, str(tmp_path), dispatcher, deadline_s=150, may_die=[1])
    assert results[1] is None
    late, gone, equal, end_s = results[0]
    print(dispatcher, late, gone, equal, round(end_s, 2))
    for message, absent, seconds in (late, gone):
        assert absent == (1,), message
        assert "rank 1 was last seen in experts of layer 0" in message
        assert seconds < DEADLINE_S + 1, message
    assert "its process is alive" in late[0]
    assert "is gone" in gone[0]
    if dispatcher == "allgather":
        assert gone[2] < 2.0  # its death is seen; a kernel that waits on the GPU does so until the deadline
    assert equal
    assert end_s < 5.0


def run(folder, out):
    command = [
        sys.executable, "-m", "lockstep.cli", "run", "--model", folder / "tiny", "--workload", folder / "prompts.jsonl",
        "--data-parallel-size", 2, "--device", "cuda", "--dispatcher", "allgather", "--deadline", 10,
        "--out", folder / out, "--json",
    ]  # fmt: skip
    log = (folder / f"{out}.log").open("w")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([str(part) for part in command], env=environment, stdout=log, stderr=log)


def outputs_of(out):
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    return [(line["request_id"], line["tokens"]) for line in lines]


def pid_with(path):
    """The process that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                return int(link.parts[2])
        except OSError:
            continue
    return None


def test_kill_minus_nine_costs_no_output_and_the_other_rank_goes_on(tmp_path):
    make_tiny(tmp_path / "tiny", num_layers=2)
    lines = [{"prompt": "One of us is killed.", "max_new_tokens": 20 + 10 * n, "arrival_s": 0} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path, "undisturbed").wait(120) == 0, (tmp_path / "undisturbed.log").read_text()
    process = run(tmp_path, "killed")
    part = tmp_path / "killed" / "parts" / "outputs-rank1.jsonl"
    until = time.monotonic() + 100
    while not (part.exists() and part.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    pid = pid_with(part)
    assert pid is not None, (tmp_path / "killed.log").read_text()
    os.kill(pid, signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "killed.log").read_text()
    assert "ended by signal 9 (SIGKILL); going on with rank 0" in (tmp_path / "killed.log").read_text()
    assert outputs_of(tmp_path / "killed") == outputs_of(tmp_path / "undisturbed")
