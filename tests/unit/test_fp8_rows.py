"""Rows rounded to fp8 as they are sent: what GPU results are compared with."""

import pytest
import torch

from dispatch_rounds import round_to_fp8, undo_scales


def test_each_run_of_128_values_has_its_scale():
    rows = torch.zeros(2, 130)
    rows[0, :3] = torch.tensor([448.0, -17.0, 0.0])  # e4m3 has 16 and 18 there: a tie goes to the even one
    rows[0, 129] = 7.0
    values, scales = round_to_fp8(rows)
    assert values.dtype is torch.float8_e4m3fn
    assert values.shape == (2, 130)
    assert scales.tolist() == [[1.0, pytest.approx(7 / 448)], [1.0, 1.0]]  # zeros are not divided by zero
    assert values.float()[0, [0, 1, 2, 129]].tolist() == [448.0, -16.0, 0.0, 448.0]
    assert undo_scales(values, scales)[0, [0, 1, 2, 129]].tolist() == [448.0, -16.0, 0.0, 7.0]


def test_values_keep_four_bits():
    rows = torch.randn(50, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float()
    apart = (undo_scales(*round_to_fp8(rows)) - rows).abs()
    largest = rows.view(50, 2, 128).abs().amax(-1).repeat_interleave(128, 1)
    assert bool((apart <= rows.abs() / 16 + largest * (2**-10 / 448) + 1e-7).all())
    assert 0.02 < apart.norm() / rows.norm() < 0.05
    assert undo_scales(rows, None) is rows
