"""The parallel state of a model that is spread over ranks: its layers, groups and steps."""

import contextlib
import json
import secrets
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.groups import Start, WatchedGroup, abort, open_groups
from lockstep.coordination.peers import Peers, speak_before_termination
from lockstep.coordination.session import Session
from lockstep.coordination.step import StepDecision, by_rank
from lockstep.coordination.waits import watch_group
from lockstep.dispatch.choose import can_map, constants_of, mapping_facts
from lockstep.dispatch.collectives import gather_json
from lockstep.dispatch.constants import DispatchConstants
from lockstep.errors import ConfigurationError, RankMismatchError
from lockstep.metadata.config import ParallelConfig
from lockstep.models import transformers_internals as internals
from lockstep.models.experts_modules import dense_checksum, experts_shapes, slots_held
from lockstep.models.generate_graphs import StepGraphs
from lockstep.models.make_layers import follow_layers, make_layers
from lockstep.models.options import ParallelOptions
from lockstep.models.own_weights import OwnWeights
from lockstep.moe.layers import MoELayers
from lockstep.moe.placement import ExpertLoad, Placement
from lockstep.moe.step import Step, current_step


class ModelParallel:
    """The layers, groups and steps of a model that is spread over the ranks.

    Engines that form their own steps use it without a session: `open()`, then for every step an agreement on
    `coordinator` and either `model(...)` inside `with parallel.step(decision):` or `parallel.run_idle_step(decision)`.

        parallel = parallel_of(model)
        parallel.open()
        decision = parallel.coordinator.agree(StepRecord(num_tokens=n, unfinished=True))
        with parallel.step(decision) as step:
            logits = model(...)

    An engine that does other work while the device runs uses `begin` instead of `step`, and calls `Step.wait` before it
    uses the outputs. An engine with CUDA graphs captures the model inside `layers.begin_capture(...)`; later, inside a
    step whose `captures` is true, it replays the graph and calls `Step.replayed()`.

    Attributes:
        layers: the MoE layers in forward order; filled by `open`.
        coordinator: filled by `open`.
        peers: where the other ranks are, and this rank's last events; filled by `open`.
        session: the `join` block that the model is in, if any.
        weights: this rank's own part of the model.
        goes_on: whether this one continues on fewer ranks with what `before` has on the device, so that captured graphs
            remain valid; `places` are its ranks' numbers among the ranks that made the layers.
    """

    def __init__(
        self,
        model: Any,
        config: ParallelConfig,
        process_group: dist.ProcessGroup,
        options: ParallelOptions,
        attention_group: WatchedGroup | None = None,
        before: "ModelParallel | None" = None,
        places: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.config = config
        self.options = options
        self.layers: MoELayers
        self.coordinator: Coordinator
        self.peers: Peers
        self.session: Session | None = None
        self.goes_on = before is not None
        self._before, self._places = before, tuple(places)
        self._attention_group = attention_group
        self._start = Start(process_group)
        # Unique keys: a second model would otherwise read what the ranks wrote about the first one.
        number = self._start.next_number("model")
        self._store = dist.PrefixStore(str(number), self._start.store)
        self._groups: list[dist.ProcessGroup] = []
        self._constants: DispatchConstants | None = None
        self._epoch = -1
        met_at = f"join() of {type(model).__name__} (model {number})"
        self._meeting = self._start.meeting_place(f"{number}/join", met_at)
        self._stream: torch.cuda.Stream | None = None
        self._graphs: StepGraphs | None = None
        self.forward = model.forward  # the model's own
        self.weights = OwnWeights(model)
        self._probe()

    def _probe(self) -> None:
        self._probed_place = self.weights.place()
        self._shapes = experts_shapes(self.model, self.forward, self.config.world_size)
        self.device = self._shapes[0].device
        self._checksum = dense_checksum(self.model) if self.config.tensor_parallel_size == 1 else 0

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigurationError(
            f"this {type(self.model).__name__} is spread over the ranks: it cannot be copied (copy.deepcopy) or saved "
            "(torch.save, pickle); load it once more on every rank instead"
        )

    def open(self) -> None:
        """Meet all ranks, compare their settings, and open groups unless the present ones can still be used.

        Errors are raised on all ranks: `RankMismatchError` with the setting that differs and each rank's value;
        `ConfigurationError` if a rank's own weights were overwritten or replaced.
        """
        complaint = self.weights.complaint()
        if not complaint and self.weights.place() != self._probed_place:  # the model was cast or moved since
            self._probe()
            self.close()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # torchrun leaves all ranks of a host on the first GPU
        usable = self.is_open and self.coordinator.usable
        self._constants = constants_of(self.options.dispatcher, self.device.type)
        facts = {"usable": usable, "epoch": self._epoch, "maps": mapping_facts(self.device), "complaint": complaint}
        facts["run"] = secrets.randbits(32)
        settings = self._settings()
        answers = self._meeting.meet(facts | settings, self.options.deadline_s)
        if complaining := [rank for rank, answer in enumerate(answers) if answer["complaint"]]:
            seen_on = ", ".join(map(str, complaining))
            raise ConfigurationError(f"{answers[complaining[0]]['complaint']} (seen on rank {seen_on})")
        for name in settings:
            values = [answer[name] for answer in answers]
            if any(value != values[0] for value in values):
                listed = by_rank(list(map(str, values)), self._start.processes)
                raise RankMismatchError(f"ranks disagree about {name}: {listed}")
        if all(answer["usable"] for answer in answers) and len({answer["epoch"] for answer in answers}) == 1:
            return
        self.close()
        maps = can_map([answer["maps"] for answer in answers])
        self._open_groups(max(answer["epoch"] for answer in answers) + 1, maps, answers[0]["run"])

    @property
    def is_open(self) -> bool:
        """Whether there are groups from `open`; after a failure they may be unusable."""
        return self._epoch >= 0

    def close(self) -> None:
        """Drop the groups from `open`; the next `open` makes new ones."""
        if self.is_open:
            self.peers.close()
        for group in self._groups:
            # Not destroyed before the process ends: torch would give the group's name to the next group of these ranks,
            # which would find the old addresses in the store and connect to nobody (seen on gloo).
            watch_group(group, None)
        self._groups, self._epoch = [], -1

    def begin(self, decision: StepDecision) -> Step:
        """Begin an agreed step, see `MoELayers.begin`; run the model inside `with`. Does not wait for the device."""
        return self.layers.begin(decision.num_tokens_across_dp)

    @contextlib.contextmanager
    def step(self, decision: StepDecision) -> Iterator[Step]:
        """A step for one forward pass, run inside `with`; the end waits for the device."""
        with self.begin(decision) as step:
            yield step
        step.wait()

    def run_idle_step(self, decision: StepDecision) -> None:
        """Take part in a step without rows: only this rank's experts run, for the rows of other ranks."""
        with self._idle_stream(), self.begin(decision) as step:
            self.weights.check()
            if self._graphs is not None and step.captures:
                self._graphs.run_idle(step)
            else:
                step.take_part_in_rest()

    def run_forward(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's forward pass inside a step, as a CUDA graph where that is possible."""
        num_rows = kwargs.pop(internals.BATCH_ROWS, None)
        if self._graphs is not None and step.captures:
            output = self._graphs.run_forward(step, self.forward, args, kwargs, num_rows)
            if output is not None:
                return output
        step.num_unpadded = num_rows
        output = self.forward(*args, **kwargs)
        self.check_all_layers_ran(step)
        return output

    def check_all_layers_ran(self, step: Step | None) -> None:
        """Raise if some MoE layers did not run over the ranks in a forward pass that has ended."""
        ran = 0 if step is None else step.next_layer
        if ran < len(self.layers):
            raise ConfigurationError(
                f"only {ran} of {len(self.layers)} MoE layers of {type(self.model).__name__} ran over the "
                f"ranks in this forward pass: something has replaced {self.weights.names[ran]}"
            )

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's JSON value, `[ranks]`. Collective, outside of steps; an error closes the groups."""
        try:
            self.peers.mark(Phase.MERGE)
            return gather_json(value, self._groups[0], self.options.deadline_s)
        except BaseException as error:
            self.layers.give_up(error)
            raise

    def expert_load(self) -> ExpertLoad:
        """Return the rows of each expert since `open`, over all ranks. Collective; needs `count_expert_load`."""
        counts = [layer.load.tolist() for layer in getattr(self, "layers", ()) if layer.load is not None]
        if not counts:
            raise ConfigurationError("nothing has counted the expert load: pass count_expert_load=True, and enter join")
        everyones = self.gather_json(counts)
        _, num_experts = slots_held(self.weights.experts[0].module)
        even = Placement.even(len(counts), num_experts, self.config.world_size)
        return ExpertLoad.of_slots(self.model.config.model_type, self.options.placement or even, everyones)

    def accept_weights(self) -> None:
        """Accept this rank's present weights as correct, after each rank has written its own part on purpose."""
        self.weights.accept()

    def current_step(self) -> Step | None:
        """Return the step of this model that this thread is running, if it is in one."""
        step = current_step()
        return step if step is not None and step.layers is getattr(self, "layers", None) else None

    @contextlib.contextmanager
    def _idle_stream(self) -> Iterator[None]:
        """A stream for idle steps only: the script's own may be blocked by a barrier that other ranks reach late."""
        device = self.device
        if device.type != "cuda":
            yield
            return
        torch.cuda.set_device(device)  # the current device is each thread's own
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            yield

    def _open_groups(self, epoch: int, maps: bool, run: int) -> None:
        config, options = self.config, self.options
        tp_size, tp_first = config.tensor_parallel_size, config.data_parallel_rank * config.tensor_parallel_size
        on_gpu = self.device.type == "cuda" and self._before is None  # layers that continue need no NCCL groups
        device = self.device if on_gpu else torch.device("cpu")
        groups = open_groups(config, device, options.deadline_s, epoch, self._start)
        self._groups = groups.opened
        self.peers = Peers(
            config.rank, config.world_size, board=groups.board, store=self._store, epoch=epoch, debug=options.debug,
            processes=self._start.processes, run=run,
        )  # fmt: skip
        speak_before_termination(self.peers)
        for group in groups.opened:
            shared = group is groups.tensor_parallel
            watch_group(group, self.peers, range(tp_first, tp_first + tp_size) if shared else ())
        if groups.tensor_parallel is not None and self._attention_group is not None:
            self._attention_group.inner = groups.tensor_parallel
        self._epoch = epoch
        fingerprint = zlib.crc32(json.dumps(self._settings(), sort_keys=True).encode())
        self.coordinator = Coordinator(
            transport=groups.transport, rank=config.rank, tensor_parallel_size=config.tensor_parallel_size,
            deadline_s=options.deadline_s, fingerprint=fingerprint, epoch=epoch, peers=self.peers,
        )  # fmt: skip
        nccl = groups.opened[1:] if on_gpu else []
        before, self._before = self._before, None
        if before is None:
            made = make_layers(self.weights.experts, self._shapes, config, options, groups, maps, self._constants)
        else:
            made = follow_layers(
                before.layers, self.weights.experts, self._shapes, config, options, groups, self._places
            )
        self.layers = MoELayers(
            made,
            max_chunk_size_per_rank=options.max_chunk_size_per_rank,
            coordinator=self.coordinator,
            deadline_s=options.deadline_s,
            abort=lambda: abort(nccl, self.device, config.rank),
            shares_attention=self._attention_group is not None,
        )
        self._graphs = StepGraphs(self.layers) if self.device.type == "cuda" else None

    def can_go_on(self, placement: Placement) -> bool:
        """Whether fewer ranks can continue, by this placement, with the layers' device memory; equal on all ranks."""
        return (
            hasattr(self, "layers")
            and all(dispatcher.abilities.rejoins for dispatcher in self.layers.dispatchers)
            and all(layer.slots is not None for layer in self.layers)
            and placement.num_slots_per_rank == self.layers[0].dispatcher.num_local_experts
        )

    def _settings(self) -> dict[str, Any]:
        """Return the settings that must be equal on all ranks, by name; deadlines may differ."""
        first, placement = self._shapes[0], self.options.placement
        options = {name: value for name, value in vars(self.options).items() if name not in ("placement", "deadline_s")}
        return options | {
            "model": type(self.model).__name__,
            "tensor_parallel_size": self.config.tensor_parallel_size,
            "dispatch constants": self._constants.summary if self._constants is not None else "",
            "placement (checksum)": placement.checksum if placement is not None else 0,
            "going on with what is on the device": self.goes_on,
            "MoE layers": len(self.weights.experts),
            "local experts": [experts.num_local_experts for experts in self.weights.experts],
            "hidden size": first.hidden_size,
            "experts per token": first.top_k,
            "dtype": str(first.dtype),
            "dtype of experts": str(self.weights.experts[0].module.down_proj.dtype),
            "LoRA on experts": self.weights.adapters_summary(),
            "weights (checksum)": self._checksum,
        }


def parallel_of(model: Any) -> ModelParallel | None:
    """Return the `ModelParallel` of a spread model, or of a module that holds one; None for other models."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else [model]
    return next(
        (found for module in modules if (found := getattr(module, "__dict__", {}).get("_lockstep_parallel"))), None
    )


def count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of rows that a forward pass sends through each layer."""
    if internals.BATCH_ROWS in kwargs:
        return int(kwargs[internals.BATCH_ROWS])
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is not None:
        return int(tokens.numel())
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise ConfigurationError("a forward pass needs input_ids or inputs_embeds")
    return int(embeds.shape[:-1].numel())
