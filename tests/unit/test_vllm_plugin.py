# vLLM needs its GPUs to start, so the plugin is tried on a stand-in package with the same module layout: a class in
# vllm.forward_context, imported from there by other modules, and a loader of the entry points.

import copy
import dataclasses
import importlib
import subprocess
import sys
import textwrap
import tomllib
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lockstep
from lockstep.errors import ConfigurationError, TokenCountError
from lockstep.integrations import vllm as plugin
from lockstep.integrations.vllm import DPMetadata

FORWARD_CONTEXT = """
    from contextlib import contextmanager
    from dataclasses import dataclass
    import torch

    @dataclass
    class DPMetadata:
        num_tokens_across_dp_cpu: torch.Tensor
        local_sizes: list[int] | None = None

        @staticmethod
        def make(parallel_config, num_tokens, num_tokens_across_dp_cpu):
            return DPMetadata(num_tokens_across_dp_cpu)

        @contextmanager
        def sp_local_sizes(self, sequence_parallel_size, pcp_size=1, use_ep=False):
            yield None

        def get_chunk_sizes_across_dp_rank(self):
            assert self.local_sizes is not None

        def cu_tokens_across_sp(self, sp_size):
            return None

    def set_forward_context(parallel_config, num_tokens, counts):
        return DPMetadata.make(parallel_config, num_tokens, counts)
"""


def config(size=2, rank=0, is_moe_model=None, use_sequence_parallel_moe=False):
    return SimpleNamespace(
        data_parallel_size=size,
        data_parallel_rank=rank,
        is_moe_model=is_moe_model,
        use_sequence_parallel_moe=use_sequence_parallel_moe,
    )


# The class.


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"sequence_parallel_size": 2}, [3, 3, 4, 4]),
        ({"sequence_parallel_size": 2, "pcp_size": 2, "use_ep": True}, [3, 3, 3, 3, 4, 4, 4, 4]),
        ({"sequence_parallel_size": 2, "pcp_size": 2, "use_ep": False}, [5, 5, 7, 7]),
        ({"sequence_parallel_size": 1, "pcp_size": 3}, [15, 21]),
        ({"sequence_parallel_size": 1, "pcp_size": 3, "use_ep": True}, [5, 5, 5, 7, 7, 7]),
        ({"sequence_parallel_size": 1, "use_ep": True}, [5, 7]),
    ],
)
def test_sizes_of_five_and_seven_tokens(arguments, sizes):
    metadata = DPMetadata(num_tokens_across_dp_cpu=torch.tensor([5, 7]))
    with metadata.sp_local_sizes(**arguments) as inside:
        assert inside == sizes
        assert metadata.get_chunk_sizes_across_dp_rank() == sizes
        assert {type(size) for size in inside} == {int}
    assert metadata.local_sizes is None


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_sizes_are_those_of_the_straightforward_tensor_arithmetic(counts, sp, pcp, use_ep):
    tensor = torch.tensor(counts)
    before = tensor.repeat_interleave(pcp) if use_ep else tensor * pcp
    with DPMetadata(tensor).sp_local_sizes(sp, pcp, use_ep) as sizes:
        assert sizes == ((before + sp - 1) // sp).repeat_interleave(sp).tolist()


def test_what_both_classes_have_gives_the_same():
    ours, theirs = lockstep.DPMetadata(500, [500, 200, 256]), DPMetadata([500, 200, 256])
    with ours.chunked_sizes(1, 256, 1) as sizes, theirs.chunked_sizes(1, 256, 1) as same:
        assert sizes == same == [244, 1, 1]
    assert torch.equal(ours.cu_tokens_across_sp(2), theirs.cu_tokens_across_sp(2))
    with pytest.raises(RuntimeError, match="no sizes outside a context"):
        theirs.get_chunk_sizes_across_dp_rank()


def test_the_surface_is_that_of_vllm_and_chunked_sizes():
    public = {name for name in dir(DPMetadata) if not name.startswith("_")}
    assert public == {
        "chunked_sizes",
        "cu_tokens_across_sp",
        "get_chunk_sizes_across_dp_rank",
        "local_sizes",
        "make",
        "sp_local_sizes",
    }
    assert [field.name for field in dataclasses.fields(DPMetadata)] == ["num_tokens_across_dp_cpu", "local_sizes"]
    assert typing.get_type_hints(DPMetadata.make)["return"] is DPMetadata
    hints = typing.get_type_hints(DPMetadata.sp_local_sizes)
    assert (hints["sequence_parallel_size"], hints["pcp_size"], hints["use_ep"]) == (int, int, bool)


def test_contexts_nest_and_survive_foreign_exits():
    metadata = DPMetadata.make(config(), 5, torch.tensor([5, 7]))
    outer, inner = metadata.sp_local_sizes(1), metadata.sp_local_sizes(2, 2, True)
    outer.__enter__()
    inner.__enter__()
    inner.__exit__("Elixir.RuntimeError", "boom", None)
    assert metadata.local_sizes == [5, 7]
    outer.__exit__()
    assert metadata.local_sizes is None


def test_values_and_copies():
    metadata = DPMetadata([5, 7])
    assert metadata == DPMetadata(torch.tensor([5, 7])) == copy.deepcopy(metadata)
    assert metadata != DPMetadata([5, 8])
    assert metadata != lockstep.DPMetadata(7, [5, 7])
    assert repr(metadata) == "DPMetadata(num_tokens_across_dp_cpu=[5, 7], local_sizes=None)"
    with pytest.raises(TypeError, match="unhashable"):
        hash(metadata)


@pytest.mark.parametrize("is_moe_model", [None, True])
def test_make_reads_the_config_of_vllm(is_moe_model):
    assert DPMetadata.make(config(rank=1, is_moe_model=is_moe_model), 7, torch.tensor([5, 7])) == DPMetadata([5, 7])
    assert DPMetadata.make(config(size=1, use_sequence_parallel_moe=True), 5, [5]) == DPMetadata([5])


@pytest.mark.parametrize(
    ("parallel_config", "num_tokens", "error", "message"),
    [
        (config(rank=1), 5, TokenCountError, "has 7 on DP rank 1, whose num_tokens is 5"),
        (config(size=3), 5, TokenCountError, "must have one entry per DP rank, 3, got 2"),
        (config(is_moe_model=False), 5, ConfigurationError, "is_moe_model must not be False"),
        (SimpleNamespace(), 5, ConfigurationError, "must have data_parallel_size and data_parallel_rank"),
    ],
)
def test_make_refuses_what_does_not_fit(parallel_config, num_tokens, error, message):
    with pytest.raises(error, match=message):
        DPMetadata.make(parallel_config, num_tokens, [5, 7])


def test_make_refuses_a_single_rank_without_sequence_parallel_experts():
    with pytest.raises(ConfigurationError, match="must be > 1 unless use_sequence_parallel_moe is set"):
        DPMetadata.make(config(size=1), 5, [5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "sequence_parallel_size must be >= 1, got 0"),
        ((2, 0), "pcp_size must be >= 1, got 0"),
        ((2, True), "pcp_size must be an integer, got True"),
        ((2, 2**30), "pcp_size must be <= 524288, got 1073741824"),
    ],
)
def test_wrong_sizes_are_refused_at_once(arguments, message):
    metadata = DPMetadata([5, 7])
    with pytest.raises(ConfigurationError, match=message):
        metadata.sp_local_sizes(*arguments)
    assert metadata.local_sizes is None


def test_counts_that_grow_beyond_int32_are_refused():
    with pytest.raises(TokenCountError, match=r"times pcp_size must be in 0..2147483647, got 4294967294 on DP rank 0"):
        DPMetadata([2**31 - 1, 7]).sp_local_sizes(1, 2)


# The plugin.


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return a function that makes and imports a package `vllm`, and says what its places for the class hold."""

    def make(version="0.33.1", forward_context=FORWARD_CONTEXT):
        package = tmp_path / "vllm"
        (package / "model_executor").mkdir(parents=True)
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (package / "forward_context.py").write_text(textwrap.dedent(forward_context))
        (package / "model_executor" / "__init__.py").write_text("")
        imports = (
            "from vllm.forward_context import DPMetadata\nfrom vllm.forward_context import DPMetadata as Metadata\n"
        )
        (package / "model_executor" / "layers.py").write_text(imports)
        (package / "model_executor" / "later.py").write_text(imports)
        context, layers = map(importlib.import_module, ("vllm.forward_context", "vllm.model_executor.layers"))

        def places():
            later = importlib.import_module("vllm.model_executor.later")
            return [context.DPMetadata, layers.DPMetadata, layers.Metadata, later.DPMetadata]

        return places

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        plugin.TOLD.clear()

    assert "vllm" not in sys.modules
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield make
    forget()


@pytest.mark.parametrize(("switch", "version"), [("1", "0.33.1"), ("metadata", "0.32.0")])
def test_the_plugin_replaces_the_class_wherever_it_was_imported(stand_in, caplog, switch, version):
    caplog.set_level("INFO")
    places = stand_in(version)
    plugin.register({"LOCKSTEP_VLLM": switch})
    plugin.register({"LOCKSTEP_VLLM": switch})
    assert places() == [DPMetadata] * 4
    # One visible line, by vLLM's own logger, however often it runs.
    (record,) = [record for record in caplog.records if record.levelname == "INFO"]
    assert record.getMessage() == f"LOCKSTEP_VLLM: DPMetadata of vLLM {version} replaced in 3 places"
    assert record.name.split(".")[0] == "vllm"


def test_layers_get_sizes_through_the_replaced_class(stand_in):
    stand_in()
    plugin.register({"LOCKSTEP_VLLM": "1"})
    set_forward_context = importlib.import_module("vllm.forward_context").set_forward_context
    with set_forward_context(config(), 5, torch.tensor([5, 7])).sp_local_sizes(2) as sizes:
        assert sizes == [3, 3, 4, 4]


@pytest.mark.parametrize("switch", ["true", "Exchange", "on", "2", " "])
def test_a_wrong_value_is_an_error_at_start(stand_in, switch):
    places = stand_in()
    message = f"LOCKSTEP_VLLM must be one of 0, 1, metadata, exchange, or not set, got '{switch}'"
    with pytest.raises(ConfigurationError, match=message):
        plugin.register({"LOCKSTEP_VLLM": switch})
    assert DPMetadata not in places()


@pytest.mark.parametrize("switch", [None, "", "0"])
def test_the_plugin_is_off_unless_switched_on(stand_in, caplog, switch):
    places = stand_in()
    plugin.register({} if switch is None else {"LOCKSTEP_VLLM": switch})
    assert DPMetadata not in places()
    assert not caplog.records


@pytest.mark.parametrize(
    ("version", "forward_context", "reason"),
    [
        ("0.34.0", FORWARD_CONTEXT, "vLLM 0.34.0 is not among the versions known, 0.32, 0.33"),
        ("0.3.3", FORWARD_CONTEXT, "vLLM 0.3.3 is not among the versions known, 0.32, 0.33"),
        ("dev", FORWARD_CONTEXT, "vLLM dev is not among the versions known, 0.32, 0.33"),
        (
            "0.33.0",
            FORWARD_CONTEXT.replace("pcp_size=1, use_ep=False", "num_dispatchers=1"),
            "than the one known: sp_local_sizes takes self, sequence_parallel_size, num_dispatchers instead of ",
        ),
        ("0.33.0", FORWARD_CONTEXT.replace("def cu_tokens", "def other_tokens"), "it has no cu_tokens_across_sp"),
    ],
)
def test_a_vllm_that_is_not_known_is_left_alone_with_one_warning(stand_in, caplog, version, forward_context, reason):
    places = stand_in(version, forward_context)
    plugin.register({"LOCKSTEP_VLLM": "1"})
    plugin.register({"LOCKSTEP_VLLM": "1"})
    assert DPMetadata not in places()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("LOCKSTEP_VLLM=1 changes nothing: ")
    assert reason in record.getMessage()


def test_exchange_in_a_vllm_without_the_method_changes_nothing_and_says_so(stand_in, caplog):
    places = stand_in("0.33.0")
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    assert DPMetadata not in places()
    (record,) = caplog.records
    assert record.getMessage().startswith("LOCKSTEP_VLLM=exchange changes nothing: vllm.model_executor.layers")
    assert "cannot be imported" in record.getMessage()


def test_exchange_in_another_version_says_which_are_known(stand_in, caplog):
    stand_in("0.30.0")
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    (record,) = caplog.records
    assert "vLLM 0.30.0 is not among the versions known, 0.26, 0.33" in record.getMessage()


@dataclasses.dataclass
class LayerMetadata(DPMetadata):
    layer: int = 0


def test_subclasses_copies_writes_and_dropped_contexts_are_as_in_our_own_class():
    metadata = LayerMetadata(torch.tensor([5, 7]), layer=3)
    metadata.sp_local_sizes(1).__enter__()
    assert metadata.local_sizes is None
    for twin in (copy.copy(metadata), copy.deepcopy(metadata), dataclasses.replace(metadata)):
        assert twin == metadata
        assert twin.layer == 3
        with twin.sp_local_sizes(2, 2, True) as sizes:
            assert sizes == [3, 3, 3, 3, 4, 4, 4, 4]
    assert repr(metadata) == "LayerMetadata(num_tokens_across_dp_cpu=[5, 7], local_sizes=None, layer=3)"
    metadata.num_tokens_across_dp_cpu[0] = 6
    for call in (lambda: metadata.sp_local_sizes(1), lambda: metadata.sp_local_sizes(1, 2)):
        with pytest.raises(TokenCountError, match="was changed after the metadata was made"):
            call()
    with pytest.raises(TokenCountError, match="must be a dense tensor"):
        DPMetadata(torch.tensor([5, 7]).to_sparse())


def test_in_a_fresh_process_without_vllm_one_warning_is_logged(tmp_path):
    script = "from lockstep.integrations.vllm import register; register(); register()"
    environment = {"LOCKSTEP_VLLM": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "cannot be imported (No module named 'vllm')" in done.stderr


def test_the_entry_point_names_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"lockstep": "lockstep.integrations.vllm:register"}
