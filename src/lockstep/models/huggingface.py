"""Any Transformers MoE model over all ranks: its experts spread, its forward passes in lockstep."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lockstep.coordination.groups import find_group, group_of, own_device, parallel_config, tensor_parallel_group
from lockstep.coordination.session import Session
from lockstep.coordination.waits import DEADLINE_S
from lockstep.errors import ConfigurationError
from lockstep.extras import untried
from lockstep.models import norms
from lockstep.models import transformers_internals as internals
from lockstep.models.adapters import shard_adapters
from lockstep.models.arguments import read_arguments
from lockstep.models.compiled import CompiledCall, moe, when_compiled
from lockstep.models.experts_modules import find_experts, plain_name, shard_experts, slots_of
from lockstep.models.loading import load_pretrained
from lockstep.models.options import ParallelOptions
from lockstep.models.own_weights import EXPERTS_IMPLEMENTATION, weights_are_there
from lockstep.models.parallel import ModelParallel, count_tokens, parallel_of
from lockstep.moe.experts import LocalExperts
from lockstep.moe.fp8 import is_fp8
from lockstep.moe.placement import Placement
from lockstep.moe.step import Step

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    class GeneratingModel(PreTrainedModel, GenerationMixin):
        """What `from_pretrained` returns, for type checkers: `PreTrainedModel` alone has no `generate`."""


ModelT = TypeVar("ModelT")

_OUTSIDE = "{} is spread over several ranks: call it inside `with lockstep.join(model):`, on every rank"
_AROUND = (
    "MoE layer {0} ran outside of {1}.forward: a part of the model was called, or a wrapper that goes around its "
    "forward; inside join, call the {1} itself or its generate"
)
_PART = "this model holds only its rank's experts, so saving it would write a part under the name of the whole"
_FP8 = "experts in fp8 are not saved: load the checkpoint with quantize_experts='none' to save it"
_STATE_DICT = f"state_dict: {_PART}; accelerate's offloading asks for one too"
_CAPTURED = (
    "{} was called while a CUDA graph is being captured, in which ranks cannot agree on a step: Lockstep captures "
    "steps of generate and generate_batch by itself; leave compile configs out of ContinuousBatchingConfig, or pass "
    "use_cuda_graph=False"
)


@overload
def from_pretrained(
    path: str | os.PathLike[str], *, output_loading_info: Literal[True], **kwargs: Any
) -> "tuple[GeneratingModel, dict[str, Any]]": ...
@overload
def from_pretrained(
    path: str | os.PathLike[str], *, tensor_parallel_size: int = 1, max_chunk_size_per_rank: int | None = None,
    dispatcher: str = "auto", fp8_dispatch: bool = False, process_group: dist.ProcessGroup | None = None,
    device_mesh: DeviceMesh | None = None, deadline_s: float = DEADLINE_S, debug: bool = False,
    fuse_norms: bool = False, placement: Placement | None = None, count_expert_load: bool = False,
    quantize_experts: str = "auto", dtype: torch.dtype | str = "auto", device: torch.device | str | None = None,
    output_loading_info: Literal[False] = False, **kwargs: Any,
) -> "GeneratingModel": ...  # fmt: skip
def from_pretrained(  # noqa: D417
    path: str | os.PathLike[str],
    *,
    tensor_parallel_size: int = 1,
    max_chunk_size_per_rank: int | None = None,
    dispatcher: str = "auto",
    fp8_dispatch: bool = False,
    process_group: dist.ProcessGroup | None = None,
    device_mesh: DeviceMesh | None = None,
    deadline_s: float = DEADLINE_S,
    debug: bool = False,
    fuse_norms: bool = False,
    placement: Placement | None = None,
    count_expert_load: bool = False,
    quantize_experts: str = "auto",
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Any:
    """Load a Hugging Face MoE checkpoint, each rank reading only its own experts, ready for `join`.

    Under `torchrun` the ranks find each other; a single process gets the plain model.

    Args:
        path: a folder, or a Hub id.
        tensor_parallel_size: ranks that share their requests; attention is split over them, >= 1.
        max_chunk_size_per_rank, dispatcher, fp8_dispatch, deadline_s, debug, fuse_norms, placement, count_expert_load:
            see `ParallelOptions`.
        process_group: the ranks, by default all; it stays open.
        device_mesh: a one-dimensional mesh of the ranks, such as `mesh["ep"]`, instead of `process_group`.
        quantize_experts: "fp8" holds the weights of routed experts as float8_e4m3fn with a float32 scale per 128 x 128
            values, whatever the checkpoint's type; "none" holds them in `dtype`; "auto" keeps a checkpoint of that form
            as stored if our kernels can read fp8 (compute capability 9.0 or later, Triton), else it is "none".
        dtype: type of the weights; "auto" is the checkpoint's.
        device: device of the weights; `cuda` is this rank's GPU. By default this rank's GPU, or the CPU without one.
        **kwargs: other arguments of Transformers' `from_pretrained`: `revision`, `trust_remote_code`, `token`,
            `attn_implementation`, ..., or attributes of the config. `device_map` names one device; "auto" leaves it to
            the rank. Arguments that cannot work over ranks are refused by name.

    Returns:
        The Transformers model, in evaluation mode. With `output_loading_info=True` the model and the loading info.

    Raises:
        ConfigurationError: on every rank, for a checkpoint or sizes that cannot work.
    """
    options = ParallelOptions(
        max_chunk_size_per_rank, dispatcher, fp8_dispatch, deadline_s, debug, fuse_norms, placement, count_expert_load
    )
    placed = read_arguments(kwargs | {"dtype": dtype, "device": device}).device
    kwargs.pop("device_map", None)  # said by `placed` from here on
    group = find_group(group_of(process_group, device_mesh), deadline_s)
    config = parallel_config(group, tensor_parallel_size)
    device = own_device(placed)
    attention, tp_mesh = None, None
    if tensor_parallel_size > 1:
        attention = tensor_parallel_group(config, group, device, deadline_s)
        tp_mesh = DeviceMesh.from_group(attention, device.type, mesh_dim_names=("tp",))
    loaded = load_pretrained(
        path, ep_rank=config.rank, ep_size=config.world_size, placement=placement, tp_mesh=tp_mesh, dtype=dtype,
        device=device, process_group=group, deadline_s=deadline_s, quantize_experts=quantize_experts, **kwargs,
    )  # fmt: skip
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if fuse_norms:
        norms.fuse_norms(model)
    if group is not None:
        attach(ModelParallel(model, config, group, options, attention))
    else:
        run_alone(model)
    return loaded


def run_alone(model: Any) -> None:
    """Run the fp8 experts of a model in a single process by our implementation. No-op for other models."""
    for _, module in find_experts(model):
        if is_fp8(module):
            internals.register_experts(EXPERTS_IMPLEMENTATION, _experts_forward)
            internals.route_experts(module, EXPERTS_IMPLEMENTATION)
            module._lockstep_alone = LocalExperts(module)
            model.save_pretrained = functools.partial(_refuse, _FP8)


def parallelize(  # noqa: D417
    model: ModelT,
    *,
    max_chunk_size_per_rank: int | None = None,
    dispatcher: str = "auto",
    fp8_dispatch: bool = False,
    process_group: dist.ProcessGroup | None = None,
    device_mesh: DeviceMesh | None = None,
    deadline_s: float = DEADLINE_S,
    debug: bool = False,
    fuse_norms: bool = False,
    placement: Placement | None = None,
    count_expert_load: bool = False,
) -> ModelT:
    """Spread the experts of a Transformers MoE model in memory over all ranks; each rank keeps its own.

    Every rank must hold the same model. In a single process the model is returned as it is.

    Args:
        model: the whole model, changed in place; or a module that holds one, such as a `PeftModel`, whose adapters of
            experts are cut to each rank's as well.
        max_chunk_size_per_rank, dispatcher, fp8_dispatch, deadline_s, debug, fuse_norms, placement, count_expert_load:
            see `ParallelOptions`.
        process_group: the ranks, by default all; it stays open.
        device_mesh: a one-dimensional mesh of the ranks, such as `mesh["ep"]`, instead of `process_group`.

    Returns:
        The same model, ready for `join`.

    Raises:
        ConfigurationError: a model without MoE layers, or one that is spread already.
    """
    options = ParallelOptions(
        max_chunk_size_per_rank, dispatcher, fp8_dispatch, deadline_s, debug, fuse_norms, placement, count_expert_load
    )
    group = find_group(group_of(process_group, device_mesh), deadline_s)
    inner = internals.transformers_model_in(model)
    found = find_experts(inner)
    if group is None:
        if fuse_norms:
            norms.fuse_norms(inner)
        return model
    if parallel_of(model) is not None:
        raise ConfigurationError(f"this {type(model).__name__} is already spread over the ranks")
    weights_are_there(inner)
    if split := next((name for name, weight in inner.named_parameters() if isinstance(weight, DTensor)), None):
        raise ConfigurationError(
            f"{split} of {type(inner).__name__} is split already (fully_shard, or Transformers' own parallelism): pass "
            "the whole model, or let lockstep.from_pretrained load each rank's part"
        )
    config = parallel_config(group, 1)
    for layer, (name, module) in enumerate(found):
        slots = slots_of(found, layer, config.rank, config.world_size, placement)
        shard_adapters(inner.get_submodule(plain_name(name)), slots)
        shard_experts(module, slots)
    if fuse_norms:
        norms.fuse_norms(inner)
    outer: Any = model
    outer.eval()
    attach(ModelParallel(inner, config, group, options))
    return model


@contextlib.contextmanager
def join(model: ModelT, *, grace_s: float = 0.01) -> Iterator[ModelT]:
    """Let every rank call the model any number of times, with any inputs, without hanging the other ranks.

    Enter it on every rank. Inside, a rank's script may call `model(...)` or `model.generate(...)` any number of times,
    and do other things in between, while a thread takes part for it. Leaving waits until all ranks have left.

    Args:
        model: from `from_pretrained` or `parallelize`, or a module that holds it, such as a `PeftModel` or a
            `LightningModule`. In a single process this block does nothing.
        grace_s: how long after a call this rank waits for the script's next one before it takes part with zero rows,
            in seconds.

    Yields:
        The model.

    Raises:
        PeerFailedError: another rank left its block by an exception; carries its message.
        RankAbsentError: a rank did not come before the deadline; entering `join` anew opens new groups.
        RankMismatchError: settings differ between ranks; names the setting and each rank's value.
        ConfigurationError: the model is not spread over the ranks, or is in a `join` block already.
    """
    _take_over(model)
    parallel = parallel_of(model)
    if parallel is None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            internals.transformers_model_in(model)  # refuses what holds a model and is no module
            raise ConfigurationError(
                f"this {type(model).__name__} is not spread over the ranks: use lockstep.from_pretrained or "
                "lockstep.parallelize first"
            )
        yield model
        return
    if parallel.session is not None:
        raise ConfigurationError(f"this {type(model).__name__} is joined already; leave that block first")
    parallel.open()
    own = parallel.config.data_parallel_rank
    parallel.session = Session(parallel.coordinator, parallel.run_idle_step, data_parallel_rank=own, grace_s=grace_s)
    try:
        with parallel.session:
            yield model
    finally:
        parallel.session = None


def _take_over(model: Any) -> None:
    """Take over a model that Transformers has divided by `DistributedConfig(ep_implementation="lockstep")`."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    if not any("_lockstep_divided_over" in vars(module) for module in modules):
        return
    inner: Any = internals.transformers_model_in(model)
    found = find_experts(inner)
    for _, module in found:
        module.forward = lambda rows, *_: rows
    with torch.no_grad():  # FSDP finds its outermost module in a call of it, which `ModelParallel` goes around
        inner(input_ids=torch.zeros(1, 1, dtype=torch.long, device=inner.device), use_cache=False)
    for module in modules:
        if isinstance(module, FSDPModule):  # whole dense weights from here on: no rank waits for another in a layer
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
    group = found[0][1].__dict__["_lockstep_divided_over"]
    config = parallel_config(group, 1)
    for layer, (_, module) in enumerate(found):
        del module._lockstep_divided_over, module.forward
        shard_experts(module, slots_of(found, layer, config.rank, config.world_size, None))
    if split := next((name for name, weight in inner.named_parameters() if isinstance(weight, DTensor)), None):
        raise ConfigurationError(
            f"{split} of {type(inner).__name__} is split over ranks that share their requests: leave tp_size out of "
            "DistributedConfig, or use lockstep.from_pretrained(tensor_parallel_size=...)"
        )
    inner.eval()
    attach(ModelParallel(inner, config, group, ParallelOptions()))


def attach(parallel: ModelParallel) -> None:
    """Route the model's experts and its forward pass through Lockstep."""
    model = parallel.model
    if parallel.config.rank == 0 and (warning := untried(internals.versions())):
        warnings.warn(warning, stacklevel=3)
    internals.register_experts(EXPERTS_IMPLEMENTATION, _experts_forward)
    internals.run_batches_in_steps()
    for index, (_, module) in enumerate(find_experts(model)):
        internals.route_experts(module, EXPERTS_IMPLEMENTATION)
        module._lockstep_place, module._lockstep_layer = (parallel, index), index
    original = parallel.forward

    @contextlib.contextmanager
    def step_of(session: Session, num_tokens: int) -> Iterator[Step]:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            # The agreement is a wait on the host, which a replayed graph would skip.
            error = ConfigurationError(_CAPTURED.format(type(model).__name__))
            session.fail(error)  # the other ranks hear of it now, whatever becomes of the capture here
            raise error
        parallel.weights.check()
        decision = session.begin_step(num_tokens)
        try:
            with parallel.step(decision) as step:
                yield step
        except BaseException as error:
            if not parallel.coordinator.usable:
                session.break_off(error)
            elif parallel.peers.spoiled:  # the others have computed with it, so a script that goes on does not help
                session.fail(error)
            raise
        finally:
            session.end_step()

    def step_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[Step] | None:
        if parallel.session is not None:
            return step_of(parallel.session, count_tokens(args, kwargs))
        if parallel.current_step() is None:
            raise RuntimeError(_OUTSIDE.format(type(model).__name__))
        return None  # an engine that forms its own steps has agreed already

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        due = step_of_call(args, kwargs)
        if due is None:
            return original(*args, **kwargs)
        with due as step:
            return parallel.run_forward(step, args, kwargs)

    def compiled_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledCall | None:
        if parallel.config.tensor_parallel_size > 1:
            raise ConfigurationError("torch.compile needs tensor_parallel_size 1: its ranks meet in every layer")
        due = step_of_call(args, kwargs)
        return CompiledCall(due, parallel.check_all_layers_ran) if due is not None else None

    if parallel.device.type == "cuda" and getattr(model, "generation_config", None) is not None:
        # Decode steps run as our own graphs, with an agreement before each replay.
        model.generation_config.disable_compile = True
    model.forward = when_compiled(forward, original, compiled_call)
    if hasattr(model, "generate"):
        model.generate = _without_synced_gpus(model.generate)
    model.__dict__["_lockstep_parallel"] = parallel
    # Refuse whatever would overwrite, save or restore this rank's part as if it were the whole.
    model.save_pretrained = functools.partial(_refuse, _PART)
    # Experts have no gradients anyway, and accelerate's `prepare` does not wrap a model that trains nothing.
    model.requires_grad_(False)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)
    model._ddp_params_and_buffers_to_ignore = _RefusedByDDP()
    for name, adapters in zip(parallel.weights.names, parallel.weights.adapters, strict=True):
        parent = model.get_submodule(name.rpartition(".")[0])
        parent.register_state_dict_post_hook(functools.partial(_refuse_to_be_read, name.rpartition(".")[2]))
        parent.register_load_state_dict_pre_hook(adapters.cut_loaded)


def _contiguous(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the rows of the head contiguous: torch otherwise multiplies them sequence by sequence.

    It then reads the whole weight for each sequence; only weights without a gradient are affected.
    """
    return tuple(arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args)


class _RefusedByDDP:
    """Refuses DistributedDataParallel, which begins by iterating over the names of parameters to ignore."""

    def __iter__(self) -> Iterator[str]:
        raise ConfigurationError(
            "DistributedDataParallel would send rank 0's experts to all ranks: a model that is spread over the ranks "
            "needs no wrapper, use it as it is inside `with lockstep.join(model):`"
        )


def _without_synced_gpus(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Turn off `synced_gpus` in `generate`, which waits for calls that other ranks may never make."""

    @functools.wraps(generate)
    def call(*args: Any, synced_gpus: Any = None, **kwargs: Any) -> Any:
        return generate(*args, synced_gpus=False, **kwargs)

    return call


def _refuse(message: str, *_: Any, **__: Any) -> None:
    raise ConfigurationError(message)


def _experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Lockstep's experts implementation for Transformers: run the layer in this thread's step."""
    if torch.compiler.is_compiling() and hasattr(module, "_lockstep_layer"):
        return moe(hidden_states, top_k_index, top_k_weights, module._lockstep_layer)
    place, alone = getattr(module, "_lockstep_place", None), getattr(module, "_lockstep_alone", None)
    if place is None and alone is not None:
        return alone.alone(hidden_states, top_k_index, top_k_weights)
    if place is None:
        raise ConfigurationError(
            f"experts_implementation={EXPERTS_IMPLEMENTATION!r} is set by lockstep.parallelize, not by hand"
        )
    parallel, index = place
    step = parallel.current_step()
    if step is None:
        name = type(parallel.model).__name__
        raise RuntimeError(_OUTSIDE.format(name) if parallel.session is None else _AROUND.format(index, name))
    output: torch.Tensor = step.run_layer(index, hidden_states, top_k_index, top_k_weights)
    return output


class _OwnPart(torch.Tensor):
    """Placeholder for experts in a state dict: has the shape of this rank's part, refuses to be read or saved."""

    _TELLS = tuple(
        getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in cls._TELLS:
            raise ConfigurationError(_STATE_DICT)
        return super().__torch_function__(func, types, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigurationError(_STATE_DICT)


def _refuse_to_be_read(child: str, parent: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in state_dict:
        if key.startswith(f"{prefix}{child}."):
            state_dict[key] = torch.empty_like(state_dict[key], device="meta").as_subclass(_OwnPart)
