"""The last steps of a rank: what is published, what others say of it, the file, and the merging of files."""

import glob
import json
import os
import re
import threading
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lockstep.cli import app
from lockstep.commands.postmortem import postmortem_document, read_recorder
from lockstep.coordination.board import Board
from lockstep.coordination.flight_recorder import FOLDER_VARIABLE, FORMAT, Phase
from lockstep.coordination.peers import Peers
from lockstep.coordination.waits import within
from lockstep.errors import ConfigurationError, PeerFailedError, RankAbsentError, RankMismatchError


@pytest.fixture
def peers(tmp_path):
    board = Board.create(3)
    board.unlink()
    for rank in range(3):
        board.register(rank)
    three = [Peers(rank, 3, board=board, epoch=2) for rank in range(3)]
    for each in three:
        each.recorder.folder = tmp_path
    return three


def at(peers, step, phase, layer=-1):
    peers.recorder.step = step
    peers.mark(phase, layer)


def test_a_rank_is_said_to_be_where_it_was(peers):
    first, second, _ = peers
    assert first.last_seen(1) == "has not been seen; its process is alive"
    at(second, 812, Phase.EXPERTS, 17)
    pattern = r"was last seen in experts of layer 17 in step 812, \d+\.\d s ago; its process is alive"
    assert re.fullmatch(pattern, first.last_seen(1))
    at(second, 813, Phase.AGREEMENT)
    assert "at the agreement of step 813" in first.last_seen(1)
    at(second, 813, Phase.LEFT)
    assert first.last_seen(1).startswith("has left join() after step 813, ")


@pytest.mark.parametrize(
    ("others", "guilty"),
    [
        ({1: (5, Phase.DISPATCH, 2), 2: (5, Phase.EXPERTS, 1)}, (2,)),  # behind
        ({1: (5, Phase.EXPERTS, 2), 2: (5, Phase.DISPATCH, 2)}, (1,)),  # nobody is behind: ahead
        ({1: (5, Phase.MODEL, -1), 2: (4, Phase.END, -1)}, (1, 2)),
        ({1: (6, Phase.AGREEMENT, -1), 2: (5, Phase.DISPATCH, 2)}, (1,)),
        ({1: (5, Phase.DISPATCH, 2), 2: (5, Phase.DISPATCH, 2)}, ()),
    ],
)
def test_who_is_absent_is_found_by_where_the_ranks_are(peers, others, guilty):
    at(peers[0], 5, Phase.DISPATCH, 2)
    for rank, place in others.items():
        at(peers[rank], *place)
    assert peers[0].absent("all_gatherv did not end").absent_ranks == guilty


def test_who_waits_for_the_rank_that_shares_its_requests_is_not_named_with_it(peers):
    first, second, third = peers
    at(third, 13, Phase.DISPATCH, 0)
    at(second, 13, Phase.MODEL)
    at(first, 13, Phase.MODEL)
    with first.before_layer(Phase.TENSOR_PARALLEL):  # of its attention, for which the second is late
        error = third.absent("not all ranks came to all_gatherv", (0, 1))  # as the exchange itself has found
    assert error.absent_ranks == (1,)


def test_a_rank_that_has_gone_on_alone_names_itself_whatever_it_waits_for(peers):
    first, second, third = peers
    at(first, 6, Phase.AGREEMENT)
    at(second, 5, Phase.COMBINE, 1)
    at(third, 5, Phase.COMBINE, 1)
    error = first.absent("the agreement of step 6 did not end", (1, 2))
    assert error.absent_ranks == (0,)
    assert "rank 0 itself skipped a collective" in str(error)
    with pytest.raises(RankAbsentError) as caught:
        second.check()
    assert caught.value.absent_ranks == (0,)


def test_a_rank_that_has_gone_on_does_not_name_itself_while_others_wait_for_each_other(peers):
    first, second, third = peers
    at(first, 6, Phase.AGREEMENT)
    at(second, 5, Phase.COMBINE, 1)
    at(third, 5, Phase.DISPATCH, 1)  # is late, and the second waits for it as this one does
    error = first.absent("the agreement of step 6 did not end", (1, 2))
    assert error.absent_ranks == (1, 2)


@pytest.mark.parametrize("letter", ["\u2717", "\0", "x"])
def test_long_last_words_keep_their_kind_and_whom_they_blame(peers, letter):
    peers[1].give_up("failed", letter * 3000, (1,))
    with pytest.raises(PeerFailedError) as caught:
        peers[0].check()
    assert caught.value.rank == 1
    assert len(caught.value.peer_message) > 150
    assert set(caught.value.peer_message) == {letter}


def test_the_first_reason_reaches_the_others_and_is_passed_on(peers, tmp_path):
    first, second, third = peers
    at(second, 4, Phase.COMBINE, 0)
    second.give_up("failed", "ValueError: broke", (1,))
    second.give_up("absent", "something later", (0,))
    with pytest.raises(PeerFailedError, match="rank 0 stops in step -1: rank 1 raised ValueError: broke") as caught:
        first.check()
    assert caught.value.rank == 1
    with pytest.raises(PeerFailedError) as caught:  # by way of either of them
        third.check()
    assert caught.value.rank == 1
    assert len(list(tmp_path.glob("lockstep-rank*-epoch2-*.jsonl"))) == 3
    assert isinstance(third.absent("later"), PeerFailedError)


@pytest.mark.parametrize(("kind", "error"), [("mismatch", RankMismatchError), ("absent", RankAbsentError)])
def test_kinds_of_last_words(peers, kind, error):
    peers[2].give_up(kind, "why", (1,))
    with pytest.raises(error, match="rank 0: rank 2 has given up: why"):
        peers[0].check()


@given(st.binary(max_size=300))
def test_any_last_words_end_in_a_sentence(words):
    board = Board.create(2)
    board.unlink()
    board.say_last_words(1, words or b"?")
    peers = Peers(0, 2, board=board)
    peers.recorder.folder = "/nowhere"
    with pytest.raises((RankAbsentError, PeerFailedError, RankMismatchError)):
        peers.check()


def test_a_spoiled_step_is_seen_by_the_others_and_only_then(peers):
    for each in peers:
        each.recorder.step = 7
    assert peers[0].spoiled_by() is None
    peers[1].spoil_step()
    assert peers[0].spoiled_by() == 1
    assert peers[1].spoiled
    assert peers[1].spoiled_by() is None
    peers[0].recorder.step = peers[1].recorder.step = 8
    assert peers[0].spoiled_by() is None
    assert not peers[1].spoiled


def test_a_call_that_hangs_is_left_behind():
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(threading.Event().wait, 0.05)
    with pytest.raises(KeyError):
        within(lambda: {}["x"], 20.0)
    assert within(lambda: 5, 20.0) == 5


def test_a_mark_costs_little(peers):
    started = time.perf_counter()
    for layer in range(2000):
        peers[0].mark(Phase.EXPERTS, layer)
    assert (time.perf_counter() - started) / 2000 < 100e-6  # about 1 us; the limit is for a busy host


# files


def recorded(peers):
    """Three ranks go through two steps; in the second, rank 1 leaves out a collective."""
    for step in (0, 1):
        for rank, each in enumerate(peers):
            at(each, step, Phase.AGREEMENT)
            each.recorder.note((3, 0, 1))
            at(each, step, Phase.DISPATCH, 0)
            if not (step == 1 and rank == 1):
                each.recorder.note(("all_gatherv", 3, 0, 1))
            at(each, step, Phase.COMBINE, 0)
            each.recorder.note(("reduce_scatterv", 3, 0, 1))
    return [each.recorder.write_file(f"rank {rank} waited in vain") for rank, each in enumerate(peers)]


def test_files_of_all_ranks_show_where_they_parted(peers, tmp_path):
    paths = recorded(peers)
    document = postmortem_document([read_recorder(path) for path in paths])
    assert document["missing"] == []
    assert [(row["rank"], row["step"], row["phase"], row["layer"]) for row in document["ranks"]] == [
        (rank, 1, "combine", 0) for rank in range(3)
    ]
    assert document["parted"] == {
        "step": 1,
        "did": {
            0: "1 operations alike, then all_gatherv[3, 0, 1], reduce_scatterv[3, 0, 1]",
            1: "1 operations alike, then reduce_scatterv[3, 0, 1]",
            2: "1 operations alike, then all_gatherv[3, 0, 1], reduce_scatterv[3, 0, 1]",
        },
    }
    assert "test_flight_recorder" in json.dumps(document["stacks"]["0"])
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in paths)  # for this user only


def test_the_command(peers):
    paths = [str(path) for path in recorded(peers)]
    result = CliRunner().invoke(app, ["postmortem", *paths[:2]])
    assert result.exit_code == 0
    assert "2 of 3 ranks left a flight recorder" in result.output
    assert "no file of ranks [2]" in result.output
    assert "they parted in step 1:" in result.output
    assert "rank 0 stopped because: rank 0 waited in vain" in result.output
    document = json.loads(CliRunner().invoke(app, ["postmortem", "--json", *paths]).output)
    assert document["parted"]["step"] == 1
    assert "thread MainThread" in CliRunner().invoke(app, ["postmortem", "--stacks", *paths]).output


def test_the_command_takes_a_folder_and_of_it_the_last_failure(peers, tmp_path, command_line):
    paths = recorded(peers)
    folder = paths[0].parent
    earlier = folder / "lockstep-rank0-epoch0-earlier.jsonl"
    header, _, rest = paths[0].read_text().partition("\n")
    earlier.write_text(json.dumps({**json.loads(header), "time": 1e6}) + "\n" + rest)
    (folder / "lockstep-rank1-of-somebody.jsonl").write_text("[1]")
    os.mkfifo(folder / "lockstep-rank2-pipe.jsonl")
    (folder / "thesis.jsonl").write_text("[1]")
    for arguments in ([str(folder)], []):
        result = CliRunner().invoke(app, ["postmortem", *arguments], env={FOLDER_VARIABLE: str(folder)})
        assert result.exit_code == 0
        assert "3 of 3 ranks left a flight recorder" in result.output
        assert "left out: run 00000000 of 1970-01-1" in result.output
        assert "files left out that cannot be read, or that another version wrote: 2" in result.output
    (tmp_path / "empty").mkdir()
    code, _, stderr = command_line("postmortem", tmp_path / "empty")
    assert code == 2
    assert "ranks write them when one fails, into " in stderr
    assert command_line("postmortem", folder / "lockstep-rank2-pipe.jsonl")[0] == 2  # and does not wait for a writer


def test_runs_that_fail_within_seconds_are_told_apart(tmp_path, command_line):
    for run in range(0xA1, 0xA9):
        for rank in range(2):
            recorder = Peers(rank, 2, run=run).recorder
            recorder.folder = tmp_path
            recorder.write_file(f"failure of run {run:x}")
    code, shown, _ = command_line("postmortem", tmp_path)
    assert code == 0
    assert "2 of 2 ranks left a flight recorder" in shown
    assert "failure of run a8" in shown
    assert "failure of run a7" not in shown
    asked = re.findall(r"left out: run 000000(..) of 2\d{3}-.*; to read it: lockstep postmortem (.*)", shown)
    assert [run for run, _ in asked] == ["a7", "a6", "a5", "a4", "a3"]
    assert "older runs left out: 2" in shown
    files = glob.glob(asked[1][1])
    assert len(files) == 2
    assert "failure of run a6" in command_line("postmortem", *files)[1]
    assert len(json.loads(command_line("postmortem", "--json", tmp_path)[1])["left_out"]) == 6


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path, command_line):
    evil = "\x1b]0;title\x07\x1b[2J[bold]x[/italic]\u202e\nrank 9 stopped because: of nothing\x9b31m"
    header = {**HEADER, "host": evil, "reason": evil}
    lines = [header, {"ns": 1, "step": 1, "phase": 0, "layer": 0, "detail": [evil]}, {"stacks": {evil: [evil]}}]
    for rank in (0, 1):
        lines[0] = {**header, "rank": rank}
        lines[1] = {**lines[1], "detail": [evil * (1 + rank)], "step": 1 + rank}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"lockstep-rank{rank}.jsonl").write_text(text)
    code, shown, _ = command_line("postmortem", "--stacks", tmp_path)
    assert code == 0
    assert not [letter for letter in shown if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf")]
    assert "[bold]x[/italic]" in shown
    assert not [line for line in shown.splitlines() if line.startswith("rank 9")]
    (tmp_path / evil.replace("/", "")).write_text("no recorder")
    code, _, stderr = command_line("postmortem", tmp_path / evil.replace("/", ""))
    assert (code, stderr.count("\n")) == (2, 1)
    assert "\x1b" not in stderr


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_named(peers, tmp_path):
    whole = recorded(peers)[0].read_bytes()
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(whole[:-30])
    assert read_recorder(torn).stacks == {}
    lines = whole.split(b"\n")
    torn.write_bytes(b"\n".join([*lines[:2], lines[2][:10], *lines[3:]]))
    with pytest.raises(ConfigurationError, match="line 3 is not JSON"):
        read_recorder(torn)


def test_files_of_other_runs_and_too_large_ones(peers, tmp_path):
    files = [read_recorder(path) for path in recorded(peers)]
    recorder = Peers(0, 4, epoch=2).recorder
    recorder.folder = tmp_path
    with pytest.raises(ConfigurationError, match=r"runs with \[3, 4\] ranks"):
        postmortem_document([*files, read_recorder(recorder.write_file("x"))])
    with pytest.raises(ConfigurationError, match="at least one"):
        postmortem_document([])
    large = tmp_path / "large.jsonl"
    large.write_bytes(b" " * (2**24 + 1))
    with pytest.raises(ConfigurationError, match="has at most 16777216 bytes"):
        read_recorder(large)


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path):
    peers = Peers(0, 2)
    peers.recorder.folder = tmp_path / "missing"
    error = peers.absent("it did not come")
    assert str(error) == "rank 0: it did not come; the absent rank could not be identified"


HEADER = {
    "format": FORMAT, "rank": 0, "num_ranks": 2, "epoch": 0, "run": 7, "pid": 1, "clock_ns": 5, "time": 1.0,
    "host": "h", "reason": "r",
}  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def read_or_refuse(path):
    try:
        file = read_recorder(path)
    except ConfigurationError as error:
        assert "\n" not in str(error)
        return
    postmortem_document([file, file])


@given(st.binary(max_size=400))
def test_any_bytes_end_in_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "recorder.jsonl"
    path.write_bytes(data)
    read_or_refuse(path)


@given(st.dictionaries(st.sampled_from(sorted(HEADER)), json_values), st.lists(json_values, max_size=4))
def test_any_json_ends_in_a_sentence(tmp_path_factory, changed, entries):
    path = tmp_path_factory.mktemp("fuzz") / "recorder.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in [{**HEADER, **changed}, *entries]) + "\n")
    read_or_refuse(path)


@given(st.fixed_dictionaries(dict.fromkeys(("ns", "step", "phase", "layer", "detail", "stacks"), json_values)))
def test_any_event_ends_in_a_sentence(tmp_path_factory, event):
    path = tmp_path_factory.mktemp("fuzz") / "recorder.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps(event) + "\n")
    read_or_refuse(path)


def test_brackets_ten_thousand_deep_are_refused(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000)
    read_or_refuse(path)


@pytest.mark.parametrize("time_s", [-1, 2**40])
def test_a_time_that_no_calendar_has_is_refused(tmp_path, time_s):
    path = tmp_path / "recorder.jsonl"
    path.write_text(json.dumps({**HEADER, "time": time_s}))
    with pytest.raises(ConfigurationError, match=rf"line 1: time is {time_s}, expected seconds since 1970"):
        read_recorder(path)
