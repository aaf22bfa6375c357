"""The names of Transformers that no release promises to keep: each exists, and does what we need of it."""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

from lockstep.extras import untried
from lockstep.models import transformers_internals as internals
from lockstep.models.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("internals") / "tiny", num_layers=1, num_experts=4)


@pytest.fixture
def model(tiny):
    return Qwen3MoeForCausalLM.from_pretrained(tiny)


def test_the_methods_that_are_overridden_are_there():
    # An override of a name that is gone would never be called.
    for name in ("prepare_distribute_model", "maybe_distribute_model", "_finalize_model_loading", "get_parameter"):
        assert callable(getattr(Qwen3MoeForCausalLM, name)), name
    assert isinstance(inspect.getattr_static(Qwen3MoeForCausalLM, "prepare_distribute_model"), classmethod)
    assert isinstance(inspect.getattr_static(Qwen3MoeForCausalLM, "maybe_distribute_model"), classmethod)
    parameters = inspect.signature(Qwen3MoeForCausalLM._finalize_model_loading).parameters
    assert list(parameters) == ["model", "load_config", "loading_info"]


def test_from_pretrained_calls_us_in_the_three_places(tiny):
    seen = []

    def distribute(model):
        assert all(parameter.is_meta for parameter in model.parameters())
        seen.append("distribute")

    def on_loaded(model, info):
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert not info.missing_keys and not info.mismatched_keys and not info.conversion_errors
        seen.append("loaded")

    own = internals.sharding_class(
        Qwen3MoeForCausalLM, distribute=distribute, on_loaded=on_loaded, local_parameters_of=[]
    )
    loaded = own.from_pretrained(tiny, distributed_config=internals.no_distribution())
    assert seen == ["distribute", "loaded"]
    assert (own.__name__, own.__module__) == (Qwen3MoeForCausalLM.__name__, Qwen3MoeForCausalLM.__module__)
    assert isinstance(loaded, Qwen3MoeForCausalLM)


def test_a_module_that_holds_parts_shows_its_own_part():
    class Parted(torch.Tensor):
        _local_tensor = torch.ones(2)

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(1, 1)
            self.inner.weight = torch.nn.Parameter(torch.ones(4, 1).as_subclass(Parted))

        def _finalize_model_loading(model, load_config, loading_info):
            pass

    names = []
    options = {"distribute": print, "on_loaded": print, "local_parameters_of": names}
    made = internals.sharding_class(Base, **options)()
    assert made.get_parameter("inner.weight").shape == (4, 1)
    names.append("inner")
    assert made.get_parameter("inner.weight").shape == (2,)


def test_experts_modules_are_recognised(model):
    found = [name for name, module in model.named_modules() if internals.is_experts_module(module)]
    assert found == ["model.layers.0.mlp.experts"]


def test_an_experts_implementation_of_ones_own(model):
    def doubled(module, hidden_states, top_k_index, top_k_weights):
        return hidden_states * 2

    internals.register_experts("doubled", doubled)
    experts = model.model.layers[0].mlp.experts
    assert internals.experts_route(experts) != "doubled"
    internals.route_experts(experts, "doubled")
    assert internals.experts_route(experts) == "doubled"
    rows = torch.randn(3, 64)
    ids = torch.zeros(3, 2, dtype=torch.long)
    assert torch.equal(experts(rows, ids, torch.ones(3, 2)), rows * 2)


def test_weights_that_may_be_missing(tiny, model):
    assert not internals.may_be_missing(model, "model.layers.0.self_attn.q_proj.weight")
    tied = Qwen3MoeForCausalLM(transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=True))
    assert internals.may_be_missing(tied, "lm_head.weight") and not internals.may_be_missing(model, "lm_head.weight")


def test_a_weight_marked_as_loaded_is_not_made_up(model):
    kept = torch.nn.Parameter(torch.full((64, 64), 7.0))
    model.model.layers[0].self_attn.q_proj.weight = kept
    internals.mark_loaded(kept)
    model._init_weights(model.model.layers[0].self_attn.q_proj)
    assert torch.equal(kept, torch.full((64, 64), 7.0))


def test_the_class_that_generates_text(model):
    assert internals.text_class_of(model.config) is Qwen3MoeForCausalLM
    assert internals.text_class_of(transformers.MixtralConfig()) is MixtralForCausalLM
    assert internals.text_class_of(transformers.CLIPVisionConfig()) is None


def test_a_class_that_comes_with_a_checkpoint(tmp_path):
    (tmp_path / "modeling_own.py").write_text("class Own:\n    answer = 42\n")
    assert internals.class_from_folder("modeling_own.Own", str(tmp_path)).answer == 42


def test_quantisations_that_are_undone():
    for method, settings in {"fp8": {"weight_block_size": [128, 128]}, "mxfp4": {}}.items():
        assert internals.dequantisation_config(method, {"quant_method": method, **settings}).dequantize is True


def test_attention_is_split_and_experts_are_not(tiny, monkeypatch):
    import transformers.distributed.tensor_parallel as tensor_parallel

    signature = inspect.signature(tensor_parallel.apply_tensor_parallelism)
    seen = []

    def apply(model, tp_mesh, tp_plan=None):
        seen.append(dict(model.tp_plan if tp_plan is None else tp_plan))

    apply.__signature__ = signature
    monkeypatch.setattr(tensor_parallel, "apply_tensor_parallelism", apply)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(transformers.AutoConfig.from_pretrained(tiny))
    before = dict(model.tp_plan)
    internals.split_attention(model, SimpleNamespace(size=lambda: 2), ["model.layers.0.mlp.experts"])
    (plan,) = seen
    assert any("q_proj" in rule for rule in plan) and not any("experts" in rule for rule in plan)
    assert any("experts" in rule for rule in before) and model.tp_plan == before


def test_the_switch_of_the_reading_threads_is_read():
    from transformers import core_model_loading

    assert internals.ASYNC_LOAD_SWITCH in inspect.getsource(core_model_loading)


def test_the_model_inside_of_a_wrapper(model):
    wrapper = torch.nn.Sequential(torch.nn.Sequential(model))
    assert internals.transformers_model_in(wrapper) is model
    assert internals.transformers_model_in(model) is model
    plain = torch.nn.Linear(1, 1)
    assert internals.transformers_model_in(plain) is plain


def test_a_version_that_was_not_tried_is_named_beside_the_newest_that_was():
    assert untried({"torch": "2.14.1+cpu", "transformers": "5.24.0"}) == ""
    assert untried({"torch": "3.0.0a0+git", "transformers": "5.25.0.dev0"}) == (
        "torch 3.0.0a0+git is newer than 2.14 and transformers 5.25.0.dev0 is newer than 5.24, "
        "the newest that Lockstep was tried with"
    )
    assert untried({"torch": "2.2"}) == ""
    assert untried(internals.versions()) == ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_batches_are_called_where_transformers_would_replay_graphs_of_its_own(model, asynchronous):
    model_runner = pytest.importorskip("transformers.generation.continuous_batching.model_runner")
    runner = object.__new__(model_runner.ModelRunner)
    called = []
    buffers = SimpleNamespace(use_block_table=False, total_seqlen_q=5)
    pairs = SimpleNamespace(io_pairs=[None, SimpleNamespace(device_io=buffers)], current_pair=1, use_block_table=False)
    runner.inputs_and_outputs = pairs if asynchronous else buffers
    runner.inputs_and_outputs.get_cb_kwargs = lambda: (None, None, None)
    runner.inputs_and_outputs.compute_stream = None
    runner.inputs_and_outputs.get_graph = lambda: SimpleNamespace(replay=lambda: called.append("graph"))
    runner.supports_logits_to_keep = lambda model: False
    runner._forward_process_and_sample = lambda model, batch, *_: called.append(batch)
    runner._compiled_varlen = runner._compiled_decode = None
    runner.use_cuda_graph_varlen, runner.use_cuda_graph_decode = True, False
    internals.run_batches_in_steps()
    runner.compute_batch(model, {})
    model.__dict__["_lockstep_parallel"] = object()
    runner.compute_batch(model, {})
    buffers.use_block_table = pairs.use_block_table = True  # a path without graphs
    runner.compute_batch(model, {})
    assert called == ["graph", {internals.BATCH_ROWS: 5}, {}]
    assert (runner.use_cuda_graph_varlen, runner.use_cuda_graph_decode) == (True, False)
