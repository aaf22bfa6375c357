"""The experts' kernels on a GPU: bfloat16, fp8 and gpt-oss against float32, and a whole model of one rank in fp8."""

import pytest
import torch

import lockstep
from experts_cases import KINDS, errors
from lockstep.models.experts_modules import find_experts
from lockstep.models.tiny import make_tiny
from lockstep.moe.fp8 import is_fp8

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(NUM_GPUS < 1, reason=f"needs a GPU, found {NUM_GPUS}"),
]


@pytest.mark.parametrize("fp8_rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_float32(kind, fp8_rows):
    assert max(errors(kind, fp8_rows, "cuda")) < 0.01


def test_a_model_of_one_rank_equals_its_experts_dequantised_on_a_cpu(tmp_path):
    path = make_tiny(tmp_path / "tiny", num_layers=2, hidden_size=128, dtype=torch.bfloat16)
    ids = torch.arange(200)[None]
    logits = []
    for device in ("cuda", "cpu"):
        model = lockstep.from_pretrained(path, device=device, quantize_experts="fp8")
        assert all(is_fp8(module) for _, module in find_experts(model))
        with torch.no_grad():
            logits.append(model(input_ids=ids.to(device)).logits.float().cpu())
    apart = (logits[0] - logits[1]).abs().amax(-1) / logits[1].abs().amax(-1)
    assert float(apart.median()) < 0.05
