"""Experts on any number of ranks, hot ones on several: outputs of one process, and the load that is counted."""

import json
import re

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from command import Command
from one_process import greedy, tokens_of

import lockstep
from lockstep import ConfigurationError, Engine, SamplingParams
from lockstep.models.tiny import make_tiny
from lockstep.moe.placement import ExpertLoad, Placement, place
from lockstep.testing import RankFailure, run_ranks

NUM_LAYERS, NUM_EXPERTS = 2, 8
HOT = [[80, 5, 40, 1, 1, 1, 2, 9], [1, 1, 1, 60, 60, 1, 1, 1]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("placement") / "tiny", num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS))


@pytest.fixture(scope="module")
def whole(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def batches(rank):
    """A prompt that gives each expert many rows, and short ones; none on the last rank."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [(2, 130 + rank), (1, 7), (3, 4)][: 2 - rank + 1] if rank < 2 else []
    return [torch.randint(0, 256, size, generator=generator) for size in sizes]


def outputs(path, placement, in_memory):
    if in_memory:
        from transformers import AutoModelForCausalLM

        model = lockstep.parallelize(AutoModelForCausalLM.from_pretrained(path), placement=placement)
    else:
        model = lockstep.from_pretrained(path, placement=placement, count_expert_load=True)
    found = []
    with lockstep.join(model):
        for ids in batches(dist.get_rank()):
            logits = model(input_ids=ids).logits
            tokens = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
            found.append((logits.numpy(), tokens.numpy()))
    parallel = lockstep.parallel_of(model)
    if in_memory:
        with pytest.raises(ConfigurationError, match="nothing has counted the expert load: pass count_expert_load"):
            parallel.expert_load()
        return found, None
    load = parallel.expert_load()
    return found, (load.pairs, load.rank_pairs)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("placement", [None, place(HOT, 3, 3), place(HOT, 3, 5)], ids=["even", "moved", "replicas"])
def test_three_ranks_for_eight_experts_give_the_outputs_of_one_process(tiny, whole, placement, in_memory):
    rows = 0
    results = run_ranks(3, outputs, tiny, placement, in_memory, deadline_s=120)
    for rank, (found, _) in enumerate(results):
        assert len(found) == len(batches(rank))
        for ids, (logits, tokens) in zip(batches(rank), found, strict=True):
            expected = whole.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
            assert tokens.tolist() == expected.tolist()
            torch.testing.assert_close(torch.from_numpy(logits), whole(input_ids=ids).logits, atol=2e-4, rtol=1e-4)
            rows += 2 * ids.numel() + 5 * len(ids)
    if not in_memory:
        for _, load in results:
            assert load == results[0][1]
            pairs, rank_pairs = load
            assert [sum(layer) for layer in pairs] == [sum(layer) for layer in rank_pairs] == [2 * rows] * NUM_LAYERS


def replicas_share_prompts(path, placement):
    """A step with many rows, all to one expert on all ranks; then what each rank has counted."""
    model = lockstep.from_pretrained(path, placement=placement, count_expert_load=True)
    parallel = lockstep.parallel_of(model)
    parallel.open()
    for count in (300, 3):
        counts = [count] * 3
        with parallel.layers.begin(counts) as step:
            ids = torch.zeros(count, 2, dtype=torch.long)
            ids[:, 1] = 7
            step.run_layer(0, torch.randn(count, 64), ids, torch.ones(count, 2))
        dist.barrier()
    return parallel.expert_load().rank_pairs[0]


@pytest.mark.ranks(3)
def test_replicas_share_the_rows_of_prompts_and_each_rank_takes_its_own_rows_of_few(tiny):
    everywhere = Placement(8, 3, ((0, 1, 2, 3, 7, 0, 4, 5, 6, 7, 0, 1, 2, 3, 7),) * NUM_LAYERS)
    # 900 and 9 rows of each of two experts that all ranks hold.
    assert run_ranks(3, replicas_share_prompts, tiny, everywhere) == [(606, 606, 606)] * 3


def another_placement(path):
    placement = place(HOT if dist.get_rank() else HOT[::-1], 3, 4)
    with lockstep.join(lockstep.from_pretrained(path, placement=placement)):
        pass


@pytest.mark.ranks(3)
def test_ranks_with_other_placements_are_told_apart_at_the_start(tiny):
    with pytest.raises(RankFailure, match=r"ranks disagree about placement \(checksum\): rank 0: \d+, rank 1: "):
        run_ranks(3, another_placement, tiny)


@pytest.mark.ranks(3)
def test_an_engine_on_three_ranks_with_a_recorded_load(tiny, whole, tmp_path):
    ExpertLoad("qwen3_moe", tuple(map(tuple, HOT)), ((45, 45, 48), (42, 42, 42))).write(tmp_path / "load.json")
    prompts = [list(range(1 + length, 2 * length + 1)) for length in (3, 40, 7, 90, 1)]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    load = {"placement": str(tmp_path / "load.json"), "num_redundant_experts": 4}
    with Engine(tiny, data_parallel_size=3, deadline_s=20, **load) as engine:
        found = tokens_of(engine.generate(prompts, params))
    assert found == [greedy(whole, prompt, 8) for prompt in prompts]


@pytest.mark.ranks(3)
def test_a_run_records_the_load_by_which_the_next_one_places(tiny, tmp_path, capsys):
    first, second, report = tmp_path / "first", tmp_path / "second", tmp_path / "second" / "report.html"
    common = (
        "run",
        "--model",
        tiny,
        "--data-parallel-size",
        3,
        "--requests",
        8,
        "--length-scale",
        0.05,
        "--expert-load",
    )
    assert Command(*common, "--out", first).wait(120) == 0, capsys.readouterr().err
    again = (*common, "--placement", first, "--num-redundant-experts", 4, "--out", second)
    assert Command(*again).wait(120) == 0, capsys.readouterr().err
    before, after = ExpertLoad.read(first), ExpertLoad.read(second)
    assert before.model == "qwen3_moe" and before.pairs == after.pairs  # routers do not know where experts are
    summaries = [json.loads((out / "summary.json").read_text()) for out in (first, second)]
    assert all(summary["verified"] for summary in summaries)
    assert sum(after.pairs[0]) == 2 * summaries[1]["real_tokens"]
    for page in (report, first / "report.html"):  # the heat map's cells: tests/unit/test_report.py
        assert '<div id="experts">' in page.read_text() and re.search(r'"num_experts": ?8\b', page.read_text())
    capsys.readouterr()
    other = make_tiny(tmp_path / "other", architecture="mixtral", num_layers=1)
    assert Command("run", "--model", other, "--data-parallel-size", 3, "--placement", first).wait(60) == 2
    assert "is of a model of type 'qwen3_moe', and this one is 'mixtral'" in " ".join(capsys.readouterr().err.split())
