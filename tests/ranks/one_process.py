"""What one process generates, by Transformers alone: what ranks are compared with."""

from functools import lru_cache

import torch

from lockstep.models.tiny import byte_tokenizer


def one_process(path):
    """Return `generate(prompt, count)`, see `greedy`, with the model of a folder; a prompt may be a text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    generated = lru_cache(lambda ids, count: greedy(model, ids, count))

    def generate(prompt, count):
        return generated(tuple(byte_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt), count)

    return generate


def greedy(model, prompt, count):
    """Return the `count` token ids that a model, whole or spread, generates after those of a prompt, greedily."""
    given = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return tuple(output[0, len(prompt) :].tolist())


def in_order(outputs):
    """Return an engine's outputs in the order of their prompts."""
    return sorted(outputs, key=lambda output: output.index)


def tokens_of(outputs):
    """Return the token ids of each of an engine's outputs, in the order of their prompts."""
    return [output.token_ids for output in in_order(outputs)]
