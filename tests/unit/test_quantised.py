"""Quantised checkpoints, made by hand: each rank's part of what the whole becomes when it is dequantised on load."""

import pytest
import torch

pytest.importorskip("transformers")

from lockstep.models.loading import load_pretrained
from quantised import fp8, mxfp4


@pytest.mark.parametrize("make", [mxfp4, fp8])
def test_each_rank_has_its_part_of_the_dequantised_weights(tmp_path, make):
    torch.manual_seed(0)
    expected = make(tmp_path)
    whole = load_pretrained(tmp_path).state_dict()
    assert len(expected) >= 2
    for name, weight in expected.items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-2, atol=1e-6)
    for ep_rank in (0, 1):
        own = load_pretrained(tmp_path, ep_rank=ep_rank, ep_size=2).state_dict()
        assert {weight.dtype for weight in own.values()} == {torch.bfloat16}
        for name, weight in own.items():
            part = slice(ep_rank * 2, ep_rank * 2 + 2) if ".experts." in name else slice(None)
            assert torch.equal(weight, whole[name][part]), name
