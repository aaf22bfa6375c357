"""What others do to a model that is spread over ranks: equal outputs, or one sentence on every rank. Never rank 0's."""

import copy
import importlib.util
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.utils

import lockstep
from lockstep.models.parallel import parallel_of
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("wrappers") / "tiny", num_layers=2, num_experts=4))


class Holder(torch.nn.Module):
    """As LightningModule: a module of the user's that holds the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


# Each does something to a fresh model and returns what is joined and called then.


def nothing(model, path):
    return model


def held(model, path):
    return Holder(model)


def prepared_by_accelerate(model, path):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


def prepared_for_evaluation(model, path):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)


def wrapped_in_ddp(model, path):
    return torch.nn.parallel.DistributedDataParallel(model)


def trained_in_ddp(model, path):
    return torch.nn.parallel.DistributedDataParallel(model.requires_grad_(True))


def held_in_ddp(model, path):
    return torch.nn.parallel.DistributedDataParallel(Holder(model.requires_grad_(True)))


def synchronised(model, path):
    """As Lightning's DDPStrategy does for predict."""
    holder = Holder(model)
    torch.distributed.utils._sync_module_states(
        holder, dist.group.WORLD, 1 << 28, src=0, params_and_buffers_to_ignore=set(), broadcast_buffers=True
    )
    return holder


def broadcast_as_deepspeed(model, path):
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    return model


def broadcast_and_cast(model, path):
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    return model.to(torch.bfloat16)


def replaced_parameters(model, path):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                received = parameter.detach().clone()
                dist.broadcast(received, 0)
                module._parameters[name] = torch.nn.Parameter(received, requires_grad=False)
    return model


def data_set(model, path):
    for parameter in model.parameters():
        received = parameter.detach().clone()
        dist.broadcast(received, 0)
        parameter.data = received
    return model


def one_expert_negated(model, path):
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[1].neg_()
    return model


def fsdp(model, path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fully_shard(model, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def loaded_whole(model, path):
    from transformers import AutoModelForCausalLM

    model.load_state_dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
    return model


def loaded_whole_not_strict(model, path):
    from transformers import AutoModelForCausalLM

    Holder(model).load_state_dict(Holder(AutoModelForCausalLM.from_pretrained(path)).state_dict(), strict=False)
    return model


def loaded_dense_only(model, path):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(path).state_dict()
    dense = {name: weight for name, weight in whole.items() if ".experts." not in name}
    assert not model.load_state_dict(dense, strict=False).unexpected_keys
    return model


def state_dict(model, path):
    weights = Holder(model).state_dict()
    assert weights["model.model.layers.0.mlp.experts.down_proj"].shape[0] == 2
    return {name: weight.clone() for name, weight in weights.items()}


def state_dict_saved_by_torch(model, path):
    torch.save(model.state_dict(), io.BytesIO())


def state_dict_saved_as_safetensors(model, path):
    from safetensors.torch import save_file

    save_file(model.state_dict(), "nowhere")


def saved_by_torch(model, path):
    torch.save(model, io.BytesIO())


def saved_by_transformers(model, path):
    model.save_pretrained("nowhere")


def saved_by_accelerate(model, path):
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, "nowhere")


def copied(model, path):
    return copy.deepcopy(Holder(model))


def cast(model, path):
    return model.to(torch.bfloat16)


def cast_there_and_back(model, path):
    return model.double().float()


def moved_to_the_same_place(model, path):
    return model.to("cpu")


def offloaded(model, path):
    return model.to("meta")


def offloaded_by_accelerate(model, path):
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


def dispatched_by_accelerate(model, path):
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def other_implementation(model, path):
    model.set_experts_implementation("eager")
    return model


class Experts(torch.nn.Module):
    """In the place of a layer's experts, and not ours."""

    def forward(self, hidden_states, *_):
        return hidden_states


def replaced_experts(model, path):
    model.model.layers[0].mlp.experts = Experts()
    return model


def all_experts_replaced(model, path):
    for layer in model.model.layers:
        layer.mlp.experts = Experts()
    return model


def accepted(model, path):
    """Each rank writes its own part on purpose."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(1.0)
    parallel_of(model).accept_weights()
    return model


OVERWRITTEN = "experts.gate_up_proj {} after it was spread over the ranks"
CASES = {
    nothing: "equal",
    held: "equal",
    prepared_by_accelerate: "equal",
    prepared_for_evaluation: "equal",
    wrapped_in_ddp: "DistributedDataParallel would send rank 0's experts to all ranks",
    trained_in_ddp: "DistributedDataParallel would send rank 0's experts to all ranks",
    held_in_ddp: OVERWRITTEN.format("was written in place"),
    synchronised: OVERWRITTEN.format("was written in place"),
    broadcast_as_deepspeed: OVERWRITTEN.format("has other values"),
    broadcast_and_cast: OVERWRITTEN.format("has other values"),
    replaced_parameters: OVERWRITTEN.format("has other values"),
    data_set: OVERWRITTEN.format("has other values"),
    one_expert_negated: "layers.1.mlp.experts.down_proj was written in place after it was spread",
    fsdp: OVERWRITTEN.format("was replaced"),
    fully_shard: OVERWRITTEN.format("was replaced"),
    loaded_whole: "load_state_dict: 'model.layers.0.mlp.experts.gate_up_proj' belongs to experts",
    loaded_whole_not_strict: "load_state_dict: 'model.model.layers.0.mlp.experts.gate_up_proj' belongs to experts",
    loaded_dense_only: "equal",
    state_dict: "state_dict: this model holds only its rank's experts",
    state_dict_saved_by_torch: "state_dict: this model holds only its rank's experts",
    state_dict_saved_as_safetensors: "state_dict: this model holds only its rank's experts",
    saved_by_torch: "it cannot be copied (copy.deepcopy) or saved (torch.save, pickle)",
    saved_by_transformers: "this model holds only its rank's experts",
    saved_by_accelerate: "this model holds only its rank's experts",
    copied: "it cannot be copied (copy.deepcopy) or saved (torch.save, pickle)",
    cast: "equal in bfloat16",
    cast_there_and_back: "equal",
    moved_to_the_same_place: "equal",
    offloaded: "is not there any more (offloaded to the meta device)",
    offloaded_by_accelerate: "accelerate's offloading asks for one too",
    dispatched_by_accelerate: "equal",
    other_implementation: "was set to experts_implementation='eager', which knows this rank's experts only",
    replaced_experts: "layers.0.mlp.experts of Qwen3MoeForCausalLM was replaced by Experts",
    accepted: "equal",
}
NEEDS = {case: "accelerate" for case in CASES if "accelerate" in case.__name__ or case is prepared_for_evaluation}


@torch.no_grad()
def outcomes(path, cases, inside_join):
    """What becomes of each case; the model is changed before `join`, or inside it."""
    from transformers import AutoModelForCausalLM

    rank = dist.get_rank()
    ids = IDS[rank : rank + 1, : 3 + rank]
    expected = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    found = {}
    for case in cases:
        model = lockstep.from_pretrained(path, deadline_s=20)
        try:
            wrapped = model if inside_join else case(model, path)
            with lockstep.join(wrapped):
                if inside_join:
                    wrapped(ids)
                    wrapped = case(model, path)
                logits = wrapped(ids).logits
        except Exception as error:
            found[case.__name__] = f"{type(error).__name__}: {error}"
            continue
        finally:
            if "prepare" in case.__name__:
                from accelerate.state import AcceleratorState, PartialState

                AcceleratorState._reset_state()
                PartialState._reset_state()
        in_bfloat16 = logits.dtype == torch.bfloat16
        tolerance = 0.05 if in_bfloat16 else 1e-5
        error = float((logits.float() - expected).abs().max() / expected.abs().max())
        found[case.__name__] = (
            f"equal{' in bfloat16' if in_bfloat16 else ''}" if error < tolerance else f"off by {error}"
        )
    return found


def installed(cases):
    return [case for case in cases if importlib.util.find_spec(NEEDS.get(case, "torch")) is not None]


@pytest.mark.ranks(2)
def test_before_join(tiny):
    results = run_ranks(2, outcomes, tiny, installed(CASES), False, deadline_s=120)
    for name, wanted in {case.__name__: CASES[case] for case in installed(CASES)}.items():
        for rank, found in enumerate(results):
            assert wanted == found[name] or (not wanted.startswith("equal") and wanted in found[name]), (
                name,
                rank,
                found[name],
            )
            assert wanted.startswith("equal") or found[name].startswith("ConfigurationError"), (name, found[name])


# Inside of `join` nothing is read from the weights, so `.data` is beyond what a step can see; all else is seen.
INSIDE = {
    synchronised: "was written in place",
    replaced_parameters: "was replaced",
    data_set: "was moved or cast inside of join",
    one_expert_negated: "was written in place",
    cast: "was moved or cast inside of join",
    other_implementation: "was set to experts_implementation='eager'",
    replaced_experts: "MoE layer 1 was called where layer 0 was due in this step",
    all_experts_replaced: "only 0 of 2 MoE layers of Qwen3MoeForCausalLM ran over the ranks in this forward pass",
    moved_to_the_same_place: "equal",
    loaded_dense_only: "equal",
}


@pytest.mark.ranks(2)
def test_inside_join(tiny):
    for rank, found in enumerate(run_ranks(2, outcomes, tiny, list(INSIDE), True, deadline_s=120)):
        for case, wanted in INSIDE.items():
            assert wanted in found[case.__name__], (case.__name__, rank, found[case.__name__])


def overwritten_on_an_idle_rank(path):
    """Rank 1 makes no call: its experts serve rank 0, and are not rank 1's own any more."""
    model = lockstep.from_pretrained(path, deadline_s=20)
    try:
        with lockstep.join(model):
            if dist.get_rank() == 0:
                model(IDS[:1])
            dist.barrier()
            if dist.get_rank() == 1:
                with torch.no_grad():
                    model.model.layers[0].mlp.experts.down_proj.zero_()
            dist.barrier()
            if dist.get_rank() == 0:
                model(IDS[:1])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.ranks(2)
def test_experts_of_a_rank_that_idles(tiny):
    first, second = run_ranks(2, overwritten_on_an_idle_rank, tiny)
    assert "PeerFailedError" in first and "rank 1" in first
    assert second.startswith("ConfigurationError") and "layers.0.mlp.experts.down_proj was written in place" in second


def captured(path):
    """Somebody else's CUDA graph capture, as far as a CPU can show it: what we ask torch is answered with yes."""
    model = lockstep.from_pretrained(path, deadline_s=20)
    rank, agreed = dist.get_rank(), 0
    try:
        with lockstep.join(model):
            model(IDS[:1])
            agree = parallel_of(model).session.begin_step

            def begin_step(num_tokens):
                nonlocal agreed
                agreed += 1
                return agree(num_tokens)

            parallel_of(model).session.begin_step = begin_step
            if rank == 0:
                torch.cuda.is_initialized = torch.cuda.is_current_stream_capturing = lambda: True
                model(IDS[:1])
            else:
                for _ in range(1000):
                    model(IDS[:1])
    except Exception as error:
        return f"{type(error).__name__}: {error}", agreed
    return "no error", agreed


@pytest.mark.ranks(2)
def test_under_a_capture_of_somebody_else(tiny):
    (first, agreed), (second, _) = run_ranks(2, captured, tiny)
    assert first.startswith("ConfigurationError: Qwen3MoeForCausalLM was called while a CUDA graph is being captured")
    assert "use_cuda_graph=False" in first and agreed == 0
    assert second.startswith("PeerFailedError") and "use_cuda_graph=False" in second


def predicted_by_lightning(path):
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def predict_step(self, batch, index):
            return self.model(batch).logits

    model = Lit(lockstep.from_pretrained(path, deadline_s=20))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        with lockstep.join(model):
            trainer.predict(model, torch.utils.data.DataLoader(IDS, batch_size=1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.ranks(2)
def test_lightning(tiny, monkeypatch):
    pytest.importorskip("lightning")
    for found in run_ranks(2, predicted_by_lightning, tiny):
        assert "was written in place after it was spread over the ranks" in found and "Lightning's Trainer" in found
