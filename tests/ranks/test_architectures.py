"""Every architecture on 2 ranks against one process: logits and greedy tokens, uneven calls, float32 and bfloat16.

Shown for some in the tests, for all of them where the table of docs/reference/architectures.md is made:

    python tests/ranks/test_architectures.py --write
"""

import argparse
import copy
import json
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from architectures import all_architectures, tiny_model

import lockstep
from lockstep.engine.sampling_params import SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import find_experts
from lockstep.testing import run_ranks
from lockstep.workload import SchedulerConfig

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
# One of each kind: what people use most, and every way in which experts, their files and their attention differ.
SHOWN_IN_TESTS = [
    "deepseek_v3", "glm4_moe", "gpt_oss", "jamba", "mixtral", "nemotron_h", "olmoe", "qwen3_moe", "qwen3_vl_moe",
]  # fmt: skip
NUM_TOKENS = 6
# Rows and lengths of each rank's calls: the ranks call the model another number of times, with other shapes.
CALLS = [[(2, 9)], [(1, 5), (3, 12), (1, 20)]]
NUM_REQUESTS = [2, 5]
# Differences of logits, relative to the largest one of the call. Float32: in every position. bfloat16: in the median
# position. In a few others a router's near-tie falls the other way and another expert answers, as it does between two
# experts implementations of Transformers itself.
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 5e-5, 2e-2


def prompts(calls):
    generator = torch.Generator().manual_seed(7 + calls)
    return [torch.randint(3, 259, shape, generator=generator) for shape in CALLS[calls]]


def greedy(model, ids):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def outputs_of(model, calls, sequences=None):
    """Logits of all calls, over the prompts and the greedy tokens (or over given sequences), and the sequences."""
    sequences = [greedy(model, ids) for ids in prompts(calls)] if sequences is None else sequences
    return [model(ids).logits.float() for ids in sequences], sequences


def relative_errors(logits, expected):
    """The largest error of each position's logits, relative to the largest logit of its call, `[positions]`."""
    pairs = zip(logits, expected, strict=True)
    return torch.cat([((one - other).abs().amax(-1) / other.abs().max()).flatten() for one, other in pairs])


def check(architecture, folder):
    """Facts about one architecture, from this rank's view."""
    rank = dist.get_rank()
    whole = tiny_model(architecture)
    if whole is None:
        return {"absent": "no class that generates text"}
    experts = find_experts(whole)[0][1]
    facts = {"class": type(whole).__name__, "experts": kind_of(experts)}
    path = Path(folder) / architecture
    if rank == 0:
        whole.save_pretrained(path)
    dist.barrier()

    # Two data-parallel ranks, each with calls of its own.
    expected, sequences = outputs_of(whole, rank)
    facts["changed"] = changed_without_experts(whole, rank, sequences)
    facts["engine"] = engine_steps(whole, rank, sequences)
    model = lockstep.from_pretrained(path, dtype=torch.float32, deadline_s=30)
    with lockstep.join(model):
        logits, own_sequences = outputs_of(model, rank)
    facts["tokens"] = all(torch.equal(*pair) for pair in zip(own_sequences, sequences, strict=True))
    facts["float32"] = float(relative_errors(logits, expected).max())

    try:
        facts |= tensor_parallel(whole, path)
    except Exception as error:  # on both ranks alike: the plan is the model's own
        facts["tensor-parallel"] = f"{type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1].name}"

    # bfloat16, teacher-forced: the same tokens on both sides.
    whole = type(whole).from_pretrained(path, dtype=torch.bfloat16).eval()
    expected, sequences = outputs_of(whole, rank)
    model = lockstep.from_pretrained(path, dtype=torch.bfloat16, deadline_s=30)
    with lockstep.join(model):
        logits, _ = outputs_of(model, rank, sequences)
    facts["bfloat16"] = float(relative_errors(logits, expected).median())
    return facts


def tensor_parallel(whole, path):
    """Two tensor-parallel ranks, which share their calls."""
    from torch.distributed.tensor import DTensor

    expected, sequences = outputs_of(whole, 1)
    model = lockstep.from_pretrained(path, dtype=torch.float32, tensor_parallel_size=2, deadline_s=30)
    split = any(isinstance(parameter, DTensor) and "attn" in name for name, parameter in model.named_parameters())
    with lockstep.join(model):
        logits, own_sequences = outputs_of(model, 1)
    equal = all(torch.equal(*pair) for pair in zip(own_sequences, sequences, strict=True))
    error = float(relative_errors(logits, expected).max())
    return {"split": split, "tensor-parallel": error if equal else "other tokens"}


def kind_of(experts):
    words = ["gated" if experts.has_gate else "without gate"]
    words += ["biases"] if experts.has_bias else []
    words += ["interleaved gate"] if not experts.is_concatenated else []
    words += ["transposed weights"] if experts.is_transposed else []
    words += ["norm after each expert"] if experts.has_post_expert_norm else []
    return ", ".join(words)


def changed_without_experts(model, rank, sequences):
    """How many of the requests get other tokens when the routed experts say nothing."""
    model = copy.deepcopy(model)
    for _, experts in find_experts(model):
        experts.down_proj.data.zero_()
        if getattr(experts, "down_proj_bias", None) is not None:
            experts.down_proj_bias.data.zero_()
    pairs = zip([greedy(model, ids) for ids in prompts(rank)], sequences, strict=True)
    return sum(int((one != other).any(dim=1).sum()) for one, other in pairs)


def engine_steps(model, rank, sequences):
    """Whether the engine's steps, as `lockstep run` forms them, give the same tokens; what it says if it refuses."""
    from lockstep.engine.rank_engine import RankEngine

    try:
        engine = RankEngine(copy.deepcopy(model), SchedulerConfig(max_num_batched_tokens=9), max_model_len=64)
    except ConfigurationError as error:
        return str(error)
    requests = [row.tolist() for ids in prompts(rank) for row in ids]
    expected = [row[-NUM_TOKENS:].tolist() for sequence in sequences for row in sequence]
    for index, prompt in enumerate(requests):
        engine.add(index, prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True))
    found = [[] for _ in requests]
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id].append(output.token_id)
    return found == expected


def check_all(architectures, folder):
    """Facts by architecture; what kept one from being tried is a fact too."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    facts = {}
    for architecture in architectures:
        try:
            facts[architecture] = check(architecture, folder)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].name
            text = " ".join(str(error).split())
            facts[architecture] = {"absent": f"no tiny model: {text[:120]} (`{where}`)"}
    return facts


def wrong(facts_of_ranks):
    """What of an architecture's data-parallel facts is not as it must be; empty if all is well."""
    found = []
    for rank, facts in enumerate(facts_of_ranks):
        if not facts["tokens"] or facts["float32"] > FLOAT32_TOLERANCE:
            found.append(f"rank {rank}: float32 {facts['float32']:.1e}, equal tokens {facts['tokens']}")
        if facts["bfloat16"] > BFLOAT16_TOLERANCE:
            found.append(f"rank {rank}: bfloat16 {facts['bfloat16']:.1e}")
        if facts["engine"] is False:
            found.append(f"rank {rank}: the engine gives other tokens")
    if not found and sum(facts["changed"] for facts in facts_of_ranks) < 0.9 * sum(NUM_REQUESTS):
        found.append("the experts hardly matter to the tokens")
    return found


def tensor_parallel_wrong(facts):
    error = facts["tensor-parallel"]
    if isinstance(error, str):
        return error
    return f"error {error:.1e}" if error > FLOAT32_TOLERANCE else ""


def table_row(architecture, facts_of_ranks):
    facts = facts_of_ranks[0]
    if "absent" in facts:
        return f"| `{architecture}` | not shown: {facts['absent'].partition(':')[0]} | | | | |"
    seen = "no: " + "; ".join(wrong(facts_of_ranks)) if wrong(facts_of_ranks) else "yes"
    split = "no"  # why is in what this script prints; a page for users names no internal errors
    if not tensor_parallel_wrong(facts):
        split = "yes, attention " + ("split" if facts["split"] else "whole on every rank")
    engine = "yes" if facts["engine"] is True else "no: " + str(facts["engine"]).split(" has ")[-1].split(";")[0]
    return f"| `{architecture}` | {facts['class']} | {facts['experts']} | {seen} | {split} | {engine} |"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("architectures"))
    return dict(zip((0, 1), run_ranks(2, check_all, SHOWN_IN_TESTS, folder, deadline_s=280), strict=True))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("architecture", SHOWN_IN_TESTS)
def test_two_ranks_give_what_one_process_gives(facts, architecture):
    both = [facts[rank][architecture] for rank in (0, 1)]
    assert not any("absent" in one for one in both), both
    assert not wrong(both) and not tensor_parallel_wrong(both[0]), both


@pytest.mark.ranks(2)
@pytest.mark.parametrize("architecture", SHOWN_IN_TESTS)
def test_the_table_in_the_docs_says_what_was_seen(facts, architecture):
    row = table_row(architecture, [facts[rank][architecture] for rank in (0, 1)])
    assert row in PAGE.read_text().split("\n"), f"run `python {Path(__file__).name} --write`: {row}"


def main():
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/reference/architectures.md")
    parser.add_argument("architectures", nargs="*", help="all of them if none is named")
    arguments = parser.parse_args()
    names = arguments.architectures or all_architectures()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(names), 8):
            both = run_ranks(2, check_all, names[start : start + 8], folder, deadline_s=400)
            for name in both[0]:
                rows.append(table_row(name, [one[name] for one in both]))
                print(rows[-1], json.dumps([one[name] for one in both]), flush=True)
    if arguments.write:
        before, rest = PAGE.read_text().split("<!-- table -->\n", 1)
        after = rest.split("<!-- end of table -->", 1)[1]
        head = [
            f"Seen with Transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}.",
            "",
            "| architecture | class | experts | 2 DP ranks | 2 TP ranks | engine |",
            "|---|---|---|---|---|---|",
        ]
        PAGE.write_text(before + "<!-- table -->\n" + "\n".join(head + rows) + "\n<!-- end of table -->" + after)


if __name__ == "__main__":
    main()
