"""What `lockstep run` says of a checkpoint and a workload before any rank starts: one sentence, right blame."""

import json
import os
import shutil
import signal
import sys

import pytest

from lockstep import ConfigurationError, Engine
from lockstep.models.tiny import byte_tokenizer, make_tiny
from lockstep.runner.options import EngineOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", num_layers=1, num_experts=4)


@pytest.fixture
def refused(tmp_path, monkeypatch, command_line):
    """Give a checkpoint and a workload's lines to `run`; get its sentence."""
    monkeypatch.chdir(tmp_path)

    def run(model, *lines):
        (tmp_path / "workload").write_text("".join(json.dumps(line) + "\n" for line in lines))
        before = sorted(path.name for path in tmp_path.iterdir())
        code, shown, stderr = command_line("run", "--model", model, "--workload", "workload")
        assert (code, shown, stderr.count("\n")) == (2, "", 1)  # one more line where ranks were started
        assert sorted(path.name for path in tmp_path.iterdir()) == before  # no output folder either
        return stderr

    return run


def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_prompt_beyond_the_embedding_blames_the_tokenizer(checkpoint, tmp_path, refused):
    model = copied(checkpoint, tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<wide>"])
    tokenizer.save_pretrained(model)
    usual = {"prompt": "as usual", "max_new_tokens": 1}
    said = refused(model, usual, {"prompt": "and <wide>", "max_new_tokens": 1})
    assert f"the tokenizer of {model} is wider than its embedding" in said
    assert "the prompt of request 1 has token id 259, and the model's vocab_size is 259" in said


@pytest.mark.parametrize("with_prompts", [True, False])
def test_a_checkpoint_without_a_tokenizer_is_not_the_workloads_fault(checkpoint, tmp_path, refused, with_prompts):
    model = copied(checkpoint, tmp_path)
    for file in model.glob("tokenizer*"):
        file.unlink()
    line = (
        {"prompt": "a", "max_new_tokens": 1}
        if with_prompts
        else {"timestamp": 0, "input_length": 5, "output_length": 1}
    )
    said = refused(model, line)
    assert f"the checkpoint {model} has no tokenizer" in said
    assert "line 1" not in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{not json", "has no tokenizer that Transformers can read: "),
        ("tokenizer.json", b"{}", "has no tokenizer that Transformers can read: "),
        ("tokenizer.json", b"[]", "has no tokenizer that Transformers can read: "),
        ("config.json", b"{not json", "is not JSON"),
        ("config.json", b"[" * 100_000, "is not JSON"),
        ("config.json", b"9" * 5000, "is not JSON"),
        ("config.json", b'{"model_type": "of-nobody"}', "cannot be read"),
    ],
)
def test_files_of_a_checkpoint_that_are_none(checkpoint, tmp_path, refused, name, content, message):
    model = copied(checkpoint, tmp_path)
    (model / name).write_bytes(content)
    assert message in refused(model, {"prompt": "a", "max_new_tokens": 1})


@pytest.mark.parametrize("clock", ["steps", "wall"])
def test_the_duration_in_real_time_is_said_before_ranks_start(tmp_path, monkeypatch, command_line, clock):
    monkeypatch.chdir(tmp_path)
    lines = [{"timestamp": 1000 * second, "input_length": 5, "output_length": 1} for second in (0, 200_000)]
    (tmp_path / "workload").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # What cannot work is found after it, and no rank is started.
    code, shown, stderr = command_line(
        *("run", "--workload", "workload", "--clock", clock, "--num-redundant-experts", "3")
    )
    assert (code, shown) == (2, "")
    told = (
        "--clock wall: the last request arrives after 2 d 7 h 33 min, so the run takes at least that long; ranks wait"
    )
    assert (told in stderr) == (clock == "wall")
    assert "--num-redundant-experts needs a placement" in stderr


def test_a_request_beyond_the_context_is_said_before_ranks_start(checkpoint, refused):
    said = refused(checkpoint, {"timestamp": 0, "input_length": 40_000, "output_length": 1})
    assert "request 0 has 40000 prompt tokens and 1 new ones, more than the model's context of 32768" in said


def test_slots_for_lost_ranks_are_refused_where_they_would_never_be_used(tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    run = ("run", "--survive", 1, "--data-parallel-size", 2)
    code, _, said = command_line(*run, "--tensor-parallel-size", 2)
    assert code == 2 and "survive is 1 with --data-parallel-size 2, --tensor-parallel-size 2" in said
    code, _, said = command_line(*run, env={"RANK": "0", "WORLD_SIZE": "2"})
    rule = "survive must be 0 under torchrun, got 1: after a loss all ranks start again there"
    assert (code, said) == (2, f"lockstep: error: --{rule}\n")
    with pytest.raises(ConfigurationError, match=rule):
        Engine("tiny", survive=1)
    with pytest.raises(ConfigurationError, match="survive is 1 with data_parallel_size 2, tensor_parallel_size 2"):
        EngineOptions("tiny", data_parallel_size=2, tensor_parallel_size=2, survive=1)


def test_ranks_do_not_come_back_where_memory_is_mapped(gpus_are_there):
    EngineOptions("tiny", data_parallel_size=2, restart_ranks=1, device="cpu")
    EngineOptions("tiny", data_parallel_size=2, restart_ranks=1, dispatcher="allgather")
    for device, dispatcher in ((None, "auto"), ("cuda", "nvlink")):
        with pytest.raises(
            ConfigurationError, match=f"restart_ranks is 1 with dispatcher '{dispatcher}' on GPUs: torch"
        ):
            EngineOptions("tiny", data_parallel_size=2, restart_ranks=1, device=device, dispatcher=dispatcher)


@pytest.fixture
def launching(monkeypatch):
    """Put a function in place of the one that starts the ranks of a run."""
    return lambda launch: monkeypatch.setattr("lockstep.runner.launcher.launch", launch)


def test_run_gives_the_handler_of_sigterm_back(tmp_path, launching, command_line):
    before, inside = signal.getsignal(signal.SIGTERM), []

    def launch(*_, **__):
        inside.append(signal.getsignal(signal.SIGTERM))
        raise ConfigurationError("no rank started")

    launching(launch)
    code, _, stderr = command_line("run", "--model", "tiny", "--out", tmp_path / "out")
    assert (code, "no rank started" in stderr) == (2, True)
    assert inside != [before]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_during_the_comparison_says_how_far_the_run_came(tmp_path, monkeypatch, launching, command_line):
    def launch(*_, **__):
        (tmp_path / "out" / "steps.jsonl").touch()
        return {"engine": {"dtype": "float32"}}

    launching(launch)
    monkeypatch.setattr("lockstep.runner.verify.verify", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, _, stderr = command_line("run", "--model", "tiny", "--out", tmp_path / "out")
    assert code == 143
    assert "terminated after" in stderr
