"""What only GPUs run, whole: the engine's device path on a GPU that is pretended, see `tests/pretend_gpu.py`."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lockstep.models.tiny import make_tiny
from lockstep.moe.placement import Placement
from lockstep.workload import PAGE_SIZE, SchedulerConfig

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4"
    ),
    pytest.mark.timeout(600),
]

LEAD = 0.1  # of the largest logit: a smaller one may change sides in bfloat16, where a router's scores tie
BATCH_TOKENS = 8  # of each request of `generate_batch`
LIMITS = {"max_num_batched_tokens": 80, "max_num_seqs": 3, "kv_capacity_tokens": 24 * PAGE_SIZE}


def _load(folder, dtype):
    from lockstep.models.loading import load_pretrained

    return load_pretrained(folder, dtype=dtype, device="cpu")


def _prompts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def _generate(engine, prompts, join_at, **choices):
    """Tokens and logprobs of requests that join at some step, and the steps' reports."""
    from lockstep.engine.sampling_params import SamplingParams

    params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, "logprobs": 0, **choices})
    waiting, found = sorted(zip(join_at, range(len(prompts)), strict=True)), [[] for _ in prompts]
    number = 0
    while True:
        while waiting and waiting[0][0] <= number:
            engine.add(waiting[0][1], prompts[waiting[0][1]], params)
            del waiting[0]
        for output in engine.step(unfinished=bool(waiting) or engine.has_unfinished):
            found[output.request_id].append((output.token_id, output.logprob))
        number += 1
        if engine.all_stopped:
            break
    reports, engine.reports = engine.reports, []
    return found, reports


def _wrong(whole, prompts, found, lead=0.0):
    """Tokens that one process would not have drawn, where its choice leads by more than `lead`; and by how much."""
    wrong = []
    for prompt, outputs in zip(prompts, found, strict=True):
        ids = [token for token, _ in outputs]
        logits = whole(input_ids=torch.tensor([prompt + ids[:-1]])).logits[0, -len(ids) :].float()
        best = logits.topk(2)
        leads = (best.values[:, 0] - best.values[:, 1]) / logits.abs().amax(-1)
        other = (best.indices[:, 0] != torch.tensor(ids)) & (leads > lead)
        wrong += [(len(prompt), row, float(leads[row])) for row in other.nonzero().flatten().tolist()]
    return wrong


def _never_wait(device_step_class):
    """Issuing a step must not wait for the GPU, from the layout of its rows to the copy of its tokens."""
    from pretend_gpu import forbid_waits

    run = device_step_class.run

    def watched(self, *arguments):
        with forbid_waits():
            return run(self, *arguments)

    device_step_class.run = watched


def _one_process(rank, folder):
    """Fused layers, our attention and sampling in float32: the tokens of Transformers' own forward pass."""
    whole, model = (_load(folder, torch.float32) for _ in range(2))
    from pretend_gpu import pretend, put_on_gpu

    pretended = pretend()
    from lockstep.engine.device_step import DeviceStep
    from lockstep.engine.rank_engine import RankEngine

    _never_wait(DeviceStep)
    engine = RankEngine(put_on_gpu(model), SchedulerConfig(**LIMITS), max_model_len=256)
    assert engine.about()["layers"] == "fused" and engine.about()["attention_name"] == "Triton over pages"
    prompts = _prompts([5, 70, 3], 0)
    found, _ = _generate(engine, prompts, [0, 0, 2])
    again, _ = _generate(engine, prompts, [0, 1, 0], temperature=0.8, top_k=20, top_p=0.9)
    alone = [_generate(engine, [prompt], [0], temperature=0.8, top_k=20, top_p=0.9, seed=i)[0][0]
             for i, prompt in enumerate(prompts)]  # fmt: skip
    assert [[token for token, _ in one] for one in again] == [[token for token, _ in one] for one in alone]
    few = RankEngine(model, SchedulerConfig(**(LIMITS | {"kv_capacity_tokens": 4 * PAGE_SIZE})), max_model_len=200)
    packed = _prompts([60, 61, 62], 1)
    preempted, _ = _generate(few, packed, [0, 0, 0], max_tokens=8)
    assert few.scheduler.num_preemptions > 0
    pretended.__exit__(None, None, None)
    assert _wrong(whole, prompts, found) == _wrong(whole, packed, preempted) == []


def _two_ranks(rank, folder):
    """Every step a graph, over mapped memory: prompts beside decoding, an idle rank, experts with replicas."""
    whole, model = (_load(folder, torch.bfloat16) for _ in range(2))
    import lockstep
    from lockstep.moe import experts, layer
    from pretend_gpu import graphs, pretend, put_on_gpu

    layer.FEW_ROWS = experts.FEW_ROWS = 3  # rows per expert: steps with the long prompt take the other kernels
    pretended = pretend(rank, 2)
    from lockstep.engine.device_step import DeviceStep
    from lockstep.engine.rank_engine import RankEngine
    from lockstep.models.parallel import parallel_of

    _never_wait(DeviceStep)
    placement = Placement.of_ranks(8, [[[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]] * 2, 5)
    model = lockstep.parallelize(
        put_on_gpu(model), dispatcher="nvlink", deadline_s=100, max_chunk_size_per_rank=24, placement=placement,
        count_expert_load=True,
    )  # fmt: skip
    parallel_of(put_on_gpu(model)).open()
    smaller = {"max_num_batched_tokens": 24, "max_num_seqs": 2, "enable_prefix_caching": False}
    config = SchedulerConfig(**(LIMITS | smaller))
    engine = RankEngine(model, config, max_model_len=256)
    assert engine.about()["graphs"] and engine.about()["layers"] == "fused", engine.about()
    # Rank 1 is idle at first, and generates while rank 0 has a prompt.
    prompts, joins = (_prompts([5, 20], 2), [0, 3]) if rank == 0 else (_prompts([6], 3), [2])
    found, reports = _generate(engine, prompts, joins)
    assert all(report.replayed for report in reports)
    # Decoding of 0, 1, 2 rows and steps with prompts, by few rows per expert and by many.
    assert 2 * 3 < graphs()[0] <= 2 * 3 + 2 and graphs()[1] == len(reports)
    eager = RankEngine(model, config, max_model_len=256, graphs=False)
    without, last = _generate(eager, prompts, joins)
    assert not any(report.replayed for report in last)
    # Two experts of each row in two layers: no padding has come to any of them.
    rows = sum(sum(report.num_tokens_across_dp) for report in [*reports, *last])
    load = parallel_of(model).expert_load()
    pretended.__exit__(None, None, None)
    assert _wrong(whole, prompts, found, LEAD) == _wrong(whole, prompts, without, LEAD) == []
    assert [sum(pairs) for pairs in load.pairs] == [2 * rows, 2 * rows]


def _a_lost_rank(rank, folder):
    """A rank is lost: the two others go on with their graphs, and capture none anew; experts come from the files."""
    whole = _load(folder, torch.bfloat16)
    from lockstep.models.huggingface import attach
    from lockstep.models.loading import load_pretrained
    from pretend_gpu import graphs, pretend, put_on_gpu

    pretended = pretend(rank, 3)
    from lockstep.coordination.groups import parallel_config
    from lockstep.models.experts_modules import find_experts
    from lockstep.models.options import ParallelOptions
    from lockstep.models.parallel import ModelParallel
    from lockstep.models.respread import Respreader
    from lockstep.moe.survivors import placement_of_epoch, widened
    from lockstep.runner.options import EngineOptions
    from lockstep.runner.ranks import join_group, leave_groups, make_engine

    first = widened(Placement.even(2, 8, 3), 1)
    options = ParallelOptions(dispatcher="nvlink", deadline_s=100, max_chunk_size_per_rank=24)
    stores = [dist.FileStore(f"{folder}.{number}", 3 - number) for number in range(2)]
    respreader = Respreader(folder, options, stores[0], dtype=torch.bfloat16)
    model = put_on_gpu(load_pretrained(folder, dtype=torch.bfloat16, ep_rank=rank, ep_size=3, placement=first))
    attach(ModelParallel(model, parallel_config(dist.group.WORLD, 1), dist.group.WORLD, options))
    limits = EngineOptions(folder, max_model_len=256, **(LIMITS | {"max_num_batched_tokens": 24, "max_num_seqs": 2}))
    engines, found = [], []
    addresses, captured = [], 0
    for epoch, members in enumerate([(0, 1, 2), (0, 2)]):
        if rank not in members:
            break
        if epoch:
            leave_groups(model)
            join_group(stores[1], members.index(rank), len(members), 100)
        placement = placement_of_epoch(first, [members] if epoch else [])
        respreader.spread(model, placement, members)
        put_on_gpu(model)
        engine = make_engine(model, limits, engines)
        while engine.capture_ahead():
            assert not epoch
        captured = captured or graphs()[0]
        addresses.append([weight.data_ptr() for _, module in find_experts(model) for weight in module.parameters()])
        prompts = [_prompts([5, 20], 2), [], _prompts([20], 3)][rank]
        outputs, reports = _generate(engine, prompts, [0, 3][: len(prompts)])
        assert all(report.replayed for report in reports)
        assert {len(report.num_tokens_across_dp) for report in reports} == {len(members)}
        found.append((prompts, outputs))
    pretended.__exit__(None, None, None)
    for prompts, outputs in found:
        assert _wrong(whole, prompts, outputs, LEAD) == []
    if rank != 1:
        assert addresses[0] == addresses[1]
        assert graphs()[0] == captured


def _a_model_of_transformers(rank, folder):
    """The script of tests/gpu/test_model.py: decode and idle steps of `generate` as graphs, beside the whole model."""
    sys.path.append(str(Path(__file__).parents[1] / "gpu"))
    import test_model

    from pretend_gpu import pretend

    pretend(rank, 2)
    test_model.STEPS, test_model.PROMPT = 3, 5
    script = test_model._Script(folder, torch.device("cuda", rank), "nvlink")
    script.check("uneven batches", (2, 1))
    script.check("an idle rank that does nothing at all", (0, 2))
    assert script.replays == (8, 16)[rank]


def _let_it_capture():
    """Let Transformers find that its accelerator has graphs, which it asks torch for by other names than ours."""
    from transformers.generation.continuous_batching import initialization, model_runner

    initialization.get_accelerator_graph_name = lambda: "CUDAGraph"
    model_runner.get_memory_pools = lambda: (None, (0, 0))


def _batched(model, prompts, keep=False, **choices):
    """Tokens of requests by `generate_batch`."""
    import transformers

    settings = transformers.GenerationConfig(
        max_new_tokens=BATCH_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = {"num_blocks": 8, "page_size": 32, "max_batch_tokens": 32, "auto_switch_to_flash": False} | choices
    answers = model.generate_batch(
        prompts,
        generation_config=settings,
        continuous_batching_config=transformers.ContinuousBatchingConfig(**batching),
        persistent_manager=keep,
    )
    assert all(answer.error is None for answer in answers.values()), [answer.error for answer in answers.values()]
    return [answer.generated_tokens for answer in answers.values()]


def _generate_batch(rank, folder):
    """Continuous batching of Transformers, its padded batches by our graphs; rank 1 has one request, then none."""
    whole, model = (_load(folder, torch.bfloat16) for _ in range(2))
    import lockstep
    from lockstep.models import generate_graphs
    from lockstep.models.parallel import parallel_of
    from pretend_gpu import pretend, put_on_gpu

    pretended = pretend(rank, 2)
    _let_it_capture()
    model = lockstep.parallelize(
        put_on_gpu(model), dispatcher="nvlink", deadline_s=100, max_chunk_size_per_rank=32, count_expert_load=True
    )
    parallel = parallel_of(put_on_gpu(model))
    agreed, runs, replays, begin = [], [], [], parallel.begin

    def counted(decision):
        agreed.append(sum(decision.num_tokens_across_dp))
        return begin(decision)

    replay = generate_graphs._CapturedForward.replay

    def counted_replay(*details):
        replays.append(len(runs))  # the run that it is in; idle steps do not count
        return replay(*details)

    parallel.begin, generate_graphs._CapturedForward.replay = counted, counted_replay
    prompts = _prompts([5, 20, 3], 2) if rank == 0 else _prompts([6], 3)
    padded = {"keep": True, "use_cuda_graph": True, "q_padding_interval_size": 8, "kv_padding_interval_size": 32}
    with lockstep.join(model):
        runs.append(_batched(model, prompts))
        runs.append(_batched(model, prompts, **padded))
    with lockstep.join(model):
        for _ in range(2 if rank == 0 else 0):
            runs.append(_batched(model, prompts, **padded))
    # Two experts of each row in two layers: no padding has come to any of them.
    assert [sum(pairs) for pairs in parallel.expert_load().pairs] == [2 * sum(agreed)] * 2
    memory = model._cached_continuous_batching_manager.batch_processor.cache.cache_tensor
    assert not memory.view(torch.bfloat16).isnan().any()  # padding is written too, where nobody reads it
    model.destroy_cached_continuous_batching_manager()
    pretended.__exit__(None, None, None)
    for tokens in runs:
        assert not _wrong(whole, prompts, [[(token, 0.0) for token in one] for one in tokens], LEAD)
    # A kind of batch is replayed from its second time on. The manager may begin before all requests have come.
    assert 0 not in replays
    assert rank != 0 or replays.count(3) >= BATCH_TOKENS // 2


def _vllms_exchange(rank, folder):
    """A step of vLLM, padded or in chunks, eagerly and by a graph that reads how many of its rows are tokens."""
    from lockstep.dispatch.base import ExpertsShape
    from lockstep.integrations.vllm_step import Step
    from lockstep.moe.experts import LocalExperts
    from lockstep.moe.reference import moe_reference
    from pretend_gpu import pretend

    generator = torch.Generator().manual_seed(0)
    gate_up, down = (0.2 * torch.randn(4, 64, width, generator=generator).bfloat16() for width in (64, 32))
    pretended = pretend(rank, 2)
    from lockstep.integrations.vllm_exchange import LayerWeights, make_exchange

    device, own = torch.device("cuda", rank), slice(2 * rank, 2 * rank + 2)
    layer = SimpleNamespace(w13_weight=gate_up[own].to(device), w2_weight=down[own].to(device))
    parallel = SimpleNamespace(sp_size=1, ep_rank=rank)
    moe = SimpleNamespace(max_num_tokens=8, max_capture_size=4, moe_parallel_config=parallel)
    experts, shape = LocalExperts(LayerWeights(layer)), ExpertsShape(4, 64, 2, torch.bfloat16, device)
    step = Step(cell=torch.zeros(1, dtype=torch.int32, device=device))
    exchange = step.exchanges[shape] = make_exchange(moe, shape, dist.group.WORLD, experts)

    def inputs(counts):
        rows = [torch.randn(count, 64, generator=generator).bfloat16() for count in counts]
        ids = [torch.rand(count, 4, generator=generator).argsort(1)[:, :2].int() for count in counts]
        return rows, ids, [torch.rand(count, 2, generator=generator) for count in counts]

    def run(counts, tokens, replay=None):
        every = inputs(counts)
        mine = [one[rank].to(device) for one in every]
        step.begin(tokens[rank])
        output = exchange.run(step, experts, *mine, counts) if replay is None else replay(mine)
        found = output.cpu()[: tokens[rank]].float()
        sent = [[row[:number] for row, number in zip(one, tokens, strict=True)] for one in every]
        expected = moe_reference([rows.float() for rows in sent[0]], *sent[1:], gate_up.float(), down.float())[rank]
        assert torch.allclose(found, expected, atol=0.02, rtol=0.02), (found - expected).abs().max()
        dispatcher = exchange.decode if max(counts) <= 4 else exchange.prompt
        assert dispatcher.buffers.counts[:2].tolist() == tokens  # what came from each rank: no padding

    run([4, 2], [3, 2])
    run([7, 5], [6, 0])  # more than the buffers for decoding hold
    buffers = [one[rank].to(device) for one in inputs([4, 4])]
    graph = torch.cuda.CUDAGraph()
    step.begin(0)
    graph.capture_begin(capture_error_mode="thread_local")
    static = exchange.run(step, experts, *buffers, [4, 4])
    graph.capture_end()

    def replay(mine):
        for buffer, values in zip(buffers, mine, strict=True):
            buffer.copy_(values)
        graph.replay()
        return static

    for tokens in ([4, 1], [0, 3], [2, 2]):
        run([4, 4], tokens, replay)
    step.check()
    pretended.__exit__(None, None, None)


def _child(rank, ranks, folder, name):
    os.environ.update(
        TRITON_INTERPRET="1", PRETENDED_MEMORY=folder, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    torch.set_num_threads(1)
    try:
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        with torch.no_grad():
            globals()[name](rank, f"{folder}/tiny")
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _run(folder, name, ranks):
    try:
        mp.spawn(_child, (ranks, str(folder), name), nprocs=ranks)
    except Exception as error:
        text = "\n".join(f"{path.name}\n{path.read_text()}" for path in sorted(folder.glob("error*")))
        raise AssertionError(text or str(error)) from None


@pytest.fixture
def folder(tmp_path):
    make_tiny(tmp_path / "tiny", num_layers=2, hidden_size=64, dtype=torch.bfloat16)
    return tmp_path


def test_one_process_on_a_gpu_draws_transformers_tokens(folder):
    _run(folder, "_one_process", 1)


@pytest.mark.ranks(2)
def test_two_ranks_replay_every_step_and_draw_the_tokens_of_one_process(folder):
    _run(folder, "_two_ranks", 2)


@pytest.mark.ranks(3)
def test_ranks_go_on_with_their_graphs_without_one_that_is_lost(folder):
    _run(folder, "_a_lost_rank", 3)


@pytest.mark.ranks(2)
def test_decode_and_idle_steps_of_generate_are_replayed(folder):
    _run(folder, "_a_model_of_transformers", 2)


@pytest.mark.ranks(2)
def test_a_step_of_vllm_sends_its_tokens_and_no_padding(folder):
    _run(folder, "_vllms_exchange", 2)


@pytest.mark.ranks(2)
def test_batches_of_generate_batch_are_replayed_and_send_no_padding(folder):
    _run(folder, "_generate_batch", 2)
