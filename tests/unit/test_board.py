"""The board in shared memory: exchanges, places, last words, and what killed processes leave behind."""

import glob
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lockstep.coordination.board import EXCHANGE_BYTES, LAST_WORDS_BYTES, Board, StoreBoard, board_bytes
from lockstep.coordination.flight_recorder import FlightRecorder, Phase, place_text
from lockstep.coordination.processes import ProcessIdentity
from lockstep.coordination.step import StepRecord
from lockstep.coordination.transports import RanksMissing, SharedMemoryTransport
from lockstep.coordination.wire import Header, cut, decode, encode, encode_message
from lockstep.errors import ConfigurationError, RankMismatchError

pytestmark = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no POSIX shared memory on this system")
HEADER = Header()


@pytest.fixture
def board():
    made = Board.create(3)
    made.unlink()
    return made


def transports(board):
    return [SharedMemoryTransport(board, rank) for rank in range(board.num_ranks)]


def test_every_rank_receives_what_every_rank_sent_over_many_rounds(board):
    group = transports(board)
    for index in range(2000):
        said = [StepRecord((index * 7 + rank) % 97, index % 2 == 0) for rank in range(3)]
        wires = [encode(HEADER, index, record) for record in said]
        for transport, wire in zip(group, wires, strict=True):
            transport.begin(wire)
        for mine, transport in zip(wires, group, strict=True):
            assert decode(transport.wait(1.0), mine, StepRecord) == tuple(zip(*map(astuple, said), strict=True))


def test_a_rank_that_does_not_come_is_named_and_may_still_come(board):
    group = transports(board)
    wires = [encode(HEADER, 0, StepRecord(rank)) for rank in range(3)]
    first = group[0]
    first.begin(wires[0])
    group[1].begin(wires[1])
    started = time.monotonic()
    with pytest.raises(RanksMissing) as caught:
        first.wait(0.1)
    assert caught.value.ranks_missing == (2,)
    assert 0.1 <= time.monotonic() - started < 10
    group[2].begin(wires[2])
    assert decode(first.wait(0.1), wires[0], StepRecord)[0] == (0, 1, 2)


def test_a_check_ends_the_wait(board):
    def check():
        raise KeyError("a peer has gone")

    first = transports(board)[0]
    first.begin(encode(HEADER, 0, StepRecord()))
    with pytest.raises(KeyError):
        first.wait(5.0, check)


def test_unlike_records_are_received_and_named_on_both_ranks(board):
    group = transports(board)
    wires = [encode(HEADER, 0, StepRecord(1)), encode(HEADER, 0, StepRecord(2)), encode_message(b"something else")]
    for transport, wire in zip(group, wires, strict=True):
        transport.begin(wire)
    for mine, exchange in list(zip(wires, group, strict=True))[:2]:
        with pytest.raises(RankMismatchError, match="rank 2 sent a record that is damaged"):
            decode(exchange.wait(1.0), mine, StepRecord)


def test_a_wish_is_seen_before_one_begins(board):
    group = transports(board)
    assert not any(transport.wanted() for transport in group)
    group[1].begin(encode(HEADER, 0, StepRecord(4)))
    assert [transport.wanted() for transport in group] == [True, False, True]
    for rank in (0, 2):
        group[rank].begin(encode(HEADER, 0, StepRecord()))
    for transport in group:
        transport.wait(1.0)
    assert not any(transport.wanted() for transport in group)


def test_the_sequence_number_wraps(board):
    group = [SharedMemoryTransport(board, rank, sequence=2**32 - 2) for rank in range(3)]
    for step in range(4):
        wires = [encode(HEADER, step, StepRecord(rank)) for rank in range(3)]
        for transport, wire in zip(group, wires, strict=True):
            transport.begin(wire)
        for mine, transport in zip(wires, group, strict=True):
            assert decode(transport.wait(1.0), mine, StepRecord)[0] == (0, 1, 2)


@given(st.integers(0, 6), st.integers(1, 2**64 - 1))
def test_a_record_of_which_one_word_is_missing_or_damaged_is_not_taken(index, change):
    board = Board.create(2)
    board.unlink()
    group = transports(board)
    wires = [encode(HEADER, 0, StepRecord(5)), encode(HEADER, 0, StepRecord(6))]
    assert len(wires[0]) == 8 * 6  # and one word before it
    pending = group[0]
    pending.begin(wires[0])
    group[1].begin(wires[1])
    word = board.exchange_offset(0, 1, 1) // 8 + index
    whole = board.words[word]
    for damaged in (0, whole ^ change):
        board.words[word] = damaged
        if damaged != whole:
            with pytest.raises(RanksMissing):
                pending.wait(0.0)
    board.words[word] = whole
    assert decode(pending.wait(0.5), wires[0], StepRecord)[0] == (5, 6)


@given(st.binary(min_size=EXCHANGE_BYTES, max_size=EXCHANGE_BYTES))
def test_whatever_stands_on_the_board_ends_in_a_sentence(garbage):
    board = Board.create(2)
    board.unlink()
    transport = SharedMemoryTransport(board, 0)
    mine = encode(HEADER, 0, StepRecord(1))
    transport.begin(mine)
    start = board.exchange_offset(0, 1, 1)
    sealed = (zlib.crc32(cut(garbage[8:])) << 32 | 1).to_bytes(8, "little") + garbage[8:]  # that passes as a record
    for found, error in ((garbage, RanksMissing), (sealed, RankMismatchError)):
        board.bytes[start : start + len(found)] = found
        with pytest.raises(error):
            decode(transport.wait(0.005), mine, StepRecord)


def test_threads_of_many_ranks_agree_ten_thousand_times():
    board = Board.create(4)
    board.unlink()
    wrong = []

    def run(rank):
        transport = SharedMemoryTransport(board, rank)
        for step in range(2500):
            mine = encode(HEADER, step, StepRecord(step * 4 + rank))
            transport.begin(mine)
            counts = decode(transport.wait(20), mine, StepRecord)[0]
            if counts != tuple(step * 4 + other for other in range(4)):
                wrong.append((rank, step, counts))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# places, last words, processes


def test_places_and_how_long_ago(board):
    board.write_place(1, 77, time.monotonic_ns() - 2_000_000_000)
    number, ago = board.place(1)
    assert number == 77
    assert 2.0 <= ago < 60


def test_last_words_are_read_whole_or_not_at_all_and_the_first_count(board):
    assert board.last_words(2) is None
    board.say_last_words(2, b"out of memory")
    board.say_last_words(2, b"something later")
    assert board.last_words(2) == b"out of memory"
    board.say_last_words(1, b"x" * (LAST_WORDS_BYTES + 500))
    assert board.last_words(1) == b"x" * LAST_WORDS_BYTES
    start = bytes(board.bytes).index(b"out of memory")
    board.bytes[start : start + 3] = b"???"
    assert board.last_words(2) is None


def test_process_states(board):
    assert board.process(0).state() == "unknown"
    board.register(0)
    assert board.process(0).state() == "alive"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = ProcessIdentity.of(child.pid)
    board.register(1, identity)

    def becomes(state):
        until = time.monotonic() + 20
        while board.process(1).state() == "alive" or (state == "gone" and board.process(1).state() == "stopped"):
            assert time.monotonic() < until
            time.sleep(0.01)
        return board.process(1).state() == state

    assert board.process(1).state() == "alive"
    child.send_signal(signal.SIGSTOP)
    assert becomes("stopped")
    child.kill()
    assert becomes("gone")  # a zombie: its parent has not asked yet
    child.wait()
    assert board.process(1).state() == "gone"
    board.register(1, ProcessIdentity(os.getpid(), *identity[1:]))  # the number was given to another process
    assert board.process(1).state() == "gone"
    board.register(1, ProcessIdentity(*identity[:2], identity.namespace + 1))  # numbers of another container
    assert board.process(1).state() == "unknown"


def test_a_process_of_another_host_is_not_looked_for_here():
    """Whose first PID namespace has the same number, but not the same boot: its processes seemed gone."""
    here = ProcessIdentity.own()._replace(pid=2**22 + 1)
    number, boot = os.stat("/proc/self/ns/pid").st_ino, here.namespace >> 32
    assert (here.namespace & 0xFFFFFFFF, here.state()) == (number, "gone")
    assert here._replace(namespace=(boot ^ 1) << 32 | number).state() == "unknown"


def test_a_rank_out_of_file_descriptors_declares_nobody_dead(board):
    board.register(0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        state = board.process(0).state()
        board.register(1)  # it cannot tell when it started either
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert state == "unknown"
    assert board.process(1).state() == "alive"


def test_without_proc_only_the_kernel_itself_says_that_a_process_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = ProcessIdentity.of(child.pid)
    (tmp_path / "file").touch()
    (tmp_path / "proc" / str(child.pid) / "stat").mkdir(parents=True)
    unreadable = [tmp_path, tmp_path / "file", tmp_path / "proc"]  # nothing there, no folder, no file
    assert identity.state() == "alive"
    assert [identity.state(proc) for proc in unreadable] == ["unknown"] * 3
    child.kill()
    child.wait()
    assert [identity.state(proc) for proc in unreadable] == ["gone"] * 3
    assert ProcessIdentity(2**70, *identity[1:]).state(tmp_path) == "unknown"


@pytest.mark.parametrize(
    ("cores", "suffice"),
    [([{0}, {1}, {2}], True), ([{0, 1, 2}] * 3, True), ([{0, 1}] * 3, False), ([{4}, {5}, {4}], False)],
)
def test_whether_every_rank_can_have_a_core(board, cores, suffice):
    for rank, mine in enumerate(cores):
        board.register(rank, cores=mine)
    assert board.cores_suffice() == suffice


# names, files, orphans


def test_attaching_shares_the_memory_and_unlinking_leaves_nothing(board):
    made = Board.create(2)
    other = Board.attach(made.name, 2)
    made.unlink()
    made.unlink()
    made.words[20] = 12345
    assert other.words[20] == 12345
    assert not glob.glob(f"/dev/shm/{made.name}")


@pytest.mark.parametrize("name", ["", "lockstep-1-2-../../etc/passwd", "/etc/passwd", "lockstep-1-2-" + "0" * 31])
def test_names_that_are_no_board(name):
    with pytest.raises(ConfigurationError, match="is not the name of a board"):
        Board.attach(name, 2)


@given(st.text(max_size=100))
def test_no_text_leads_out_of_the_folder(name):
    with pytest.raises((ConfigurationError, OSError)):
        Board.attach(name, 2)


def test_boards_of_other_size_are_refused():
    made = Board.create(2)
    try:
        with pytest.raises(ConfigurationError, match=f"{board_bytes(2)} bytes, expected .* for 3 ranks"):
            Board.attach(made.name, 3)
    finally:
        made.unlink()
    with pytest.raises(FileNotFoundError):
        Board.attach(made.name, 2)


def test_a_link_in_place_of_a_board_is_not_followed(tmp_path):
    name = f"lockstep-1-1-{'ab' * 16}"
    target = tmp_path / "target"
    target.write_bytes(b"\0" * board_bytes(2))
    os.symlink(target, f"/dev/shm/{name}")
    try:
        with pytest.raises(OSError):
            Board.attach(name, 2)
    finally:
        os.unlink(f"/dev/shm/{name}")


def test_a_maker_that_was_killed_half_way_leaves_nothing_after_the_next_board():
    code = (
        "import os, signal; from lockstep.coordination.board import Board; name = Board.create(2).name; "
        "assert os.path.exists(f'/dev/shm/{name}'); print(name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    left = f"/dev/shm/{child.stdout.strip()}"
    Board.create(2).unlink()
    assert not os.path.exists(left)


# the board in a store


def recorder_of(rank, num_ranks=3):
    recorder = FlightRecorder(rank, num_ranks, epoch=2, process=rank)
    recorder.step = 7
    recorder.mark(Phase.EXPERTS, 3)
    return recorder


def test_ranks_of_several_hosts_see_each_other_in_a_store():
    store = dist.HashStore()
    boards = [StoreBoard(store, recorder_of(rank)) for rank in range(2)]  # the third does not come
    until = time.monotonic() + 20
    while not boards[0].place(1)[0]:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert place_text(*boards[0].place(1)).startswith("was last seen in experts of layer 3 in step 7, ")
    assert place_text(*boards[0].place(2)) == "has not been seen"
    assert boards[1].last_words(0) is None
    boards[0].say_last_words(0, b"out of memory")
    assert boards[1].last_words(0) == b"out of memory"
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(StoreBoard.roll_call, boards)) == [(2,), (2,)]
    for board in boards:
        board.close()


class DeadStore:
    """A store whose keeper is gone; counts who asks it."""

    def __init__(self):
        self.asked = 0

    def check(self, keys):
        self.asked += 1
        raise RuntimeError("Broken pipe")

    def set(self, key, value):
        raise RuntimeError("Broken pipe")


def test_a_store_that_does_not_answer_is_not_asked_again():
    store = DeadStore()
    board = StoreBoard(store, recorder_of(0))
    assert board.last_words(1) is None
    assert board.place(1)[0] == 0
    assert board.roll_call() == ()
    assert store.asked == 1
