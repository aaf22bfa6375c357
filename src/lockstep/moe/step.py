"""One step: which rows go through the MoE layers, how they travel, which layer is due, and how it failed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.waits import await_parked
from lockstep.dispatch.base import Route
from lockstep.errors import ConfigurationError, PeerFailedError, TokenCountError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.dp_metadata import DPMetadata
from lockstep.metadata.forward_context import ForwardContext, set_forward_context
from lockstep.moe.layer import MoELayer

if TYPE_CHECKING:
    from lockstep.moe.layers import MoELayers

_current: ContextVar[Step | None] = ContextVar("lockstep_step", default=None)


def current_step() -> Step | None:
    """Return this thread's step, or None. An idle step on another thread does not count."""
    return _current.get()


class Step:
    """One forward pass of the model, on all ranks together. A context manager: the model runs inside.

    A rank with rows, an idle rank and a rank that failed differ only in the rows they bring: each takes part in every
    layer. Leaving the block takes part in the remaining layers, so that other ranks can continue whatever happened
    here. Made by `MoELayers.begin`.

    Attributes:
        plan: the chunks of the step; None during a capture.
        route: how its rows travel.
        next_layer: index of the layer that is due.
        in_step: whether every collective so far was issued; then the groups can be used again after an error.
        failure: what broke on this rank, if anything.
        num_unpadded: how many of the model's rows are the agreed ones, where padding follows them; None without any.
        padding: which rows of the buffers are padding, `[capacity, 1]`, in a captured step whose model reads them all.
    """

    def __init__(
        self, layers: MoELayers, routes: Sequence[Route], plan: ChunkPlan | None,
        num_rows: torch.Tensor | None, capacity: int | None,
    ) -> None:  # fmt: skip
        self.layers, self.plan, self.route = layers, plan, routes[0]
        self.peers = layers.silent_peers if plan is None else layers.peers
        self.number = self.peers.recorder.step
        self.num_rows, self._capacity = num_rows, capacity
        self.captured = plan is None
        self.first_row = sum(self.route.sizes[: layers.config.rank])  # of this rank, among those of all ranks
        self.next_layer, self.in_step = 0, True
        self.failure: BaseException | None = None
        self.num_unpadded: int | None = None
        self.padding: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._contexts = ExitStack()
        config = layers.config
        self._own_rows = self._rows_due = capacity or 0
        if plan is not None:
            self._own_rows = plan.sp_rows[config.rank]
            self._rows_due = plan.num_tokens_across_dp[config.data_parallel_rank] if capacity is None else capacity
        if plan is None or len(plan) == 1:
            chunks = [[(route, slice(0, self._own_rows))] for route in routes]
        else:
            chunks = [[(route.of_chunk(one.sizes), slice(one.start, one.stop)) for one in plan] for route in routes]
        self._chunks = dict(zip(layers.dispatchers, chunks, strict=True))

    @property
    def captures(self) -> bool:
        """Whether ranks may issue the step as a CUDA graph; equal on all ranks, each of which is free to do so."""
        return self.route.captures and self.layers.config.tensor_parallel_size == 1 and any(self.route.sizes)

    @property
    def has_many_rows(self) -> bool:
        """Whether experts get enough rows, by the agreed counts, for the kernels for many rows."""
        return not self.layers[0].takes_few_rows(sum(self.route.sizes))

    def __enter__(self) -> Step:
        try:
            self._check_buffers()
            self._contexts.callback(_current.reset, _current.set(self))
            if self.plan is not None:
                counts, config = self.plan.num_tokens_across_dp, self.layers.config
                metadata = DPMetadata.make(config, counts[config.data_parallel_rank], list(counts))
                self._contexts.enter_context(set_forward_context(ForwardContext(metadata, self.plan, self.number)))
                self.peers.mark(Phase.MODEL)
        except BaseException as error:  # the others have agreed on this step too: they are not left waiting
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self._contexts.close()
        if error is not None and self._rows_due and self.layers.shares_attention:
            # Whoever shares this rank's requests waits for it in a layer that it can no longer take part in.
            self.layers.give_up(error)
            return False
        if not self.captured:
            self.take_part_in_rest()
            self.finish(error)
        elif error is not None or self.failure is not None:
            for dispatcher in self.layers.dispatchers:
                dispatcher.forget_capture()
            if error is None and self.failure is not None:
                raise self.failure
        return False

    def chunks(self, layer: MoELayer) -> list[tuple[Route, slice]]:
        """Return the route and this rank's rows of each chunk."""
        return self._chunks[layer.dispatcher]

    def run_layer(
        self, index: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run this rank's rows through an MoE layer. Collective; layers come in order.

        Args:
            index: number of the layer, from 0.
            hidden_states: all rows of this data-parallel rank in the step, `[..., hidden]`.
            topk_ids: global experts of each row, `[..., top_k]`.
            topk_weights: routing weights, `[..., top_k]`.

        Returns:
            The weighted sums, in the shape and dtype of `hidden_states`.

        Raises:
            TokenCountError: the number of rows differs from the agreed one, or from the buffers'.
            ConfigurationError: rows of another size or device, or with another number of experts.
            PeerFailedError: another rank's experts failed in this step; raised by the last layer.
            RuntimeError: another layer is due; also raised by `backward`, since there are no gradients.
        """
        if index != self.next_layer:
            raise RuntimeError(f"MoE layer {index} was called where layer {self.next_layer} was due in this step")
        layer = self.layers.layers[index]
        shape, top_k = layer.shape, topk_ids.shape[-1]
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if (rows.shape[1], top_k, rows.device) != (shape.hidden_size, shape.top_k, shape.device):
            raise ConfigurationError(
                f"rows of {rows.shape[1]} values on {rows.device} with {top_k} experts each came to MoE layer {index}, "
                f"which was set up for {shape.hidden_size} on {shape.device} with {shape.top_k}"
            )
        real = slice(self.num_unpadded)
        rows, num_padding = rows[real], rows.shape[0] - rows[real].shape[0]
        if rows.shape[0] != self._rows_due:
            buffered = self.captured or self.num_rows is not None
            due = f"its buffers have {self._rows_due}" if buffered else f"{self._rows_due} were agreed for this step"
            dp_rank = self.layers.config.data_parallel_rank
            raise TokenCountError(f"{rows.shape[0]} rows came to MoE layer {index}, but {due} on DP rank {dp_rank}")
        self.next_layer = index + 1
        with torch.no_grad():
            # One dtype on the wire: under autocast a rank's rows may come in another one than those of its idle peers.
            own = rows.to(shape.dtype), topk_ids.reshape(-1, top_k)[real], topk_weights.reshape(-1, top_k)[real]
            if self.layers.config.tensor_parallel_size > 1:  # this rank takes its share of the group's rows
                assert self.plan is not None
                start, stop = self.plan.sp_span(self.layers.config.rank)
                own = own[0][start:stop], own[1][start:stop], own[2][start:stop]
            output = layer.run(self, index, *own).to(rows.dtype)
            if self.padding is not None:  # undefined there
                output.masked_fill_(self.padding, 0)
            if num_padding:
                output = torch.nn.functional.pad(output, (0, 0, 0, num_padding))
        if self.next_layer == len(self.layers) and not self.captured:
            # Before the host uses the model's output: it must be complete, and no rank's experts may have failed.
            self._await_collectives()
            if (spoiled_by := self.peers.spoiled_by()) is not None:
                own_rank, blamed = self.peers.name(self.layers.config.rank), self.peers.name(spoiled_by)
                text = f"rank {own_rank} stops in step {self.number}: the experts of rank {blamed} failed"
                raise PeerFailedError(text, blamed)
        if hidden_states.requires_grad and torch.is_grad_enabled():
            output = _InferenceOnly.apply(rows, output)
        return output.view_as(hidden_states)

    @torch.no_grad()
    def take_part_in_rest(self) -> None:
        """Run the local experts for other ranks in all remaining layers, without rows of this rank.

        If rows of this rank were agreed on, rows that go to no expert take their place. Errors are kept in `failure`,
        since other ranks still need the following layers. Stops if a collective was left out.
        """
        if not self.captured:
            self.num_rows = None  # what is handed in now is as many rows as were agreed
        while self.next_layer < len(self.layers) and self.in_step:
            index, layer = self.next_layer, self.layers.layers[self.next_layer]
            self.next_layer += 1
            try:
                own = layer.rows_for_nobody(self._own_rows) if self._own_rows else layer.nothing
                layer.run(self, index, *own)
            except Exception as error:
                self.failure = self.failure or error

    def replayed(self) -> None:
        """Note that a CUDA graph has issued all layers of this step on this rank."""
        self.next_layer = len(self.layers)

    def spoil(self, error: Exception) -> None:
        """Note that this rank's experts have failed, so that its results of this step are invalid on other ranks."""
        self.failure = self.failure or error
        self.peers.spoil_step()

    def finish(self, error: BaseException | None = None) -> None:
        """Issue the rest of the step, with no wait for the device; raise `failure` unless the model raised an error."""
        if self.in_step:
            try:
                self._await_collectives()
            except Exception as broken:
                self.failure = self.failure or broken
        self._event = self.layers.end_step()
        if not self.in_step:
            self.layers.give_up(error or self.failure or RuntimeError("a collective did not end"))
        self.peers.mark(Phase.END)
        if error is None and self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Wait until the device has finished this rank's step; raises `RankAbsentError` or `PeerFailedError`."""
        if self._event is not None:
            self.layers.wait(self._event, self.number)

    def _await_collectives(self) -> None:
        try:
            await_parked(self.peers)
        except Exception as error:
            self.layers.give_up(error)
            raise

    def _check_buffers(self) -> None:
        """Raise if buffers with more rows than agreed, or their counter, do not fit the step."""
        cell, capacity, device = self.num_rows, self._capacity, self.layers.device
        if capacity is None and cell is not None:
            raise ConfigurationError("num_rows goes with the capacity of the buffers that it counts")
        if capacity is not None and self.plan is not None:
            tp_size = self.layers.config.tensor_parallel_size
            if tp_size > 1 or len(self.plan) > 1:
                raise ConfigurationError(
                    "buffers with more rows than the step need one chunk and no tensor parallelism, got "
                    f"{len(self.plan)} chunks and tensor_parallel_size {tp_size}"
                )
            if capacity < self._own_rows:
                raise ConfigurationError(f"{self._own_rows} rows do not fit into buffers of {capacity}")
        if cell is not None and (cell.dtype is not torch.int32 or cell.numel() != 1 or cell.device != device):
            found = f"{cell.dtype} {list(cell.shape)} on {cell.device}"
            raise ConfigurationError(f"num_rows must be int32 [1] on {device}, got {found}")


class _InferenceOnly(torch.autograd.Function):
    """Makes `backward` an error: a gradient that silently left out the experts would be wrong."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise RuntimeError("Lockstep's MoE layer is for inference: no gradients flow through it")
