"""Two hosts, as network namespaces with a cable between them: the main job runs, and the cable is cut, slow, healed.

Each namespace has shared memory of its own, as hosts have, so the ranks agree over gloo. Needs root; where namespaces
are not allowed the tests skip themselves.
"""

import ctypes
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from lockstep import cli
from lockstep.models.tiny import make_tiny

pytestmark = pytest.mark.ranks(4)
HOSTS = (f"lockstep-{os.getpid()}-a", f"lockstep-{os.getpid()}-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
DEADLINE_S = 6.0
"""Of the run whose cable is cut; the others have the usual one."""


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hosts():
    """Two namespaces joined by a veth pair, `v0` and `v1`."""
    try:
        made = [ip("netns", "add", host) for host in HOSTS]
    except FileNotFoundError:
        pytest.skip("no `ip` command here")
    try:
        made.append(ip("link", "add", "v0", "netns", HOSTS[0], "type", "veth", "peer", "name", "v1", "netns", HOSTS[1]))
        for index, host in enumerate(HOSTS):
            made.append(ip("-n", host, "addr", "add", f"{ADDRESSES[index]}/24", "dev", f"v{index}"))
            made.append(ip("-n", host, "link", "set", f"v{index}", "up"))
            made.append(ip("-n", host, "link", "set", "lo", "up"))
        failed = [result.stderr.strip() for result in made if result.returncode != 0]
        if failed:
            pytest.skip(f"network namespaces are not allowed here: {failed[0]}")
        yield HOSTS
    finally:
        for host in HOSTS:
            ip("netns", "del", host)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A checkpoint and a workload."""
    folder = tmp_path_factory.mktemp("hosts")
    make_tiny(folder / "tiny", num_layers=2, num_experts=12)
    lines = [
        {"prompt": "Over the cable. " * (1 + n % 3), "max_new_tokens": 5 + n, "arrival_s": 0.2 * n} for n in range(16)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start(job, out, port, *more):
    """The ranks of the main job, two on each host, as torchrun would start them."""
    processes, context = [], multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "lockstep.models.huggingface"])
    for rank in range(4):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": f"v{rank // 2}", "LOCKSTEP_RECORDER_DIR": str(job),
        }  # fmt: skip
        arguments = [
            "run", "--model", job / "tiny", "--workload", job / "prompts.jsonl", "--data-parallel-size", 4,
            "--out", job / out, "--json", *more,
        ]  # fmt: skip
        process = context.Process(
            target=run_on_host,
            args=(HOSTS[rank // 2], environment, [str(part) for part in arguments], job / f"{out}-{rank}.log"),
        )
        process.start()
        processes.append(process)
    return processes


def run_on_host(host, environment, arguments, log):
    """One rank: into the host's network, with shared memory of its own, and then what the command does."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}") as namespace:
        assert libc.setns(namespace.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNET
    assert libc.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS
    own_memory = "mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm"
    subprocess.run(own_memory, shell=True, check=True)
    os.environ.update(environment)
    sys.argv = ["lockstep", *arguments]
    cli.main()


def logs(job, out):
    return [(job / f"{out}-{rank}.log").read_text() for rank in range(4)]


def wait_all(processes, seconds):
    """Exit status of each, None for one that hangs, and how long after now each ended."""
    started, codes, ended = time.monotonic(), [None] * len(processes), [None] * len(processes)
    while None in codes and time.monotonic() < started + seconds:
        for index, process in enumerate(processes):
            if codes[index] is None and process.exitcode is not None:
                codes[index], ended[index] = process.exitcode, time.monotonic() - started
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return codes, ended


def until_some_are_finished(job, out, processes):
    until = time.monotonic() + 100
    while time.monotonic() < until:
        parts = list((job / out / "parts").glob("outputs-rank*.jsonl")) if (job / out / "parts").exists() else []
        if sum(part.read_text().count("\n") for part in parts) >= 2:
            return
        assert all(process.exitcode is None for process in processes), logs(job, out)
        time.sleep(0.01)
    raise AssertionError(logs(job, out))


def outputs_of(folder):
    lines = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    return [(line["request_id"], line["tokens"]) for line in lines]


def assert_done(job, out, codes):
    assert codes == [0, 0, 0, 0], logs(job, out)
    summary = json.loads((job / out / "summary.json").read_text())
    assert (summary["verified"], summary["mismatches"], summary["requests"]) == (True, 0, 16)


def test_the_main_job_runs_over_two_hosts(hosts, job):
    codes, _ = wait_all(start(job, "healthy", 29511), 150)
    assert_done(job, "healthy", codes)


def test_a_cut_cable_ends_the_run_on_both_hosts_and_names_the_other(hosts, job):
    processes = start(job, "cut", 29512, "--deadline", DEADLINE_S)
    until_some_are_finished(job, "cut", processes)
    ip("-n", hosts[1], "link", "set", "v1", "down")
    try:
        codes, ended = wait_all(processes, 60)
    finally:
        ip("-n", hosts[1], "link", "set", "v1", "up")
    texts = logs(job, "cut")
    assert codes == [1, 1, 1, 1], texts
    assert max(ended) < DEADLINE_S + 1 + 10, ended  # the second of grace, and more for a busy machine
    for text in texts:
        assert "RankAbsentError" in text
    # Where the store is; if rank 0, which keeps it, ends first, rank 1 cannot ask it any more.
    # One of the other host's ranks may have come as far as rank 0 before the cable was cut: then the other is named.
    # A rank of the same host that waits elsewhere may be named too.
    named = re.compile(r"ranks? [\d, ]*[23][\d, ]* absent: .*rank [23] was last seen ")
    assert any(named.search(text) for text in texts[:2]), "\n".join(texts[:2])
    for text in texts[2:]:
        assert "could not be identified" in text
    assert not (job / "cut" / "outputs.jsonl").exists()


def test_a_cable_that_heals_within_the_deadline_costs_nothing(hosts, job):
    processes = start(job, "healed", 29513)
    until_some_are_finished(job, "healed", processes)
    ip("-n", hosts[1], "link", "set", "v1", "down")
    time.sleep(0.8)
    ip("-n", hosts[1], "link", "set", "v1", "up")
    codes, _ = wait_all(processes, 120)
    assert_done(job, "healed", codes)


def test_a_loose_contact_slows_the_run_and_changes_nothing(hosts, job):
    processes = start(job, "loose", 29515)
    until_some_are_finished(job, "loose", processes)
    for _ in range(12):
        ip("-n", hosts[1], "link", "set", "v1", "down")
        time.sleep(0.1)
        ip("-n", hosts[1], "link", "set", "v1", "up")
        time.sleep(0.3)
    codes, _ = wait_all(processes, 120)
    assert_done(job, "loose", codes)


def test_a_slow_cable_that_loses_packets(hosts, job):
    tc = ["ip", "netns", "exec", hosts[0], "tc", "qdisc", "add", "dev", "v0", "root"]
    added = subprocess.run([*tc, "netem", "delay", "50ms", "loss", "5%"], capture_output=True, text=True, check=False)
    if added.returncode != 0:
        pytest.skip(f"no netem here: {added.stderr.strip()}")
    try:
        codes, _ = wait_all(start(job, "slow", 29514), 160)
    finally:
        subprocess.run(["ip", "netns", "exec", hosts[0], "tc", "qdisc", "del", "dev", "v0", "root"], check=False)
    assert_done(job, "slow", codes)


ENGINE = """
import os, sys, lockstep
with lockstep.Engine(sys.argv[1]) as engine:
    prompts = [[1, 2, 3 + number] for number in range(2 * int(os.environ["RANK"]))]
    for output in engine.generate(prompts, lockstep.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)):
        print("rank", output.rank, "tokens", *output.token_ids)
"""


def test_the_engine_under_torchrun_on_two_hosts(hosts, job):
    """One rank on each; the one on the first host has no prompt, and the agent there keeps the rendezvous."""
    from transformers import AutoModelForCausalLM

    script = job / "engine.py"
    script.write_text(ENGINE)
    agents = []
    for index, host in enumerate(hosts):
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1,
            "--rdzv-backend", "c10d", "--rdzv-conf", f"is_host={1 - index}",
            "--rdzv-id", "hosts", "--rdzv-endpoint", f"{ADDRESSES[0]}:29599", "--local-addr", ADDRESSES[index],
            script, job / "tiny",
        ]  # fmt: skip
        own_memory = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        command = ["ip", "netns", "exec", host, "unshare", "--mount", "sh", "-c", own_memory, "sh", *map(str, torchrun)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"v{index}", "OMP_NUM_THREADS": "1"}
        agents.append(subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1))
    try:
        said = [agent.communicate(timeout=150) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    whole = AutoModelForCausalLM.from_pretrained(job / "tiny")
    expected = []
    for number in range(2):
        ids = torch.tensor([[1, 2, 3 + number]])
        tokens = whole.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 3:]
        expected.append(" ".join(["rank 1 tokens", *map(str, tokens.tolist())]))
    assert said[0][0] == ""
    assert said[1][0].splitlines() == expected
