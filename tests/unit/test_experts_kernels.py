"""The experts' kernels in Triton's interpreter, compared with float32 pair by pair: bfloat16, fp8, gpt-oss."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from experts_cases import KINDS, errors, gated_module
from lockstep.moe.experts import LocalExperts


class WithoutOverlap:
    """Launches a kernel without programmatic dependent launch, which the interpreter does not know."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, launch_pdl=False, PDL=False, **constants):
            del launch_pdl
            options = {"PDL": False} if "PDL" in self.kernel.arg_names else {}
            return self.kernel[grid](*arguments, **constants, **options)

        return launch


def exact_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Replaces the interpreter's `dot`, which would read the bits of bfloat16 as integers: a product in float32."""
    from triton.runtime.interpreter import TensorHandle

    dtypes = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
    a, b = (torch.from_numpy(one.data.copy()).view(dtypes[str(one.dtype.scalar)]).float() for one in (a, b))
    return TensorHandle((a @ b).numpy() + d.data, d.dtype.scalar)


def rounded(self, source, target):
    """Replaces the interpreter's cast from float32 to bfloat16, which truncates: rounds to nearest, as GPUs do."""
    from triton.runtime.interpreter import TensorHandle

    assert str(target.scalar) == "bf16"
    values = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
    return TensorHandle(values, target.scalar)


def grouped_mm(rows, weights, offs):
    parts = zip(rows.tensor_split(offs.tolist()), [*weights, weights[0]], strict=True)  # the last: of no expert
    return torch.cat([part @ weight for part, weight in parts])


def check(kind, fp8_rows):
    """Run the kernels in the interpreter; fail if they differ from float32."""
    from triton.runtime.interpreter import InterpreterBuilder

    from lockstep.moe import experts_kernels

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = exact_dot, rounded
    for name in ("gate_up_kernel", "down_kernel"):
        setattr(experts_kernels, name, WithoutOverlap(getattr(experts_kernels, name)))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=1)
    torch.nn.functional.grouped_mm = grouped_mm
    found = errors(kind, fp8_rows)
    assert max(found) < 0.006, found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(
    numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4"
)
@pytest.mark.parametrize("fp8_rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
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
