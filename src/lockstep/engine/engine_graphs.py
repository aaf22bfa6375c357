"""Steps as CUDA graphs, valid for any counts of the other ranks.

A graph reads the number of real rows from device memory; the rest go to no expert, write no key and attend to nothing.
So each rank replays the smallest graph that its own rows fit into. Decoding graphs are captured at start, those of
steps with prompts while the ranks are idle, or else when a step of their size first occurs.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lockstep.engine.decoder import Prompts, Rows
from lockstep.models.parallel import ModelParallel
from lockstep.moe.layers import MoELayers
from lockstep.moe.step import Step

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class HostRows:
    """`Rows` and `Prompts` of a step as plain integers; a token of -1 stands for the one its request drew last."""

    num_decode: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    row_seqs: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    cu_rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def graph_sizes(max_rows: int) -> list[int]:
    """Return the decoding graphs' numbers of rows: 0, the powers of two, and `max_rows`."""
    powers = (2**i for i in itertools.count())
    return [0, *itertools.takewhile(lambda size: size < max_rows, powers), max_rows]


def mixed_sizes(max_rows: int) -> list[int]:
    """Return the numbers of rows of graphs with prompts, at most a quarter more than needed: 64, 80, 96, ..."""
    steps = (size for i in itertools.count(6) for size in range(2**i, 2 ** (i + 1), 2**i // 4))
    return [*itertools.takewhile(lambda size: size < max_rows, steps), max_rows]


class EngineGraphs:
    """One rank's graphs: of decoding steps up to `max_rows` rows, and of steps with prompts up to `max_mixed_rows`."""

    def __init__(
        self, parallel: ModelParallel, decoder: Callable[[Rows], Tensor],
        lay_out: Callable[[Tensor | None, Tensor, Tensor], Rows], max_rows: int, max_mixed_rows: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._layers = parallel.layers
        self._decoder = decoder
        self._lay_out = lay_out
        # A step's inputs, for one copy: how many rows are real, their rows of the block table, their positions.
        self._inputs = torch.zeros(1 + 2 * max_rows, dtype=torch.int32, device=device)
        self._inputs[1 : 1 + max_rows] = -1
        self._max_rows = max_rows
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._sizes = graph_sizes(max_rows)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self._mixed_sizes = mixed_sizes(max_mixed_rows)
        self._mixed: dict[tuple[int, bool], _MixedGraph | None] = {}
        self._device = device

    def capture(self) -> None:
        """Capture all graphs after a trial run each; the largest first, so that others reuse its memory. Collective."""
        for many in (True, False):
            for size in reversed(self._sizes):
                with self._begin(size, many, self._inputs) as step:
                    self._pass(size, step)
                self._graphs[size, many] = self._capture(size, many, self._inputs, self._pass)
            smallest = self._mixed_sizes[0]
            inputs = self._mixed_inputs(smallest)
            with self._begin(smallest, many, inputs):
                self._mixed_pass(smallest, inputs)

    def capture_ahead(self) -> bool:
        """Capture a graph that no step has needed yet, the largest first; return whether there was one."""
        for most_of_smaller, size in reversed([*itertools.pairwise([0, *self._mixed_sizes])]):
            for many in (True, False):
                can_occur = many or self._layers[0].takes_few_rows(most_of_smaller + 1)
                if can_occur and (size, many) not in self._mixed:
                    self._mixed[size, many] = self._capture_mixed(size, many)
                    return True
        return False

    def go_on(self, layers: MoELayers) -> None:
        """Use the graphs in steps of new layers, which have the same device memory."""
        self._layers = layers

    def run(
        self, row_seqs: Sequence[int], positions: Sequence[int], step: Step
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Replay the smallest graph that the rows fit into.

        Returns logits, valid until the next replay (None without rows), and, on the device, `row_seqs` and the position
        of each row's next token, `[num_rows]` int32.
        """
        num_rows, most = len(row_seqs), self._max_rows
        size = next(size for size in self._sizes if size >= num_rows)
        rest = most - num_rows
        packed = torch.tensor([num_rows, *row_seqs, *[-1] * rest, *positions, *[0] * rest], dtype=torch.int32)
        self._inputs.copy_(packed.pin_memory(), non_blocking=True)
        graph, logits = self._graphs[size, step.has_many_rows]
        graph.replay()
        step.replayed()
        _, own_rows, own_positions = self._inputs.split([1, most, most])
        return (None if logits is None else logits[:num_rows]), own_rows[:num_rows], own_positions[:num_rows] + 1

    def run_mixed(self, host: HostRows, step: Step) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `run`, for a step with prompts; captures if needed. None if no graph is large enough or capture failed."""
        num_rows, num_prompts = len(host.ids), len(host.prompts)
        size = next((size for size in self._mixed_sizes if size >= num_rows), None)
        if size is None or num_prompts > self._max_rows:
            return None
        key = size, step.has_many_rows
        if key not in self._mixed:
            self._mixed[key] = self._capture_mixed(*key)
        graph = self._mixed[key]
        if graph is None:
            return None
        rows, prompts, count = size - num_rows, self._max_rows - num_prompts, len(host.sampled)
        packed = [
            num_rows, host.num_decode, *host.ids, *[0] * rows, *host.positions, *[0] * rows,
            *host.row_seqs, *[-1] * rows, *host.prompts, *[0] * prompts, *host.cu_rows, *[num_rows] * prompts,
            *host.lengths, *[0] * prompts, *host.sampled, *[0] * (len(graph.logits) - count),
        ]  # fmt: skip
        graph.inputs.copy_(torch.tensor(packed, dtype=torch.int32).pin_memory(), non_blocking=True)
        graph.graph.replay()
        step.replayed()
        return graph.logits[:count], graph.row_seqs[:count], graph.positions[:count]

    def _capture_mixed(self, size: int, many: bool) -> _MixedGraph | None:
        inputs = self._mixed_inputs(size)
        try:
            graph, outputs = self._capture(
                size, many, inputs, lambda size, step: self._mixed_pass(size, inputs), "relaxed"
            )
        except RuntimeError as error:  # nothing has run: the step continues without a graph
            logger.warning("steps of %d rows with prompts cannot be CUDA graphs: %s", size, error)
            return None
        return _MixedGraph(graph, inputs, *outputs)

    def _mixed_lengths(self, size: int) -> list[int]:
        """Lengths of the inputs' parts: 2 counts, ids, positions, row_seqs, prompts, cu_rows, lengths, sampled."""
        most = self._max_rows
        return [2, size, size, size, most, most + 1, most, min(size, most)]

    def _mixed_inputs(self, size: int) -> Tensor:
        """Return a buffer for the inputs of a step with prompts, filled for one without real rows."""
        inputs = torch.zeros(sum(self._mixed_lengths(size)), dtype=torch.int32, device=self._device)
        inputs.split(self._mixed_lengths(size))[3].fill_(-1)
        return inputs

    def _mixed_pass(self, size: int, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the sampled rows, their rows of the block table, and the positions of the next tokens."""
        header, ids, positions, row_seqs, prompts, cu_rows, prompt_lengths, sampled = inputs.split(
            self._mixed_lengths(size)
        )
        rows = self._lay_out(ids, positions, row_seqs)
        generates = torch.arange(size, device=self._device) < header[1]
        chosen = sampled.long()
        rows = replace(
            rows,
            lengths=torch.where(generates, rows.lengths, 0),
            num_decode=min(size, self._max_rows),
            prompts=Prompts(prompts, cu_rows, prompt_lengths),
            sampled=chosen,
        )
        return self._decoder(rows), row_seqs[chosen], positions[chosen] + 1

    def _capture(
        self, size: int, many: bool, inputs: Tensor, issue: Callable[[int, Step], T], mode: str = "thread_local"
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self._begin(size, many, inputs) as step:
            graph.capture_begin(pool=self._pool, capture_error_mode=mode)
            try:
                outputs = issue(size, step)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, outputs

    def _begin(self, size: int, many: bool, inputs: Tensor) -> Step:
        return self._layers.begin_capture(self._layers.typical_sizes(many), num_rows=inputs[:1], capacity=size)

    def _pass(self, size: int, step: Step) -> Tensor | None:
        if not size:
            step.take_part_in_rest()
            return None
        _, row_seqs, positions = self._inputs.split([1, self._max_rows, self._max_rows])
        return self._decoder(self._lay_out(None, positions[:size], row_seqs[:size]))


class _MixedGraph(NamedTuple):
    """A graph of a step with prompts, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor
    row_seqs: Tensor
    positions: Tensor
