"""The command line as somebody meets it who mistypes, lacks a package, or has odd names: one sentence, status 2."""

import errno
import json
import os
import subprocess
import sys
from typing import get_args

import pytest

from lockstep import cli_types
from lockstep.report.terminal import plain


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_choices_are_the_names_that_the_library_knows():
    from lockstep.dispatch.choose import dispatcher_names
    from lockstep.runner.options import DTYPES
    from lockstep.simulation.config import ROW_SHAPES
    from lockstep.workload.policies import LOAD_BALANCING

    assert get_args(cli_types.Dispatcher) == dispatcher_names()
    assert get_args(cli_types.DType) == ("auto", *DTYPES)
    assert get_args(cli_types.LoadBalancing) == LOAD_BALANCING == cli_types.LOAD_BALANCING
    assert cli_types.ROW_SHAPES == ROW_SHAPES


def test_help_names_every_choice():
    env = {**os.environ, "TERMINAL_WIDTH": "200", "COLUMNS": "200"}  # a narrow terminal breaks names in two
    help_of = {}
    for name in ("run", "simulate"):
        line = [sys.executable, "-m", "lockstep", name, "--help"]
        help_of[name] = subprocess.run(line, capture_output=True, text=True, env=env, timeout=60).stdout
    for name in ("allgather", "alltoall", "nvlink", "bfloat16", "cuda:N", "least-tokens"):
        assert name in help_of["run"]
    for name in ("least-tokens", "ragged", "equal"):
        assert name in help_of["simulate"]


def test_no_option_is_called_by_what_it_takes():
    """Typer 0.27 names an option after a metavar that differs from it in case alone: `--PORT` for `--port`."""
    import typer

    from lockstep.cli import app

    for command in typer.main.get_command(app).commands.values():
        taken = {parameter.name: parameter.metavar for parameter in command.params if parameter.metavar}
        assert not [name for name, metavar in taken.items() if metavar.lower() == name], command.name


@pytest.mark.parametrize("package", ["typer", "rich"])
@pytest.mark.parametrize("arguments", [["--help"], ["run"], []])
def test_without_the_extra_cli_the_command_says_what_to_type(package, arguments):
    code = f"import sys; sys.modules['{package}'] = None; from lockstep.__main__ import main; main()"
    done = python(code, *arguments)
    assert (done.returncode, done.stderr) == (
        2,
        f"lockstep: error: {package} is not installed, which this command needs: pip install 'lockstep-moe[cli]'\n",
    )


@pytest.mark.parametrize(
    ("arguments", "missing", "extras"),
    [
        (["run"], ["numpy"], "report"),
        (["run"], ["numpy", "transformers", "safetensors"], "models"),
        (["run", "--metrics-port", "0"], ["prometheus_client"], "metrics"),
        (["simulate"], ["numpy"], "report"),
        (["simulate", "--out", "out"], ["pyarrow"], "report"),
        (["compare", ".", "."], ["numpy"], "report"),
        (["bench", "calibrate"], ["numpy"], "report"),
        (["bench", "calibrate"], ["transformers"], "models"),
    ],
)
def test_what_a_command_lacks_is_named_before_it_does_anything(
    arguments, missing, extras, tmp_path, monkeypatch, command_line
):
    monkeypatch.chdir(tmp_path)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    code, _, stderr = command_line(*arguments)
    assert code == 2
    assert f"{', '.join(missing)} " in stderr
    assert f"pip install 'lockstep-moe[{extras}]'" in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("lockstep.Engine", "ModuleNotFoundError: transformers is not installed, which lockstep.Engine needs"),
        (
            "lockstep.from_pretrained('.')",
            "ConfigurationError: transformers is not installed, which from_pretrained needs",
        ),
    ],
)
def test_what_the_library_lacks_is_named_too(call, says):
    code = f"import sys; sys.modules['transformers'] = None; import lockstep; {call}"
    assert f"{says}: pip install 'lockstep-moe[models]'" in python(code).stderr.splitlines()[-1]


def test_ctrl_c_inside_of_an_exec_ends_with_130_too():
    """Python would end by the signal: what is run here is what makes dataclasses, which imports do all the time."""
    done = python(
        "import typer\nfrom lockstep.cli_errors import run_to_status\napp = typer.Typer()\n"
        "@app.command()\ndef work():\n    exec('raise KeyboardInterrupt')\nrun_to_status(app)"
    )
    assert (done.returncode, done.stderr) == (130, "lockstep: interrupted\n")


def test_python_m_lockstep_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lockstep", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("lockstep ")


def test_options_are_checked_before_torch_is_imported(tmp_path):
    (tmp_path / "trace").write_text("nothing of use\n")
    lines = [
        ["run", "--data-parallel-size", "0"],
        ["run", "--dispatcher", "pigeon"],
        ["run", "--deadline", "nan"],
        ["run", "--data-parallel-size", "100000"],
        ["run", "--workload", str(tmp_path / "none")],
        ["run", "--workload", str(tmp_path / "trace")],
        ["run", "--kv-capacity-tokens", "1"],
        ["run", "--model", str(tmp_path / "none")],
        ["run", "--metrics-port", "-1"],
        ["simulate", "--row-shapes", "round"],
        ["bench", "calibrate", "--repeats", "0"],
        ["plan", "--tokens", "5", "--sp", "0"],
    ]
    code = (
        "import json, sys\nfrom lockstep.__main__ import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['lockstep', *line]\n"
        "    try: main()\n"
        "    except SystemExit as ended: print(ended.code, 'torch' in sys.modules)\n"
    )
    done = python(code, json.dumps(lines))
    assert done.stdout.splitlines() == ["2 False"] * len(lines), done.stderr
    assert done.stderr.count("\n") == len(lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run --data-parallel-size -3", "--data-parallel-size must be >= 1, got -3"),
        ("simulate --max-chunk-size 9999999999999999999", "--max-chunk-size must be <= 2147483647, got 9999999999"),
        ("simulate --buffer-capacity-rows 9999999999", "--buffer-capacity-rows must be <= 2147483647, got 9999999999"),
        ("simulate --synthetic rate=1,rate=2", "--synthetic: synthetic parameters are name=number, each once"),
        ("run --max-num-seqs 0", "--max-num-seqs must be >= 1, got 0"),
        ("run --seconds-per-step 0", "--seconds-per-step must be a number > 0, got 0"),
        ("run --rate-scale nan", "--rate-scale must be a number in 1e-09..1e+09, got 'nan'"),
        ("run --max-malformed-share 2", "--max-malformed-share must be a number in 0..1, got 2"),
        ("run --requests 1e3", "--requests must be an integer >= 1, got 1e3"),
        ("run --metrics-port 65536", "--metrics-port must be in 0..65535, got 65536"),
        ("simulate --buffer-capacity-rows 7", "--buffer-capacity-rows must be >= 8, a row of each of 8 ranks, got 7"),
        ("simulate --max-chunk-size 4,x", "--max-chunk-size must be an integer >= 1, got 'x'"),
        ("simulate --queue-p99 -1s", "--queue-p99 must be a time > 0"),
        ("simulate --workers 0", "--workers must be >= 1, got 0"),
        ("simulate --length-scale 1e9 --requests 3", "--length-scale=1e+09 makes a request of"),
        ("plan --tokens 5,-3", "--tokens must be in 0..2147483647, got -3 on DP rank 1"),
        ("plan --tokens 5,x", "--tokens must be integers separated by commas, got 'x' on DP rank 1"),
        ("plan --tokens 2000000 --max-chunk-size 1", "--max-chunk-size 1 must be large enough for 10000 chunks"),
        ("workload describe synthetic --rate-scale 0", "--rate-scale must be a number in"),
        ("bench calibrate --repeats 0", "--repeats must be >= 1, got 0"),
        ("run --no-such-option 1", "No such option: --no-such-option"),
    ],
)
def test_the_option_that_was_typed_is_the_one_that_is_named(line, message, tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    code, shown, stderr = command_line(*line.split())
    assert (code, shown, stderr.count("\n")) == (2, "", 1)
    assert message in stderr
    assert not list(tmp_path.iterdir())


def test_numbers_of_thousands_of_digits_are_one_short_sentence(command_line):
    for option in ("--seed", "--data-parallel-size", "--requests", "--deadline"):
        code, _, stderr = command_line("run", option, "9" * 5000)
        assert (code, stderr.count("\n")) == (2, 1)
        assert stderr.startswith(f"lockstep: error: {option} must be ")
        assert len(stderr) < 200
    code, _, stderr = command_line("plan", "--tokens", "5," + "9" * 5000)
    assert (code, stderr.count("\n")) == (2, 1)


def test_a_path_keeps_its_name_in_a_message_about_options(tmp_path, command_line):
    path = tmp_path / "max_chunk_size"
    path.write_text("nothing of use\n")
    assert f"{path}: no request could be read" in command_line("simulate", "--workload", path)[2]


@pytest.mark.parametrize("name", ["m[/b]", "[red]x", ":smile:", "a b", "tab\there", "esc\x1b[31m", "\udcff", "ü\u202e"])
def test_names_of_any_letters_are_shown_and_never_obeyed(name, tmp_path, command_line):
    trace, out = tmp_path / name, tmp_path / f"out {name}"
    trace.parent.mkdir(exist_ok=True)  # "m[/b]" is the file "b]" in a folder "m["
    trace.write_text('{"timestamp": 0, "input_length": 9, "output_length": 3}\n' * 4 + "x\n")
    common = ("--workload", trace, "--data-parallel-size", "2", "--workers", "1")
    code, shown, stderr = command_line("simulate", *common, "--out", out)
    assert code == 0, stderr
    assert "left out 1 malformed line" in stderr
    assert (out / "report.html").exists()
    seen = name if name.isprintable() else plain(name)
    assert f"out {seen}/report.html" in shown.replace("\n", "")
    assert "\x1b" not in shown + stderr
    for again in (("compare", out, out), ("workload", "describe", trace), ("simulate", *common, "--json")):
        assert command_line(*again)[0] == 0
    code, _, stderr = command_line("simulate", *common, "--out", out)
    assert (code, "exists" in stderr, "\x1b" in stderr) == (2, True, False)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "file/below", "folder"])
@pytest.mark.parametrize(
    "line", ["simulate --workload", "run --workload", "postmortem", "workload describe", "run --model", "compare ."]
)
def test_paths_that_cannot_be_read_are_bad_input(name, line, tmp_path, monkeypatch, command_line):
    (tmp_path / "file").write_text("of mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command_line(*line.split(), tmp_path / name)
    assert (code, stderr.count("\n")) == (2, 1)


def test_output_that_cannot_be_written_is_no_traceback():
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "lockstep", "plan", "--tokens", "5", "--json"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "lockstep: error: OSError: No space left on device\n")


def test_two_simulations_never_write_into_one_folder(tmp_path, command_line):
    from lockstep.commands.folder import output_folder

    line = ("simulate", "--requests", "5", "--workers", "1", "--out", tmp_path / "out", "--overwrite")
    with output_folder(tmp_path / "out", False):
        for arguments in (line, ("run", "--requests", "1", *line[5:])):
            code, _, stderr = command_line(*arguments)
            assert (code, "is being written by another command" in stderr) == (2, True)
    assert command_line(*line)[0] == 0
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert command_line(*line)[0] == 0
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_ctrl_c_ends_every_command_with_130(monkeypatch, command_line):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lockstep.workload.load_workload", interrupted)
    for line in (("simulate",), ("workload", "describe", "synthetic")):
        assert command_line(*line) == (130, "", "lockstep: interrupted\n")


@pytest.mark.parametrize(
    ("variable", "value"), [("RANK", "first"), ("RANK", "-1"), ("WORLD_SIZE", ""), ("RANK", "9" * 99)]
)
def test_what_starts_ranks_and_counts_wrongly_is_named(variable, value, command_line):
    code, _, stderr = command_line("run", env={"RANK": "0", variable: value})
    assert code == 2
    assert f"{variable} must be a number >= 0, got" in stderr


def test_a_full_disk_is_named_with_the_folder(tmp_path, monkeypatch, command_line):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lockstep.commands.simulate.write_trace", full)
    out = tmp_path / "out"
    code, _, stderr = command_line("simulate", "--requests", "5", "--workers", "1", "--out", out)
    assert (code, stderr.splitlines()[-1]) == (1, f"lockstep: error: OSError: {out}: No space left on device")


def test_logs_of_nothing_can_be_compared(tmp_path, command_line):
    (tmp_path / "steps.jsonl").write_text("")
    code, _, stderr = command_line("compare", tmp_path, tmp_path)
    assert (code, stderr) == (0, "")
