# vLLM's routed experts on Lockstep's exchange. `SYMBOLS` lists everything that it uses of vLLM.
#
# vLLM creates its MoE method for unquantised experts through a registry, where another class can replace its own.
# Ours is a subclass. It loads weights as vLLM does, and runs them through Lockstep's dispatch, experts and combine
# if possible; otherwise it behaves as vLLM's own method, and one log line says why.

import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist

from lockstep._version import __version__
from lockstep.coordination.transports import open_transport
from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.choose import can_map, mapping_facts
from lockstep.dispatch.collectives import gather_json
from lockstep.errors import ConfigurationError
from lockstep.integrations.vllm_step import START_DEADLINE_S, Exchange, Step, Watch, say
from lockstep.moe.experts import LocalExperts, silu_and_multiply

KNOWN_VERSIONS = ("0.26", "0.33")  # written against the sources of both; only 0.26 was run

METHOD_MODULE = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
METHOD = "UnquantizedFusedMoEMethod"

SYMBOLS = {
    METHOD_MODULE: [METHOD, f"{METHOD}.process_weights_after_loading", f"{METHOD}.apply", f"{METHOD}.register_oot"],
    "vllm.model_executor.custom_op": ["op_registry_oot"],
    "vllm.forward_context": ["get_forward_context", "is_forward_context_available"],
    "vllm.distributed.parallel_state": ["get_ep_group"],
    "vllm.config": ["get_current_vllm_config"],
}
"""Names used of vLLM, the same in both versions, by module."""

RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu_model_runner", "AsyncGPUModelRunnerOutput"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.async_utils", "AsyncOutput"),
)
"""Module and class that run a worker's steps, and those that hand out their tokens. Which are in use depends on the
model; only what the worker has imported is looked at."""

DEADLINE = "LOCKSTEP_VLLM_DEADLINE_S"  # longest wait for a rank in a step that serves requests; 30 if not set

PROMPT_ROWS = 4096  # maximum rows per rank and dispatch outside CUDA graphs; more go in chunks

STEP = Step()  # one per process: a worker runs one step at a time


class LayerWeights:
    """A layer's weights under the names that `LocalExperts` reads; read at each call, since vLLM may replace them."""

    has_gate = True
    _apply_gate = staticmethod(silu_and_multiply)

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    gate_up_proj = property(lambda self: self._layer.w13_weight)  # [num_local_experts, 2 * intermediate, hidden]
    down_proj = property(lambda self: self._layer.w2_weight)  # [num_local_experts, hidden, intermediate]


def unsupported(config: Any, moe: Any, method: Any) -> str:
    """Return why the configuration keeps a layer's experts on vLLM's own path, or an empty string."""
    parallel, experts = config.parallel_config, moe.moe_parallel_config
    activation = str(getattr(moe.activation, "value", moe.activation))
    backend = str(getattr(getattr(method, "unquantized_backend", None), "name", None))
    sp_is_missing = parallel.tensor_parallel_size > 1 and not experts.is_sequence_parallel
    swiglu = any(getattr(moe, name, None) is not None for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"))
    checks = (
        (not experts.use_ep, "expert parallelism is off (enable_expert_parallel)"),
        (experts.dp_size < 2, "data_parallel_size is 1"),
        (sp_is_missing, "tensor_parallel_size > 1 without sequence-parallel experts"),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size > 1"),
        (experts.pcp_size > 1, "prefill_context_parallel_size > 1"),
        (experts.enable_eplb, "EPLB moves experts between ranks (enable_eplb)"),
        (getattr(parallel, "enable_elastic_ep", False), "ranks come and go (enable_elastic_ep)"),
        (getattr(parallel, "enable_dbo", False), "batches are split in two (enable_dbo)"),
        (getattr(parallel, "ubatch_size", 0) > 1, "batches are split (ubatch_size)"),
        (parallel.expert_placement_strategy != "linear", f"expert placement {parallel.expert_placement_strategy!r}"),
        (getattr(config, "speculative_config", None) is not None, "speculative decoding"),
        (getattr(config, "lora_config", None) is not None or moe.is_lora_enabled, "LoRA"),
        (getattr(config.model_config, "enable_sleep_mode", False), "sleep mode, which takes memory away"),
        (moe.in_dtype is not torch.bfloat16, f"dtype {moe.in_dtype}; only bfloat16 travels"),
        (moe.has_bias, "experts with biases"),
        (activation != "silu", f"activation {activation!r}; only gated SiLU"),
        (swiglu, "a clamped or scaled SwiGLU"),
        (moe.num_experts % experts.ep_size != 0, f"{moe.num_experts} experts on {experts.ep_size} ranks"),
        (moe.hidden_dim != (moe.hidden_dim_unpadded or moe.hidden_dim), "padded rows"),
        (bool(getattr(moe, "intermediate_pad", None)), "padded experts"),
        (backend != "TRITON", f"weights in the layout of vLLM's backend {backend} (set moe_backend=triton)"),
    )
    return "; ".join(reason for holds, reason in checks if holds)


def disagreement(answers: Sequence[dict[str, Any]]) -> str:
    """Return why ranks with these answers cannot use the exchange, or an empty string; see `join`."""
    for rank, answer in enumerate(answers):
        if answer["no"]:
            return f"{answer['no']} (on EP rank {rank})"
    for name in answers[0]["alike"]:
        values = [answer["alike"].get(name) for answer in answers]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"EP rank {rank}: {value}" for rank, value in enumerate(values))
            return f"ranks disagree about {name}: {listed}"
    if not can_map([answer["maps"] for answer in answers]):
        return "the ranks' GPUs cannot map each other's memory: over 8, not on one host, or not all joined by NVLink"
    return ""


def deadline_s(environment: Mapping[str, str] = os.environ) -> float:
    """Return the deadline from the environment, seconds; `ConfigurationError` unless it is a positive number."""
    text = environment.get(DEADLINE, "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise ConfigurationError(f"{DEADLINE} must be a number of seconds above 0, got {text!r}")
    return seconds


def capacities(moe: Any) -> tuple[int, int]:
    """Return the rows per rank that the decode and prompt buffers hold, from a `FusedMoEConfig`."""
    sp_size = max(1, moe.moe_parallel_config.sp_size)
    largest = -(-int(moe.max_num_tokens) // sp_size)
    graphs = -(-int(moe.max_capture_size or 0) // sp_size) or 256
    return min(graphs, largest), largest if largest <= graphs else min(PROMPT_ROWS, largest)


def make_exchange(moe: Any, shape: ExpertsShape, group: dist.ProcessGroup, experts: LocalExperts) -> Exchange:
    """Map the buffers of an exchange on all ranks, and load all kernels, the experts' too. Collective."""
    from lockstep.dispatch.nvlink import NvlinkDispatcher

    # If each worker sees only its own GPU, torch numbers each of them 0. The ranks have checked that they differ.
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    made = [
        NvlinkDispatcher(
            group, num_experts=shape.num_experts, hidden_size=shape.hidden_size, top_k=shape.top_k,
            max_tokens_per_rank=capacity, deadline_s=START_DEADLINE_S, device=shape.device,
        )
        for capacity in dict.fromkeys(capacities(moe))
    ]  # fmt: skip
    for dispatcher in made:
        experts.warm_up(dispatcher.num_ranks * dispatcher.max_tokens_per_rank * dispatcher.top_k, fp8=False)
    parallel = moe.moe_parallel_config
    sp_size = max(1, parallel.sp_size)
    return Exchange(made[0], made[-1], rank=parallel.ep_rank, sp_size=sp_size, deadline_s=deadline_s())


def join(
    config: Any, moe: Any, method: Any, layer: Any, *,
    facts: Callable[[torch.device], list[str] | None] = mapping_facts,
    make: Callable[[Any, ExpertsShape, dist.ProcessGroup, LocalExperts], Exchange] = make_exchange,
) -> Callable[..., torch.Tensor] | None:  # fmt: skip
    """Return the function that runs a layer's rows, or None to keep vLLM's path. Collective, agreed for every layer."""
    parallel = moe.moe_parallel_config
    reason = unsupported(config, moe, method)
    if not parallel.use_ep or parallel.dp_size < 2 or getattr(config.parallel_config, "enable_elastic_ep", False):
        say(f"vLLM's own path stays: {reason}", logging.WARNING)  # no fixed group to ask
        return None
    group = importlib.import_module("vllm.distributed.parallel_state").get_ep_group()
    experts, device = LocalExperts(LayerWeights(layer)), layer.w2_weight.device
    shape = ExpertsShape(moe.num_experts, moe.hidden_dim, moe.experts_per_token, moe.in_dtype, device)
    if not reason and not experts.run_on_device:
        reason = "experts that our kernels do not run"
    if not reason and not watch_runners():
        reason = "this vLLM runs its steps in a class that is not known"
    alike = {
        "Lockstep's version": __version__, "vLLM's version": importlib.import_module("vllm").__version__,
        "the experts": [shape.num_experts, shape.hidden_size, shape.top_k, str(shape.dtype)],
        "the rows of a step": capacities(moe), "the sequence-parallel ranks": parallel.sp_size,
    }  # fmt: skip
    own = {"no": reason, "maps": facts(device), "alike": alike}
    reason = disagreement(gather_json(own, group.cpu_group, START_DEADLINE_S))
    if not reason and STEP.watch is None:
        _, board = open_transport(group.cpu_group, START_DEADLINE_S)
        if board is None:
            reason = "the ranks share no memory of their host"
        else:
            STEP.watch = Watch(STEP, board, group.rank_in_group, deadline_s())
            STEP.watch.start()
    if reason:
        say(f"vLLM's own path stays: {reason}", logging.WARNING)
        return None
    if shape not in STEP.exchanges:
        # Tensors made in inference mode are read-only outside it, where the step's count is written.
        with torch.inference_mode(False):
            if STEP.cell is None:
                STEP.cell = torch.zeros(1, dtype=torch.int32, device=device)
            STEP.exchanges[shape] = exchange = make(moe, shape, group.device_group, experts)
        say(
            f"{shape.num_experts} routed experts on {group.world_size} ranks go through Lockstep's exchange: steps of "
            f"up to {exchange.decode.max_tokens_per_rank} rows per rank in one piece, larger ones in chunks of "
            f"{exchange.prompt.max_tokens_per_rank}; a rank counts as missing after {exchange.deadline_s:g} s"
        )
    return partial(STEP.exchanges[shape].run, STEP, experts)


def make_method(base: Any, join: Callable[..., Callable[..., torch.Tensor] | None] = join) -> Any:
    """Return a subclass of `base`, vLLM's method for unquantised experts, that uses our exchange; see `join`."""

    class LockstepFusedMoEMethod(base):  # known at run time only
        """vLLM's method; `run_rows` runs a layer's rows through Lockstep's exchange, or is None."""

        def __init__(self, moe: Any, *args: Any, **options: Any) -> None:
            super().__init__(moe, *args, **options)
            self._lockstep_config = importlib.import_module("vllm.config").get_current_vllm_config()
            self._has_asked = False
            self.run_rows: Callable[..., torch.Tensor] | None = None

        @property
        def mk_can_overlap_shared_experts(self) -> bool:
            """Whether `apply` runs the shared experts itself: vLLM's kernel may, our exchange leaves them to vLLM."""
            return self.run_rows is None and bool(super().mk_can_overlap_shared_experts)

        def process_weights_after_loading(self, layer: Any) -> None:
            """Load as vLLM does, then join the exchange. Collective over the expert-parallel group."""
            super().process_weights_after_loading(layer)
            if not self._has_asked:
                self._has_asked = True
                self.run_rows = join(self._lockstep_config, self.moe, self, layer)

        def apply(
            self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
            shared_experts: Any = None, shared_experts_input: torch.Tensor | None = None,
        ) -> Any:  # fmt: skip
            """Run the routed experts of rows `[n, hidden]`; vLLM runs the shared ones before or after this call."""
            if self.run_rows is None or layer.apply_router_weight_on_input:
                return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
            context = importlib.import_module("vllm.forward_context")
            metadata = context.get_forward_context().dp_metadata if context.is_forward_context_available() else None
            if metadata is None:
                needed = "the token counts of all ranks in vLLM's forward context"
                raise ConfigurationError(f"LOCKSTEP_VLLM=exchange needs {needed}")
            # Each count includes padding.
            return self.run_rows(x, topk_ids, topk_weights.float(), metadata.num_tokens_across_dp_cpu.tolist())

    return LockstepFusedMoEMethod


_BEGIN, _HAND_OUT = ("execute_model", "_dummy_run"), ("sample_tokens", "get_output")


def _num_tokens(scheduler_output: Any, *_: Any, dummy_run: bool = False, **__: Any) -> int:
    return 0 if dummy_run else int(scheduler_output.total_num_scheduled_tokens)


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of vLLM that begins a step or hands out its tokens."""

    @wraps(function)
    def call(owner: Any, *args: Any, **options: Any) -> Any:
        if name in _BEGIN:
            STEP.begin(0 if name == "_dummy_run" else _num_tokens(*args, **options))
        result = STEP.within(function, owner, *args, **options)
        if name in _HAND_OUT and not hasattr(result, "get_output"):
            STEP.check()  # the tokens are on the host, so the step is over
        return result

    vars(call)["_lockstep"] = True
    return call


def watch(owner: Any) -> bool:
    """Wrap, once, a class's functions that begin a step or hand out its tokens; return whether it runs steps."""
    for name in (*_BEGIN, *_HAND_OUT):
        function = getattr(owner, name, None)
        if function is not None and not hasattr(function, "_lockstep"):
            setattr(owner, name, _watched(name, function))
    return all(hasattr(owner, name) for name in (*_BEGIN, "sample_tokens"))


def watch_runners() -> bool:
    """Make this worker's steps report their token counts, and check before tokens leave; False if impossible."""
    found = [watch(getattr(sys.modules.get(module), name, None)) for module, name in RUNNERS]
    return any(found)


def missing_symbols() -> str:
    """Return the first of `SYMBOLS` that this vLLM lacks, or an empty string."""
    for module_name, names in SYMBOLS.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            return f"{module_name} cannot be imported ({error})"
        for name in names:
            owner, _, attribute = name.rpartition(".")
            if not hasattr(getattr(module, owner) if owner else module, attribute):
                return f"{module_name} has no {name}"
    return ""


def register_method(join: Callable[..., Callable[..., torch.Tensor] | None] = join) -> str:
    """Replace vLLM's method by ours in its registry; return why not, or an empty string."""
    if obstacle := missing_symbols():
        return obstacle
    deadline_s()  # report a wrong value at start
    base = getattr(importlib.import_module(METHOD_MODULE), METHOD)
    registered = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot.get(METHOD)
    if registered is None:
        base.register_oot(make_method(base, join))
    elif registered.__name__ != "LockstepFusedMoEMethod":
        return f"another plugin has put {registered.__name__} in the place of vLLM's {METHOD}"
    return ""
