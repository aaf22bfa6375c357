"""Continuous batching of Transformers over GPUs, its padded batches as our graphs, whatever other ranks do.

The same script runs on CPU ranks, where no batch is a graph and float32 makes all tokens equal to one process's.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_engine_gpu import _prompts, misses

from lockstep.testing import run_ranks

pytest.importorskip("transformers", "5.23", reason="options of generate_batch are those of Transformers 5.23")
from many_ranks import ranks_for, repeated

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NUM_RANKS = ranks_for(NUM_GPUS)
TOKENS = 12
LENGTHS = ([5, 70, 130, 9, 33], [40, 3])  # of the prompts of even and odd ranks
# Of ContinuousBatchingConfig, beside those of all runs: Transformers' default, then its graphs in both of its loops.
EAGER, GRAPHS = {"use_cuda_graph": False}, {"use_cuda_graph": True, "use_async_batching": False}
ASYNC = {"use_cuda_graph": True, "use_async_batching": True}


class _Batches:
    """A spread model whose rows are counted, and the runs of `generate_batch` on it."""

    def __init__(self, folder, device, attention):
        import lockstep
        from lockstep.models import generate_graphs as graphs
        from lockstep.models.loading import load_pretrained

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.wholes = [load_pretrained(folder, dtype=kind, device=device) for kind in {dtype: 0, torch.float32: 0}]
        self.model = lockstep.from_pretrained(
            folder, dtype=dtype, device=device, dispatcher="nvlink" if device.type == "cuda" else "allgather",
            attn_implementation=attention, max_chunk_size_per_rank=256, count_expert_load=True, deadline_s=60,
        )  # fmt: skip
        self.join, self.parallel = lockstep.join, lockstep.parallel_of(self.model)
        self.exact, self.replays, self.agreed = device.type != "cuda", 0, []
        replay, begin = graphs._CapturedForward.replay, self.parallel.begin

        def counted_replay(*arguments):
            self.replays += 1
            return replay(*arguments)

        def counted_begin(decision):
            self.agreed.append(sum(decision.num_tokens_across_dp))
            return begin(decision)

        graphs._CapturedForward.replay, self.parallel.begin = counted_replay, counted_begin

    def run(self, prompts, **choices):
        """Run in a `join` block of its own; returns misses, and replays of this rank's batches."""
        import transformers

        settings = transformers.GenerationConfig(
            max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        batching = transformers.ContinuousBatchingConfig(
            page_size=256, num_blocks=16, max_batch_tokens=128, auto_switch_to_flash=False, **choices
        )
        before = self.replays
        with self.join(self.model):
            answers = self.model.generate_batch(
                prompts, generation_config=settings, continuous_batching_config=batching
            )
        errors = [answer.error for answer in answers.values() if answer.error is not None]
        assert len(answers) == len(prompts) and not errors, errors
        found = [[(token, 0.0) for token in answer.generated_tokens] for answer in answers.values()]
        assert all(len(one) == TOKENS for one in found)
        return misses(self.wholes, prompts, found, self.exact), self.replays - before


def _play(folder, device_type, attention):
    rank = dist.get_rank()
    batches = _Batches(folder, torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu"), attention)
    mine = _prompts(rank, repeated(LENGTHS, dist.get_world_size())[rank])
    alone = mine if rank == 0 else []  # the other ranks have nothing to do at all
    facts = {"eager": batches.run(mine, **EAGER), "graphs": batches.run(mine, **GRAPHS)}
    if device_type == "cuda":
        facts["asynchronous"] = batches.run(mine, **ASYNC)
    facts["others idle"] = batches.run(alone, **GRAPHS)
    # Two experts of each row in three layers: no padding has come to any of them.
    facts["pairs"] = [sum(pairs) for pairs in batches.parallel.expert_load().pairs]
    facts["agreed"] = [2 * sum(batches.agreed)] * 3
    return facts


def _child(rank, ranks, folder, attention):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=ranks)
    torch.save(_play(f"{folder}/tiny", "cuda", attention), f"{folder}/facts{rank}.pt")
    os._exit(0)


@pytest.fixture
def folder(tmp_path):
    from lockstep.models.tiny import make_tiny

    make_tiny(tmp_path / "tiny", num_layers=3, hidden_size=128, num_experts=16)
    return tmp_path


def _check(facts):
    for one in facts:
        runs = {name: one[name] for name in one if name not in ("pairs", "agreed")}
        assert [misses for misses, _ in runs.values()] == [0] * len(runs), facts
        assert one["pairs"] == one["agreed"], facts


@pytest.mark.gpu(2)
@pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}")
@pytest.mark.timeout(280)
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_padded_batches_are_replayed_and_draw_the_tokens_of_one_process(folder, attention):
    if attention != "sdpa" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    mp.spawn(_child, (NUM_RANKS, str(folder), attention), nprocs=NUM_RANKS)
    facts = [torch.load(Path(folder, f"facts{rank}.pt"), weights_only=False) for rank in range(NUM_RANKS)]
    print(facts)
    _check(facts)
    for rank, one in enumerate(facts):
        assert one["eager"][1] == 0, facts
        # A size of batch is replayed from its second time on; decoding is of few sizes.
        assert min(one[name][1] for name in ("graphs", "asynchronous")) >= TOKENS // 2, facts
        assert (one["others idle"][1] >= TOKENS // 2) == (rank == 0), facts


@pytest.mark.ranks(2)
def test_the_same_script_on_two_cpu_ranks(folder):
    _check(run_ranks(2, _play, str(folder / "tiny"), "cpu", "sdpa", deadline_s=200))
