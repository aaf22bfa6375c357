"""One MoE layer over all ranks: split, chunk, dispatch, experts, combine, gather."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lockstep.coordination.flight_recorder import FlightRecorder, Phase
from lockstep.coordination.forward_context import get_forward_context
from lockstep.dispatch.base import NO_EXPERT, Dispatcher, DispatchHandle
from lockstep.dispatch.collectives import DEADLINE_S, all_gatherv
from lockstep.errors import ConfigurationError, TokenCountError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.config import ParallelConfig
from lockstep.moe.experts import LocalExperts

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(hidden_states [rows, hidden], gather_index [pairs], tokens_per_expert [num_local_experts]) -> [pairs, hidden]`"""


class MoELayer:
    """The routed experts of one layer, spread over all ranks. Inference only: no gradients flow through it.

    Every rank walks through the chunks of the step's `ChunkPlan`, with the rows that the plan gives it, zero included.
    Sizes come from the plan, which all ranks derive from the agreed counts, and from nowhere else.

    Args:
        experts: this rank's experts as one function of rows, see `Experts`.
        dispatcher: brings rows to their experts and back.
        config: this rank's place. Ranks of one tensor-parallel group hand in the same rows; each takes its share of
            them into the experts and all get all results.
        hidden_size: of a row.
        top_k: experts per row.
        dtype: of the rows that this rank sends when it has none of its own.
        device: likewise.
        tensor_parallel_group: the ranks that share rows; needed if `config.tensor_parallel_size > 1`. Left open.
        deadline_s: longest wait for any rank, in seconds.
        recorder: is told where this rank is, if given.
        index: number of this layer, for the recorder.
    """

    def __init__(
        self,
        experts: Experts,
        dispatcher: Dispatcher,
        config: ParallelConfig,
        *,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tensor_parallel_group: dist.ProcessGroup | None = None,
        deadline_s: float = DEADLINE_S,
        recorder: FlightRecorder | None = None,
        index: int = 0,
    ) -> None:
        if config.tensor_parallel_size > 1 and tensor_parallel_group is None:
            raise ConfigurationError(
                f"tensor_parallel_size {config.tensor_parallel_size} needs a tensor_parallel_group"
            )
        if dtype not in dispatcher.abilities.dtypes:
            raise ConfigurationError(f"dispatcher {dispatcher.name!r} cannot carry {dtype}")
        self.experts = experts
        self.dispatcher = dispatcher
        self.config = config
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.dtype = dtype
        self.device = torch.device(device)
        self.in_step = True
        """Whether this rank has issued every collective of its last call: after an error, whether it may go on."""
        self.tensor_parallel_group = tensor_parallel_group
        self._deadline_s = deadline_s
        self._recorder = recorder or FlightRecorder(config.rank, config.world_size)
        self.index = index

    def __call__(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Run this rank's rows through their experts, wherever those are. Collective.

        Args:
            hidden_states: all rows of this data-parallel rank in this step, `[num_tokens, hidden]`.
            topk_ids: global experts of each row, `[num_tokens, top_k]`.
            topk_weights: their weights, `[num_tokens, top_k]`.

        Returns:
            The weighted sums, `[num_tokens, hidden]`.

        Raises:
            TokenCountError: other rows than were agreed for this step.
            RuntimeError: outside a forward context, or one without a chunk plan; and from `backward`, where gradients
                are asked for.
        """
        with torch.no_grad():
            output = self._run_own_rows(hidden_states, topk_ids, topk_weights)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return _InferenceOnly.apply(hidden_states, output)
        return output

    def _run_own_rows(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        plan = self._plan()
        agreed = plan.num_tokens_across_dp[self.config.data_parallel_rank]
        if hidden_states.shape[0] != agreed:
            raise TokenCountError(
                f"{hidden_states.shape[0]} rows came to the MoE layer, but {agreed} were agreed for this step "
                f"on DP rank {self.config.data_parallel_rank}"
            )
        start, stop = plan.sp_span(self.config.rank)
        return self._run(plan, hidden_states[start:stop], topk_ids[start:stop], topk_weights[start:stop])

    @torch.no_grad()
    def take_part(self, plan: ChunkPlan) -> None:
        """Take part in this layer's collectives without rows of one's own, running the local experts for the others.

        Where the plan says that this rank has rows (it failed after the agreement), rows that go to no expert are sent.
        """
        num_rows = plan.sp_rows[self.config.rank]
        rows = torch.zeros(num_rows, self.hidden_size, dtype=self.dtype, device=self.device)
        ids = torch.full((num_rows, self.top_k), NO_EXPERT, device=self.device)
        weights = torch.zeros(num_rows, self.top_k, device=self.device)
        self._run(plan, rows, ids, weights)

    def _plan(self) -> ChunkPlan:
        plan = get_forward_context().chunk_plan
        if plan is None:
            raise RuntimeError("the forward context has no chunk_plan: pass ForwardContext(dp_metadata, chunk_plan)")
        return plan

    def _run(
        self, plan: ChunkPlan, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        self.in_step = False
        # One integer and one float type on the wire, whatever a model's router returns: all ranks must send alike.
        topk_ids, topk_weights = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
        output = torch.empty_like(rows)
        failure: Exception | None = None
        for index, chunk in enumerate(plan):
            span = slice(chunk.start, chunk.stop)
            self._recorder.mark(Phase.DISPATCH, self.index, index)
            handle = self.dispatcher.dispatch(rows[span], topk_ids[span], topk_weights[span], chunk.sizes)
            self._recorder.mark(Phase.EXPERTS, self.index, index)
            try:
                expert_output = self._run_experts(handle, sum(chunk.sizes))
            except Exception as error:
                # The others are already on their way into `combine`. Meet them there, with what nobody takes for a
                # result, then say what happened.
                failure = failure or error
                self._recorder.spoil_step()
                expert_output = rows.new_full((handle.gather_index.shape[0], self.hidden_size), float("nan"))
            self._recorder.mark(Phase.COMBINE, self.index, index)
            combined = self.dispatcher.combine(expert_output, handle)
            if len(plan) == 1:
                output = combined
            else:
                output[span] = combined
        gathered = self._gather(plan, output)
        self._recorder.mark(Phase.MODEL, self.index)
        self.in_step = True
        if failure is not None:
            raise failure
        return gathered

    def _run_experts(self, handle: DispatchHandle, num_rows: int) -> torch.Tensor:
        offsets = getattr(handle.state, "expert_offsets", None)
        if offsets is None:
            return self.experts(handle.hidden_states, handle.gather_index, handle.tokens_per_expert)
        # This backend leaves the counts on the device; what the host knows is how many rows all ranks have together.
        assert isinstance(self.experts, LocalExperts)
        return self.experts.on_device(
            handle.hidden_states, handle.state.scales, handle.gather_index, offsets, self.rows_per_expert(num_rows)
        )

    def rows_per_expert(self, num_rows: int) -> float:
        """Return how many rows an expert gets on average where all ranks together bring so many."""
        return num_rows * self.top_k / self.dispatcher.num_experts

    def _gather(self, plan: ChunkPlan, own: torch.Tensor) -> torch.Tensor:
        """Give every rank of a tensor-parallel group the rows of all of them."""
        tp_size = self.config.tensor_parallel_size
        if tp_size == 1:
            return own
        assert self.tensor_parallel_group is not None
        first = self.config.data_parallel_rank * tp_size
        sizes = plan.sp_rows[first : first + tp_size]
        return all_gatherv([own], sizes, self.tensor_parallel_group, self._deadline_s, host_waits=False)[0]


class _InferenceOnly(torch.autograd.Function):
    """A gradient that silently left out the experts would be worse than none."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise RuntimeError("Lockstep's MoE layer is for inference: no gradients flow through it")
