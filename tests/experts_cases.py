"""Cases for the experts' kernels (bfloat16, fp8, gpt-oss), and their errors against float32."""

from types import SimpleNamespace

import torch

from dispatch_rounds import round_to_fp8, undo_scales
from lockstep.moe.experts import LocalExperts, silu_and_multiply
from lockstep.moe.fp8 import dequantise, quantise

KINDS = ["bf16", "fp8", "gpt-oss"]
HIDDEN, INTERMEDIATE = 256, 128
COUNTS = [3, 0, 17, 35, 1]  # pairs per expert: none, one tile of 16, several of 32


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


def errors(kind, fp8_rows, device="cpu"):
    """Run the kernels for few and for many rows; return how far each is from float32, relative to its norm."""
    module = gpt_oss_module() if kind == "gpt-oss" else gated_module(kind == "fp8")
    rows, scales = random(9, HIDDEN).bfloat16(), None
    if fp8_rows:
        rows, scales = round_to_fp8(rows)
    num_pairs = sum(COUNTS)
    index = torch.arange(num_pairs + 5, dtype=torch.int32) * 4 % 9
    offsets = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0)], dtype=torch.int32)
    expected = one_pair_at_a_time(module, undo_scales(rows, scales).float(), index[:num_pairs])
    if isinstance(module, torch.nn.Module):
        module.to(device)
    else:
        tensors = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        vars(module).update({name: value.to(device) for name, value in tensors.items()})
    experts = LocalExperts(module)
    assert experts.run_on_device
    given = [None if one is None else one.to(device) for one in (rows, scales, index, offsets)]
    outputs = [experts.on_device(*given, rows_per_expert)[:num_pairs].float().cpu() for rows_per_expert in (1, 1000)]
    return [float((output - expected).norm() / expected.norm()) for output in outputs]
