"""From a rank's first line to its last, and the launcher's: who ends when, who is named, what is left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from fault_matrix import expected_outputs, generate, load, prompts

import lockstep
from lockstep.commands.postmortem import read_recorder
from lockstep.coordination.board import Board
from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.peers import Peers, speak_before_termination
from lockstep.coordination.processes import ProcessIdentity
from lockstep.errors import PeerFailedError, RankAbsentError
from lockstep.models.parallel import parallel_of
from lockstep.models.tiny import make_tiny
from lockstep.runner.launcher import launch
from lockstep.testing import Fault, run_ranks
from lockstep.testing.faults import break_on_purpose

DEADLINE_S = 1.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("lives") / "tiny", num_layers=2, num_experts=8))


# the launcher


def stop_all():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def rank_1_takes_long():
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(60)
    return "done"


def rank_1_stops():
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    return "done"


def stops_in_the_first_start():
    dist.barrier()
    if dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    return "done"


def child_exits(how):
    if dist.get_rank() == 1:
        child = os.fork()
        if child == 0:
            if how == "raises":
                raise ValueError("of the child")
            sys.exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == {"exits": 3, "raises": 1}[how]
    dist.barrier()
    return "done"


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("function", "words", "absent"),
    [
        (stop_all, "ranks 0, 1 stood still for more than 1 s; the process of rank 0 is stopped", (0, 1)),
        (rank_1_stops, "s after other ranks had; the process of rank 1 is stopped", (1,)),
        (rank_1_takes_long, "rank 1 did not end within 2.5 s after other ranks had", (1,)),
    ],
)
def test_the_launcher_waits_for_no_rank_without_a_limit(function, words, absent):
    started = time.monotonic()
    with pytest.raises(RankAbsentError) as caught:
        launch(2, function, deadline_s=DEADLINE_S)
    assert words in str(caught.value)
    assert caught.value.absent_ranks == absent
    assert time.monotonic() - started < 30


@pytest.mark.ranks(2)
def test_a_stopped_rank_costs_a_restart(caplog):
    assert launch(2, stops_in_the_first_start, deadline_s=DEADLINE_S, max_restarts=1) == "done"
    assert "the process of rank 1 is stopped; starting all ranks again" in caplog.text


@pytest.mark.ranks(2)
@pytest.mark.parametrize("how", ["exits", "raises"])
def test_what_a_rank_has_forked_says_nothing_in_its_name(how):
    assert launch(2, child_exits, how) == "done"
    assert run_ranks(2, child_exits, how) == ["done", "done"]


def dies_before_its_child():
    if dist.get_rank() == 1:
        if os.fork() == 0:
            os.closerange(1, 3)  # whoever reads the tests' output need not wait for it
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.ranks(2)
def test_a_ranks_death_is_seen_though_what_it_has_forked_lives_on():
    started = time.monotonic()
    with pytest.raises(PeerFailedError, match=r"rank 1 failed: its process was ended by signal 9 \(SIGKILL\)"):
        launch(2, dies_before_its_child)
    assert time.monotonic() - started < 30


CTRL_C = """
import os, random, signal, sys, threading, time
from lockstep.runner.launcher import launch

def interrupt(seconds):
    time.sleep(seconds)
    os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    launch(2, time.sleep, 0.01)
    rng = random.Random(1)
    for _ in range(25):
        try:
            thread = threading.Thread(target=interrupt, args=(rng.uniform(0.0, 0.3),))
            thread.start()
            launch(2, time.sleep, 0.05)
            time.sleep(1)
            sys.exit("the signal did not come")
        except KeyboardInterrupt:
            thread.join()
    print("all came")
"""


@pytest.mark.ranks(2)
def test_ctrl_c_in_any_moment_of_a_ranks_life_prints_no_traceback(tmp_path):
    (tmp_path / "script.py").write_text(CTRL_C)
    ended = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, env=ENVIRONMENT, timeout=200,
        start_new_session=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "all came\n"), ended.stderr
    assert "Traceback" not in ended.stderr


KILLED = """
import os, sys, time
from pathlib import Path
from lockstep.runner.launcher import launch

def say_and_sleep(folder):
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    launch(2, say_and_sleep, sys.argv[1])
"""


@pytest.mark.ranks(2)
def test_ranks_need_no_temporary_folder(tmp_path):
    """Whose name may be longer than what the path of a socket may have."""
    temporary = tmp_path / ("a" * 100)
    temporary.mkdir()
    (tmp_path / "script.py").write_text(
        "from lockstep.runner.launcher import launch\nprint(launch(2, len, 'four'))\n"  # without a guard
    )
    ended = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env={**ENVIRONMENT, "TMPDIR": str(temporary)}, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (ended.stdout, ended.returncode) == ("4\n", 0), ended.stderr
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")]


@pytest.mark.ranks(2)
def test_ranks_end_with_a_killed_launcher_and_nothing_is_left(tmp_path, tmp_path_factory):
    (tmp_path / "script.py").write_text(KILLED)
    temporary, said = tmp_path_factory.mktemp("t"), tmp_path / "said"
    said.mkdir()
    command = [sys.executable, tmp_path / "script.py", said]
    with subprocess.Popen(command, env={**ENVIRONMENT, "TMPDIR": str(temporary)}, start_new_session=True) as process:
        until = time.monotonic() + 60
        while len([path for path in said.iterdir() if path.read_text()]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        ranks = [psutil.Process(int(path.read_text())) for path in said.iterdir()]
        server = ranks[0].parent()
        assert server.parent().pid == process.pid
        ranks[1].suspend()
        process.kill()
        process.wait(10)
    _, alive = psutil.wait_procs([*ranks, server], timeout=10)
    assert not alive
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")]


# SIGTERM


def wait_for_sigterm(board_name, gone, how):
    board = Board.attach(board_name, 2)
    board.register(0)
    board.register(1, ProcessIdentity(gone, 0, ProcessIdentity.own().namespace))
    peers = Peers(0, 2, board=board)
    peers.recorder.step = 7
    peers.mark(Phase.EXPERTS, layer=3)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    speak_before_termination(peers)
    child = os.fork()
    if child == 0:  # such as a worker of a DataLoader, which is ended by SIGTERM
        time.sleep(60)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert board.last_words(0) is None
    wait = time.sleep if how == "python" else dist.HashStore().wait  # in C++ Python sees no signal
    gate = threading.Lock()
    gate.acquire()
    threading.Thread(target=lambda: (gate.acquire(), os.write(1, b"ready\n")), daemon=True).start()
    sys.setswitchinterval(1000)  # the thread gets the GIL, and speaks, only once this one is in its wait
    gate.release()
    wait(60 if how == "python" else ["never"])


@pytest.mark.parametrize(("peer", "how"), [("gone", "python"), ("gone", "c++"), ("alive", "python")])
def test_sigterm_ends_a_rank_after_its_last_words(tmp_path, peer, how):
    board = Board.create(2)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    pid = ended.pid if peer == "gone" else os.getpid()
    code = f"import test_lives; test_lives.wait_for_sigterm({board.name!r}, {pid}, {how!r})"
    environment = {**ENVIRONMENT, "LOCKSTEP_RECORDER_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, text = process.communicate(timeout=20)
    finally:
        process.kill()
        board.unlink()
    assert process.returncode == (-signal.SIGTERM if how == "python" else 128 + signal.SIGTERM)
    words = board.last_words(0).decode()
    if peer == "alive":
        assert "rank 0 was ended in experts of layer 3 in step 7" in words
        assert "rank 0" not in text
        assert not list(tmp_path.iterdir())
        return
    line = re.search(rf"rank 0: SIGTERM came in experts of layer 3.*rank 1 absent.*process {pid} is gone.*", text)
    assert line, text
    assert Path(line[0].rsplit(": ", 1)[1]).is_file()
    assert '"ranks": [1]' in words


def test_sigterm_repeats_why_a_rank_has_given_up_until_its_groups_are_closed(tmp_path, environment):
    environment(LOCKSTEP_RECORDER_DIR=tmp_path)
    board = Board.create(2)
    board.unlink()
    board.register(0)
    board.register(1, ProcessIdentity.own())
    peers = Peers(0, 2, board=board)
    peers.mark(Phase.EXPERTS, layer=3)
    error = peers.absent("nobody came", (1,))
    peers.mark(Phase.LEFT)  # the error is raised, and the script may not have shown it when SIGTERM comes
    assert "rank 0: nobody came; rank 1 absent" in peers.terminate() and peers.terminate() in str(error)
    peers.close()
    assert peers.terminate() == ""


TORCHRUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from fault_matrix import generate, prompts
import lockstep

model = lockstep.from_pretrained(sys.argv[1])
with lockstep.join(model):
    for number in range(1000):
        if os.environ["RANK"] == "1" and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        generate(model, prompts(0)[0])
"""


@pytest.mark.ranks(2)
def test_kill_minus_nine_under_torchrun_leaves_words_and_a_recorder_file(tiny, tmp_path):
    (tmp_path / "script.py").write_text(TORCHRUN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*launcher, tmp_path / "script.py", tiny, Path(__file__).parent], capture_output=True, text=True, timeout=120,
        env={**ENVIRONMENT, "LOCKSTEP_RECORDER_DIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert re.search(r"rank 0: .*rank 1 absent: .*its process \d+ is gone", ended.stderr), ended.stderr
    assert [path.name[:15] for path in tmp_path.glob("*.jsonl")] == ["lockstep-rank0-"]


# recorder files of one group


def write_recorders_of_two_groups(path, folder):
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    model = load(path, 20.0, 1)
    for _ in range(2):
        with lockstep.join(model):
            generate(model, prompts(0)[0])
        parallel = parallel_of(model)
        parallel.peers.recorder.write_file("on purpose")
        parallel.close()  # as after a failure: the next join() opens new groups


@pytest.mark.ranks(2)
def test_the_recorder_files_of_one_group_share_a_run_number_and_those_of_the_next_do_not(tiny, tmp_path):
    run_ranks(2, write_recorders_of_two_groups, tiny, str(tmp_path))
    files = [read_recorder(path) for path in tmp_path.glob("*.jsonl")]
    runs = {file.run: sorted(other.rank for other in files if other.run == file.run) for file in files}
    assert list(runs.values()) == [[0, 1], [0, 1]]
    assert 0 not in runs


# two replicas in one start


def two_replicas(path, how):
    """Ranks 2 and 3 are the second replica; rank 3 breaks."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = lockstep.from_pretrained(path, process_group=pairs[rank // 2], deadline_s=DEADLINE_S)
    expected = expected_outputs(path, rank)
    dist.barrier()
    if how == "absent" and rank == 3:
        time.sleep(3 * DEADLINE_S)
        return None
    try:
        with lockstep.join(model):
            outputs = [generate(model, batch) for batch in prompts(rank)]
            if how == "raises" and rank == 3:
                raise ValueError("of rank 3")
            if how == "stops" and rank == 3:
                break_on_purpose(Fault(rank, 0, "end", "stop", seconds=3 * DEADLINE_S))
            if how == "disagrees" and rank == 3:
                parallel_of(model).coordinator.step += 1
                generate(model, prompts(rank)[0])
    except (RankAbsentError, PeerFailedError, lockstep.RankMismatchError) as error:
        return type(error).__name__, str(error), getattr(error, "absent_ranks", None) or getattr(error, "rank", None)
    except ValueError:
        return None
    return outputs == expected


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("how", "words", "named"),
    [
        ("absent", r"rank 2: ranks \[3\] did not enter join\(\) of .* within 1 s; rank 3 was last seen", (3,)),
        ("raises", r"rank 2 stops at step \d+: rank 3 raised ValueError: of rank 3", 3),
        ("stops", r"rank 3 absent: rank 3 (was last seen|has left).*its process is stopped.*steps of rank 2: ", (3,)),
        ("disagrees", r"ranks disagree about step: rank 2: \d+, rank 3: \d+", None),
    ],
)
def test_two_replicas_in_one_start_never_meet_each_other(tiny, how, words, named):
    first, second, third, _ = run_ranks(4, two_replicas, tiny, how, deadline_s=40)
    assert (first, second) == (True, True)
    assert re.search(words, third[1]), third
    assert third[2] == named


def synced_gpus(path):
    rank = dist.get_rank()
    model = lockstep.from_pretrained(path, deadline_s=DEADLINE_S)
    expected = expected_outputs(path, rank)
    with lockstep.join(model):
        calls = prompts(rank)[: 1 + rank]
        outputs = [
            model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, synced_gpus=True).tolist() for ids in calls
        ]
    return outputs == expected[: 1 + rank]


@pytest.mark.ranks(2)
def test_synced_gpus_with_another_number_of_calls_waits_for_nobody(tiny):
    assert run_ranks(2, synced_gpus, tiny) == [True, True]


def test_a_process_without_a_readable_start_time_is_known_by_its_number():
    own = ProcessIdentity.own()
    assert ProcessIdentity(own.pid, 0, own.namespace).state() == "alive"
    assert ProcessIdentity(own.pid, own.started + 1, own.namespace).state() == "gone"
    assert ProcessIdentity(own.pid, own.started, 0).state() == "unknown"
