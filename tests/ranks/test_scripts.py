"""Scripts that people have, with a different share of the work on each of 2 ranks: the examples of two pages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lockstep
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "scripts.md"
ENGINE_PAGE = PAGE.parents[1] / "tutorials" / "engine_of_your_own.md"
PROMPTS = ["one", "the second prompt", "3", "a fourth, which is somewhat longer than the others", "five"]


def example(name):
    """The code of one section of the page."""
    section = PAGE.read_text().split(f"## {name}\n", 1)[1].split("\n## ", 1)[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def engine_script():
    return "\n".join(re.findall(r"^```python\n(.*?)^```", ENGINE_PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))


def run_engine(queues_of):
    """Run this rank's batches by the page's functions; the outputs."""
    group, names = dist.group.WORLD, {"__name__": "page"}
    exec(compile(engine_script(), ENGINE_PAGE.name, "exec"), names)
    coordinator = lockstep.Coordinator(group, deadline_s=10)
    outputs = names["serve"](queues_of[group.rank()], coordinator, names["make_layers"](group, coordinator))
    return [rows.tolist() for rows in outputs]


def run_example(name, path):
    """Run the page's code as a script, with this rank's prompts; what it put into `outputs`."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    names = {"path": path, "prompts": PROMPTS[:4] if rank == 0 else PROMPTS[4:], "all_prompts": PROMPTS}
    exec(compile(example(name), f"{PAGE.name}: {name}", "exec"), names)
    return names["outputs"], names.get("num_prompt_tokens")


def one_process(path):
    """The text that a single process generates for each prompt, alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    outputs = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        outputs.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return outputs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("scripts") / "tiny", num_layers=2))


@pytest.fixture(scope="module")
def expected(tiny):
    return one_process(tiny)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["A plain loop", "transformers.pipeline"])
def test_ranks_with_uneven_shares(tiny, expected, name):
    (first, _), (second, _) = run_ranks(2, run_example, name, tiny)
    assert first + second == expected
    assert len(first) == 4 and len(second) == 1


@pytest.mark.ranks(2)
def test_accelerate_with_its_barriers_and_gathers(tiny, expected):
    gathered = run_ranks(2, run_example, "Accelerate", tiny)
    num_bytes = sum(len(prompt.encode()) for prompt in PROMPTS)  # one token each
    assert gathered == [(expected, num_bytes)] * 2  # every rank has all of them


@pytest.mark.ranks(2)
def test_an_engine_of_your_own_gives_on_two_ranks_what_it_gives_on_one():
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(rows, 16, generator=generator) for rows in sizes] for sizes in ((3, 1, 5), (2,)))
    spread = run_ranks(2, run_engine, [first, second])
    assert [[len(rows) for rows in outputs] for outputs in spread] == [[3, 1, 5], [2]]
    for mine, found in zip((first, second), spread, strict=True):
        (alone,) = run_ranks(1, run_engine, [mine])
        for expected, rows in zip(alone, found, strict=True):
            torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert not re.findall(r"lockstep\.\w+\.\w+ import|from lockstep\.", engine_script())


@pytest.mark.ranks(2)
def test_an_engine_of_your_own_runs_as_pasted(tmp_path):
    (tmp_path / "engine.py").write_text(engine_script())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "engine.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    (shown,) = re.findall(r"^```\n(rank 0: .*?)^```", ENGINE_PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert all(ended.stdout.count(line) == 1 for line in shown.splitlines())
