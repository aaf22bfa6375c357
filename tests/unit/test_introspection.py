# The rules of readers such as SnakeBridge, which writes an Elixir module for a Python class, restated as tests.

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POSITIONAL = "POSITIONAL_OR_KEYWORD"
INTEGERS = {
    "sp_local_sizes": ["sequence_parallel_size"],
    "cu_tokens_across_sp": ["sp_size"],
    "chunked_sizes": ["sequence_parallel_size", "max_chunk_size_per_rank", "chunk_idx"],
    "get_chunk_sizes_across_dp_rank": [],
}


def interpreters():
    """Return the Pythons 3.11 to 3.13 of this machine: this one, those on the path, those of pyenv."""
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for version in ("3.11", "3.12", "3.13"):
        pyenv = sorted(
            Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
        )
        for candidate in (*map(str, pyenv), shutil.which(f"python{version}")):
            if candidate and version not in found:
                found[version] = candidate
    extra = os.environ.get("LOCKSTEP_TEST_PYTHONS", "")
    for candidate in filter(None, extra.split(os.pathsep)):
        version = run(candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
        found[version] = candidate
    return found


def run(python, *arguments):
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=110, env=environment)


@functools.cache
def description(python, name):
    """Return what a Python finds on one of our classes; skips, with the reason, where that Python lacks torch."""
    if name == "DPMetadata" and run(python, "-c", "import torch").returncode:
        pytest.skip(f"{python} has no torch, which DPMetadata needs; set LOCKSTEP_TEST_PYTHONS to one that has it")
    done = run(python, str(ROOT / "tests" / "introspection.py"), name)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[name]


@pytest.fixture(params=sorted(interpreters().items()), ids=lambda item: item[0])
def python(request):
    version, path = request.param
    if run(path, "-c", "pass").returncode:
        pytest.skip(f"Python {version} at {path} does not start")
    return path


def test_dp_metadata_has_the_published_functions_and_one_attribute(python):
    found = description(python, "DPMetadata")
    assert set(found["functions"]) == {*INTEGERS, "__init__", "make"}
    assert found["attributes"] == ["local_sizes"]


def test_parameters_have_the_published_names_order_and_kinds(python):
    functions = description(python, "DPMetadata")["functions"]
    for name, parameters in INTEGERS.items():
        assert functions[name]["parameters"] == [[each, POSITIONAL, "int", False] for each in parameters]
    assert functions["make"]["parameters"] == [
        ["parallel_config", POSITIONAL, "ParallelConfig", False],
        ["num_tokens", POSITIONAL, "int", False],
        ["num_tokens_across_dp_cpu", POSITIONAL, "Tensor", False],
    ]
    assert functions["__init__"]["parameters"] == [
        ["max_tokens_across_dp_cpu", POSITIONAL, "Tensor", False],
        ["num_tokens_across_dp_cpu", POSITIONAL, "Tensor", False],
        ["local_sizes", POSITIONAL, "list[int] | None", True],
    ]


def test_every_annotation_resolves_and_make_returns_the_class_itself(python):
    functions = description(python, "DPMetadata")["functions"]
    assert {name: function["returns"] for name, function in functions.items()} == {
        "__init__": "NoneType",
        "make": "DPMetadata",
        "sp_local_sizes": "SizesContext",
        "chunked_sizes": "SizesContext",
        "get_chunk_sizes_across_dp_rank": "list[int] | None",
        "cu_tokens_across_sp": "Tensor",
    }


def test_parallel_config_takes_four_integers(python):
    found = description(python, "ParallelConfig")
    names = ["data_parallel_size", "data_parallel_rank", "tensor_parallel_size", "tensor_parallel_rank"]
    assert found["functions"]["__init__"]["parameters"] == [[name, POSITIONAL, "int", True] for name in names]
    assert set(found["functions"]) == {"__init__"}
    assert set(found["attributes"]) == {*names, "rank", "world_size"}


@pytest.mark.parametrize("name", ["DPMetadata", "ParallelConfig"])
def test_every_function_has_a_google_docstring_of_its_own(python, name):
    found = description(python, name)
    assert found["module_doc"] is None, "a module docstring would stand in for a missing one"
    assert found["doc"]
    for function in found["functions"].values():
        assert not function["doc"].startswith("Initialize self"), "that is object's"
        assert re.match(r"[A-Z][^\n]+\.(\n|$)", function["doc"])
        assert not re.search(r"^-{3,}$|:param ", function["doc"], flags=re.MULTILINE), "NumPy or Sphinx style"
        for parameter, *_ in function["parameters"]:
            assert re.search(rf"^Args:\n(    .*\n)*?    {parameter}: ", function["doc"], flags=re.MULTILINE)
        # What is written into an Elixir heredoc must not end it, nor be interpolated.
        assert '"""' not in function["doc"]
        assert "#{" not in function["doc"]


def test_the_constructor_makes_the_published_arity(python):
    required = [
        each for each in description(python, "DPMetadata")["functions"]["__init__"]["parameters"] if not each[3]
    ]
    assert len(required) == 2, "new(term, term, [term], keyword)"
