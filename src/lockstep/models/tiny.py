"""A small Mixture-of-Experts checkpoint made on the spot, for a machine with no weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lockstep.errors import ConfigurationError

# With 0.02, the usual value, experts hardly affect the tokens: with all experts set to zero, 15 of 20 outputs stayed
# the same, so a comparison of tokens would prove nothing.
INITIALIZER_RANGE = 0.15
ARCHITECTURES = ("qwen3_moe", "mixtral")
_NUM_BYTES = 256
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")


def make_tiny(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    architecture: str = "qwen3_moe",
    num_layers: int = 4,
    hidden_size: int = 64,
    num_experts: int = 8,
    num_experts_per_token: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a small random model with a byte tokenizer and return its folder; a seed always gives the same model."""
    if architecture not in ARCHITECTURES:
        raise ConfigurationError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    if hidden_size < 16 or hidden_size % 16:
        raise ConfigurationError(f"hidden_size must be a multiple of 16, >= 16, got {hidden_size}")
    if num_layers < 1 or num_experts < 1:
        raise ConfigurationError(f"num_layers and num_experts must be >= 1, got {num_layers} and {num_experts}")
    if not 1 <= num_experts_per_token <= num_experts:
        raise ConfigurationError(f"num_experts_per_token must be in 1..{num_experts}, got {num_experts_per_token}")
    # Imported here, since transformers takes seconds and a library user may not have it.
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(architecture, num_layers, hidden_size, num_experts, num_experts_per_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """Make a Transformers tokenizer: ids 0..255 are UTF-8 bytes, 256..258 begin, end and padding of a sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet maps each byte to a printable character; sorted, so that ids do not change between runs.
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    bos, eos, pad = _SPECIAL_TOKENS
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE, **names,
    )  # fmt: skip


def _config(architecture: str, num_layers: int, hidden_size: int, num_experts: int, num_experts_per_token: int) -> Any:
    from transformers import MixtralConfig, Qwen3MoeConfig

    shared = {
        "vocab_size": _NUM_BYTES + len(_SPECIAL_TOKENS),
        "bos_token_id": _NUM_BYTES,
        "eos_token_id": _NUM_BYTES + 1,
        "pad_token_id": _NUM_BYTES + 2,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "num_experts_per_tok": num_experts_per_token,
        "max_position_embeddings": 32768,
        "initializer_range": INITIALIZER_RANGE,
    }
    if architecture == "mixtral":
        return MixtralConfig(num_local_experts=num_experts, intermediate_size=2 * hidden_size, **shared)
    sizes = {"moe_intermediate_size": hidden_size, "intermediate_size": 2 * hidden_size}
    return Qwen3MoeConfig(num_experts=num_experts, norm_topk_prob=True, **sizes, **shared)
