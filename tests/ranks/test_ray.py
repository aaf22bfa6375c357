"""examples/ray_actors.py on two actors: what one process generates, although the first actor has no prompt at all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from lockstep.models.tiny import make_tiny

pytest.importorskip("ray")
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_actors.py"


@pytest.mark.ranks(2)
def test_the_example(tmp_path):
    tiny = str(make_tiny(tmp_path / "tiny", num_layers=2))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, EXAMPLE, tiny, "2"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    expected = []
    for number in range(3):
        inputs = tokenizer(f"Prompt {number} of rank 1: ", return_tensors="pt")
        tokens = whole.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected.append(repr(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])))
    for round_number in (0, 1):
        assert re.findall(rf"^round {round_number}, rank 1: (.*)$", done.stdout, flags=re.MULTILINE) == expected
    assert "rank 0:" not in done.stdout
