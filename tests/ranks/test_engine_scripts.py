"""A script's end is the end of its engine's ranks, however it ends: Ctrl-C, a kill, a rank that is stopped."""

import os
import signal
import subprocess
import sys

import pytest

from waiting import is_running, wait_for

pytest.importorskip("transformers")

from lockstep.models.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("engine") / "tiny", num_layers=2))


SCRIPT = """
import signal, sys
import lockstep
engine = lockstep.Engine(sys.argv[1], data_parallel_size=2)
(output,) = engine.generate(["abc"], lockstep.SamplingParams(max_tokens=4, temperature=0))
# Another thread takes signals, as it is where one comes just before this thread waits: no wait is cut short.
if "others" in sys.argv:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print(len(output.token_ids), *(rank.pid for rank in engine.ranks()), flush=True)
with engine:
    for output in engine.generate(["abc"] * 50, lockstep.SamplingParams(max_tokens=10_000, ignore_eos=True)):
        pass
"""


def started_script(tmp_path, tiny, *arguments):
    """A script without `__main__` guard, in its own process group as a terminal has it; its ranks' processes."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(path), tiny, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    tokens, *pids = map(int, process.stdout.readline().split())
    assert tokens == 4 and len(pids) == 2 and all(is_running(pid) for pid in pids)
    return process, pids


@pytest.mark.ranks(2)
@pytest.mark.parametrize("taken_by", ["main", "others"])
def test_ctrl_c_ends_a_script_and_all_its_ranks(tmp_path, tiny, taken_by):
    process, pids = started_script(tmp_path, tiny, taken_by)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGINT, 130)
    assert said.count("KeyboardInterrupt") == 1 and said.count("Traceback") == 1  # the script's own, none of a rank
    wait_for(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.ranks(2)
def test_no_rank_survives_its_script_not_even_a_stopped_one(tmp_path, tiny):
    process, pids = started_script(tmp_path, tiny)
    os.kill(pids[1], signal.SIGSTOP)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: not any(is_running(pid) for pid in pids))
