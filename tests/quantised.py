"""Quantised checkpoints of small models, made by hand, for tests of loading and of experts in fp8."""

import json

import torch
from safetensors.torch import load_file, save_file

NUM_EXPERTS = 4
SIZES = {
    "vocab_size": 64, "num_hidden_layers": 2, "num_experts_per_tok": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": NUM_EXPERTS, "initializer_range": 0.15,
}  # fmt: skip
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 = torch.tensor(FP4 + [-value for value in FP4])


def rewrite(path, quantise, quantization_config):
    tensors = {}
    for name, weight in load_file(path / "model.safetensors").items():
        tensors |= quantise(name, weight)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))


def mxfp4(path):
    """Blocks of 32 values along the input, two to a byte, and a power of two per block."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(hidden_size=64, intermediate_size=64, head_dim=16, **SIZES)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    expected = {}

    def quantise(name, weight):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: weight}
        num_experts, num_in, num_out = weight.shape
        codes = torch.randint(0, 16, (num_experts, num_out, num_in // 32, 32), dtype=torch.uint8)
        scales = torch.randint(120, 126, (num_experts, num_out, num_in // 32), dtype=torch.uint8)
        values = FP4[codes.long()] * torch.exp2(scales.float() - 127).unsqueeze(-1)
        expected[name] = values.reshape(num_experts, num_out, num_in).transpose(1, 2).to(torch.bfloat16)
        return {f"{name}_blocks": codes[..., ::2] | (codes[..., 1::2] << 4), f"{name}_scales": scales}

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(path, quantise, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return expected


def fp8(path):
    """One scale per block of 128 x 128, one tensor per expert."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(hidden_size=256, intermediate_size=256, moe_intermediate_size=128, head_dim=64, **SIZES)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    expected = {}

    def quantise(name, weight):
        if "experts" not in name and "q_proj" not in name:
            return {name: weight}
        scales = torch.rand(weight.shape[0] // 128, weight.shape[1] // 128) * 0.01 + 0.001
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        values = (weight.float() / spread).clamp(-440, 440).to(torch.float8_e4m3fn)
        if "q_proj" in name:
            expected[name] = (values.float() * spread).to(torch.bfloat16)
        return {name: values, f"{name}_scale_inv": scales}

    settings = {"activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    rewrite(path, quantise, {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"], **settings})
    return expected
