"""The experts' kernels under Triton's interpreter, against float32 one pair at a time: bfloat16, fp8, gpt-oss."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from dispatch_rounds import round_to_fp8, undo_scales
from lockstep.moe.experts import LocalExperts, silu_and_multiply
from lockstep.moe.fp8 import dequantise, quantise

HIDDEN, INTERMEDIATE = 256, 128
COUNTS = [3, 0, 17, 35, 1]  # pairs per expert: none, one tile of 16, several of 32


class WithoutOverlap:
    """A kernel that does not start before the launch ahead of it ends, which the interpreter has no word for."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, launch_pdl=False, PDL=False, **constants):
            del launch_pdl
            options = {"PDL": False} if "PDL" in self.kernel.arg_names else {}
            return self.kernel[grid](*arguments, **constants, **options)

        return launch


def exact_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter's matrix product, which takes the bits of bfloat16 for integers, in float32."""
    from triton.runtime.interpreter import TensorHandle

    dtypes = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
    a, b = (torch.from_numpy(one.data.copy()).view(dtypes[str(one.dtype.scalar)]).float() for one in (a, b))
    return TensorHandle((a @ b).numpy() + d.data, d.dtype.scalar)


def rounded(self, source, target):
    """The interpreter's float32 to bfloat16, which cuts off, rounded as GPUs do."""
    from triton.runtime.interpreter import TensorHandle

    assert str(target.scalar) == "bf16"
    values = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
    return TensorHandle(values, target.scalar)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def gated_module(fp8):
    experts = len(COUNTS)
    gate_up = (random(experts, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5).bfloat16()
    down = (random(experts, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5).bfloat16()
    module = SimpleNamespace(gate_up_proj=gate_up, down_proj=down, _apply_gate=silu_and_multiply)
    if fp8:
        gate_up *= torch.arange(1, 2 * INTERMEDIATE + 1)[:, None] / INTERMEDIATE  # blocks of unlike scales
        module.gate_up_proj, module.gate_up_proj_scale_inv = quantise(gate_up)
        module.down_proj, module.down_proj_scale_inv = quantise(down)
    return module


def gpt_oss_module():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=len(COUNTS))
    module = GptOssExperts(config).bfloat16()
    for parameter in module.parameters():
        parameter.data = (random(*parameter.shape) * (4 * HIDDEN**-0.5 if parameter.ndim == 3 else 2)).bfloat16()
    return module.requires_grad_(False)


def plain_weights(module):
    """Return gate rows, up rows, down product and both biases in float32."""
    if hasattr(module, "gate_up_proj_scale_inv"):
        gate_up = dequantise(module.gate_up_proj, module.gate_up_proj_scale_inv, torch.float32)
        return *gate_up.chunk(2, 1), dequantise(module.down_proj, module.down_proj_scale_inv, torch.float32), 0, 0, 0
    if hasattr(module, "down_proj_bias"):
        gate_up, bias = module.gate_up_proj.float().transpose(1, 2), module.gate_up_proj_bias.float()
        down = module.down_proj.float().transpose(1, 2)
        return gate_up[:, ::2], gate_up[:, 1::2], down, bias[:, ::2], bias[:, 1::2], module.down_proj_bias.float()
    return *module.gate_up_proj.float().chunk(2, 1), module.down_proj.float(), 0, 0, 0


def one_pair_at_a_time(module, rows, gather_index):
    gate, up, down, gate_bias, up_bias, down_bias = plain_weights(module)
    outputs = []
    experts = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    for row, expert in zip(gather_index.tolist(), experts, strict=True):
        g, u = gate[expert] @ rows[row], up[expert] @ rows[row]
        if isinstance(down_bias, torch.Tensor):
            g, u = (g + gate_bias[expert]).clamp(max=7.0), (u + up_bias[expert]).clamp(-7.0, 7.0)
            outputs.append(down[expert] @ ((u + 1) * g * torch.sigmoid(1.702 * g)) + down_bias[expert])
        else:
            outputs.append(down[expert] @ (torch.nn.functional.silu(g) * u))
    return torch.stack(outputs)


def grouped_mm(rows, weights, offs):
    parts = zip(rows.tensor_split(offs.tolist()), [*weights, weights[0]], strict=True)  # the last: of no expert
    return torch.cat([part @ weight for part, weight in parts])


def check(kind, fp8_rows):
    """Run both kernels on pairs whose number only the device knows; raise where they differ from float32."""
    from triton.runtime.interpreter import InterpreterBuilder

    from lockstep.moe import experts_kernels

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = exact_dot, rounded
    for name in ("gate_up_kernel", "down_kernel"):
        setattr(experts_kernels, name, WithoutOverlap(getattr(experts_kernels, name)))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=1)
    torch.nn.functional.grouped_mm = grouped_mm
    module = gpt_oss_module() if kind == "gpt-oss" else gated_module(kind == "fp8")
    experts = LocalExperts(module)
    assert experts.run_on_device
    rows, scales = random(9, HIDDEN).bfloat16(), None
    if fp8_rows:
        rows, scales = round_to_fp8(rows)
    num_pairs = sum(COUNTS)
    index = torch.arange(num_pairs + 5, dtype=torch.int32) * 4 % 9
    offsets = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0)], dtype=torch.int32)
    expected = one_pair_at_a_time(module, undo_scales(rows, scales).float(), index[:num_pairs])
    for rows_per_expert in (1, 1000):
        output = experts.on_device(rows, scales, index, offsets, rows_per_expert)[:num_pairs].float()
        apart = float((output - expected).norm() / expected.norm())
        assert apart < 0.006, (kind, rows_per_expert, apart)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(
    numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4"
)
@pytest.mark.parametrize("fp8_rows", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp8", "gpt-oss"])
def test_kernels_equal_float32(kind, fp8_rows):
    script = f"import test_experts_kernels as tests; tests.check({kind!r}, {fp8_rows})"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_gate_that_the_kernels_lack_stays_off_the_device():
    module = gated_module(fp8=False)
    module.act_fn = torch.nn.SiLU()
    assert LocalExperts(module).run_on_device

    def clamped(gate_up):  # as DeepSeek-V4's, whose activation is a SiLU too
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)

    module._apply_gate = clamped
    assert not LocalExperts(module).run_on_device
    module._apply_gate = lambda gate_up: torch.nn.functional.gelu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]
    assert not LocalExperts(module).run_on_device
