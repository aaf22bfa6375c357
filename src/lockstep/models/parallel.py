"""What a model that is spread over the ranks carries with it: its layers, their dispatchers, the present step."""

import contextlib
import functools
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.flight_recorder import FlightRecorder, Phase, watch_group
from lockstep.coordination.forward_context import ForwardContext, in_forward_context, set_forward_context
from lockstep.coordination.session import Session
from lockstep.coordination.step import StepDecision
from lockstep.coordination.termination import speak_before_termination
from lockstep.coordination.transports import wait_until
from lockstep.dispatch.base import Dispatcher
from lockstep.dispatch.choose import AutoDispatcher, can_map, make_dispatcher, make_mapped_dispatcher, mapping_facts
from lockstep.dispatch.collectives import all_gatherv, await_last
from lockstep.dispatch.constants import DispatchConstants, constants_for
from lockstep.errors import ConfigurationError, LockstepError, PeerFailedError, RankMismatchError, TokenCountError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.config import ParallelConfig
from lockstep.metadata.dp_metadata import DPMetadata
from lockstep.models import transformers_internals as internals
from lockstep.models.graphs import StepGraphs
from lockstep.models.groups import Start, abort, open_groups
from lockstep.models.loading import find_experts
from lockstep.models.seal import Seal, weights_are_there
from lockstep.models.watched_group import WatchedGroup
from lockstep.moe.experts import FEW_ROWS, LocalExperts
from lockstep.moe.layer import MoELayer

_MAPPED_ROWS = 4096  # rows of each rank that fit into buffers mapped by all peers, where no chunk size is given
EXPERTS_IMPLEMENTATION = "lockstep"
"""Our name among Transformers' experts implementations. Being none of its own, `generate` never switches it."""
OUTSIDE = (
    "{} is spread over several ranks, so it cannot run alone: call it inside `with lockstep.join(model):`, "
    "on every rank"
)
"""What a call of such a model says outside of `join`; the class is put in."""

# Kernels that wait for a rank end at the deadline by themselves, and then say for which: until then, and a little more.
_KERNELS_S = 0.5


class ModelParallel:
    """What a model that is spread over the ranks carries with it.

    Engines that form their own steps use it without a session: `open()`, then for every step an agreement on
    `coordinator` and either `model(...)` inside `with parallel.step(decision):` or `parallel.run_idle_step(decision)`.

    Args:
        model: whose experts modules hold this rank's experts only.
        config: this rank's place.
        process_group: the ranks; left open.
        max_chunk_size_per_rank: most rows that one rank sends through an MoE layer at a time; None for no limit.
        dispatcher: name of the backend.
        deadline_s: longest wait for any rank, in seconds.
        debug: compare every collective over all ranks before it is issued, and name the first that differs; slow.
        fp8_dispatch: send rows to their experts in fp8.
        attention_group: that the model's tensor-parallel layers run their collectives on, where it has any.

    Attributes:
        layers: the MoE layers in forward order; filled by `open`.
        coordinator: filled by `open`.
        recorder: what this rank did last; filled by `open`.
        session: the `join` block that the model is in, if any.
    """

    def __init__(
        self,
        model: Any,
        config: ParallelConfig,
        process_group: dist.ProcessGroup,
        max_chunk_size_per_rank: int | None,
        dispatcher: str,
        deadline_s: float,
        debug: bool = False,
        fp8_dispatch: bool = False,
        attention_group: WatchedGroup | None = None,
    ) -> None:
        self.model = model
        self.config = config
        if dispatcher == "nvlink" and max_chunk_size_per_rank is None:
            max_chunk_size_per_rank = _MAPPED_ROWS
        self.max_chunk_size_per_rank = max_chunk_size_per_rank
        self.dispatcher_name = dispatcher
        self.deadline_s = deadline_s
        self.debug = debug
        self.fp8_dispatch = fp8_dispatch
        self.layers: list[MoELayer] = []
        self.coordinator: Coordinator
        self.recorder: FlightRecorder
        self.session: Session | None = None
        self._process_group = process_group
        self._attention_group = attention_group
        self._start = Start(process_group)
        # Keys of its own: a second model would otherwise read what the ranks said about the first.
        number = self._start.next_number("model")
        self._store = dist.PrefixStore(str(number), self._start.store)
        self._groups: list[dist.ProcessGroup] = []
        self._mapped: dict[tuple[int, ...], Dispatcher] = {}
        self._can_map = False
        self._constants: DispatchConstants | None = None  # for `auto`, which chooses by them
        self._epoch = -1
        self._meeting = self._start.meeting_place(
            f"{number}/join", f"join() of {type(model).__name__} (model {number})"
        )
        self._plan: ChunkPlan | None = None
        self._captured: tuple[torch.Tensor, bool] | None = None
        self._layers_done = 0
        self._stream: torch.cuda.Stream | None = None
        self._last_step: torch.cuda.Event | None = None
        self._graphs: StepGraphs | None = None
        self._forward = model.forward  # the model's own
        weights_are_there(model)
        self._probe()
        found = find_experts(model)
        self._seals = [Seal(type(model).__name__, name, module) for name, module in found]
        self._experts = [
            LocalExperts(module, check_weights=seal.check) for (_, module), seal in zip(found, self._seals, strict=True)
        ]
        self._seals += [
            Seal(type(model).__name__, name, module)
            for name, module in model.named_modules()
            if any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        ]
        self._expert_names = [name for name, _ in found]

    def _weights_place(self) -> tuple[torch.dtype, torch.device]:
        weight = self.model.get_input_embeddings().weight
        return weight.dtype, weight.device

    def _probe(self) -> None:
        self._probed_place = self._weights_place()
        self._shapes = _experts_shapes(self.model, self._forward)
        self.device = self._shapes[0].device
        self._checksum = _dense_checksum(self.model) if self.config.tensor_parallel_size == 1 else 0

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigurationError(
            f"this {type(self.model).__name__} is spread over the ranks: it cannot be copied (copy.deepcopy) or saved "
            "(torch.save, pickle); load it once more on every rank instead"
        )

    def open(self) -> None:
        """Meet all ranks, check that they are set up alike, and open groups where there are none that may be used.

        Raises:
            RankAbsentError: ranks that did not come before the deadline, by number.
            RankMismatchError: naming the setting that differs and each rank's value.
            ConfigurationError: on all ranks, if a rank's own weights were overwritten or replaced since.
        """
        complaint = self._complaint()
        if not complaint and self._weights_place() != self._probed_place:  # the model was cast or moved since
            self._probe()
            self.close()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # torchrun leaves all ranks of a host on the first GPU
        usable = self._epoch >= 0 and self.coordinator.usable
        self._constants = constants_for(self.device.type) if self.dispatcher_name == "auto" else None
        facts = {"usable": usable, "epoch": self._epoch, "maps": mapping_facts(self.device), **self._settings()}
        facts["complaint"] = complaint
        answers = self._meeting.meet(facts, self.deadline_s)
        complaining = [rank for rank, answer in enumerate(answers) if answer["complaint"]]
        if complaining:
            raise ConfigurationError(
                f"{answers[complaining[0]]['complaint']} (seen on rank {', '.join(map(str, complaining))})"
            )
        for name in self._settings():
            values = [answer[name] for answer in answers]
            if any(value != values[0] for value in values):
                pairs = zip(self._start.processes, values, strict=True)
                listed = ", ".join(f"rank {rank}: {value}" for rank, value in pairs)
                raise RankMismatchError(f"ranks disagree about {name}: {listed}")
        if all(answer["usable"] for answer in answers) and len({answer["epoch"] for answer in answers}) == 1:
            return
        self.close()
        self._can_map = can_map([answer["maps"] for answer in answers])
        self._open_groups(epoch=max(answer["epoch"] for answer in answers) + 1)

    def check_unchanged(self) -> None:
        """Check that this rank still has its own weights, and runs them over the ranks; cheap, for every step.

        Raises:
            ConfigurationError: naming the weight and what was done to it, or the experts implementation.
        """
        for seal in self._seals:
            seal.check()
        for name, experts in zip(self._expert_names, self._experts, strict=True):
            if internals.experts_route(experts.module) != EXPERTS_IMPLEMENTATION:
                raise ConfigurationError(
                    f"{type(self.model).__name__}'s {name} was set to experts_implementation="
                    f"{internals.experts_route(experts.module)!r}, which knows this rank's experts only: leave "
                    f"{EXPERTS_IMPLEMENTATION!r} in place (no set_experts_implementation)"
                )

    def accept_weights(self) -> None:
        """Take this rank's weights as they are now for right, after each rank has written its own part on purpose."""
        for seal in self._seals:
            seal.accept()

    def _complaint(self) -> str:
        """What is wrong with this rank's weights, for all ranks to hear."""
        try:
            for seal in self._seals:
                seal.check_values()
            modules = [experts.module for experts in self._experts]
            _refuse_wrapped_experts(dict(zip(self._expert_names, modules, strict=True)), self.model)
        except ConfigurationError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Let go of the groups that `open` opened; the next `open` makes new ones."""
        if self._epoch >= 0:
            self.recorder.close()
        for group in self._groups:
            # Not destroyed before the process ends: torch gives a destroyed group's name to the next one of the same
            # ranks, which then finds the old addresses in the store and connects to nobody (seen on gloo).
            watch_group(group, None)
        self._groups, self._mapped = [], {}
        self._epoch = -1

    @contextlib.contextmanager
    def step(self, decision: StepDecision, waits: bool = True) -> Iterator[ChunkPlan]:
        """Run one forward pass of the model inside, with the rows that were agreed for this rank.

        If the block raises, this rank still takes part in what the step had planned, so that the others can go on.
        """
        plan = self._begin(decision)
        counts = plan.num_tokens_across_dp
        metadata = DPMetadata.make(self.config, counts[self.config.data_parallel_rank], counts)
        failure: BaseException | None = None
        try:
            self.recorder.mark(Phase.MODEL)
            with set_forward_context(ForwardContext(metadata, plan, step=self.recorder.step)):
                yield plan
        except BaseException as error:
            failure = error
            raise
        finally:
            self._end_step(plan, failure, leaves_attention=True)
        if waits:
            self._await_step()

    @property
    def can_capture(self) -> bool:
        """Whether layers can be part of a CUDA graph whose rows are counted on the device, see `captured_step`."""
        return self.device.type == "cuda" and bool(self._mapped) and self.config.tensor_parallel_size == 1

    def has_many_rows(self, decision: StepDecision) -> bool:
        """Whether the agreed rows of a step give each expert so many that other kernels serve better."""
        return self.layers[0].rows_per_expert(sum(decision.num_tokens_across_dp)) > FEW_ROWS

    @contextlib.contextmanager
    def captured_step(self, num_rows: torch.Tensor, many: bool) -> Iterator[None]:
        """Let layers called inside count their rows on the device: for graphs that serve any agreed counts.

        Args:
            num_rows: how many of the rows that a layer is called with are real, int32 `[1]` on the device.
            many: which kernels run the experts, see `has_many_rows`.
        """
        self._captured = num_rows, many
        try:
            yield
        finally:
            self._captured = None

    def take_part_in_capture(self) -> None:
        """Call all layers inside `captured_step` without rows."""
        for index, layer in enumerate(self.layers):
            rows = torch.empty(0, layer.hidden_size, dtype=layer.dtype, device=layer.device)
            ids = torch.empty(0, layer.top_k, dtype=torch.int32, device=layer.device)
            self._run_layer(index, rows, ids, ids.float())

    def was_replayed(self) -> None:
        """Say inside `step` that a graph has issued all of its layers."""
        self._layers_done = len(self.layers)

    def await_event(self, event: torch.cuda.Event) -> None:
        """Wait for an event behind a step, at most until the deadline; find out whether all ranks took part to there.

        Raises:
            RankAbsentError: a rank did not come, by number.
        """
        self._await_step(event)

    @property
    def tensor_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's requests."""
        return self.layers[0].tensor_parallel_group

    def run_idle_step(self, decision: StepDecision, *, own_stream: bool = True) -> None:
        """Take part in a step without rows: this rank's experts run for the others, nothing else does."""
        with self._idle_stream() if own_stream else contextlib.nullcontext():
            plan = self._begin(decision)
            failure: BaseException | None = None
            try:
                self.recorder.mark(Phase.MODEL)
                self.check_unchanged()
                if self._graphs is not None and self._graphs.serves(plan):
                    self._graphs.run_idle(plan, lambda: self._run_idle_layers(plan))
                    self._layers_done = len(self.layers)
            except BaseException as error:
                failure = error
                raise
            finally:
                self._end_step(plan, failure)

    def run_forward(
        self, plan: ChunkPlan, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the model's forward pass inside `step`, as a CUDA graph where that is possible."""
        if self._graphs is not None and self._graphs.serves(plan):
            output = self._graphs.run_forward(plan, forward, args, kwargs)
            if output is not None:
                self._layers_done = len(self.layers)
                return output
            self._layers_done = 0
        output = forward(*args, **kwargs)
        if self._layers_done < len(self.layers):
            raise ConfigurationError(
                f"only {self._layers_done} of {len(self.layers)} MoE layers of {type(self.model).__name__} ran over "
                f"the ranks in this forward pass: something has replaced {self._expert_names[self._layers_done]}"
            )
        return output

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank what each rank has, outside of steps. Collective over all ranks, after `open`.

        Args:
            data: of this rank; any number of bytes, none too.

        Returns:
            Each rank's, `[ranks]`.

        Raises:
            RankAbsentError: a rank did not come in time; the groups are not used again.
        """
        control = self._groups[0]
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        try:
            self.recorder.mark(Phase.MERGE)
            ones = [1] * self.config.world_size
            (lengths,) = all_gatherv([torch.tensor([[len(data)]])], ones, control, self.deadline_s)
            sizes = lengths.flatten().tolist()
            (everything,) = all_gatherv([mine.view(-1, 1)], sizes, control, self.deadline_s)
        except BaseException as error:
            self._give_up(error)
            raise
        return [bytes(part.flatten().tolist()) for part in everything.split(sizes)]

    def _run_idle_layers(self, plan: ChunkPlan) -> None:
        for index, layer in enumerate(self.layers):
            self._layers_done = index + 1
            layer.take_part(plan)

    @contextlib.contextmanager
    def _idle_stream(self) -> Iterator[None]:
        """Idle steps go on a stream of their own: the script's may stand in a barrier that other ranks come to late."""
        device = self.device
        if device.type != "cuda":
            yield
            return
        torch.cuda.set_device(device)  # the current device is each thread's own
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            yield

    def _begin(self, decision: StepDecision) -> ChunkPlan:
        self._layers_done = 0
        if self._last_step is not None:
            self._last_step.wait()  # steps run one after another, whichever stream each is on
        counts, tp_size, rank = decision.num_tokens_across_dp, self.config.tensor_parallel_size, self.config.rank
        limit = self.max_chunk_size_per_rank
        self._plan = ChunkPlan(counts, tp_size, limit, rank)
        first = self.layers[0]
        if isinstance(first.dispatcher, AutoDispatcher) and first.dispatcher.has_limits:
            # Its fastest backend may take fewer rows at a time than this step has; from agreed counts all cut alike.
            kind = (first.hidden_size, first.top_k, first.dtype, first.device.type)
            limit = first.dispatcher.choose(self._plan.sp_rows, *kind, limit).max_chunk_size
        if limit != self.max_chunk_size_per_rank:
            self._plan = ChunkPlan(counts, tp_size, limit, rank)
        return self._plan

    def _end_step(self, plan: ChunkPlan, failure: BaseException | None, leaves_attention: bool = False) -> None:
        """Run the step's remaining layers without rows of this rank, unless its groups are in an unknown state."""
        if failure is not None and leaves_attention and self._attention_group is not None:
            # Whoever shares this rank's requests waits for it in a layer that it can no longer take part in.
            self._plan = None
            self._give_up(failure)
            return
        own: Exception | None = None
        while self._layers_done < len(self.layers) and self._in_step():
            self._layers_done += 1
            try:
                self.layers[self._layers_done - 1].take_part(plan)
            except Exception as error:  # the local experts broke; the other ranks still count on the layers after this
                own = own or error
        if self._in_step():
            try:
                self._await_layers()
            except Exception as error:
                own = own or error
        self._plan = None
        if self.device.type == "cuda":
            self._last_step = torch.cuda.current_stream().record_event()
        if not self._in_step():
            self._give_up(failure or own or RuntimeError("a collective did not end"))
        self.recorder.mark(Phase.END)
        if own is not None and failure is None:
            raise own

    def _await_layers(self) -> None:
        """Wait for the last layer's collectives, before anybody needs the model's output on the host."""
        try:
            await_last(self.recorder)
        except Exception as error:
            self._give_up(error)
            raise

    def _await_step(self, event: Any = None) -> None:
        """Wait until the GPU has done this rank's step: nobody takes for a result what a missing rank has spoiled."""
        event = event or self._last_step
        if event is None:
            return
        failure: BaseException
        try:
            wait_until(event.query, self.deadline_s + _KERNELS_S, self.recorder.check)
            for dispatcher in self._mapped.values():
                dispatcher.check()  # type: ignore[attr-defined]  # all that map memory have it
        except TimeoutError as error:
            text = f"step {self.recorder.step} did not end on the GPU: {error}"
            failure = error if isinstance(error, LockstepError) else self.recorder.absent(text)
        except (LockstepError, RuntimeError) as error:
            failure = error
        else:
            return
        self._give_up(failure)
        raise failure

    def _give_up(self, failure: BaseException) -> None:
        """Use the groups no more, tell the others why, and end what waits for them on the GPU."""
        self.coordinator.give_up(failure)
        abort(self._groups, self.device, self.config.rank)

    def _in_step(self) -> bool:
        return all(layer.in_step for layer in self.layers)

    def _run_layer(
        self, index: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Stand in for an experts module's forward."""
        if self._captured is not None:
            return self._run_captured_layer(index, hidden_states, topk_ids, topk_weights)
        if not in_forward_context():  # nor is this thread in a step if the session's is in an idle one just now
            if self.session is not None:
                name = type(self.model).__name__
                raise RuntimeError(
                    f"MoE layer {index} ran outside of {name}.forward: a part of the model was called, or a wrapper "
                    f"that goes around its forward; inside join, call the {name} itself or its generate"
                )
            raise RuntimeError(OUTSIDE.format(type(self.model).__name__))
        assert self._plan is not None
        if index != self._layers_done:
            raise RuntimeError(f"MoE layer {index} was called where layer {self._layers_done} was due in this step")
        layer = self.layers[index]
        rows, top_k = hidden_states.reshape(-1, hidden_states.shape[-1]), topk_ids.shape[-1]
        if (rows.shape[1], top_k, rows.device) != (layer.hidden_size, layer.top_k, layer.device):
            raise ConfigurationError(
                f"rows of {rows.shape[1]} values on {rows.device} with {top_k} experts each came to MoE layer {index}, "
                f"which was set up for {layer.hidden_size} on {layer.device} with {layer.top_k}"
            )
        agreed = self._plan.num_tokens_across_dp[self.config.data_parallel_rank]
        if rows.shape[0] != agreed:
            raise TokenCountError(
                f"{rows.shape[0]} rows came to MoE layer {index}, but {agreed} were agreed for this step "
                f"on DP rank {self.config.data_parallel_rank}"
            )
        self._layers_done = index + 1
        # One dtype on the wire: under autocast a rank's rows may come in another one than those of its idle peers.
        ids, weights = topk_ids.reshape(-1, top_k), topk_weights.reshape(-1, top_k)
        output = layer(rows.to(layer.dtype), ids, weights).to(rows.dtype)
        if index == len(self.layers) - 1:
            self._await_layers()
            spoiled_by = self.recorder.spoiled_by()
            if spoiled_by is not None:
                own, blamed = self.recorder.name(self.config.rank), self.recorder.name(spoiled_by)
                text = f"rank {own} stops in step {self.recorder.step}"
                raise PeerFailedError(f"{text}: the experts of rank {blamed} failed", blamed)
        return output.view_as(hidden_states)

    def _run_captured_layer(
        self, index: int, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        assert self._captured is not None
        num_rows, many = self._captured
        layer = self.layers[index]
        dispatcher, experts = next(iter(self._mapped.values())), layer.experts
        assert isinstance(experts, LocalExperts)
        handle = dispatcher.dispatch(rows, topk_ids, topk_weights, num_tokens=num_rows)  # type: ignore[call-arg]
        output = experts.on_device(
            handle.hidden_states,
            handle.state.scales,
            handle.gather_index,
            handle.state.expert_offsets,
            FEW_ROWS + 1 if many else FEW_ROWS,
        )
        return dispatcher.combine(output, handle)

    def _open_groups(self, epoch: int) -> None:
        config, tp_size = self.config, self.config.tensor_parallel_size
        groups = open_groups(self._process_group, config, self.device, self.deadline_s, epoch, self._start)
        self._groups, data, tp_group = groups.opened, groups.data, groups.tensor_parallel
        self.recorder = FlightRecorder(
            config.rank,
            config.world_size,
            board=groups.board,
            store=self._store,
            epoch=epoch,
            debug=self.debug,
            processes=self._start.processes,
        )
        speak_before_termination(self.recorder)
        first = config.data_parallel_rank * tp_size
        for group in groups.opened:
            watch_group(group, self.recorder, range(first, first + tp_size) if group is tp_group else ())
        if tp_group is not None and self._attention_group is not None:
            self._attention_group.inner = tp_group
        self._epoch = epoch
        self.coordinator = Coordinator(
            transport=groups.transport,
            rank=config.rank,
            tensor_parallel_size=tp_size,
            deadline_s=self.deadline_s,
            fingerprint=zlib.crc32(json.dumps(self._settings(), sort_keys=True).encode()),
            epoch=epoch,
            recorder=self.recorder,
        )
        pairs = list(zip(self._experts, self._shapes, strict=True))
        self.layers = [
            MoELayer(
                experts,
                self._make_dispatcher(experts, shape, data),
                config,
                hidden_size=shape.hidden_size,
                top_k=shape.top_k,
                dtype=shape.dtype,
                device=shape.device,
                tensor_parallel_group=tp_group,
                deadline_s=self.deadline_s,
                recorder=self.recorder,
                index=index,
            )
            for index, (experts, shape) in enumerate(pairs)
        ]
        if self._mapped and self.device.type == "cuda":
            capacity = config.world_size * (self.max_chunk_size_per_rank or _MAPPED_ROWS)
            for experts, shape in {(e.module.down_proj.shape, s.top_k): (e, s) for e, s in pairs}.values():
                experts.warm_up(capacity * shape.top_k, self.fp8_dispatch)
        self._graphs = StepGraphs(self.layers) if self.device.type == "cuda" else None

    def _make_dispatcher(self, experts: LocalExperts, shape: "_Shape", group: dist.ProcessGroup) -> Dispatcher:
        num_experts = experts.num_local_experts * self.config.world_size
        if self.dispatcher_name == "auto":
            mapped = None
            if self._can_map and shape.dtype is torch.bfloat16 and experts.run_on_device:
                mapped = self._mapped_dispatcher(num_experts, shape, group)
            return AutoDispatcher(
                group, num_experts, deadline_s=self.deadline_s, constants=self._constants, mapped=mapped
            )
        if self.dispatcher_name != "nvlink":
            return make_dispatcher(self.dispatcher_name, group, num_experts, deadline_s=self.deadline_s)
        experts.check_device_kernels()
        return self._mapped_dispatcher(num_experts, shape, group)

    def _mapped_dispatcher(self, num_experts: int, shape: "_Shape", group: dist.ProcessGroup) -> Dispatcher:
        # Its buffers are mapped by all peers, and layers run one after another: those of one shape share them.
        key = (num_experts, shape.hidden_size, shape.top_k)
        if key not in self._mapped:
            self._mapped[key] = make_mapped_dispatcher(
                group,
                num_experts=num_experts,
                hidden_size=shape.hidden_size,
                top_k=shape.top_k,
                max_rows_per_rank=self.max_chunk_size_per_rank or _MAPPED_ROWS,
                deadline_s=self.deadline_s,
                fp8=self.fp8_dispatch,
            )
        return self._mapped[key]

    def _settings(self) -> dict[str, Any]:
        """What must be the same on all ranks; small, so that it can be compared by name."""
        first = self._shapes[0]
        return {
            "model": type(self.model).__name__,
            "tensor_parallel_size": self.config.tensor_parallel_size,
            "max_chunk_size_per_rank": self.max_chunk_size_per_rank,
            "dispatcher": self.dispatcher_name,
            "fp8 dispatch": self.fp8_dispatch,
            "dispatch constants": self._constants.summary if self._constants is not None else "",
            "MoE layers": len(self._experts),
            "local experts": [experts.num_local_experts for experts in self._experts],
            "hidden size": first.hidden_size,
            "experts per token": first.top_k,
            "dtype": str(first.dtype),
            "weights (checksum)": self._checksum,
            "debug": self.debug,
        }


def parallel_of(model: Any) -> ModelParallel | None:
    """Return what a model that is spread over the ranks carries with it; None for any other model.

    Args:
        model: the model, or a module that holds it, such as a `PeftModel` or a `LightningModule`.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else [model]
    return next(
        (module.__dict__["_lockstep_parallel"] for module in modules if "_lockstep_parallel" in vars(module)), None
    )


def _refuse_wrapped_experts(experts: dict[str, Any], model: Any) -> None:
    """Adapters on experts would have the sizes of all of them, or of one rank's."""
    now = dict(model.named_modules(remove_duplicate=False))
    for name, module in experts.items():
        if now.get(name) is not module:
            found = type(now[name]).__name__ if name in now else "nothing"
            raise ConfigurationError(
                f"{name} of {type(model).__name__} was replaced by {found}: experts that are spread over ranks take no "
                "adapters; leave them out of target_modules and target_parameters, or merge the adapter into the whole "
                "model (merge_and_unload) before lockstep.parallelize"
            )


class _Shape:
    """What an experts module is called with: found by calling it once."""

    def __init__(self, rows: torch.Tensor, topk_ids: torch.Tensor) -> None:
        self.hidden_size = int(rows.shape[-1])
        self.top_k = int(topk_ids.shape[-1])
        self.dtype = rows.dtype
        self.device = rows.device


@torch.no_grad()
def _dense_checksum(model: Any) -> int:
    """Hash the first values of every weight that all ranks must have alike: unlike seeds or checkpoints show up."""
    experts = {id(parameter) for _, module in find_experts(model) for parameter in module.parameters()}
    parts = [p.detach().flatten()[:16].float() for p in model.parameters() if id(p) not in experts]
    return zlib.crc32(torch.cat(parts).cpu().numpy().tobytes())


@torch.no_grad()
def _experts_shapes(model: Any, forward: Callable[..., Any]) -> list[_Shape]:
    """Send one token through the model with experts that only look, and return what each was called with.

    No config names these the same in all architectures, and the order of the calls is known for certain.
    """
    found = {id(module): index for index, (_, module) in enumerate(find_experts(model))}
    seen: dict[int, _Shape] = {}

    def look(module: Any, rows: torch.Tensor, topk_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        seen[found[id(module)]] = _Shape(rows, topk_ids)
        return torch.zeros_like(rows)

    with _experts_run_by(model, look):
        forward(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    if list(seen) != list(range(len(found))):
        raise ConfigurationError(
            f"{type(model).__name__} does not call each of its {len(found)} MoE layers once and in order: {list(seen)}"
        )
    return list(seen.values())


@contextlib.contextmanager
def _experts_run_by(model: Any, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    modules = [module for _, module in find_experts(model)]
    for module in modules:
        module.forward = functools.partial(function, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
