# vLLM's routed experts on Lockstep's exchange. All that it relies on in vLLM is named in `SYMBOLS`, by version.
#
# vLLM makes its MoE method for unquantised experts by a registry, in which another class can take the place of its own.
# Ours is a subclass. It loads weights as vLLM does, and runs them through Lockstep's dispatch, experts and combine
# where it can; where it cannot, it is vLLM's own method, and one line says why.

import importlib
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.dispatch.base import ExpertsShape
from lockstep.dispatch.choose import can_map, mapping_facts
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.moe.experts import LocalExperts, silu_and_multiply

logger = logging.getLogger("vllm.plugins.lockstep")

KNOWN_VERSIONS = ("0.26", "0.33")
"""vLLM's versions, as major.minor, whose sources this was written against. 0.26 is the one that was run."""

METHOD_MODULE = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
METHOD = "UnquantizedFusedMoEMethod"

SYMBOLS = {
    METHOD_MODULE: [METHOD, f"{METHOD}.process_weights_after_loading", f"{METHOD}.apply", f"{METHOD}.register_oot"],
    "vllm.model_executor.custom_op": ["op_registry_oot"],
    "vllm.forward_context": ["get_forward_context", "is_forward_context_available"],
    "vllm.distributed.parallel_state": ["get_ep_group"],
    "vllm.config": ["get_current_vllm_config"],
}
"""What is used in both versions, by module."""

RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu_model_runner", "AsyncGPUModelRunnerOutput"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.async_utils", "AsyncOutput"),
)
"""Module and class of what runs a worker's steps and of what hands out their tokens. Which are in use depends on the
model; only what the worker has imported is looked at."""

DEADLINE = "LOCKSTEP_VLLM_DEADLINE_S"
"""Longest wait for a rank in a step that serves requests, seconds; 30 if it is not set."""

START_DEADLINE_S = 600.0
"""Longest wait before the first request: ranks compile and tune kernels at their own pace."""

PROMPT_ROWS = 4096
"""Most rows of a rank in one dispatch of a step that no CUDA graph holds; more go in chunks."""


class Step:
    """What a worker knows of the step that it runs, beside what vLLM's forward context says.

    Attributes:
        num_tokens: tokens of this rank in the step, without padding, 0 in a dummy batch; the host's copy.
        cell: the same on the device, `[1]` int32. Captured graphs read it at each replay.
        serving: whether a request has been seen.
        calls: when each call of vLLM's began that this worker is in, seconds of `time.monotonic`. There may be two:
            tokens of one step are fetched in another thread while the next step begins.
        exchanges: all exchanges of this process, by shape.
        watch: looks after ranks that have stopped; None before the first exchange.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.cell: torch.Tensor | None = None
        self.serving = False
        self.calls: dict[object, float] = {}
        self.exchanges: dict[ExpertsShape, Exchange] = {}
        self.watch: Watch | None = None

    def begin(self, num_tokens: int) -> None:
        """Note how many tokens of requests this rank has. Called before each step, on the stream that will run it.

        Raises:
            RankAbsentError: a rank did not come to an earlier step.
        """
        self.check()
        self.num_tokens = num_tokens
        self.serving = self.serving or num_tokens > 0
        if self.cell is not None:
            self.cell.fill_(num_tokens)

    def within(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of vLLM's in which it may wait for other ranks."""
        call = object()
        self.calls[call] = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            del self.calls[call]

    def check(self) -> None:
        """Raise what a kernel has found out meanwhile; called before a step, and before its tokens leave the worker.

        Raises:
            RankAbsentError: naming the rank.
        """
        for exchange in self.exchanges.values():
            try:
                exchange.check()
            except LockstepError as error:
                tell(str(error), logging.ERROR)
                raise


STEP = Step()
"""Of this process: a worker runs one step at a time."""


class Watch:
    """Notices a rank that is stopped or gone while vLLM itself waits for it, where no kernel of ours does.

    vLLM agrees on each step by a collective of its own, which waits for minutes and names nobody. So each worker has a
    thread that writes the time into memory that all ranks share, and looks at the others' while its worker is busy.

    Args:
        step: of this process.
        beats: `[ranks + 1]` int64 in shared memory: nanoseconds of `time.monotonic_ns`, and 1 once a rank has served.
        rank: this rank.
        deadline_s: how long another rank may be silent during a step of this one.
        end: what to do where the worker does not end by itself: vLLM's wait cannot be called off.
    """

    PERIOD_S = 0.25
    GRACE_S = 2.0

    def __init__(
        self, step: Step, beats: torch.Tensor, rank: int, deadline_s: float, end: Callable[[int], None] = os._exit
    ) -> None:
        self.step, self.beats, self.rank, self.deadline_s, self._end = step, beats, rank, deadline_s, end
        self.beat()

    def start(self) -> None:
        """Begin to beat and to look, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="lockstep-watch", daemon=True).start()

    def beat(self) -> None:
        """Say that this rank is alive, and pass on that requests are served: an idle rank sees none of its own."""
        self.beats[self.rank] = time.monotonic_ns()
        if self.step.serving:
            self.beats[-1] = 1
        elif int(self.beats[-1]):
            self.step.serving = True

    def silent_ranks(self) -> list[int]:
        """Return the ranks that have been silent for as long as the deadline, while this rank is in a step."""
        now = time.monotonic()
        if not self.step.serving or now - min(list(self.step.calls.values()), default=now) < self.deadline_s:
            return []
        beats = self.beats.tolist()[:-1]
        return [rank for rank, beat in enumerate(beats) if rank != self.rank and now - beat / 1e9 >= self.deadline_s]

    def look(self) -> str:
        """Return what keeps this rank's step from ending, or an empty string."""
        try:
            self.step.check()
        except LockstepError as error:
            return str(error)
        names = ", ".join(map(str, self.silent_ranks()))
        waited = f"has been silent for {self.deadline_s:g} s while rank {self.rank} is in a step"
        return f"EP rank {names} {waited}" if names else ""

    def _run(self) -> None:
        while True:
            time.sleep(self.PERIOD_S)
            self.beat()
            reason = self.look()
            if reason:
                tell(reason, logging.ERROR)
                time.sleep(self.GRACE_S)  # the worker may be about to raise the same
                self._end(1)
                return


def share_beats(group: dist.ProcessGroup, rank: int) -> torch.Tensor:
    """Return memory that all ranks of a host share, `[ranks + 1]` int64, see `Watch`. Collective, on the CPU."""
    name = gather_texts(secrets.token_hex(8), group)[0]
    path = Path("/dev/shm") / f"lockstep-vllm-{name}"
    if rank == 0:
        path.touch(mode=0o600, exist_ok=False)
    gather_texts("made", group)
    beats = torch.from_file(str(path), shared=True, size=group.size() + 1, dtype=torch.int64)
    beats[rank] = time.monotonic_ns()
    gather_texts("mapped", group)  # with everybody's first beat in it
    if rank == 0:
        path.unlink()  # it lives on as long as somebody has mapped it
    return beats


class Exchange:
    """Dispatch and combine for all layers of one shape, over the expert-parallel group.

    Steps that CUDA graphs hold go through buffers as large as the largest graph; larger ones through buffers of their
    own, in chunks where they must. Which of the two, and how many chunks, follows from counts that all ranks know.

    Args:
        decode: the dispatcher with the smaller buffers.
        prompt: the one for all larger steps; the same object where graphs are as large as any step.
        sp_size: ranks that share the tokens of one data-parallel rank.
        sp_rank: this rank among them.
        deadline_s: longest wait for a rank while requests are served.
    """

    def __init__(self, decode: Any, prompt: Any, *, sp_size: int = 1, sp_rank: int = 0, deadline_s: float = 30) -> None:
        self.decode, self.prompt, self.dispatchers = decode, prompt, list(dict.fromkeys((decode, prompt)))
        self.sp_size, self.sp_rank, self.deadline_s = sp_size, sp_rank, deadline_s

    def check(self) -> None:
        """Raise if a kernel gave up waiting, naming the rank that did not come."""
        for dispatcher in self.dispatchers:
            dispatcher.check()

    def run(
        self,
        step: Step,
        experts: LocalExperts,
        rows: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        num_tokens_across_dp: Sequence[int],
    ) -> torch.Tensor:
        """Run this rank's rows through their experts, wherever those are. Collective.

        Args:
            step: says how many of the rows are tokens.
            experts: this rank's.
            rows: `[n, hidden]` bfloat16, the tokens first, padding behind them.
            topk_ids: global experts, `[n, top_k]`.
            topk_weights: `[n, top_k]`.
            num_tokens_across_dp: rows of each data-parallel rank, padding included, `[dp_size]`; the same on all.

        Returns:
            The weighted sums, `[n, hidden]`; padding rows mean nothing.
        """
        sizes = [-(-count // self.sp_size) for count in num_tokens_across_dp for _ in range(self.sp_size)]
        largest = max(sizes)
        dispatcher = self.decode if largest <= self.decode.max_tokens_per_rank else self.prompt
        limit = dispatcher.max_tokens_per_rank
        # A graph keeps the deadline that it was captured with.
        in_earnest = step.serving or (rows.is_cuda and torch.cuda.is_current_stream_capturing())
        dispatcher.set_deadline(self.deadline_s if in_earnest else START_DEADLINE_S)
        outputs = []
        for start in range(0, max(1, largest), limit):
            chunk = slice(start, start + limit)
            route = dispatcher.route([max(0, min(limit, size - start)) for size in sizes])
            num_tokens = self._num_tokens(step, rows.shape[0], start, limit)
            handle = dispatcher.dispatch(route, rows[chunk], topk_ids[chunk], topk_weights[chunk], num_tokens)
            rows_per_expert = sum(route.sizes) * dispatcher.top_k / dispatcher.num_experts
            result = experts.on_device(
                handle.hidden_states, handle.scales, handle.gather_index, handle.expert_offsets, rows_per_expert
            )
            outputs.append(dispatcher.combine(result, handle))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _num_tokens(self, step: Step, num_rows: int, start: int, limit: int) -> torch.Tensor:
        """How many rows of the chunk at `start` are tokens, `[1]` int32 on the device; this rank has `num_rows`."""
        assert step.cell is not None
        if self.sp_size == 1 and num_rows <= limit and start == 0:
            return step.cell
        before = self.sp_rank * num_rows + start  # tokens of the data-parallel rank that others or earlier chunks take
        return (step.cell - before).clamp_(0, max(0, min(limit, num_rows - start)))


class LayerWeights:
    """A layer's weights under the names that `LocalExperts` reads; read anew at each call, since vLLM may replace them.

    Args:
        layer: vLLM's `RoutedExperts`, with `w13_weight` (gate rows first, then up rows) and `w2_weight`.
    """

    has_gate = True
    _apply_gate = staticmethod(silu_and_multiply)

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def gate_up_proj(self) -> Any:
        """`[num_local_experts, 2 * intermediate, hidden]`."""
        return self._layer.w13_weight

    @property
    def down_proj(self) -> Any:
        """`[num_local_experts, hidden, intermediate]`."""
        return self._layer.w2_weight


def unsupported(config: Any, moe: Any, method: Any) -> str:
    """Return why a layer's experts keep vLLM's own path by its and vLLM's configuration alone, or an empty string."""
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


def gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """Return a text of every rank, of at most 4000 bytes each, in rank order. Collective, on the CPU."""
    raw = text.encode()[:4000]
    own = torch.zeros(4096, dtype=torch.uint8)
    own[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    all_texts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(all_texts, own, group=group)
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in all_texts]


def agree(reason: str, group: dist.ProcessGroup, device: torch.device) -> str:
    """Return why the ranks cannot use the exchange, the same answer on all, or an empty string. Collective, on the CPU.

    Args:
        reason: why this rank cannot, or an empty string.
        group: the expert-parallel ranks.
        device: this rank's GPU.
    """
    facts = None if reason else mapping_facts(device)
    answers = [json.loads(text) for text in gather_texts(json.dumps({"no": reason, "maps": facts}), group)]
    for rank, answer in enumerate(answers):
        if answer["no"]:
            return f"{answer['no']} (on EP rank {rank})"
    if not can_map([answer["maps"] for answer in answers]):
        return "the ranks' GPUs cannot map each other's memory: over 8, not on one host, or not all joined by NVLink"
    return ""


def deadline_s() -> float:
    """Return the deadline that the environment asks for, seconds; `ConfigurationError` if it is no positive number."""
    text = os.environ.get(DEADLINE, "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise ConfigurationError(f"{DEADLINE} must be a number of seconds above 0, got {text!r}")
    return seconds


def make_exchange(moe: Any, shape: ExpertsShape, group: dist.ProcessGroup) -> Exchange:
    """Map the buffers of an exchange on all ranks, as many rows as vLLM's `FusedMoEConfig` says. Collective."""
    from lockstep.dispatch.nvlink import NvlinkDispatcher

    experts = moe.moe_parallel_config
    sp_size = max(1, experts.sp_size)
    largest = -(-int(moe.max_num_tokens) // sp_size)
    graphs = -(-int(moe.max_capture_size or 0) // sp_size) or 256
    # Where each worker sees its own GPU only, all are number 0 to torch. That they differ was agreed before.
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")

    def make(capacity: int) -> NvlinkDispatcher:
        return NvlinkDispatcher(
            group, num_experts=shape.num_experts, hidden_size=shape.hidden_size, top_k=shape.top_k,
            max_tokens_per_rank=capacity, deadline_s=START_DEADLINE_S, device=shape.device,
        )  # fmt: skip

    decode = make(min(graphs, largest))
    prompt = decode if largest <= graphs else make(min(PROMPT_ROWS, largest))
    return Exchange(decode, prompt, sp_size=sp_size, sp_rank=experts.ep_rank % sp_size, deadline_s=deadline_s())


def make_method(base: Any) -> Any:
    """Return `base`, vLLM's method for unquantised experts, with our exchange in it."""

    class LockstepFusedMoEMethod(base):  # known at run time only
        """vLLM's method; runs the experts through Lockstep's exchange where it can."""

        def __init__(self, moe: Any, *args: Any, **options: Any) -> None:
            super().__init__(moe, *args, **options)
            self._lockstep_config = importlib.import_module("vllm.config").get_current_vllm_config()
            self._exchange: Exchange | None = None
            self._experts: LocalExperts | None = None

        @property
        def mk_can_overlap_shared_experts(self) -> bool:
            """Whether `apply` runs the shared experts itself: vLLM's kernel may, our exchange leaves them to vLLM."""
            return self._exchange is None and bool(super().mk_can_overlap_shared_experts)

        def process_weights_after_loading(self, layer: Any) -> None:
            """Load as vLLM does, then join the exchange. Collective over the expert-parallel group."""
            super().process_weights_after_loading(layer)
            if self._experts is None:
                self._experts = LocalExperts(LayerWeights(layer))
                self._exchange = join(self._lockstep_config, self.moe, self, self._experts, layer.w2_weight.device)

        def apply(
            self,
            layer: Any,
            x: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            shared_experts: Any = None,
            shared_experts_input: torch.Tensor | None = None,
        ) -> Any:
            """Run the routed experts of rows `[n, hidden]`; vLLM runs the shared ones before or after this call."""
            if self._exchange is None or layer.apply_router_weight_on_input:
                return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
            assert self._experts is not None
            return self._exchange.run(STEP, self._experts, x, topk_ids, topk_weights.float(), counts_across_dp())

    return LockstepFusedMoEMethod


def counts_across_dp() -> list[int]:
    """Return the rows of each data-parallel rank in this step, padding included, `[dp_size]`."""
    context = importlib.import_module("vllm.forward_context")
    metadata = context.get_forward_context().dp_metadata if context.is_forward_context_available() else None
    if metadata is None:
        raise ConfigurationError("LOCKSTEP_VLLM=exchange needs the token counts of all ranks in vLLM's forward context")
    counts: list[int] = metadata.num_tokens_across_dp_cpu.tolist()
    return counts


_told: set[str] = set()


def tell(text: str, level: int = logging.INFO) -> None:
    """Log a line once per process."""
    if text not in _told:
        _told.add(text)
        logger.log(level, "LOCKSTEP_VLLM=exchange: %s", text)


def join(config: Any, moe: Any, method: Any, experts: LocalExperts, device: torch.device) -> Exchange | None:
    """Return the exchange for a layer's experts, or None where vLLM's own path stays. Collective; logs one line."""
    reason = unsupported(config, moe, method)
    if reason:
        # Equal on all ranks, as the configuration is: nobody waits for anybody.
        tell(f"vLLM's own path stays: {reason}", logging.WARNING)
        return None
    shape = ExpertsShape(moe.num_experts, moe.hidden_dim, moe.experts_per_token, moe.in_dtype, device)
    if shape in STEP.exchanges:
        return STEP.exchanges[shape]
    group = importlib.import_module("vllm.distributed.parallel_state").get_ep_group()
    if not experts.run_on_device:
        reason = "experts that our kernels do not run"
    elif not watch_runners():
        reason = "this vLLM runs its steps in a class that is not known"
    reason = agree(reason, group.cpu_group, device)
    if reason:
        tell(f"vLLM's own path stays: {reason}", logging.WARNING)
        return None
    # Tensors made in inference mode could not be written to outside it, where a step's count is noted.
    with torch.inference_mode(False):
        if STEP.cell is None:
            STEP.cell = torch.zeros(1, dtype=torch.int32, device=device)
        exchange = make_exchange(moe, shape, group.device_group)
    for dispatcher in exchange.dispatchers:
        experts.warm_up(dispatcher.num_ranks * dispatcher.max_tokens_per_rank * dispatcher.top_k, fp8=False)
    STEP.exchanges[shape] = exchange
    if STEP.watch is None:
        beats = share_beats(group.cpu_group, group.rank_in_group)
        STEP.watch = Watch(STEP, beats, group.rank_in_group, exchange.deadline_s)
        STEP.watch.start()
    tell(
        f"{shape.num_experts} routed experts on {group.world_size} ranks go through Lockstep's exchange: steps of up "
        f"to {exchange.decode.max_tokens_per_rank} rows per rank in one piece, larger ones in chunks of "
        f"{exchange.prompt.max_tokens_per_rank}; a rank counts as missing after {exchange.deadline_s:g} s"
    )
    return exchange


def _execute_model(function: Any, runner: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
    STEP.begin(0 if options.get("dummy_run", False) else int(scheduler_output.total_num_scheduled_tokens))
    return STEP.within(function, runner, scheduler_output, *args, **options)


def _dummy_run(function: Any, *args: Any, **options: Any) -> Any:
    STEP.begin(0)
    return STEP.within(function, *args, **options)


def _hand_out_tokens(function: Any, *args: Any, **options: Any) -> Any:
    result = STEP.within(function, *args, **options)
    if not hasattr(result, "get_output"):
        STEP.check()  # the tokens are on the host, so the step is over
    return result


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "execute_model": _execute_model,
    "_dummy_run": _dummy_run,
    "sample_tokens": _hand_out_tokens,
    "get_output": _hand_out_tokens,
}


def _wrapped(function: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return around(function, *args, **options)

    vars(call)["_lockstep"] = True
    return call


def watch(owner: Any) -> bool:
    """Wrap, once, the functions of a class that begin a step or hand out its tokens; say whether it runs steps."""
    for name, around in _WRAPPERS.items():
        function = getattr(owner, name, None)
        if function is not None and not hasattr(function, "_lockstep"):
            setattr(owner, name, _wrapped(function, around))
    return all(hasattr(owner, name) for name in ("execute_model", "_dummy_run", "sample_tokens"))


def watch_runners() -> bool:
    """Have each step of this worker say how many tokens it has, and its tokens wait for our word; False if none can."""
    found = [watch(getattr(sys.modules.get(module), name, None)) for module, name in RUNNERS]
    return any(found)


def missing_symbols() -> str:
    """Return what this vLLM lacks of `SYMBOLS`, or an empty string."""
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


def register_method() -> str:
    """Put our method in the place of vLLM's in its registry of replacements; return why not, or an empty string."""
    obstacle = missing_symbols()
    if obstacle:
        return obstacle
    deadline_s()  # a wrong value is an error at start
    base = getattr(importlib.import_module(METHOD_MODULE), METHOD)
    registered = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot.get(METHOD)
    if registered is None:
        base.register_oot(make_method(base))
    elif registered.__name__ != "LockstepFusedMoEMethod":
        return f"another plugin has put {registered.__name__} in the place of vLLM's {METHOD}"
    return ""
