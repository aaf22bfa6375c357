import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["examples/elixir/mix.exs", "examples/elixir/config/runtime.exs", "examples/elixir/lib/lockstep_example.ex"]
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
    assert len(blocks) == 2
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


def test_the_make_target_sets_what_compiling_and_running_need():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"SNAKEPIT_PYTHON=\S.*python SNAKEBRIDGE_VENV=\S.* mix run", makefile)
