"""The engine over GPUs: steps as graphs against eager ones, idle ranks, prompts on other ranks, counts that change.

The same script runs on CPU ranks, where no step is a graph and float32 makes all tokens equal to one process's.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lockstep.testing import run_ranks
from lockstep.workload import PAGE_SIZE, SchedulerConfig
from many_ranks import ranks_for

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NUM_RANKS = ranks_for(NUM_GPUS)
# Of the largest logit: what bfloat16 may add up to in three layers; a lead above it seldom changes sides.
LEAD = 0.06
# Share of tokens that may change sides all the same: a router whose scores tie sends a row to another expert.
WAVERING = 0.03


def _prompts(rank, lengths, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def _run(engine, prompts, tokens, join_at=None):
    """Tokens and logprobs of each request; request i joins at step `join_at[i]`."""
    from lockstep.engine.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0)
    waiting = sorted(zip(join_at or [0] * len(prompts), range(len(prompts)), strict=True))
    first = max(engine.seen, default=-1) + 1
    found = {first + index: [] for index in range(len(prompts))}
    step = 0
    replayed = []
    while True:
        while waiting and waiting[0][0] <= step:
            index = waiting.pop(0)[1]
            engine.add(first + index, prompts[index], params)
            engine.seen.add(first + index)
        for output in engine.step(unfinished=bool(waiting) or engine.has_unfinished):
            found[output.request_id].append((output.token_id, output.logprob))
        step += 1
        if engine.all_stopped:
            break
    replayed = [report.replayed for report in engine.reports]
    overrun = sum(report.overrun_rows for report in engine.reports)
    engine.cached = sum(report.schedule.num_cached_tokens for report in engine.reports)
    engine.reports.clear()
    assert overrun == 0
    return [found[first + index] for index in range(len(prompts))], replayed


@torch.no_grad()
def misses(wholes, prompts, found, exact):
    """Tokens that one process would not have drawn: any other where `exact`, else those behind its choice by `LEAD`.

    `wholes` are the model in the ranks' dtype and in float32, of which the nearer counts: a router whose scores tie
    sends the first one's rows to another expert as well.
    """
    off = 0
    for prompt, outputs in zip(prompts, found, strict=True):
        ids = torch.tensor([token for token, _ in outputs], device=wholes[0].device)
        inputs = torch.cat([torch.tensor(prompt, device=ids.device), ids[:-1]])[None]
        leads = []
        for whole in wholes:
            logits = whole(input_ids=inputs).logits[0, -len(ids) :].float()
            behind = logits.amax(-1) - logits.gather(1, ids[:, None])[:, 0]
            leads.append(behind / logits.abs().amax(-1))
        off += int((torch.stack(leads).amin(0) > (0 if exact else LEAD)).sum())
    allowed = 0 if exact else WAVERING * sum(map(len, found)) + 1
    return max(0, off - int(allowed))


class _Eagerly:
    """In the place of a graph: runs anew what the graph holds, padding included, from its inputs to its outputs."""

    def __init__(self, graphs, size, many, inputs, issue, outputs):
        self.begin, self.issue, self.outputs = (lambda: graphs._begin(size, many, inputs)), issue, outputs

    def replay(self):
        with self.begin() as step:
            found = self.issue(step)
        for output, new in zip(self.outputs, found, strict=True):
            output.copy_(new)


def _without_graphs(graphs):
    """Let all graphs that an engine has be run eagerly instead."""
    for (size, many), (_, logits) in graphs._graphs.items():
        issue, outputs = (lambda step, size=size: [graphs._pass(size, step)]), [logits]
        if not size:
            issue, outputs = (lambda step: [graphs._pass(0, step)][:0]), []
        graphs._graphs[size, many] = _Eagerly(graphs, size, many, graphs._inputs, issue, outputs), logits
    for (size, many), mixed in graphs._mixed.items():
        issue = lambda _, size=size, inputs=mixed.inputs: graphs._mixed_pass(size, inputs)  # noqa: E731
        eagerly = _Eagerly(graphs, size, many, mixed.inputs, issue, mixed[2:])
        graphs._mixed[size, many] = mixed._replace(graph=eagerly)


def _play(folder, device_type):
    import lockstep
    from lockstep.engine.rank_engine import RankEngine
    from lockstep.models.loading import load_pretrained
    from lockstep.models.parallel import parallel_of

    rank, cuda = dist.get_rank(), device_type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    wholes = [load_pretrained(folder, dtype=kind, device=device) for kind in {dtype: 0, torch.float32: 0}]
    dispatcher = "nvlink" if cuda else "allgather"
    model = lockstep.from_pretrained(folder, dtype=dtype, device=device, dispatcher=dispatcher, deadline_s=60)
    parallel_of(model).open()
    # Without prefix pages: a prompt whose beginning is known has other rows, and so other last bits.
    limits = {"max_num_batched_tokens": 512, "max_num_seqs": 16, "kv_capacity_tokens": 64 * PAGE_SIZE}
    config = SchedulerConfig(**limits, enable_prefix_caching=False)

    def engine(**changes):
        made = RankEngine(model, SchedulerConfig(**(vars(config) | changes)), max_model_len=512, graphs=cuda)
        made.seen = set()
        return made

    facts = {}
    graphs = engine()
    facts["about"] = graphs.about()
    # Ranks with other numbers of requests, of other lengths; the last rank has none. Some join later, so that this
    # rank generates while another has a prompt, and counts change.
    lengths = [] if rank == dist.get_world_size() - 1 else [[5, 70, 130, 9, 200], [40], [3, 3, 3]][rank % 3]
    prompts = _prompts(rank, lengths)
    joins = [2 * index for index in range(len(prompts))]
    found, replayed = _run(graphs, prompts, 12, joins)
    facts["misses"] = misses(wholes, prompts, found, exact=not cuda)
    facts["replayed"] = sum(replayed), len(replayed)
    again, _ = _run(graphs, prompts, 12, joins)
    facts["repeats"] = again == found
    if cuda:
        _without_graphs(graphs._device_step.graphs)
        facts["equals the same steps run eagerly"] = _run(graphs, prompts, 12, joins)[0] == found
        eager = RankEngine(model, config, max_model_len=512, graphs=False)
        eager.seen = set()
        unpadded, replayed = _run(eager, prompts, 12, joins)
        facts["eager replayed"] = sum(replayed)
        facts["misses without padding"] = misses(wholes, prompts, unpadded, exact=False)
        del eager
    # With prefix pages, the second time from pages that the first has filled.
    prefix = engine(enable_prefix_caching=True)
    _run(prefix, prompts, 12, joins)
    found, _ = _run(prefix, prompts, 12, joins)
    facts["misses with prefix pages"] = misses(wholes, prompts, found, exact=not cuda)
    facts["cached tokens"] = prefix.cached
    # Few pages: requests are preempted and computed again.
    few = engine(kv_capacity_tokens=5 * PAGE_SIZE)
    prompts = _prompts(rank, [60, 61, 62, 63, 5][: max(0, 5 - rank)], seed=2)
    found, _ = _run(few, prompts, 10)
    facts["misses with few pages"] = misses(wholes, prompts, found, exact=not cuda)
    facts["preemptions"] = few.scheduler.num_preemptions
    facts["pages back"] = few.cache.num_free_pages == few.cache.num_pages
    return facts


def _child(rank, ranks, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=ranks)
    torch.save(_play(f"{folder}/tiny", "cuda"), f"{folder}/facts{rank}.pt")
    os._exit(0)


@pytest.fixture
def folder(tmp_path):
    from lockstep.models.tiny import make_tiny

    make_tiny(tmp_path / "tiny", num_layers=3, hidden_size=128, num_experts=16)
    return tmp_path


def _check(facts):
    for one in facts:
        assert not any(one[name] for name in one if name.startswith("misses")), facts
        assert one["repeats"] and one["pages back"], facts
    assert facts[0]["preemptions"] > 0 and facts[0]["cached tokens"] > 0, facts


@pytest.mark.gpu(2)
@pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}")
@pytest.mark.timeout(280)
def test_steps_as_graphs_equal_eager_ones_whatever_other_ranks_do(folder):
    mp.spawn(_child, (NUM_RANKS, str(folder)), nprocs=NUM_RANKS)
    facts = [torch.load(Path(folder, f"facts{rank}.pt"), weights_only=False) for rank in range(NUM_RANKS)]
    print(facts)
    _check(facts)
    for one in facts:
        replayed, steps = one["replayed"]
        assert replayed == steps, facts  # prompts and idle steps too
        assert one["eager replayed"] == 0 and one["equals the same steps run eagerly"], facts


@pytest.mark.ranks(2)
def test_the_same_script_on_two_cpu_ranks(folder):
    _check(run_ranks(2, _play, str(folder / "tiny"), "cpu", deadline_s=200))
