"""Compile all Triton kernels for a Hopper GPU at the sizes that users launch, through the real launch code.

A substitute for Triton's driver compiles to machine code and records the arguments of each launch instead of running
it. This finds, without a GPU: arguments that a kernel does not have, code that does not compile, tiles that exceed
shared memory, and cached launches whose arguments differ in order from Triton's own.
"""

import importlib.util
import multiprocessing
import os
import traceback
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, HEADS, KV_HEADS, DIM = 2048, 768, 128, 8, 32, 4, 128  # of Qwen3-30B-A3B
SHARED_MEMORY = 232448  # bytes of one block on H100 and H200


class Driver:
    """Compiles for compute capability 9.0, and keeps what was launched: `(kernel, arguments)`."""

    def __init__(self):
        self.launched = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (0, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
        )
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        assert metadata.shared <= SHARED_MEMORY
        return lambda x, y, z, stream, function, packed, hook_data, enter, leave, *arguments: self.launched.append(
            (function, arguments)
        )


class Memory:
    """Buffers of all ranks in this process; nobody is met."""

    def __init__(self, ranks):
        self.ranks = ranks

    def map(self, nbytes, device):
        self.buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(self.ranks)]
        return self.buffers[0], [buffer.data_ptr() for buffer in self.buffers]

    def synchronize(self, device):
        pass

    def meet(self, deadline_s):
        pass


def _exchange(driver, ranks, fp8):
    """Dispatch and combine, each by Triton's own launch and then by the cached one, with the same arguments."""
    from triton.runtime.jit import JITFunction

    from lockstep.dispatch import nvlink

    capacity, specialised, run = 256, [], JITFunction.run

    def counted_run(kernel, *arguments, **options):
        specialised.append(kernel)
        return run(kernel, *arguments, **options)

    JITFunction.run = counted_run
    dispatcher = nvlink.NvlinkDispatcher(
        SimpleNamespace(rank=lambda: 0, size=lambda: ranks), num_experts=EXPERTS, hidden_size=HIDDEN, top_k=TOP_K,
        max_tokens_per_rank=capacity, fp8=fp8, device=torch.device("cpu"), memory=Memory(ranks), warm_up=False,
        launch=nvlink.launch_sizes(132, ranks, EXPERTS // ranks, HIDDEN, capacity),
    )  # fmt: skip
    dispatcher._dispatch_options, dispatcher._combine_options = dispatcher._options(early=True)
    rows, ids = torch.zeros(3, HIDDEN, dtype=torch.bfloat16), torch.zeros(3, TOP_K, dtype=torch.int32)
    result, weights, seen = torch.zeros(ranks * capacity, HIDDEN, dtype=torch.bfloat16), torch.zeros(3, TOP_K), []
    output = torch.zeros_like(rows)
    for reduced in (False, False, True, True):
        driver.launched.clear()
        handle = dispatcher.dispatch(dispatcher.route([3] * ranks), rows, ids, weights)
        dispatcher.combine(result, handle, reduced=reduced, output=output)
        seen.append([(function, _plain(arguments)) for function, arguments in driver.launched])
        assert [function for function, _ in seen[-1]] == ["dispatch_kernel", "combine_kernel"]
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[0][1] != seen[2][1]
    assert len(specialised) == 3  # dispatch and two kinds of combine, each once


def _plain(arguments):
    return [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]


def _experts(driver, rows_fp8, kind):
    """Kernels for few rows per expert and for many. Weights are one expert's in the shape of 32: nothing is read."""
    from lockstep.moe.experts import LocalExperts, silu_and_multiply

    local = EXPERTS // 4

    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(1, *shape, dtype=dtype).expand(local, *(-1 for _ in shape))

    module = SimpleNamespace(
        gate_up_proj=zeros(2 * INTERMEDIATE, HIDDEN), down_proj=zeros(HIDDEN, INTERMEDIATE),
        _apply_gate=silu_and_multiply,
    )  # fmt: skip
    expected = ["gate_up_kernel", "down_kernel", "gather_kernel", "activation_kernel"]
    if kind == "fp8":
        for name in ("gate_up_proj", "down_proj"):
            out, inner = getattr(module, name).shape[1:]
            setattr(module, name, zeros(out, inner, dtype=torch.float8_e4m3fn))
            setattr(module, f"{name}_scale_inv", zeros(out // 128, inner // 128, dtype=torch.float32))
        expected[3:] = ["dequantise_kernel", "activation_kernel", "dequantise_kernel"]
    elif kind == "gpt-oss":
        module = SimpleNamespace(
            gate_up_proj=zeros(HIDDEN, 2 * INTERMEDIATE), down_proj=zeros(INTERMEDIATE, HIDDEN),
            gate_up_proj_bias=zeros(2 * INTERMEDIATE), down_proj_bias=zeros(HIDDEN), has_bias=True, is_transposed=True,
            is_concatenated=False, alpha=1.702, limit=7.0, _apply_gate=_gate_of_gpt_oss,
        )  # fmt: skip
        expected.append("bias_kernel")
    experts = LocalExperts(module)
    assert experts.run_on_device
    torch.nn.functional.grouped_mm = lambda rows, weights, offs: rows.new_zeros(len(rows), weights.shape[2])
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    experts.warm_up(64, rows_fp8)
    assert [name for name, _ in driver.launched] == expected


def _gate_of_gpt_oss(gate_up):
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _attention(driver, dtype):
    from lockstep.engine import attention_launch, decoder_kernels
    from lockstep.engine.attention import AttentionOptions

    attention_launch._launch_options = lambda device: {"PDL": True, "launch_pdl": True}
    attention_launch.max_programs = lambda device, tiles: 132 * tiles.programs_per_sm
    pages = [torch.zeros(8, 64, KV_HEADS, DIM, dtype=dtype) for _ in range(2)]
    table, numbers = torch.zeros(16, 4, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    query, keys = torch.zeros(16, HEADS, DIM, dtype=dtype), torch.zeros(16, KV_HEADS, DIM, dtype=dtype)
    out = torch.zeros_like(query)
    attention_launch.write_keys(keys, keys, *pages, numbers)
    for more in ((), (128, 30.0, torch.zeros(HEADS, dtype=dtype))):
        options = AttentionOptions(DIM**-0.5, *more)
        for ready in (False, True):
            attention_launch.attend_decode(query, *pages, table, numbers, numbers, options, out, None, ready)
        attention_launch.attend_prompts(query, *pages, table, numbers[:2], numbers[:3], numbers[:2], options, out)
    rows, weight = torch.zeros(16, HIDDEN, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    qkv, angles = torch.zeros(16, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype), torch.zeros(16, DIM, dtype=dtype)
    decoder_kernels.add_rms_norm(rows, None, weight, 1e-6)
    decoder_kernels.add_rms_norm(rows, rows, weight, 1e-6)
    for norm in (None, weight[:DIM]):
        decoder_kernels.rope_and_write(qkv, angles, angles, norm, norm, 1e-6, numbers, *pages, HEADS)
    decoder_kernels.route(torch.zeros(16, EXPERTS, dtype=dtype), TOP_K, True)
    assert len(driver.launched) == 1 + 2 * 3 + 5


CASES = {
    "2 ranks, bf16": (_exchange, 2, False),
    "4 ranks, fp8": (_exchange, 4, True),
    "experts in bf16": (_experts, False, "bf16"),
    "experts in bf16, rows in fp8": (_experts, True, "bf16"),
    "experts in fp8": (_experts, False, "fp8"),
    "experts of gpt-oss": (_experts, False, "gpt-oss"),
    "attention, bf16": (_attention, torch.bfloat16),
    "attention, float32": (_attention, torch.float32),
}


def _child(case, sender):
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    try:
        from triton.runtime import driver as drivers

        active = Driver()
        getattr(drivers, "driver", drivers).set_active(active)
        function, *arguments = CASES[case]
        function(active, *arguments)
        sender.send("")
    except BaseException:
        sender.send(traceback.format_exc())


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_hopper_as_they_are_launched(case):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, sender))
    process.start()
    assert receiver.poll(280), "no answer in 280 s"
    problem = receiver.recv()
    process.join()
    assert not problem, problem
