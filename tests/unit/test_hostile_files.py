"""Workload, step log and checkpoint files of any content end in a sentence, in little memory, and lead nowhere else."""

import json
import os
import shutil
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lockstep.errors import ConfigurationError
from lockstep.models.checkpoint import check_files
from lockstep.models.loading import load_pretrained
from lockstep.models.tiny import make_tiny
from lockstep.steplog.files import read_step_log
from lockstep.steplog.record import FIELDS
from lockstep.workload import WorkloadOptions, load_trace

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("timestamp", "input_length", "output_length", "hash_ids", "prompt", "max_new_tokens", "arrival_s", "tokens")
azure_lines = st.lists(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=4).map(",".join), max_size=4
)


def refused_or_read(function, *arguments):
    try:
        return function(*arguments)
    except ConfigurationError as error:
        assert str(error).count("\n") == 0, str(error)
        assert len(str(error)) < 2000
        return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile") / "file.jsonl"


@given(st.binary(max_size=300))
def test_workloads_of_any_bytes(file, data):
    file.write_bytes(data)
    refused_or_read(load_trace, file)


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), json_values), min_size=1, max_size=4))
def test_workloads_of_any_json(file, entries):
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    refused_or_read(load_trace, file)


@given(azure_lines)
def test_workloads_of_any_table(file, lines):
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]), encoding="utf-8")
    refused_or_read(load_trace, file)


@pytest.mark.parametrize(
    "line", ['{"timestamp": 0, "input_length": %d, "output_length": %d}', "[" * 50_000, '"' + "x" * 2**20]
)
def test_a_length_in_a_workload_takes_no_memory(file, line):
    file.write_text((line % (2**62, 2**62) if "%" in line else line) + "\n")
    tracemalloc.start()
    try:
        refused_or_read(load_trace, file, WorkloadOptions())
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300))
def test_step_logs_of_any_bytes(file, data):
    file.write_bytes(data)
    refused_or_read(read_step_log, file)


@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), json_values), min_size=1, max_size=3))
def test_step_logs_of_any_json(file, entries):
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    refused_or_read(read_step_log, file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", num_layers=1, num_experts=4)


def load(folder):
    return load_pretrained(str(folder), ep_rank=0, ep_size=1, dtype="auto", device="cpu", process_group=None)


@example(b"0", "config.json")
@example(b"[]", "config.json")
@example(b"null", "config.json")
@example(b'"qwen3_moe"', "config.json")
@example(b'{"model_type": 5}', "config.json")
@example(b"0", "model.safetensors.index.json")
@example(b"[]", "model.safetensors.index.json")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(["config.json", "model.safetensors.index.json"]))
def test_checkpoints_of_any_bytes(checkpoint, tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("copy") / "tiny"
    shutil.copytree(checkpoint, folder)
    if name.endswith("index.json"):
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    (folder / name).write_bytes(data)
    with pytest.raises(ConfigurationError):
        load(folder)


@settings(max_examples=40)
@given(json_values, st.booleans())
def test_indices_and_headers_of_any_json(checkpoint, tmp_path_factory, value, as_header):
    folder = tmp_path_factory.mktemp("json")
    data = json.dumps(value).encode()
    if as_header:
        (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    refused_or_read(check_files, folder)


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", (10).to_bytes(8, "little") + b"{not json}",
     (2).to_bytes(8, "little") + b"{}", b"\x80\x04cos\nsystem\n(S'false'\ntR."],
)  # fmt: skip
def test_weights_whose_header_lies(checkpoint, tmp_path, header):
    folder = tmp_path / "tiny"
    shutil.copytree(checkpoint, folder)
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(header)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError):
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", "."])
def test_an_index_does_not_lead_out_of_its_folder(checkpoint, tmp_path, name):
    folder = tmp_path / "tiny"
    shutil.copytree(checkpoint, folder)
    (weights,) = folder.glob("*.safetensors")
    shutil.move(weights, tmp_path / "outside.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "outside.safetensors", "pt") as tensors:
        names = list(tensors.keys())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError):
        load(folder)


def test_pickled_weights_are_not_opened(checkpoint, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(checkpoint, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    mark = tmp_path / "executed"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(mark) + b"'\ntR.")
    with pytest.raises(ConfigurationError):
        load(folder)
    assert not mark.exists()
