"""Break one rank on purpose, in a chosen step and phase, to check that all other ranks end in time and name it."""

import dataclasses
import functools
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.flight_recorder import IN_LAYER, Phase
from lockstep.coordination.meeting import Whereabouts
from lockstep.coordination.peers import Peers
from lockstep.coordination.wire import HEAD_BYTES, Wire
from lockstep.dispatch.collectives import AllToAll, instead_of_all_to_all
from lockstep.errors import ConfigurationError
from lockstep.models.parallel import parallel_of

FaultPhase = Literal["start", "load", "meet", "agreement", "model", "dispatch", "experts", "combine", "end", "merge"]
Action = Literal[
    "raise", "exit", "kill", "stop", "delay", "ctrl_c", "skip", "swap", "wrong_size", "wrong_count", "corrupted_header",
    "other_protocol",
]  # fmt: skip
_PHASES_OF = {
    **dict.fromkeys(("wrong_count", "corrupted_header", "other_protocol"), ("agreement",)),
    **dict.fromkeys(("skip", "swap", "wrong_size"), ("dispatch", "combine")),
}
_PLACES = {"start": "waiting in the start", "load": "loading ", "meet": "waiting in join()"}


class InjectedFault(Exception):
    """Raised by the action `raise`."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong once.

    Attributes:
        rank: the rank that breaks.
        step: first agreement or step in which it may happen.
        phase: where in the step: before the `agreement`, in the `model` between agreement and dispatch, before the
            `dispatch`, the `experts` or the `combine` of an MoE layer, at the `end`. Outside of steps: at the `start`
            of the default group, in the `load` of a checkpoint, before ranks `meet` in `join`, at the `merge` of
            their outputs.
        action: `raise` an `InjectedFault`; `exit` the process at once; `kill` it by SIGKILL; `stop` it by SIGSTOP, and
            continue it after `seconds`; `delay` it by `seconds`; `ctrl_c`: send it SIGINT; `skip` the next collective;
            `swap` the next two; `wrong_size`: send one row more than agreed in the next collective; `wrong_count`:
            announce one row too many; `corrupted_header`, `other_protocol`: in the next record.
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
        phases = _PHASES_OF.get(self.action, get_args(FaultPhase))
        if self.action not in get_args(Action):
            raise ConfigurationError(f"action must be one of {get_args(Action)}, got {self.action!r}")
        if self.phase not in phases:
            raise ConfigurationError(f"{self.action} belongs to phase {' or '.join(phases)}, got {self.phase!r}")


@contextmanager
def inject(model: Any, *faults: Fault) -> Iterator[list[float]]:
    """Apply this rank's faults to a joined model inside the block; yields when they happened, in host seconds."""
    parallel = parallel_of(model)
    if parallel is None or not parallel.is_open:
        raise ConfigurationError("faults are injected inside `with lockstep.join(model):`, over several ranks")
    with inject_into(parallel.peers, parallel.coordinator, *faults) as happened:
        yield happened


@contextmanager
def inject_outside(rank: int, *faults: Fault) -> Iterator[list[float]]:
    """As `inject`, before a model is joined; `rank` is this rank's number in the whole start."""
    due = _Due(fault for fault in faults if fault.rank == rank and fault.phase in _PLACES)

    def on_enter(place: str) -> None:
        due.happen(lambda fault: place.startswith(_PLACES[fault.phase]))

    before, Whereabouts.on_enter = Whereabouts.on_enter, on_enter
    try:
        yield due.happened
    finally:
        Whereabouts.on_enter = before


@contextmanager
def inject_into(peers: Peers, coordinator: Coordinator, *faults: Fault) -> Iterator[list[float]]:
    """As `inject`, for an engine with its own coordinator that marks its phases in `peers`."""
    due = _Due(fault for fault in faults if fault.rank == peers.rank and fault.phase not in _PLACES)
    place, changed = peers.recorder, _ChangedCollectives()

    def is_there(fault: Fault) -> bool:
        right_layer = place.phase not in IN_LAYER or place.layer == fault.layer
        return place.phase == Phase[fault.phase.upper()] and place.step >= fault.step and right_layer

    before, peers.on_mark = peers.on_mark, lambda _: due.happen(is_there, coordinator, changed)
    try:
        with instead_of_all_to_all(changed):
            yield due.happened
    finally:
        peers.on_mark = before


class _Due:
    """Pending faults, and when the rest `happened`."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = list(faults)
        self.happened: list[float] = []

    def happen(self, is_there: Callable[[Fault], bool], *where: Any) -> None:
        """Execute the first pending fault that belongs here."""
        fault = next(filter(is_there, self.faults), None)
        if fault is not None:
            self.faults.remove(fault)
            self.happened.append(time.monotonic())
            break_on_purpose(fault, *where)


def break_on_purpose(
    fault: Fault, coordinator: Coordinator | None = None, collectives: "_ChangedCollectives | None" = None
) -> None:
    """Execute a fault now, whatever its place; faults within a step need the last two arguments."""
    step = f" of step {coordinator.peers.recorder.step}" if coordinator is not None else ""
    match fault.action:
        case "raise":
            raise InjectedFault(f"injected on rank {fault.rank} in {fault.phase}{step}")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # Another process must wake it up.
            subprocess.Popen(["sh", "-c", f"sleep {fault.seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.01)  # the signal stops all threads, but not always before this call returns
        case "delay":
            time.sleep(fault.seconds)
        case "ctrl_c":
            os.kill(os.getpid(), signal.SIGINT)
        case "skip" | "swap" | "wrong_size" if collectives is not None:
            collectives.action = fault.action
        case "wrong_count" | "corrupted_header" | "other_protocol" if coordinator is not None:
            _change_next_record(coordinator.transport, _CHANGES[fault.action])
        case _:
            raise ConfigurationError(f"{fault.action} belongs into a step, got phase {fault.phase!r}")


def _change_next_record(transport: Any, change: Callable[[Wire], Wire]) -> None:
    begin = transport.begin

    def begin_changed(wire: Wire) -> None:
        del transport.begin  # the class's own again
        begin(change(wire))

    transport.begin = begin_changed


def _one_row_more(wire: Wire) -> Wire:
    """The first field of every record is its number of rows; it follows the head."""
    rows = struct.unpack_from("<q", wire, HEAD_BYTES)[0] + 1
    return wire[:HEAD_BYTES] + struct.pack("<q", rows) + wire[HEAD_BYTES + 8 :]


def _flipped(wire: Wire, word: int, bits: int) -> Wire:
    """Flip bits in one 32-bit word of the record's head."""
    return (int.from_bytes(wire, "little") ^ bits << 32 * word).to_bytes(len(wire), "little")


_CHANGES: dict[str, Callable[[Wire], Wire]] = {
    "wrong_count": _one_row_more,
    "corrupted_header": functools.partial(_flipped, word=3, bits=1 << 20),
    "other_protocol": functools.partial(_flipped, word=1, bits=3),
}


class _ChangedCollectives:
    """Runs this process's collectives, and changes the next one or two by `action`: `skip`, `swap` or `wrong_size`."""

    def __init__(self) -> None:
        self.action = ""
        self._held: AllToAll | None = None

    def __call__(self, call: AllToAll) -> None:
        """Run a collective, or its faulty version."""
        if self.action == "swap" and self._held is None:
            # Issue the collective that follows a dispatch, a combine of the same sizes, before it.
            self._held = call
            dataclasses.replace(
                call,
                name="reduce_scatterv" if call.name == "all_gatherv" else "all_gatherv",
                received=torch.empty_like(call.sent),
                sent=torch.zeros_like(call.received),
                recv_sizes=call.send_sizes,
                send_sizes=call.recv_sizes,
            ).run()
            return
        action, self.action = self.action, ""
        held, self._held = self._held, None
        if held is not None:
            held.run()
        elif action == "wrong_size":
            own = call.group.rank()
            dataclasses.replace(
                call,
                noted_sizes=[size + (rank == own) for rank, size in enumerate(call.noted_sizes)],
                sent=torch.cat([call.sent, call.sent.new_zeros((1, *call.sent.shape[1:]))]),
                send_sizes=[*call.send_sizes[:-1], call.send_sizes[-1] + 1],
            ).run()
        elif action != "skip":
            call.run()
