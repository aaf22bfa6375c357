"""Train a small MoE on text that comes with Python: python examples/train_small.py OUTPUT --minutes 60

The text is the language reference that `help()` shows (`pydoc_data.topics`, 0.45 MB, PSF licence), read byte by byte.
`--size small` is the model in examples/small_moe: 16 experts, 2 per token, 3.4 M parameters, 7 MB in float16. `--size
medium` has 70 M parameters and needs a GPU.
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data import topics

import torch
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lockstep.models.tiny import byte_tokenizer

SIZES = {
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_experts": 16, "moe_intermediate_size": 128},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "num_experts": 32, "moe_intermediate_size": 160},
}
SEQUENCE, BATCH, EVERY = 256, 16, 100


def make_model(size: str, tokenizer) -> Qwen3MoeForCausalLM:
    """Return an untrained model whose vocabulary is the bytes and three special tokens."""
    shape = SIZES[size]
    heads = shape["hidden_size"] // 32
    config = Qwen3MoeConfig(
        **shape,
        vocab_size=len(tokenizer),
        intermediate_size=2 * shape["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        # Balances the experts only as far as training needs it: what a text prefers shall be seen.
        router_aux_loss_coef=0.002,
        output_router_logits=True,
        max_position_embeddings=32768,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def documents(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens to train on, and every twentieth document to check with; each ends with the end token."""
    parts = [[], []]
    for number, text in enumerate(topics.topics[name] for name in sorted(topics.topics)):
        parts[number % 20 == 19] += [*tokenizer(text.strip()).input_ids, tokenizer.eos_token_id]
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def batch(tokens: torch.Tensor, device: str) -> torch.Tensor:
    """Return random windows of the tokens, `[BATCH, SEQUENCE]`."""
    starts = torch.randint(len(tokens) - SEQUENCE, (BATCH, 1))
    return tokens[starts + torch.arange(SEQUENCE)].to(device)


def bits_per_byte(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, device: str) -> float:
    """Return the cross-entropy of held-out text, in bits, router losses left out."""
    windows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)[:64].to(device)
    with torch.no_grad():
        logits = model(windows, output_router_logits=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return float(loss) / math.log(2)


def train(model: Qwen3MoeForCausalLM, train_tokens, test_tokens, minutes: float, device: str) -> None:
    """Train for a time: the learning rate follows the share of it that has passed."""
    highest = 4e-3 if model.config.hidden_size < 256 else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=highest, betas=(0.9, 0.98), weight_decay=0.05)
    start, step, passed = time.monotonic(), 0, 0.0
    while passed < 1:
        passed = (time.monotonic() - start) / (60 * minutes)
        rate = highest * min(1, (step + 1) / 100) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * min(1, passed)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = batch(train_tokens, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % EVERY == 0 or passed >= 1:
            held_out = bits_per_byte(model, test_tokens, device)
            print(
                f"step {step}, {100 * passed:.0f} %: {loss.item() / math.log(2):.3f} bits per byte, "
                f"{held_out:.3f} on held-out text",
                flush=True,
            )


def main() -> None:
    """Train, save, and print a sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = make_model(arguments.size, tokenizer).to(arguments.device)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, *documents(tokenizer), arguments.minutes, arguments.device)
    model.config.output_router_logits = False
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.float16).save_pretrained(arguments.output)
    # It has learned one text, not to talk: a chat goes on where the last message ends.
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(arguments.output)
    prompt = tokenizer("The import statement", return_tensors="pt").to(arguments.device)
    print(tokenizer.decode(model.float().generate(**prompt, max_new_tokens=200)[0]))


if __name__ == "__main__":
    main()
