"""Attention over the ranks of a TP group, experts over all ranks: uneven batches give what one process gives."""

import pytest
import torch
import torch.distributed as dist

import lockstep
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

NUM_TOKENS = 5
# Batches (rows, length) of each DP rank: another number of calls, other shapes, a DP rank with none.
CALLS = {
    "uneven": [[(2, 7), (1, 13)], [(3, 5)]],
    "one without calls": [[(2, 7), (1, 13)], []],
    "one group": [[(1, 3), (2, 9)]],
}


def greedy(model, ids):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip


@torch.no_grad()
def compare(path, calls, tp_size, max_chunk_size):
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    dp_rank = dist.get_rank() // tp_size
    generator = torch.Generator().manual_seed(dp_rank)
    batches = [torch.randint(0, 256, shape, generator=generator) for shape in CALLS[calls][dp_rank]]
    whole = AutoModelForCausalLM.from_pretrained(path).eval()
    model = lockstep.from_pretrained(path, tensor_parallel_size=tp_size, max_chunk_size_per_rank=max_chunk_size)
    local = next(p for name, p in model.named_parameters() if name.endswith("q_proj.weight"))
    outcomes = {"split": isinstance(local, DTensor) and local.to_local().shape[0] * tp_size == local.shape[0]}
    with lockstep.join(model):
        tokens = [greedy(model, ids) for ids in batches]
        logits = [model(ids).logits for ids in batches]
    outcomes["tokens"] = all(torch.equal(own, greedy(whole, ids)) for own, ids in zip(tokens, batches, strict=True))
    errors = [(own - whole(ids).logits).abs().max() / own.abs().max() for own, ids in zip(logits, batches, strict=True)]
    outcomes["logits"] = float(max(errors, default=0.0))
    return outcomes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    # 4 key-value heads, so that 4 ranks can share them.
    from transformers import AutoConfig, AutoModelForCausalLM

    path = make_tiny(tmp_path_factory.mktemp("tp") / "tiny", num_layers=2)
    config = AutoConfig.from_pretrained(path, num_key_value_heads=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("calls", "tp_size", "max_chunk_size"),
    [
        ("uneven", 2, None),
        ("uneven", 2, 3),
        ("one without calls", 2, None),
        ("one group", 4, None),
        ("one group", 2, 2),
    ],
)
def test_splits_of_the_ranks_give_what_one_process_gives(tiny, calls, tp_size, max_chunk_size):
    for outcome in run_ranks(len(CALLS[calls]) * tp_size, compare, tiny, calls, tp_size, max_chunk_size):
        assert outcome["split"] and outcome["tokens"] and outcome["logits"] < 1e-5, outcome
