"""What one process generates, by Transformers alone: what ranks are compared with."""

from functools import lru_cache

import torch

from lockstep.models.tiny import byte_tokenizer


def one_process(path):
    """Return `generate(prompt, count) -> token ids`, greedy, of a text or token ids; always `count` tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()

    @lru_cache
    def generated(ids, count):
        given = torch.tensor([ids])
        with torch.no_grad():
            output = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return tuple(output[0, len(ids) :].tolist())

    def generate(prompt, count):
        return generated(tuple(byte_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt), count)

    return generate
