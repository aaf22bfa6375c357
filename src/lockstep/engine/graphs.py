"""Decoding as CUDA graphs, captured at start, right for any counts of the other ranks.

A graph has room for some rows; how many of them are real it reads from device memory. Rows beyond them pad it at home:
they go to no expert, write no key, attend to nothing and are not sampled. So each rank replays the smallest graph that
its own rows fit into, whatever the others run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from lockstep.engine.decoder import Rows
from lockstep.models.parallel import ModelParallel
from lockstep.moe.step import Step

logger = logging.getLogger(__name__)


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


class DecodeGraphs:
    """The graphs of one rank's decoding steps, and of the steps in which it has no rows.

    Args:
        parallel: of the model.
        decoder: runs a pass over rows.
        lay_out: `(ids, positions, row_seqs) -> Rows`, on the device.
        last_tokens: the token that each row of the block table goes on with, `[max_num_seqs]` int64.
        max_rows: of the largest graph.
        device: the GPU.
    """

    def __init__(
        self,
        parallel: ModelParallel,
        decoder: Callable[[Rows], torch.Tensor],
        lay_out: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Rows],
        last_tokens: torch.Tensor,
        max_rows: int,
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
                self._graphs[size, many] = self._capture(size, many)

    def serves(self, num_rows: int) -> bool:
        """Whether there is a graph for so many rows."""
        return num_rows <= self._max_rows

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

    def _capture(self, size: int, many: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self._begin(size, many) as step:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = self._pass(size, step)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, logits

    def _begin(self, size: int, many: bool) -> Step:
        layers = self._parallel.layers
        return layers.begin_capture(layers.typical_sizes(many), num_rows=self._inputs[:1], capacity=size)

    def _pass(self, size: int, step: Step) -> torch.Tensor | None:
        if not size:
            step.take_part_in_rest()
            return None
        most = self._max_rows
        row_seqs, positions = self._inputs[1 : 1 + size], self._inputs[1 + most : 1 + most + size]
        ids = self._last_tokens[row_seqs.clamp(min=0).long()]
        return self._decoder(self._lay_out(ids, positions, row_seqs))
