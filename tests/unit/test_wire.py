# The class as a caller in another language drives it: through a process that takes and gives JSON.

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep import ChunkPlan

ROOT = Path(__file__).parents[2]


# Python's types that have an Elixir struct of the same name in Snakepit 0.13.0; all others become one, PythonException.
SNAKEPIT_ERRORS = {
    "ValueError",
    "KeyError",
    "IndexError",
    "TypeError",
    "AttributeError",
    "ImportError",
    "RuntimeError",
    "NotImplementedError",
    "FileNotFoundError",
    "PermissionError",
    "ZeroDivisionError",
}


class WireError(Exception):
    def __init__(self, error):
        super().__init__(error["message"])
        self.type = error["type"]
        self.struct = "Snakepit.Error." + (self.type if self.type in SNAKEPIT_ERRORS else "PythonException")


class Wire:
    def __init__(self):
        command = [sys.executable, str(ROOT / "tests" / "wire_worker.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, op, target=None, *args, **kwargs):
        request = {"op": op, "args": args, "kwargs": kwargs}
        if op in ("create", "get_class"):
            request |= {"module": "lockstep", "class": target}
        else:
            request["object"], _, name = target if isinstance(target, tuple) else (target, None, None)
            request |= {"method": name, "attribute": name}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise WireError(reply["error"])
        return reply["ok"]

    def call(self, target, method, *args, **kwargs):
        return self("call", (target, None, method), *args, **kwargs)

    def get(self, target, attribute):
        return self("get", (target, None, attribute))


@pytest.fixture(scope="module")
def wire():
    wire = Wire()
    yield wire
    wire.process.stdin.close()
    assert wire.process.wait(timeout=20) == 0


@pytest.fixture
def metadata(wire):
    return wire("create", "DPMetadata", 500, [500, 200, 256])


def test_a_chunk_loop_of_four_ranks_equals_the_plan(wire):
    counts, limit, sp = [120, 80, 140, 100], 64, 1
    loops = []
    for rank in range(4):
        config = wire("create", "ParallelConfig", data_parallel_size=4, data_parallel_rank=rank)
        metadata = wire.call(wire("get_class", "DPMetadata"), "make", config, counts[rank], counts)
        assert metadata["type"] == "DPMetadata"
        chunks = []
        for chunk_idx in range(-(-max(counts) // limit)):
            context = wire.call(metadata, "chunked_sizes", sp, limit, chunk_idx)
            entered = wire("enter", context)
            inside = wire.call(metadata, "get_chunk_sizes_across_dp_rank")
            assert wire.get(metadata, "local_sizes") == inside == entered
            assert wire("exit", context, None, None, None) is False
            assert wire("release", context) is True
            chunks.append(inside)
        loops.append(chunks)
        plan = ChunkPlan(counts, sp, limit, rank, min_rows=1)
        assert chunks == [list(chunk.sizes) for chunk in plan]
    assert all(loop == loops[0] for loop in loops)


def test_make_is_reached_from_an_instance_too(wire, metadata):
    config = wire("create", "ParallelConfig", data_parallel_size=2, data_parallel_rank=1)
    made = wire.call(metadata, "make", config, 7, [5, 7])
    text = "DPMetadata(max_tokens_across_dp_cpu=7, num_tokens_across_dp_cpu=[5, 7], local_sizes=None)"
    assert made["inspect"] == text


def test_counts_and_maximum_are_reached_without_a_tensor(wire, metadata):
    assert wire.get(metadata, "num_tokens_across_dp_cpu")["type"] == "Tensor"
    context = wire.call(metadata, "sp_local_sizes", 1)
    counts = wire("enter", context)
    wire("exit", context, None, None, None)
    assert counts == [500, 200, 256]
    assert max(counts) == 500


def test_a_tensor_reference_gives_its_list(wire, metadata):
    assert wire.call(wire.call(metadata, "cu_tokens_across_sp", 1), "tolist") == [500, 700, 956]
    assert wire.call(wire.get(metadata, "num_tokens_across_dp_cpu"), "tolist") == [500, 200, 256]
    assert wire.call(wire.get(metadata, "max_tokens_across_dp_cpu"), "tolist") == 500.0


def test_a_bare_none_arrives_as_text(wire, metadata):
    assert wire.get(metadata, "local_sizes") == "None"


def test_leaving_with_the_strings_of_a_failed_block_restores(wire, metadata):
    outer, inner = wire.call(metadata, "sp_local_sizes", 1), wire.call(metadata, "chunked_sizes", 1, 256, 1)
    wire("enter", outer)
    assert wire("enter", inner) == [244, 1, 1]
    assert wire("exit", inner, "Elixir.RuntimeError", "boom", None) is False
    assert wire.get(metadata, "local_sizes") == [500, 200, 256]
    wire("exit", outer, "Elixir.RuntimeError", "boom", None)
    assert wire.get(metadata, "local_sizes") == "None"


def test_leaving_twice_leaves_no_sizes(wire, metadata):
    context = wire.call(metadata, "sp_local_sizes", 1)
    wire("enter", context)
    wire("exit", context, None, None, None)
    wire("exit", context, None, None, None)
    assert wire.get(metadata, "local_sizes") == "None"


def test_releasing_a_context_inside_leaves_it(wire, metadata):
    outer, inner = wire.call(metadata, "sp_local_sizes", 1), wire.call(metadata, "chunked_sizes", 1, 256, 1)
    wire("enter", outer)
    wire("enter", inner)
    assert wire("release", inner) is True
    assert wire.get(metadata, "local_sizes") == [500, 200, 256]
    assert wire("release", outer) is True
    assert wire.get(metadata, "local_sizes") == "None"
    with pytest.raises(WireError, match="no sizes outside a context"):
        wire.call(metadata, "get_chunk_sizes_across_dp_rank")


def test_a_released_metadata_lives_on_in_its_context(wire):
    metadata = wire("create", "DPMetadata", 7, [5, 7])
    context = wire.call(metadata, "sp_local_sizes", 2)
    wire("release", metadata)
    assert wire("enter", context) == [3, 3, 4, 4]
    assert wire("exit", context, None, None, None) is False


def test_keyword_options_work(wire, metadata):
    context = wire.call(metadata, "chunked_sizes", sequence_parallel_size=1, max_chunk_size_per_rank=256, chunk_idx=0)
    assert wire("enter", context) == [256, 200, 256]


@pytest.mark.parametrize(
    ("method", "args", "type_name", "sentence"),
    [
        (
            "get_chunk_sizes_across_dp_rank",
            [],
            "RuntimeError",
            "there are no sizes outside a context: call this within",
        ),
        ("sp_local_sizes", [0], "ConfigurationError", "sequence_parallel_size must be >= 1, got 0"),
        ("sp_local_sizes", [2.0], "ConfigurationError", "sequence_parallel_size must be an integer, got 2.0"),
        ("chunked_sizes", [1, 0, 0], "ConfigurationError", "max_chunk_size_per_rank must be >= 1, got 0"),
        (
            "make",
            [None, 5, [5]],
            "ConfigurationError",
            "parallel_config must have data_parallel_size and data_parallel_rank",
        ),
    ],
)
def test_an_error_arrives_as_its_own_type_with_a_sentence(wire, metadata, method, args, type_name, sentence):
    with pytest.raises(WireError) as raised:
        wire.call(metadata, method, *args)
    assert raised.value.type == type_name
    assert sentence in str(raised.value)


def test_wrong_counts_are_sentences(wire):
    with pytest.raises(WireError, match="max_tokens_across_dp_cpu must be the largest count, 7 on DP rank 1, got 8"):
        wire("create", "DPMetadata", 8, [5, 7])
    with pytest.raises(WireError, match=r"must be integers, got 7.0 on DP rank 1"):
        wire("create", "DPMetadata", 7, [5, 7.0])


def test_the_plan_of_a_step_crosses_as_lists(wire):
    plan = wire("create", "ChunkPlan", [0, 300], 2, 100, min_rows=1)
    assert wire.get(plan, "num_tokens_across_dp") == [0, 300]
    assert wire.get(plan, "sp_rows") == [0, 0, 150, 150]
    assert wire.get(wire.call(plan, "__getitem__", 1), "sizes") == [1, 1, 50, 50]
    assert wire.call(plan, "__len__") == 2.0


PAGE = (ROOT / "docs" / "how-to" / "elixir.md").read_text()


def claimed(call):
    """Return what docs/how-to/elixir.md says comes back for a call."""
    (shown,) = (line.split(" | ")[1] for line in PAGE.splitlines() if line.startswith(f"| {call} | "))
    return shown.removesuffix(" |")


def test_what_the_page_says_comes_back_does(wire, metadata):
    def entered(method, *args):
        context = wire.call(metadata, method, *args)
        sizes = wire("enter", context)
        inside = wire.call(metadata, "get_chunk_sizes_across_dp_rank"), wire.get(metadata, "local_sizes")
        wire("exit", context, None, None, None)
        return sizes, *inside

    assert claimed("`DPMetadata.sp_local_sizes(metadata, 1)`, entered") == f"`{entered('sp_local_sizes', 1)[0]}`"
    assert claimed("`DPMetadata.sp_local_sizes(metadata, 2)`, entered") == f"`{entered('sp_local_sizes', 2)[0]}`"
    sizes, inside, attribute = entered("chunked_sizes", 1, 256, 1)
    assert claimed("`DPMetadata.chunked_sizes(metadata, 1, 256, 1)`, entered") == f"`{sizes}`"
    last = "inside the last"
    assert claimed(f"`DPMetadata.get_chunk_sizes_across_dp_rank(metadata)` {last}") == f"`{{:ok, {inside}}}`"
    assert claimed(f"`DPMetadata.local_sizes(metadata)` {last}") == f"`{{:ok, {attribute}}}`"
    outside = wire.get(metadata, "local_sizes")
    assert claimed("`DPMetadata.local_sizes(metadata)` outside") == f'`{{:ok, "{outside}"}}`'
    cumulative = wire.call(metadata, "cu_tokens_across_sp", 1)
    assert claimed("`DPMetadata.cu_tokens_across_sp(metadata, 1)`") == "`{:ok, ref}`, a tensor"
    assert cumulative["type"] == wire.get(metadata, "num_tokens_across_dp_cpu")["type"] == "Tensor"
    tolist = wire.call(cumulative, "tolist")
    assert claimed('`SnakeBridge.method(ref, "tolist", [])` of that') == f"`{{:ok, {tolist}}}`"
    for call, method, args in (
        ("`DPMetadata.get_chunk_sizes_across_dp_rank(metadata)` outside", "get_chunk_sizes_across_dp_rank", []),
        ("`DPMetadata.sp_local_sizes(metadata, 0)`", "sp_local_sizes", [0]),
    ):
        with pytest.raises(WireError) as raised:
            wire.call(metadata, method, *args)
        assert f"`{raised.value.type}`" in claimed(call)
    for call, arguments in (
        ("`DPMetadata.new(8, [5, 7], [])`", (8, [5, 7])),
        ("`DPMetadata.new(500.0, [500, 200, 256], [])`", (500.0, [500, 200, 256])),
    ):
        with pytest.raises(WireError) as raised:
            wire("create", "DPMetadata", *arguments)
        assert f"`{raised.value.type}`" in claimed(call)


def test_the_page_says_which_struct_each_error_becomes(wire, metadata):
    table = {}
    for call in (
        lambda: wire.call(metadata, "get_chunk_sizes_across_dp_rank"),
        lambda: wire.call(metadata, "sp_local_sizes", 0),
        lambda: wire("create", "DPMetadata", 8, [5, 7]),
    ):
        with pytest.raises(WireError) as raised:
            call()
        table[raised.value.type] = raised.value.struct
    assert len(table) == 3
    for type_name, struct in table.items():
        assert f'| `{type_name}` | `"{type_name}"` | `{struct}` |' in PAGE


def test_floats_are_refused_as_the_page_says(wire, metadata):
    for call in (
        lambda: wire("create", "DPMetadata", 500.0, [500, 200, 256]),
        lambda: wire.call(metadata, "sp_local_sizes", 2.0),
    ):
        with pytest.raises(WireError, match="must be an integer, got"):
            call()


def test_the_loop_of_the_page_gives_what_it_shows(wire):
    config = wire("create", "ParallelConfig", data_parallel_size=4, data_parallel_rank=2)
    metadata = wire.call(wire("create", "DPMetadata", 0, [0]), "make", config, 140, [120, 80, 140, 100])
    chunks = [wire("enter", wire.call(metadata, "chunked_sizes", 1, 64, chunk_idx)) for chunk_idx in range(3)]
    assert f"# {chunks}" in PAGE
