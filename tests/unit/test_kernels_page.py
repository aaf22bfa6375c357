"""The script of docs/how-to/kernels.md gives what PyTorch computes; on a CPU by Triton's interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "kernels.md"
NORM = """
summed = residual + residual
assert torch.equal(total, summed)
expected = torch.nn.functional.rms_norm(summed.float(), (hidden,), weight.float(), 1e-6)
assert torch.allclose(normed.float(), expected, atol=2e-2), (normed.float() - expected).abs().max()
"""
EXPERTS = """
for place, pair in enumerate(pairs.tolist()):
    expert, row = int(topk_ids.flatten()[pair]), normed[pair // 2].float()
    gate, up = (gate_up_proj[expert].float() @ row).chunk(2)
    wanted = down_proj[expert].float() @ (torch.nn.functional.silu(gate) * up)
    assert torch.allclose(outputs[place].float(), wanted, rtol=3e-2, atol=3e-2), (place, outputs[place], wanted)
"""


def run(script):
    environment = {**os.environ, **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_norm_of_the_page():
    run(blocks()[0] + NORM)


@pytest.mark.gpu(1)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_experts_of_the_page():
    run("".join(blocks()) + EXPERTS)
