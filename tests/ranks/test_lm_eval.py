"""lm-evaluation-harness over ranks: the scores and answers of one process, whatever number of documents there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.models.tiny import make_tiny

pytest.importorskip("lm_eval")

WORDS = ["apple", "stone", "river", "cloud", "engine", "paper", "window", "garden", "silver", "music"]
# Documents that neither 2 nor 3 ranks divide, and fewer than ranks.
TASKS = {
    "choice": (7, {"output_type": "multiple_choice", "doc_to_target": "answer", "doc_to_choice": "{{choices}}"}),
    "few": (1, {"output_type": "multiple_choice", "doc_to_target": "answer", "doc_to_choice": "{{choices}}"}),
    "rolling": (5, {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}"}),
    "generate": (
        5,
        {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, tasks with local data, and one process's results."""
    folder = tmp_path_factory.mktemp("lm_eval")
    make_tiny(folder / "tiny", num_layers=2, num_experts=6)
    (folder / "tasks").mkdir()
    for name, (count, settings) in TASKS.items():
        rows = [
            {
                "question": " ".join(WORDS[number % 7 :: 1 + number % 3]),
                "choices": [WORDS[number], WORDS[-number - 1] + " and more"],
                "answer": number % 2,
            }
            for number in range(count)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "doc_to_text": "{{question}}", **settings,
        }  # fmt: skip
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    evaluate(folder, "one", "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu")
    return folder


def evaluate(folder, name, *command, model_args="", batch_size=2):
    """Run the harness as a process; its output."""
    command = [
        sys.executable, *command, "--model_args", f"pretrained={folder / 'tiny'}{model_args}",
        "--tasks", ",".join(TASKS),
        "--include_path", folder / "tasks", "--batch_size", batch_size, "--output_path", folder / name, "--log_samples",
    ]  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=240, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_ranks(num_ranks):
    return (
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks,
        "-m", "lockstep.integrations.lm_eval", "run", "--model", "lockstep",
    )  # fmt: skip


def scores(folder, name):
    """What the harness saved: one file of results, and the answer to each document."""
    (file,) = Path(folder, name).rglob("results_*.json")
    answers = {}
    for path in Path(folder, name).rglob("samples_*.jsonl"):
        task = path.name.split("_")[1]
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        answers[task] = [sample["filtered_resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
    return json.loads(file.read_text())["results"], answers


@pytest.mark.ranks(3)
@pytest.mark.parametrize(("num_ranks", "model_args"), [(3, ""), (2, ",tensor_parallel_size=2,dispatcher=allgather")])
def test_scores_are_those_of_one_process(folder, num_ranks, model_args):
    name = f"on {num_ranks}"
    output = evaluate(folder, name, *on_ranks(num_ranks), model_args=model_args, batch_size=3)
    expected, expected_answers = scores(folder, "one")
    found, answers = scores(folder, name)
    assert found.keys() == expected.keys() == TASKS.keys()
    for task, (count, _) in TASKS.items():
        assert len(answers[task]) == count
        for metric, value in expected[task].items():
            assert found[task][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (
                metric
            )
    assert answers["generate"] == expected_answers["generate"]
    assert output.count("|rolling ") == 1  # one table, of rank 0


@pytest.mark.ranks(2)
def test_an_argument_that_cannot_be_is_refused_by_name(folder):
    with pytest.raises(AssertionError, match="from_pretrained got 'parallelize'"):
        evaluate(folder, "refused", *on_ranks(2), model_args=",parallelize=True")
