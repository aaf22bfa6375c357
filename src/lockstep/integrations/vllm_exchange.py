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
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from lockstep.dispatch.choose import can_map, mapping_facts
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.moe.experts import LocalExperts

logger = logging.getLogger("vllm.plugins.lockstep")

KNOWN_VERSIONS = ("0.26", "0.33")
"""vLLM's versions, as major.minor, whose sources this was written against. 0.26 is the one that was run."""

METHOD_MODULE = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
METHOD = "UnquantizedFusedMoEMethod"

SYMBOLS: dict[str, dict[str, tuple[str, ...]]] = {
    METHOD_MODULE: {METHOD: ("__init__", "process_weights_after_loading", "apply", "register_oot")},
    "vllm.forward_context": {"get_forward_context": (), "is_forward_context_available": ()},
    "vllm.distributed.parallel_state": {"get_ep_group": ()},
    "vllm.config": {"get_current_vllm_config": ()},
}
"""What is used in both versions: module, name in it, and what a class must have."""

RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner", "AsyncGPUModelRunnerOutput"),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner", ""),
    "vllm.v1.worker.gpu.async_utils": ("", "AsyncOutput"),
}
"""Where the worker runs its steps, and the class whose `get_output` hands out their tokens. Which of the two runners is
in use depends on the model; only what the worker has imported is looked at."""

DEADLINE = "LOCKSTEP_VLLM_DEADLINE_S"
"""Longest wait for a rank in a step that serves requests, seconds; 30 if it is not set."""

START_DEADLINE_S = 600.0
"""Longest wait before the first request: ranks compile and tune kernels at their own pace."""

PROMPT_ROWS = 4096
"""Most rows of a rank in one dispatch of a step that no CUDA graph holds; more go in chunks."""


@dataclass(frozen=True)
class Shape:
    """The routed experts of a layer. Layers with equal shapes share their buffers.

    Attributes:
        num_experts: of all ranks.
        hidden_size: of a row.
        top_k: experts per row.
    """

    num_experts: int
    hidden_size: int
    top_k: int


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
        self.exchanges: dict[Shape, Exchange] = {}
        self.watch: Watch | None = None

    def begin(self, num_tokens: int) -> None:
        """Note how many tokens this rank has. Called before each step, on the stream that will run it.

        Args:
            num_tokens: of requests; 0 where the rank only takes part.

        Raises:
            RankAbsentError: a rank did not come to an earlier step.
        """
        self.check()
        self.num_tokens = num_tokens
        self.serving = self.serving or num_tokens > 0
        if self.cell is not None:
            self.cell.fill_(num_tokens)

    def within(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of vLLM's in which it may wait for other ranks.

        Args:
            function: the function; gets `args` and `options`.
            args: positional arguments.
            options: keyword arguments.
        """
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
                logger.error("LOCKSTEP_VLLM=exchange: %s", error)
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
        self.step, self.beats, self.rank, self.deadline_s = step, beats, rank, deadline_s
        self._end = end
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
        silent = self.silent_ranks()
        if not silent:
            return ""
        names = ", ".join(map(str, silent))
        return f"EP rank {names} has been silent for {self.deadline_s:g} s while rank {self.rank} is in a step"

    def _run(self) -> None:
        while True:
            time.sleep(self.PERIOD_S)
            self.beat()
            reason = self.look()
            if reason:
                tell(reason, level=logging.ERROR)
                time.sleep(self.GRACE_S)  # the worker may be about to raise the same
                self._end(1)
                return


def share_beats(group: dist.ProcessGroup, rank: int) -> torch.Tensor:
    """Return memory that all ranks of a host share, `[ranks + 1]` int64, see `Watch`. Collective.

    Args:
        group: the ranks, for tensors on the CPU.
        rank: this rank.
    """
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

    def __init__(
        self, decode: Any, prompt: Any, *, sp_size: int = 1, sp_rank: int = 0, deadline_s: float = 30.0
    ) -> None:
        self.decode, self.prompt = decode, prompt
        self.sp_size, self.sp_rank = sp_size, sp_rank
        self.deadline_s = deadline_s

    def check(self) -> None:
        """Raise if a kernel gave up waiting, naming the rank that did not come."""
        for dispatcher in {id(each): each for each in (self.decode, self.prompt)}.values():
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
        assert step.cell is not None
        if largest <= limit:
            return self._run_chunk(
                dispatcher, experts, rows, topk_ids, topk_weights, self._tokens(step, rows, 0), sizes
            )
        output = torch.empty_like(rows)
        for start in range(0, largest, limit):
            chunk = slice(start, start + limit)
            own = rows[chunk]
            chunk_sizes = [max(0, min(limit, size - start)) for size in sizes]
            num_tokens = self._tokens(step, own, start, rows.shape[0])
            output[chunk] = self._run_chunk(
                dispatcher, experts, own, topk_ids[chunk], topk_weights[chunk], num_tokens, chunk_sizes
            )
        return output

    def _tokens(self, step: Step, own: torch.Tensor, start: int, num_rows: int | None = None) -> torch.Tensor:
        """Return how many of a chunk's rows are tokens, `[1]` int32 on the device.

        Args:
            step: the step.
            own: this rank's rows of the chunk.
            start: first of them, among this rank's rows.
            num_rows: this rank's rows in the step, padding included; None: those of `own`.
        """
        assert step.cell is not None
        num_rows = own.shape[0] if num_rows is None else num_rows
        before = self.sp_rank * num_rows + start  # tokens of the data-parallel rank that others or earlier chunks take
        if before == 0 and num_rows == own.shape[0] and self.sp_size == 1:
            return step.cell
        return (step.cell - before).clamp_(0, own.shape[0])

    def _run_chunk(
        self,
        dispatcher: Any,
        experts: LocalExperts,
        rows: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        num_tokens: torch.Tensor,
        sizes: Sequence[int],
    ) -> torch.Tensor:
        handle = dispatcher.dispatch(dispatcher.route(sizes), rows, topk_ids, topk_weights, num_tokens)
        rows_per_expert = sum(sizes) * dispatcher.top_k / dispatcher.num_experts
        result = experts.on_device(
            handle.hidden_states, handle.scales, handle.gather_index, handle.expert_offsets, rows_per_expert
        )
        return dispatcher.combine(result, handle)


class LayerWeights:
    """A layer's weights under the names that `LocalExperts` reads; read anew at each call, since vLLM may replace them.

    Args:
        layer: vLLM's `RoutedExperts`, with `w13_weight` (gate rows first, then up rows) and `w2_weight`.
    """

    has_gate = True

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def gate_up_proj(self) -> torch.Tensor:
        """`[num_local_experts, 2 * intermediate, hidden]`."""
        weight: torch.Tensor = self._layer.w13_weight
        return weight

    @property
    def down_proj(self) -> torch.Tensor:
        """`[num_local_experts, hidden, intermediate]`."""
        weight: torch.Tensor = self._layer.w2_weight
        return weight

    @staticmethod
    def _apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def unsupported(config: Any, moe: Any, method: Any) -> str:
    """Return why a model's experts keep vLLM's own path, judged by the configuration alone, or an empty string.

    Args:
        config: vLLM's configuration.
        moe: the layer's `FusedMoEConfig`.
        method: its MoE method, which has chosen a backend.
    """
    parallel, experts = config.parallel_config, moe.moe_parallel_config
    activation = str(getattr(moe.activation, "value", moe.activation))
    backend = str(getattr(getattr(method, "unquantized_backend", None), "name", None))
    checks = (
        (not experts.use_ep, "expert parallelism is off (enable_expert_parallel)"),
        (experts.dp_size < 2, "data_parallel_size is 1"),
        (
            parallel.tensor_parallel_size > 1 and not experts.is_sequence_parallel,
            "tensor_parallel_size > 1 without sequence-parallel experts",
        ),
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
        (
            any(getattr(moe, name, None) is not None for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")),
            "a clamped or scaled SwiGLU",
        ),
        (moe.num_experts % experts.ep_size != 0, f"{moe.num_experts} experts on {experts.ep_size} ranks"),
        (moe.hidden_dim != (moe.hidden_dim_unpadded or moe.hidden_dim), "padded rows"),
        (bool(getattr(moe, "intermediate_pad", None)), "padded experts"),
        (
            backend != "TRITON",
            f"weights in the layout of vLLM's backend {backend} (set moe_backend=triton)",
        ),
    )
    return "; ".join(reason for holds, reason in checks if holds)


def gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """Return a short text of every rank, in rank order. Collective.

    Args:
        text: this rank's; at most 4000 bytes of it arrive.
        group: of the ranks, for tensors on the CPU.
    """
    raw = text.encode()[:4000]
    own = torch.zeros(4096, dtype=torch.uint8)
    own[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    all_texts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(all_texts, own, group=group)
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in all_texts]


def agree(reason: str, group: dist.ProcessGroup, device: torch.device) -> str:
    """Return why the ranks cannot use the exchange, the same answer on all, or an empty string. Collective.

    Args:
        reason: why this rank cannot, or an empty string.
        group: the expert-parallel ranks, for tensors on the CPU.
        device: this rank's GPU.
    """
    facts = None if reason else mapping_facts(device)
    answers = [json.loads(text) for text in gather_texts(json.dumps({"no": reason, "maps": facts}), group)]
    for rank, answer in enumerate(answers):
        if answer["no"]:
            return f"{answer['no']} (on EP rank {rank})"
    if not can_map([answer["maps"] for answer in answers]):
        return "the ranks' GPUs cannot map each other's memory: not on one host, or without NVLink between all of them"
    return ""


def deadline_s() -> float:
    """Return the deadline that the environment asks for, seconds.

    Raises:
        ConfigurationError: if it is no positive number.
    """
    text = os.environ.get(DEADLINE, "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise ConfigurationError(f"{DEADLINE} must be a number of seconds above 0, got {text!r}")
    return seconds


def make_exchange(config: Any, moe: Any, shape: Shape, group: dist.ProcessGroup, device: torch.device) -> Exchange:
    """Map the buffers of an exchange on all ranks. Collective.

    Args:
        config: vLLM's configuration.
        moe: the layer's `FusedMoEConfig`.
        shape: of its experts.
        group: the expert-parallel ranks.
        device: this rank's GPU.
    """
    from lockstep.dispatch.nvlink import NvlinkDispatcher

    experts = moe.moe_parallel_config
    sp_size = max(1, experts.sp_size)
    largest = -(-int(moe.max_num_tokens) // sp_size)
    graphs = -(-int(moe.max_capture_size or 0) // sp_size) or 256
    seconds = deadline_s()
    # Where each worker sees its own GPU only, all are number 0 to torch. That they differ was agreed before.
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")

    def make(capacity: int) -> NvlinkDispatcher:
        return NvlinkDispatcher(
            group,
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            max_tokens_per_rank=capacity,
            deadline_s=START_DEADLINE_S,
            device=device,
        )

    decode = make(min(graphs, largest))
    prompt = decode if largest <= decode.max_tokens_per_rank else make(min(PROMPT_ROWS, largest))
    sp_rank = int(experts.ep_rank) % sp_size
    return Exchange(decode, prompt, sp_size=sp_size, sp_rank=sp_rank, deadline_s=seconds)


def make_method(base: Any) -> Any:
    """Return vLLM's method for unquantised experts with our exchange in it.

    Args:
        base: vLLM's `UnquantizedFusedMoEMethod`.
    """

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
            """Load as vLLM does, then join the exchange. Collective over the expert-parallel group.

            Args:
                layer: vLLM's `RoutedExperts`.
            """
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
            """Run the routed experts; see vLLM.

            Args:
                layer: vLLM's `RoutedExperts`.
                x: rows, `[n, hidden]`.
                topk_weights: `[n, top_k]`.
                topk_ids: `[n, top_k]`.
                shared_experts: run by vLLM before or after this call.
                shared_experts_input: their input.
            """
            if self._exchange is None or layer.apply_router_weight_on_input:
                return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
            assert self._experts is not None
            return self._exchange.run(STEP, self._experts, x, topk_ids, topk_weights.float(), counts_across_dp())

    return LockstepFusedMoEMethod


def counts_across_dp() -> list[int]:
    """Return the rows of each data-parallel rank in this step, padding included, `[dp_size]`.

    Raises:
        ConfigurationError: outside a step of several ranks.
    """
    context = importlib.import_module("vllm.forward_context")
    metadata = context.get_forward_context().dp_metadata if context.is_forward_context_available() else None
    if metadata is None:
        raise ConfigurationError("LOCKSTEP_VLLM=exchange needs the token counts of all ranks in vLLM's forward context")
    counts: list[int] = metadata.num_tokens_across_dp_cpu.tolist()
    return counts


_told: set[str] = set()


def tell(text: str, *, level: int = logging.INFO) -> None:
    """Log a line once per process.

    Args:
        text: the line.
        level: how loud.
    """
    if text not in _told:
        _told.add(text)
        logger.log(level, "LOCKSTEP_VLLM=exchange: %s", text)


def join(config: Any, moe: Any, method: Any, experts: LocalExperts, device: torch.device) -> Exchange | None:
    """Return the exchange for a layer's experts, or None where vLLM's own path stays. Collective; logs one line.

    Args:
        config: vLLM's configuration.
        moe: the layer's `FusedMoEConfig`.
        method: its MoE method.
        experts: this rank's experts.
        device: this rank's device.
    """
    reason = unsupported(config, moe, method)
    if reason:
        # Equal on all ranks, as the configuration is: nobody waits for anybody.
        tell(f"vLLM's own path stays: {reason}", level=logging.WARNING)
        return None
    shape = Shape(int(moe.num_experts), int(moe.hidden_dim), int(moe.experts_per_token))
    known = STEP.exchanges.get(shape)
    if known is not None:
        return known
    group = importlib.import_module("vllm.distributed.parallel_state").get_ep_group()
    reason = "" if experts.run_on_device else "experts that our kernels do not run"
    if not watch_runners():
        reason = reason or "this vLLM runs its steps in a class that is not known"
    if not reason and group.world_size > 8:
        reason = f"{group.world_size} ranks; at most 8 GPUs of one host"
    reason = agree(reason, group.cpu_group, device)
    if reason:
        tell(f"vLLM's own path stays: {reason}", level=logging.WARNING)
        return None
    # Tensors made in inference mode could not be written to outside it, where a step's count is noted.
    with torch.inference_mode(False):
        if STEP.cell is None:
            STEP.cell = torch.zeros(1, dtype=torch.int32, device=device)
        exchange = make_exchange(config, moe, shape, group.device_group, device)
    for dispatcher in {id(each): each for each in (exchange.decode, exchange.prompt)}.values():
        slots = dispatcher.num_ranks * dispatcher.max_tokens_per_rank * dispatcher.top_k
        experts.warm_up(slots, False)
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


def watch_runners() -> bool:
    """Have each step of this worker tell us its number of tokens, and ask us before tokens leave.

    Returns:
        Whether a class that runs steps was found.
    """
    found = False
    for name, (runner, output) in RUNNERS.items():
        module = sys.modules.get(name)
        if not isinstance(module, ModuleType):
            continue
        if runner and hasattr(module, runner):
            found = True
            watch_runner(getattr(module, runner))
        if output and hasattr(module, output):
            watch_output(getattr(module, output))
    return found


def watch_runner(runner: Any) -> None:
    """Wrap the functions of a runner class that begin a step and that hand out its tokens.

    Args:
        runner: a class with `execute_model`, `_dummy_run` and `sample_tokens`.
    """
    if getattr(runner, "_lockstep_watched", False):
        return
    runner._lockstep_watched = True
    execute_model, dummy_run, sample_tokens = runner.execute_model, runner._dummy_run, runner.sample_tokens

    @wraps(execute_model)
    def counted_execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        is_dummy = options.get("dummy_run", False)
        STEP.begin(0 if is_dummy else int(scheduler_output.total_num_scheduled_tokens))
        return STEP.within(execute_model, self, scheduler_output, *args, **options)

    @wraps(dummy_run)
    def counted_dummy_run(self: Any, *args: Any, **options: Any) -> Any:
        STEP.begin(0)
        return STEP.within(dummy_run, self, *args, **options)

    @wraps(sample_tokens)
    def checked_sample_tokens(self: Any, *args: Any, **options: Any) -> Any:
        result = STEP.within(sample_tokens, self, *args, **options)
        if not hasattr(result, "get_output"):
            STEP.check()  # its tokens are on the host, so the step is over
        return result

    runner.execute_model, runner._dummy_run = counted_execute_model, counted_dummy_run
    runner.sample_tokens = checked_sample_tokens


def watch_output(output: Any) -> None:
    """Wrap the function that waits for a step's tokens.

    Args:
        output: a class with `get_output`.
    """
    if getattr(output, "_lockstep_watched", False):
        return
    output._lockstep_watched = True
    get_output = output.get_output

    @wraps(get_output)
    def checked_get_output(self: Any, *args: Any, **options: Any) -> Any:
        result = STEP.within(get_output, self, *args, **options)
        STEP.check()
        return result

    output.get_output = checked_get_output


def missing_symbols() -> str:
    """Return what this vLLM lacks of `SYMBOLS`, or an empty string."""
    for module_name, names in SYMBOLS.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            return f"{module_name} cannot be imported ({error})"
        for name, attributes in names.items():
            found = getattr(module, name, None)
            if found is None:
                return f"{module_name} has no {name}"
            for attribute in attributes:
                if not hasattr(found, attribute):
                    return f"{module_name}.{name} has no {attribute}"
    return ""


def register_method() -> str:
    """Put our method in the place of vLLM's in its registry of replacements.

    Returns:
        Why it was not, or an empty string.
    """
    obstacle = missing_symbols()
    if obstacle:
        return obstacle
    deadline_s()  # a wrong value is an error at start
    base = getattr(importlib.import_module(METHOD_MODULE), METHOD)
    registry = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot
    registered = registry.get(METHOD)
    if registered is None:
        base.register_oot(make_method(base))
    elif registered.__name__ != "LockstepFusedMoEMethod":
        return f"another plugin has put {registered.__name__} in the place of vLLM's {METHOD}"
    return ""
