"""Steps as CUDA graphs, right for any counts of the other ranks.

A graph has room for some rows; how many of them are real it reads from device memory. Rows beyond them pad it at home:
they go to no expert, write no key, attend to nothing and are not sampled. So each rank replays the smallest graph that
its own rows fit into, whatever the others run.

Graphs of decoding are captured at start. Those of steps with prompts, in which every row may be of any request, are
captured when a step of their size comes for the first time: issuing that step takes no longer than without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from lockstep.engine.decoder import Prompts, Rows
from lockstep.models.parallel import ModelParallel
from lockstep.moe.step import Step

logger = logging.getLogger(__name__)

_LEAST_MIXED = 64

T = TypeVar("T")


@dataclass
class HostRows:
    """A step's rows as plain integers; those that generate come first.

    Attributes:
        num_decode: rows that generate.
        ids: token of each row; -1 for the one that its request drew last.
        positions: of the tokens in their requests.
        row_seqs: row of the block table of each row.
        sampled: rows from which a token is drawn.
        prompts: row of the block table of each prompt.
        cu_rows: where each prompt's rows begin, and their end.
        lengths: tokens of each prompt that are in pages after the step.
    """

    num_decode: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    row_seqs: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    cu_rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def graph_sizes(max_rows: int) -> list[int]:
    """Return how many rows the graphs have room for: 0, the powers of two, and `max_rows`.

    Example:
        >>> graph_sizes(100)
        [0, 1, 2, 4, 8, 16, 32, 64, 100]
    """
    sizes = [0]
    power = 1
    while power < max_rows:
        sizes.append(power)
        power *= 2
    return [*sizes, max_rows]


def mixed_sizes(max_rows: int) -> list[int]:
    """Return how many rows the graphs of steps with prompts have room for: at most a quarter more than are there.

    Example:
        >>> mixed_sizes(200)
        [64, 80, 96, 112, 128, 160, 192, 200]
    """
    sizes, base = [], _LEAST_MIXED
    while base < max_rows:
        sizes += [size for size in range(base, 2 * base, base // 4) if size < max_rows]
        base *= 2
    return [*sizes, max_rows]


class EngineGraphs:
    """The graphs of one rank's steps.

    Args:
        parallel: of the model.
        decoder: runs a pass over rows.
        lay_out: `(ids, positions, row_seqs) -> Rows`, on the device.
        last_tokens: the token that each row of the block table goes on with, `[max_num_seqs]` int64.
        max_rows: most rows of a decoding step, and most prompts of another.
        max_mixed_rows: most rows of a step with prompts.
        device: the GPU.
    """

    def __init__(
        self,
        parallel: ModelParallel,
        decoder: Callable[[Rows], torch.Tensor],
        lay_out: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Rows],
        last_tokens: torch.Tensor,
        max_rows: int,
        max_mixed_rows: int,
        device: torch.device,
    ) -> None:
        self._parallel = parallel
        self._decoder = decoder
        self._lay_out = lay_out
        self._last_tokens = last_tokens
        # One copy brings a step's inputs: how many rows are real, their rows of the block table, their positions.
        self._inputs = torch.full((1 + 2 * max_rows,), -1, dtype=torch.int32, device=device)
        self._max_rows = max_rows
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        self._sizes = graph_sizes(max_rows)
        self._mixed_sizes = mixed_sizes(max_mixed_rows)
        self._mixed: dict[tuple[int, bool], _MixedGraph | None] = {}
        self._device = device

    def capture(self) -> None:
        """Capture all graphs, the largest first, so that the smaller ones fit into its memory. Collective.

        Each pass first runs as it is, without real rows, which loads its kernels.
        """
        self._inputs.fill_(-1)
        self._inputs[0] = 0
        self._inputs[1 + self._max_rows :] = 0
        for many in (True, False):
            for size in reversed(self._sizes):
                with self._begin(size, many) as step:
                    self._pass(size, step)
                self._graphs[size, many] = self._capture(size, many, self._inputs, self._pass)
            smallest = self._mixed_sizes[0]
            inputs = self._mixed_inputs(smallest)
            with self._begin(smallest, many, inputs) as step:
                self._mixed_pass(smallest, step, inputs)

    def run(
        self, row_seqs: Sequence[int], positions: Sequence[int], step: Step
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Replay the smallest graph that the rows fit into.

        Args:
            row_seqs: row of the block table of each row.
            positions: of the rows' tokens.
            step: that they belong to; its `captures` is true.

        Returns:
            Logits of the rows, `[num_rows, vocabulary]`, valid until the next replay; None without rows. And on the
            device: `row_seqs`, `[num_rows]` int32, and the position of the next token of each, `[num_rows]` int32.
        """
        num_rows, most = len(row_seqs), self._max_rows
        size = next(size for size in self._sizes if size >= num_rows)
        padding = [-1] * (most - num_rows)
        packed = torch.tensor(
            [num_rows, *row_seqs, *padding, *positions, *([0] * (most - num_rows))], dtype=torch.int32
        )
        self._inputs.copy_(packed.pin_memory(), non_blocking=True)
        graph, logits = self._graphs[size, step.has_many_rows]
        graph.replay()
        step.replayed()
        own_rows = self._inputs[1 : 1 + num_rows]
        own_positions = self._inputs[1 + most : 1 + most + num_rows] + 1
        return (logits[:num_rows] if logits is not None else None), own_rows, own_positions

    def run_mixed(self, host: HostRows, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Replay the smallest graph that a step with prompts fits into, captured now if there is none yet.

        Args:
            host: the rows.
            step: that they belong to; its `captures` is true.

        Returns:
            Logits of the sampled rows, `[num_sampled, vocabulary]`, valid until the next replay; the rows of the block
            table that they belong to, int32; and the positions of the tokens to be drawn, int32. None for rows that no
            graph has room for, or where the capture failed.
        """
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
        rows, prompts = size - num_rows, self._max_rows - num_prompts
        packed = [
            num_rows, host.num_decode, *host.ids, *([0] * rows), *host.positions, *([0] * rows),
            *host.row_seqs, *([-1] * rows),
            *host.prompts, *([0] * prompts), *host.cu_rows, *([num_rows] * prompts),
            *host.lengths, *([0] * prompts),
            *host.sampled, *([0] * (graph.most_sampled - len(host.sampled))),
        ]  # fmt: skip
        graph.inputs.copy_(torch.tensor(packed, dtype=torch.int32).pin_memory(), non_blocking=True)
        graph.graph.replay()
        step.replayed()
        count = len(host.sampled)
        return graph.logits[:count], graph.row_seqs[:count], graph.positions[:count]

    def _capture_mixed(self, size: int, many: bool) -> _MixedGraph | None:
        inputs = self._mixed_inputs(size)

        def issue(size: int, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return self._mixed_pass(size, step, inputs)

        try:
            graph, outputs = self._capture(size, many, inputs, issue, "relaxed")
        except RuntimeError as error:  # nothing has run: the step goes on without a graph
            logger.warning("steps of %d rows with prompts cannot be CUDA graphs: %s", size, error)
            return None
        return _MixedGraph(graph, inputs, *outputs)

    def _mixed_inputs(self, size: int) -> torch.Tensor:
        """Room for the inputs of a step with prompts, as of one without real rows."""
        inputs = torch.zeros(
            2 + 3 * size + 3 * self._max_rows + 1 + min(size, self._max_rows), dtype=torch.int32, device=self._device
        )
        inputs[2 + 2 * size : 2 + 3 * size] = -1
        return inputs

    def _mixed_pass(
        self, size: int, step: Step, inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of the sampled rows, their rows of the block table, and the positions of the next tokens."""
        most = self._max_rows
        lengths = [2, size, size, size, most, most + 1, most, min(size, most)]
        header, ids, positions, row_seqs, prompts, cu_rows, prompt_lengths, sampled = inputs.split(lengths)
        last = self._last_tokens[row_seqs.clamp(min=0).long()]
        rows = self._lay_out(torch.where(ids < 0, last, ids.long()), positions, row_seqs)
        generates = torch.arange(size, device=self._device) < header[1]
        chosen = sampled.long()
        rows = replace(
            rows,
            lengths=torch.where(generates, rows.lengths, 0),
            num_decode=min(size, most),
            prompts=Prompts(prompts, cu_rows, prompt_lengths),
            sampled=chosen,
        )
        return self._decoder(rows), row_seqs[chosen], positions[chosen] + 1

    def _capture(
        self, size: int, many: bool, inputs: torch.Tensor, issue: Callable[[int, Step], T], mode: str = "thread_local"
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

    def _begin(self, size: int, many: bool, inputs: torch.Tensor | None = None) -> Step:
        layers = self._parallel.layers
        num_rows = (self._inputs if inputs is None else inputs)[:1]
        return layers.begin_capture(layers.typical_sizes(many), num_rows=num_rows, capacity=size)

    def _pass(self, size: int, step: Step) -> torch.Tensor | None:
        if not size:
            step.take_part_in_rest()
            return None
        most = self._max_rows
        row_seqs, positions = self._inputs[1 : 1 + size], self._inputs[1 + most : 1 + most + size]
        ids = self._last_tokens[row_seqs.clamp(min=0).long()]
        return self._decoder(self._lay_out(ids, positions, row_seqs))


@dataclass(frozen=True)
class _MixedGraph:
    """A graph of steps with prompts, and what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    logits: torch.Tensor
    row_seqs: torch.Tensor
    positions: torch.Tensor

    @property
    def most_sampled(self) -> int:
        return int(self.logits.shape[0])
