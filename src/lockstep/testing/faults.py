"""Break one rank on purpose, in a chosen step and phase, to see that all others end in time and name it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.peers import Peers
from lockstep.coordination.step import StepRecord
from lockstep.coordination.whereabouts import Whereabouts
from lockstep.coordination.wire import WORD_BYTES, Wire
from lockstep.dispatch import collectives
from lockstep.errors import ConfigurationError
from lockstep.models.parallel import parallel_of

FaultPhase = Literal["start", "load", "meet", "agreement", "model", "dispatch", "experts", "combine", "end", "merge"]
Action = Literal[
    "raise", "exit", "kill", "stop", "delay", "ctrl_c", "skip", "swap", "wrong_size", "wrong_count", "corrupted_header",
    "other_protocol",
]  # fmt: skip
PHASES: tuple[FaultPhase, ...] = get_args(FaultPhase)
ACTIONS: tuple[Action, ...] = get_args(Action)


_PLACES = {"start": "waiting in the start", "load": "loading ", "meet": "waiting in join()"}


class InjectedFault(Exception):
    """What an injected `raise` raises."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong once.

    Attributes:
        rank: on which rank.
        step: in the first agreement or step from this number on.
        phase: where in the step: before the `agreement`, in the `model` between agreement and dispatch, before the
            `dispatch`, the `experts` or the `combine` of an MoE layer, at the `end`. Outside of steps: at the `start`
            of the default group, in the `load` of a checkpoint, before ranks `meet` in `join`, at the `merge` of what
            they have written.
        action: `raise` an `InjectedFault`; `exit` the process at once; `kill` it by SIGKILL; `stop` it by SIGSTOP, and
            let it go on after `seconds`; `delay` it by `seconds`; `ctrl_c`: send it SIGINT; `skip` the next collective;
            `swap` the next two; `wrong_size`: bring one row more to the next collective than was agreed; `wrong_count`:
            announce one row more than there are; `corrupted_header`, `other_protocol`: in the next record.
        layer: number of the MoE layer, for the phases that have one.
        seconds: of a delay or stop.
    """

    rank: int
    step: int
    phase: FaultPhase
    action: Action
    layer: int = 0
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigurationError(f"phase must be one of {PHASES}, got {self.phase!r}")
        if self.action not in ACTIONS:
            raise ConfigurationError(f"action must be one of {ACTIONS}, got {self.action!r}")
        if self.action in ("wrong_count", "corrupted_header", "other_protocol") and self.phase != "agreement":
            raise ConfigurationError(f"{self.action} belongs to phase 'agreement', got {self.phase!r}")
        if self.action in ("skip", "swap", "wrong_size") and self.phase not in ("dispatch", "combine"):
            raise ConfigurationError(f"{self.action} belongs to phase 'dispatch' or 'combine', got {self.phase!r}")


@contextmanager
def inject(model: Any, *faults: Fault) -> Iterator[list[float]]:
    """Let faults happen to a joined model inside the block. Use it on every rank, inside `lockstep.join`.

    Args:
        model: the model that is joined.
        *faults: those of other ranks are ignored.

    Yields:
        When faults happened on this rank, in seconds of the host's clock.

    Raises:
        ConfigurationError: the model is not joined.
    """
    parallel = parallel_of(model)
    if parallel is None or not parallel.is_open:
        raise ConfigurationError("faults are injected inside `with lockstep.join(model):`, over several ranks")
    with inject_into(parallel.peers, parallel.coordinator, *faults) as happened:
        yield happened


@contextmanager
def inject_outside(rank: int, *faults: Fault) -> Iterator[list[float]]:
    """Let faults happen before a model is joined: at the `start`, in the `load`, or before ranks `meet`.

    Args:
        rank: this rank's number in the whole start.
        *faults: those of other ranks and phases are ignored.

    Yields:
        As `inject`.
    """
    happened: list[float] = []
    due = [fault for fault in faults if fault.rank == rank and fault.phase in _PLACES]

    def on_enter(place: str) -> None:
        for fault in due:
            if place.startswith(_PLACES[fault.phase]):
                due.remove(fault)
                happened.append(time.monotonic())
                break_on_purpose(fault)
                return

    before, Whereabouts.on_enter = Whereabouts.on_enter, on_enter
    try:
        yield happened
    finally:
        Whereabouts.on_enter = before


@contextmanager
def inject_into(peers: Peers, coordinator: Coordinator, *faults: Fault) -> Iterator[list[float]]:
    """Let faults happen to an engine that has a coordinator of its own.

    Args:
        peers: the one that the engine's layers mark their phases in.
        coordinator: that the engine agrees through.
        *faults: those of other ranks are ignored.

    Yields:
        As `inject`.
    """
    happened: list[float] = []
    due = [fault for fault in faults if fault.rank == peers.rank and fault.phase not in _PLACES]

    def on_mark(marked: Peers) -> None:
        place = marked.recorder
        for fault in due:
            phase = Phase[fault.phase.upper()]
            in_layer = phase in (Phase.DISPATCH, Phase.EXPERTS, Phase.COMBINE)
            if place.phase == phase and place.step >= fault.step and (not in_layer or place.layer == fault.layer):
                due.remove(fault)
                happened.append(time.monotonic())
                break_on_purpose(fault, coordinator)
                return

    before, peers.on_mark, exchange = peers.on_mark, on_mark, collectives._exchange
    try:
        yield happened
    finally:
        peers.on_mark = before
        collectives._exchange = exchange
        vars(coordinator).pop("_send", None)
        vars(coordinator.transport).pop("begin", None)


def break_on_purpose(fault: Fault, coordinator: Coordinator | None = None) -> None:
    """Do at once what a fault says.

    Args:
        fault: its action and seconds count; where and when it should happen do not.
        coordinator: of this rank; needed by the actions that belong into a step.

    Raises:
        InjectedFault: for the action `raise`.
        ConfigurationError: an action that needs a coordinator.
    """
    step = f" of step {coordinator.peers.recorder.step}" if coordinator is not None else ""
    match fault.action:
        case "raise":
            raise InjectedFault(f"injected on rank {fault.rank} in {fault.phase}{step}")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # Somebody else must wake it up.
            subprocess.Popen(["sh", "-c", f"sleep {fault.seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.01)  # the signal stops all threads, but not always before this call returns
        case "delay":
            time.sleep(fault.seconds)
        case "ctrl_c":
            os.kill(os.getpid(), signal.SIGINT)
        case "skip" | "swap" | "wrong_size":
            _next_collectives(fault.action)
        case _ if coordinator is None:
            raise ConfigurationError(f"{fault.action} belongs into a step, got phase {fault.phase!r}")
        case "wrong_count":
            _next_record(coordinator, lambda record: type(record)(record.num_tokens + 1, record.unfinished))
        case "corrupted_header":
            _next_wire(coordinator, 3, 1 << 20)
        case "other_protocol":
            _next_wire(coordinator, 1, 3)


def _next_record(coordinator: Coordinator, change: Callable[[StepRecord], StepRecord]) -> None:
    send = coordinator._send

    def changed(record: StepRecord) -> Any:
        del coordinator._send
        return send(change(record))

    coordinator._send = changed  # type: ignore[method-assign]


def _next_wire(coordinator: Coordinator, word: int, bits: int) -> None:
    """Flip bits in a word of the next record's head."""
    transport: Any = coordinator.transport
    begin = transport.begin

    def changed(wire: Wire) -> Any:
        del transport.begin
        flipped = int.from_bytes(wire, "little") ^ bits << 8 * WORD_BYTES * word
        return begin(flipped.to_bytes(len(wire), "little"))

    transport.begin = changed


def _next_collectives(action: str) -> None:
    """Change the next one or two collectives of this process. They are all issued in one place."""
    module: Any = collectives
    exchange = module._exchange
    held: list[tuple[Any, ...]] = []

    def changed(*call: Any) -> None:
        if action == "swap" and not held:
            # Issue what follows a dispatch, a combine of the same sizes, before it.
            held.append(call)
            name, noted, received, sent, recv_sizes, send_sizes, group, *waits = call
            exchange(
                "reduce_scatterv" if name == "all_gatherv" else "all_gatherv", noted, torch.empty_like(sent),
                torch.zeros_like(received), send_sizes, recv_sizes, group, *waits,
            )  # fmt: skip
            return
        module._exchange = exchange
        if action == "swap":
            exchange(*held[0])
        elif action == "wrong_size":
            name, noted, received, sent, recv_sizes, send_sizes, group, *waits = call
            more = torch.cat([sent, sent.new_zeros((1, *sent.shape[1:]))])
            noted = [size + (rank == group.rank()) for rank, size in enumerate(noted)]
            send_sizes = [*send_sizes[:-1], send_sizes[-1] + 1]
            exchange(name, noted, received, more, recv_sizes, send_sizes, group, *waits)

    module._exchange = changed
