"""The checkpoint in examples/small_moe: its text can be read, and its router has preferences."""

import json
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lockstep

FOLDER = Path(__file__).parents[2] / "examples" / "small_moe"


def test_uneven_ranks_write_english():
    rows = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()][:5]
    with lockstep.Engine(FOLDER, data_parallel_size=2, dtype="float32") as engine:
        params = lockstep.SamplingParams(max_tokens=80)
        texts = {output.index: output.text for output in engine.generate([row["prompt"] for row in rows], params)}
    chat = [{"role": "user", "content": rows[0]["prompt"]}]  # what README sends to `make serve`
    assert AutoTokenizer.from_pretrained(FOLDER).apply_chat_template(chat, tokenize=False) == rows[0]["prompt"]
    known = set(re.findall(r"\w+", "\n".join(topics.topics.values())))
    for number, row in enumerate(rows):
        words = re.findall(r"\w+", row["prompt"] + texts[number])[:-1]  # the last one is cut off
        assert len(words) > 5
        assert sum(word in known for word in words) >= 0.9 * len(words), texts[number]


def test_experts_are_preferred():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokens = tokenizer(topics.topics["import"][:2000], return_tensors="pt")
    with torch.no_grad():
        routers = model(**tokens, output_router_logits=True).router_logits
    for layer, router in enumerate(routers):
        load = torch.bincount(router.topk(2).indices.flatten(), minlength=16)
        assert load.max() > 1.5 * load.float().mean(), f"layer {layer}: {load.tolist()}"


@pytest.mark.ranks(2)
def test_the_example_for_a_model_of_transformers_runs_on_uneven_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, FOLDER.parent / "uneven_generate.py"], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("rank 0: 'The import statement") == 1
    assert ended.stdout.count("rank 1: ") == 4
