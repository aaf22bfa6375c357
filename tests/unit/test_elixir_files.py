import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = [f"examples/elixir/lib/{name}.ex" for name in ("lockstep_example", "documented_values")]
FILES = ["examples/elixir/mix.exs", "examples/elixir/config/runtime.exs", *LIBRARY]
PARSE = "for file <- System.argv(), do: Code.string_to_quoted!(File.read!(file), file: file)"


def parse(*paths):
    elixir = shutil.which("elixir")
    if elixir is None:
        pytest.skip("no elixir on this machine to parse with")
    done = subprocess.run([elixir, "-e", PARSE, *map(str, paths)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_mix_project_parses():
    parse(*(ROOT / path for path in FILES))


def test_the_examples_of_the_page_parse(tmp_path):
    page = (ROOT / "docs" / "how-to" / "elixir.md").read_text()
    blocks = re.findall(r"^```elixir\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.exs").write_text(block)
    parse(*tmp_path.glob("*.exs"))


def test_page_and_project_name_the_same_dependency():
    project = (ROOT / "examples" / "elixir" / "mix.exs").read_text()
    for text in ('{:snakebridge, "~> 0.16.0"}', '{:lockstep, :stdlib, include: ["DPMetadata", "ParallelConfig"]}'):
        assert text in project
        assert text in (ROOT / "docs" / "how-to" / "elixir.md").read_text()


def test_no_file_names_several_modules_in_one_alias():
    # SnakeBridge 0.16 reads `alias Lockstep.{A, B}` as a call of a Python function and stops the compilation.
    for path in [*FILES, "docs/how-to/elixir.md"]:
        code = re.sub(r"`[^`\n]*`|#.*", "", (ROOT / path).read_text())
        assert not re.search(r"alias [\w.]+\.\{", code), path


def run_script(tmp_path, *commands):
    """Run run.sh with a PATH of the tools that it needs before mix, and `commands`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "realpath", "xargs", *commands):
        (tools / name).symlink_to(shutil.which(name) or "/bin/true")
    environment = {"PATH": str(tools), "VENV": str(tmp_path)}
    script = ROOT / "examples" / "elixir" / "run.sh"
    return subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)


def test_the_script_says_what_it_lacks_and_fails(tmp_path):
    (tmp_path / "no_mix").mkdir()
    done = run_script(tmp_path / "no_mix")
    assert done.returncode == 1 and "not run: no mix on this machine" in done.stderr
    (tmp_path / "no_uv").mkdir()
    done = run_script(tmp_path / "no_uv", "mix")
    assert done.returncode == 1 and "not run: no uv on this machine" in done.stderr


def test_the_script_sets_what_compiling_and_running_need():
    script = (ROOT / "examples" / "elixir" / "run.sh").read_text()
    assert re.search(r"^export .*SNAKEPIT_PYTHON=\S+/bin/python SNAKEBRIDGE_VENV=\S+$", script, flags=re.MULTILINE)
