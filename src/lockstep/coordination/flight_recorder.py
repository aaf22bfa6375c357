"""This rank's last steps, kept for a postmortem, and the wording of places in a step."""

import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "LOCKSTEP_RECORDER_DIR"  # where recorder files go; the system's temporary folder by default
FORMAT = "lockstep-flight-recorder-2"
_LAYER_BITS, _STEP_BITS = 16, 40


class Phase(IntEnum):
    """Where in a step a rank is, in the order of the step."""

    AGREEMENT = 1
    MODEL = 2
    DISPATCH = 3
    EXPERTS = 4
    COMBINE = 5
    END = 6
    LEFT = 7
    TENSOR_PARALLEL = 8
    MERGE = 9
    COMPILE = 10


IN_LAYER = (Phase.DISPATCH, Phase.EXPERTS, Phase.COMBINE)  # the phases of each MoE layer
_BEFORE_LAYER = (Phase.TENSOR_PARALLEL, Phase.COMPILE)  # after the previous layer, before this layer's dispatch
_SAID_AS = {
    Phase.AGREEMENT: "at the agreement of step {step}",
    Phase.MODEL: "in the model's other layers in step {step}",
    Phase.DISPATCH: "in dispatch of layer {layer} in step {step}",
    Phase.EXPERTS: "in experts of layer {layer} in step {step}",
    Phase.COMBINE: "in combine of layer {layer} in step {step}",
    Phase.END: "in its script after step {step}",
    Phase.LEFT: "has left join() after step {step}",
    Phase.TENSOR_PARALLEL: "in a tensor-parallel exchange before MoE layer {layer} in step {step}",
    Phase.MERGE: "gathering what all ranks have written, after step {step}",
    Phase.COMPILE: "compiling a part of the model before MoE layer {layer} in step {step}",
}


class FlightRecorder:
    """A ring of this rank's last events, and its place. Sends nothing.

    `process` is the rank's number in the whole start. `run` is a random number that ranks agree on when they open
    groups, 0 where they agreed on none: files with the same `run` are of one failure.
    """

    def __init__(self, rank: int, num_ranks: int, epoch: int, process: int, run: int = 0) -> None:
        self.rank, self.num_ranks, self.epoch, self.process, self.run = rank, num_ranks, epoch, process, run
        self.step, self.phase, self.layer = -1, Phase.END, -1
        self.fingerprint = 0
        self.folder: str | Path = ""
        self._ring: deque[tuple[int, int, int, int, Any]] = deque(maxlen=512)
        self._file: Path | None = None

    def mark(self, phase: Phase, layer: int = -1, detail: Any = None) -> int:
        """Enter a phase of the current step and return the time, in ns of the monotonic clock."""
        now = time.monotonic_ns()
        self.phase, self.layer = phase, layer
        self._ring.append((now, self.step, phase, layer, detail))
        return now

    def note(self, detail: Any) -> None:
        """Record an event in the current phase."""
        self._ring.append((time.monotonic_ns(), self.step, 0, self.layer, detail))

    def collective(self, name: str, sizes: Sequence[int]) -> None:
        """Record a collective that is about to be issued on all ranks."""
        self.fingerprint = zlib.crc32(repr((name, tuple(sizes))).encode(), self.fingerprint)
        self.note((name, *sizes))

    @property
    def place(self) -> int:
        """Where this rank is, as one word: steps from -1 and layers from -1 share it with the phase."""
        layer, step = self.layer + 1 & (1 << _LAYER_BITS) - 1, self.step + 1 & (1 << _STEP_BITS) - 1
        return self.phase << (_LAYER_BITS + _STEP_BITS) | layer << _STEP_BITS | step

    @property
    def idle_s(self) -> float:
        """Seconds since the last event."""
        return (time.monotonic_ns() - self._ring[-1][0]) / 1e9 if self._ring else 0.0

    @property
    def doing(self) -> str:
        """This rank's activity, in words that follow "rank 3 waited"."""
        return _SAID_AS[self.phase].format(step=self.step, layer=self.layer)

    def write_file(self, reason: str) -> Path | None:
        """Write the ring and every thread's stack to a file, once; return its path, None if that failed."""
        if self._file is not None:
            return self._file
        header = {
            "format": FORMAT, "rank": self.rank, "num_ranks": self.num_ranks, "epoch": self.epoch, "run": self.run,
            "pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "clock_ns": time.monotonic_ns(),
            "reason": reason,
        }  # fmt: skip
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = {
            names.get(ident, str(ident)): traceback.format_stack(frame)[-12:]
            for ident, frame in sys._current_frames().items()
        }
        keys = ("ns", "step", "phase", "layer", "detail")
        entries = [dict(zip(keys, entry, strict=True)) for entry in list(self._ring)]
        try:
            folder = self.folder or os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir()
            # An unpredictable name: others may be able to write to the folder.
            prefix = f"lockstep-rank{self.process}-epoch{self.epoch}-run{self.run:08x}-"
            descriptor, path = tempfile.mkstemp(".jsonl", prefix, folder)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in (header, *entries, {"stacks": stacks}))
        except OSError as error:
            logger.warning("rank %d: the flight recorder could not be written: %s", self.rank, error)
            return None
        self._file = Path(path)
        return self._file

    def file_note(self) -> str:
        """Return the path of the written ring, as the end of a message."""
        return f"; the last steps of rank {self.process}: {self._file}" if self._file is not None else ""


def unpack_place(place: int) -> tuple[int, int, int]:
    """Return `(step, phase, layer)`."""
    step = (place & (1 << _STEP_BITS) - 1) - 1
    return step, place >> (_LAYER_BITS + _STEP_BITS), (place >> _STEP_BITS & (1 << _LAYER_BITS) - 1) - 1


def place_order(place: int) -> tuple[int, int, int, int]:
    """Return a sort key that orders places as in a step."""
    step, phase, layer = unpack_place(place)
    part = 0 if phase <= Phase.AGREEMENT else 2 if phase in (Phase.END, Phase.LEFT, Phase.MERGE) else 1
    return step, part, layer - (phase in _BEFORE_LAYER), phase


def place_text(place: int, ago: float) -> str:
    """Return a place in words that follow a rank's number; `ago` in seconds."""
    step, phase, layer = unpack_place(place)
    if phase not in _SAID_AS:
        return f"was last seen {ago:.1f} s ago" if place else "has not been seen"
    text = f"{_SAID_AS[Phase(phase)].format(step=step, layer=layer)}, {ago:.1f} s ago"
    return text if phase == Phase.LEFT else f"was last seen {text}"
