"""The folder that a command writes: nothing of others is removed, and two commands never write into it at once."""

import os
import subprocess
import sys

import pytest

from lockstep.commands.folder import MARKER, output_folder
from lockstep.errors import ConfigurationError

HOLDS = """
import sys, time
from lockstep.commands.folder import output_folder
with output_folder(sys.argv[1], overwrite=True) as out:
    (out / "steps.jsonl").write_text("of the first")
    print("writing", flush=True)
    time.sleep(100)
"""


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_overwrite_removes_what_commands_write_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    own = ("parts/outputs-rank0.jsonl", "parts/steps-rank12-restart1.jsonl", "tiny-0/config.json", "steps.jsonl")
    others = ("thesis.tex", "flight.log", "flights/a", "tiny-plans", "tiny-1/notes", "parts/mine", "report.html.bak")
    with output_folder(out, overwrite=False):
        for name in (*own, *others):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(name)
    with output_folder(out, overwrite=True):
        assert all((out / name).read_text() == name for name in others)
        assert not any((out / name).exists() for name in (*own, "tiny-0"))


@pytest.mark.parametrize("name", ["settings.json", "steps.jsonl", ".lockstep-run", "parts/outputs-rank0.jsonl"])
def test_a_folder_that_we_did_not_make_is_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of somebody")
    before = contents(tmp_path)
    with (
        pytest.raises(ConfigurationError, match="not empty, and Lockstep did not make it"),
        output_folder(tmp_path, True),
    ):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("marker", [b"of somebody", b"", None, "link", "pipe"])
def test_a_marker_of_somebody_elses_is_none(tmp_path, marker):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "steps.jsonl").write_text("of somebody")
    path = tmp_path / MARKER
    if marker is None:
        path.mkdir()
    elif marker == "link":
        with output_folder(tmp_path / "other", False):
            path.symlink_to(tmp_path / "other" / MARKER)
    elif marker == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(marker)
    with pytest.raises(ConfigurationError, match="Lockstep did not make it"):
        output_folder(tmp_path, True).__enter__()
    assert (tmp_path / "steps.jsonl").read_text() == "of somebody"


def test_links_are_removed_and_what_they_lead_to_stays(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (outside / "outputs-rank0.jsonl").write_text("of somebody")
    with output_folder(out, False):
        (out / "parts").symlink_to(outside)
        (out / "report.html").symlink_to(outside / "outputs-rank0.jsonl")
    with output_folder(out, True):
        assert contents(out) == [MARKER]
    assert (outside / "outputs-rank0.jsonl").read_text() == "of somebody"
    with output_folder(out, True):
        (out / "trace.json").mkdir()
    with pytest.raises(ConfigurationError, match=r"trace.json is a folder where a file is to be written"):
        output_folder(out, True).__enter__()


def test_the_second_command_is_refused_for_as_long_as_the_first_one_lives(tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", HOLDS, out], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"writing\n"
        with pytest.raises(ConfigurationError, match=rf"being written by another command \(process {first.pid} on"):
            output_folder(out, True).__enter__()
        assert (out / "steps.jsonl").read_text() == "of the first"
    finally:
        first.kill()
        first.wait()
    with output_folder(out, True):  # a dead process's lock is free
        assert not (out / "steps.jsonl").exists()


def test_ranks_of_one_torchrun_share_a_folder_and_another_run_is_kept_out(tmp_path):
    out = tmp_path / "out"
    with output_folder(out, False, "ranks of a"), output_folder(out, False, "ranks of a"):
        (out / "steps.jsonl").write_text("of a")
        for overwrite, run in ((True, "ranks of b"), (True, "")):
            with pytest.raises(ConfigurationError, match="is being written by another command"):
                output_folder(out, overwrite, run).__enter__()
    with output_folder(out, False, "ranks of a"):  # started again: what was finished stays
        assert (out / "steps.jsonl").exists()
    with pytest.raises(ConfigurationError, match="exists: choose another, or pass --overwrite"):
        output_folder(out, False, "ranks of b").__enter__()
    with output_folder(out, True, "ranks of b"):
        assert not (out / "steps.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("file", "is no folder"), ("file/below", "cannot be written: Not a directory"), ("x" * 300, "File name too long"),
     ("loop/below", "cannot be written: Too many levels")],
)  # fmt: skip
def test_places_where_no_folder_can_be(tmp_path, name, message):
    (tmp_path / "file").write_text("of somebody")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigurationError, match=message):
        output_folder(tmp_path / name, True).__enter__()
    assert (tmp_path / "file").read_text() == "of somebody"
