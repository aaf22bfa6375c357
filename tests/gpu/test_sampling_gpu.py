"""Sampling on a GPU: the tokens of the CPU, nothing read back, nothing that depends on the batch."""

import pytest
import torch

from lockstep.engine.sampling import Sampler, SamplingParams, seed_key, top_ids, uniforms

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(NUM_GPUS < 1, reason=f"needs a GPU, found {NUM_GPUS}"),
]

CHOICES = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 64, "min_p": 0.01, "temperature": 2.0},
    {"top_p": 0.8},
    {"top_k": 300, "top_p": 0.95},
    {"min_p": 0.02, "repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "top_k": 50, "frequency_penalty": 0.5},
    {"min_tokens": 6, "stop_token_ids": [4, 9], "temperature": 1.5},
    {"logprobs": 3, "temperature": 1.2},
]


def make_sampler(device, num_slots, vocab_size):
    sampler = Sampler(num_slots, vocab_size, device, eos_token_ids=[3])
    for slot in range(num_slots):
        sampler.set(slot, SamplingParams(**CHOICES[slot % len(CHOICES)]), slot, list(range(slot + 1)))
    return sampler


def sample(sampler, logits, slots, positions):
    device = sampler.device
    return sampler.sample(
        logits.to(device), torch.tensor(slots, device=device), torch.tensor(positions, device=device), slots
    )


def test_hashes_have_the_same_bits():
    keys = torch.tensor([seed_key(seed) for seed in range(-500, 500)])
    positions = torch.arange(1000) * 131
    assert torch.equal(uniforms(keys.cuda(), positions.cuda()).cpu(), uniforms(keys, positions))


@pytest.mark.parametrize("vocab_size", [259, 5000, 151_936])
def test_tokens_equal_the_cpus(vocab_size):
    num_slots, num_steps = 40, 4
    generator = torch.Generator().manual_seed(vocab_size)
    on_cpu, on_gpu = make_sampler("cpu", num_slots, vocab_size), make_sampler("cuda", num_slots, vocab_size)
    slots = list(range(num_slots))
    for step in range(num_steps):
        logits = torch.randn(num_slots, vocab_size, generator=generator) * 3
        positions = [slot + 1 + step for slot in slots]
        expected, drawn = (sample(sampler, logits, slots, positions) for sampler in (on_cpu, on_gpu))
        assert drawn.tokens.tolist() == expected.tokens.tolist()
        torch.testing.assert_close(drawn.logprobs.cpu(), expected.logprobs, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(drawn.top_ids.cpu(), expected.top_ids)


def test_equal_logits_are_ordered_as_on_the_cpu():
    values = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = values.float().sort(descending=True, stable=True).indices[:, :64]
    for rows in (1, 3, 64):
        assert torch.equal(top_ids(values[:rows].cuda(), 64).cpu(), expected[:rows])


def test_a_token_is_the_same_alone_and_in_any_batch():
    num_slots, vocab_size = 60, 151_936
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(num_slots, vocab_size, generator=generator).bfloat16()
    alone = []
    sampler = make_sampler("cuda", num_slots, vocab_size)
    for slot in range(num_slots):
        alone.append(sample(sampler, logits[slot : slot + 1], [slot], [slot + 1]).tokens.item())
    for seed in range(4):
        order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))[
            : num_slots - 9 * seed
        ].tolist()
        sampler = make_sampler("cuda", num_slots, vocab_size)
        drawn = sample(sampler, logits[order], order, [slot + 1 for slot in order])
        assert drawn.tokens.tolist() == [alone[slot] for slot in order]


def test_nothing_waits_for_the_device():
    num_slots, vocab_size = 20, 151_936
    sampler = make_sampler("cuda", num_slots, vocab_size)
    logits = torch.randn(num_slots, vocab_size, device="cuda")
    slots = torch.arange(num_slots, device="cuda")
    sampler.sample(logits, slots, slots + 1, list(range(num_slots)))  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.set(3, SamplingParams(top_p=0.5, presence_penalty=1.0, min_tokens=2), 1, [1, 2], [5, 5])
        rows = list(range(num_slots - 1, -1, -1))
        drawn = sampler.sample(logits, slots.flip(0), slots + 30, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.tokens.shape == (num_slots,)
