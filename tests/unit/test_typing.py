"""What a type checker makes of the public face; Transformers is a stub here, so that mypy need not read all of it."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_overloads

import pytest

import lockstep

ROOT = Path(__file__).parents[2]
STUB = """
from typing import Any
class GenerationMixin:
    def generate(self, *args: Any, **kwargs: Any) -> list[int]: ...
class PreTrainedModel:
    name_or_path: str
"""
CONFIG = f"""
[mypy]
mypy_path = {ROOT / "src"}:stubs
follow_imports = skip
ignore_missing_imports = true
[mypy-lockstep,lockstep.models.huggingface,transformers]
follow_imports = silent
"""
SCRIPT = """
from typing import Any, assert_type
import lockstep
model = lockstep.from_pretrained("folder", deadline_s=5)
assert_type(model.generate(max_new_tokens=2), list[int])
assert_type(model.name_or_path, str)
assert_type(lockstep.parallelize(model).generate(), list[int])
with lockstep.join(model) as joined:
    assert_type(joined.generate(), list[int])
informed, info = lockstep.from_pretrained("folder", output_loading_info=True)
assert_type(informed.generate(), list[int])
assert_type(info, dict[str, Any])
"""


def checked(folder, script):
    """Return mypy's complaints about a script, each as the line that it is about and its code."""
    (folder / "stubs" / "transformers").mkdir(parents=True)
    (folder / "stubs" / "transformers" / "__init__.pyi").write_text(STUB)
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110)
    lines = script.splitlines()
    return [
        (lines[int(number) - 1], code)
        for number, code in re.findall(r"^script.py:(\d+): error: .*\[(.*)\]$", done.stdout, flags=re.MULTILINE)
    ]


def test_the_overload_has_the_parameters_of_from_pretrained():
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return {(one.name, one.default) for one in found if one.name != "output_loading_info"}

    assert parameters(get_overloads(lockstep.from_pretrained)[-1]) == parameters(lockstep.from_pretrained)


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_from_pretrained_returns_a_model_that_generates_and_with_loading_info_a_pair(tmp_path):
    wrong = [
        'lockstep.from_pretrained("folder", deadline_s="soon")',
        'lockstep.from_pretrained("folder").generated()',
        'lockstep.from_pretrained("folder", output_loading_info=True).generate()',
    ]
    script = SCRIPT + "\n".join(wrong)
    codes = ["call-overload", "attr-defined", "attr-defined"]
    assert checked(tmp_path, script) == list(zip(wrong, codes, strict=True))
