"""The examples of docs/how-to/engine.md: each gives what the page shows."""

import doctest
import re
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")

from lockstep.models.tiny import make_tiny
from lockstep.runner.options import EngineOptions
from lockstep.testing import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "engine.md"
TEXTS = ["one", "the second prompt", "3", "a fourth one"]


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.ranks(2)
def test_every_session_of_the_page_gives_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sessions = "\n".join(block for block in blocks() if block.startswith(">>>"))
    test = doctest.DocTestParser().get_doctest(sessions, {}, PAGE.name, PAGE.name, 0)
    assert len(test.examples) >= 20
    failures = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)


def run_script(index, path):
    script = [block for block in blocks() if not block.startswith(">>>")][index]
    texts = TEXTS[:3] if dist.get_rank() == 0 else TEXTS[3:]
    names = {"path": path, "batches": [[text] for text in texts], "prompts": [list(text.encode()) for text in texts]}
    exec(compile(script, PAGE.name, "exec"), names)
    return names["answers"]


@pytest.mark.ranks(2)
def test_scripts_of_the_page_run_on_uneven_ranks(tmp_path):
    path = str(make_tiny(tmp_path / "tiny", num_layers=2))
    texts = run_ranks(2, run_script, 0, path)
    assert [len(answers) for answers in texts] == [3, 1]
    tokens = run_ranks(2, run_script, 1, path)
    assert [{len(answer) for answer in answers.values()} for answers in tokens] == [{8}, {8}]
    assert [sorted(answers) for answers in tokens] == [[0, 1, 2], [0]]


def test_the_page_names_every_option_with_its_default():
    words = {
        None: ("the model's context", "no limit", "what the memory allows", "a GPU if there is one", "equal shares")
    }
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", PAGE.read_text().split("## Options", 1)[1], re.MULTILINE
    )
    named = {}
    for names, defaults in rows:
        names, defaults = names.split(", "), defaults.split(", ")
        named |= dict(zip(names, defaults if len(names) > 1 else [", ".join(defaults)], strict=True))
    fields = {name: field.default for name, field in EngineOptions.__dataclass_fields__.items() if name != "model"}
    assert {name.strip("`") for name in named} == set(fields)
    for name, default in fields.items():
        shown = named[f"`{name}`"].partition(";")[0].strip("`")
        expected = words.get(default) or (f"{default:g}" if isinstance(default, float) else str(default),)
        assert shown in expected, name
