"""A tiny random model of every architecture that follows Transformers' experts interface."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import torch

# Sizes under the names that configs give them; each architecture takes those that it knows.
SIZES = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "sliding_window": 8, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # experts
    "n_routed_experts": 8, "num_experts": 8, "num_local_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1, "num_dense_layers": 1,
    # latent attention, sparse attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8,
    # recurrent layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 16, "n_groups": 2, "mamba_dt_rank": 8,
}  # fmt: skip

MOST_PARAMETERS = 30_000_000
_LATENT = {"num_key_value_heads": 4}
_ALTERNATING = ["linear_attention", "full_attention"] * 2
# What an architecture needs beside the sizes above.
EXTRA = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": {**_LATENT, "layer_group_size": 2},
    "ernie4_5_vl_moe": {"moe_num_experts": [8, 8], "moe_intermediate_size": [64, 64]},
    "deepseek_v2": {**_LATENT, "topk_group": 1, "n_group": 1},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "deepseek_v32": _LATENT,
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "dots3_note": _LATENT,
    "gemma4": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 259, "num_global_key_value_heads": 2,
        "global_head_dim": 16, "tie_word_embeddings": False,
    },
    "glm4_moe_lite": _LATENT,
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next": {**_LATENT, "index_kpool": 2},
    "glm_moe_dsa": _LATENT,
    "granitemoehybrid": {"layer_types": _ALTERNATING},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_LATENT, "layer_types": _ALTERNATING, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": _LATENT,
    "mistral_large4": _LATENT,
    "qwen4_exp": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Sizes of the parts that see pictures, which text alone never reaches.
VISION_SIZES = {
    "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32, "depth": 1, "num_hidden_layers": 1,
    "num_heads": 2, "num_attention_heads": 2, "deepstack_visual_indexes": [0], "embed_dim": 32,
}  # fmt: skip


def all_architectures() -> list[str]:
    """Model folders of the installed Transformers whose modeling file uses the experts interface, by name."""
    import transformers

    return sorted(
        file.parent.name
        for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", file.read_text(), re.MULTILINE)
    )


def tiny_model(architecture: str, seed: int = 0):
    """A tiny random text model on the CPU, float32; None where the architecture has no class that generates text."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    classes = [
        getattr(module, name) for name in vars(module) if name.endswith(("ForCausalLM", "ForConditionalGeneration"))
    ]
    classes = [cls for cls in classes if cls.__module__ == module.__name__ and cls.can_generate()]
    classes.sort(key=lambda cls: cls.__name__.endswith("ForConditionalGeneration"))
    if not classes:
        return None
    model_class = classes[0]
    config_class = model_class.config_class or CONFIG_MAPPING[architecture]
    config = make_config(config_class, architecture)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"{num_parameters} parameters are not tiny: the config has sizes under other names")
    torch.manual_seed(seed)
    return model_class(config).eval()


def make_config(config_class: type, architecture: str):
    """A config with small sizes; of a model that also sees pictures, one whose parts are small."""
    if "text_config" not in config_class.sub_configs:
        return config_class(**known_sizes(config_class, SIZES) | EXTRA.get(architecture, {}))
    parts = {}
    for name, part_class in config_class.sub_configs.items():
        if name == "text_config":
            parts[name] = known_sizes(part_class, SIZES) | EXTRA.get(architecture, {})
        elif part_class.__name__ != "AutoConfig":
            parts[name] = known_sizes(part_class, VISION_SIZES)
    return config_class(**parts)


def known_sizes(config_class: type, sizes: dict) -> dict:
    """Those of `sizes` that the config class declares and does not leave unset."""
    parameters = inspect.signature(config_class).parameters
    names = {
        **{name: name for name in parameters},
        **{a: t for a, t in config_class.attribute_map.items() if t in parameters},
    }
    return {
        name: value
        for name, value in sizes.items()
        if name in names and (parameters[names[name]].default is not None or name in _SET_ANYWAY)
    }


_SET_ANYWAY = {"pad_token_id", "bos_token_id", "eos_token_id", "num_experts_per_tok"}
