"""The routed experts of one layer, spread over all ranks: dispatch, experts and combine, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.waits import DEADLINE_S
from lockstep.dispatch.base import NO_EXPERT, Dispatcher, ExpertsShape, Route
from lockstep.dispatch.collectives import all_gatherv
from lockstep.errors import ConfigurationError
from lockstep.metadata.config import ParallelConfig
from lockstep.moe.experts import FEW_ROWS, LocalExperts
from lockstep.moe.placement import Placement

if TYPE_CHECKING:
    from lockstep.moe.step import Step

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(hidden_states [rows, hidden], gather_index [pairs], tokens_per_expert [num_local_experts]) -> [pairs, hidden]`"""


class MoELayer:
    """The routed experts of one layer over all ranks. Inference only: no gradients flow through it.

    A layer knows nothing of steps: `Step` decides which rows it runs, and in which chunks.

    Args:
        experts: this rank's experts, see `Experts`; `LocalExperts` if the dispatcher leaves counts on the device.
        dispatcher: brings rows to their experts and back. Layers that run one after another may share it.
        config: this rank's place. Ranks of one tensor-parallel group pass the same rows; each takes its share of them
            into the experts, and all get all results.
        shape: sizes and dtype of the experts and their rows.
        tensor_parallel_group: the ranks that share rows, if there are several. It stays open.
        slots: the placement, unless experts are in contiguous shares; with it `shape.num_experts` counts slots.
        load: counters of the pairs in each of this rank's slots, `[num_local_experts]`, on the device.
        deadline_s: longest wait for any rank, in seconds.
    """

    def __init__(
        self,
        experts: Experts,
        dispatcher: Dispatcher,
        config: ParallelConfig,
        shape: ExpertsShape,
        *,
        tensor_parallel_group: dist.ProcessGroup | None = None,
        deadline_s: float = DEADLINE_S,
        slots: SlotTable | None = None,
        load: torch.Tensor | None = None,
    ) -> None:
        if (tp_size := config.tensor_parallel_size) > 1 and tensor_parallel_group is None:
            raise ConfigurationError(f"tensor_parallel_size {tp_size} needs a tensor_parallel_group")
        if shape.dtype not in dispatcher.abilities.dtypes:
            raise ConfigurationError(f"dispatcher {dispatcher.name!r} cannot carry {shape.dtype}")
        self.experts, self.dispatcher = experts, dispatcher
        self.config, self.shape = config, shape
        self.tensor_parallel_group = tensor_parallel_group
        self.slots, self.load = slots, load
        self._deadline_s = deadline_s
        self.nothing = self.rows_for_nobody(0)

    def rows_for_nobody(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return states, ids and weights of rows that go to no expert, for a rank that has failed to make its own."""
        shape = self.shape
        return (
            torch.zeros(num_rows, shape.hidden_size, dtype=shape.dtype, device=shape.device),
            torch.full((num_rows, shape.top_k), NO_EXPERT, dtype=torch.int32, device=shape.device),
            torch.zeros(num_rows, shape.top_k, device=shape.device),
        )

    def takes_few_rows(self, num_rows: int) -> bool:
        """Return whether the kernels for few rows run if all ranks together bring `num_rows` rows."""
        return self._rows_per_expert(num_rows) <= FEW_ROWS

    def run(
        self, step: Step, index: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return weighted sums, `[num_tokens, hidden]`, of the tensor-parallel group's rows. Only `Step` calls this."""
        step.in_step = False  # until every collective of this layer has been issued
        failed_before = step.failure
        if self.slots is not None:
            topk_ids = self.slots.slots(topk_ids, step.first_row, self.takes_few_rows(sum(step.route.sizes)))
        # One integer and one float type on the wire, whatever a model's router returns: all ranks must send alike.
        topk_ids, topk_weights = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
        chunks = step.chunks(self)
        if len(chunks) == 1:
            output = self._run_chunk(step, (index, 0), chunks[0][0], hidden_states, topk_ids, topk_weights)
        else:
            output = torch.empty_like(hidden_states)
            for number, (route, span) in enumerate(chunks):
                rows = hidden_states[span], topk_ids[span], topk_weights[span]
                output[span] = self._run_chunk(step, (index, number), route, *rows)
        output = self._gather(step, output)
        step.peers.mark(Phase.MODEL, index)
        step.in_step = True
        if step.failure is not None and step.failure is not failed_before:
            raise step.failure
        return output

    def _run_chunk(
        self, step: Step, place: tuple[int, int], route: Route,
        hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        mark = step.peers.mark
        mark(Phase.DISPATCH, *place)
        handle = self.dispatcher.dispatch(route, hidden_states, topk_ids, topk_weights, step.num_rows)
        if self.load is not None:
            self.load += handle.tokens_per_expert
        mark(Phase.EXPERTS, *place)
        try:
            if handle.num_pairs is not None:
                expert_output = self.experts(handle.hidden_states, handle.gather_index, handle.tokens_per_expert)
            else:
                assert isinstance(self.experts, LocalExperts)
                expert_output = self.experts.on_device(
                    handle.hidden_states, handle.scales, handle.gather_index, handle.expert_offsets,
                    self._rows_per_expert(sum(route.sizes)),
                )  # fmt: skip
        except Exception as error:
            # The other ranks are about to enter `combine`: join them with NaNs, which pass for no result, and raise
            # the error at the end of the layer.
            step.spoil(error)
            expert_output = hidden_states.new_full((handle.gather_index.shape[0], self.shape.hidden_size), float("nan"))
        mark(Phase.COMBINE, *place)
        return self.dispatcher.combine(expert_output, handle)

    def _rows_per_expert(self, num_rows: int) -> float:
        """Return the mean rows per expert if all ranks together bring `num_rows` rows."""
        return num_rows * self.shape.top_k / self.shape.num_experts

    def _gather(self, step: Step, own: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks of the tensor-parallel group."""
        tp_size = self.config.tensor_parallel_size
        if tp_size == 1:
            return own
        assert self.tensor_parallel_group is not None and step.plan is not None
        first = self.config.data_parallel_rank * tp_size
        sizes = step.plan.sp_rows[first : first + tp_size]
        return all_gatherv([own], sizes, self.tensor_parallel_group, self._deadline_s, host_waits=False)[0]


class SlotTable:
    """One layer's placement on the device: the slot for each expert that a row has chosen, seen from a `rank`.

    Few rows go to as few slots as possible, since reading an expert's weights costs as much as its rows: to the slot
    on this rank, else to the first. Many rows are spread: `(number of the row in the step + expert) % replicas`.
    """

    def __init__(self, placement: Placement, layer: int, rank: int, device: torch.device) -> None:
        most = max(map(len, placement.replicas(layer)))
        # The last entry of each is that of `NO_EXPERT`, -1.
        shape = placement.num_experts + 1, most
        self._nearest = torch.empty(shape[0], dtype=torch.int32, device=device)
        self._replicas = torch.empty(shape, dtype=torch.int32, device=device)
        self._counts = torch.empty(shape[0], dtype=torch.int64, device=device)
        self._spreads = most > 1
        self.follow(placement, layer, rank, range(placement.num_ranks))

    def follow(self, placement: Placement, layer: int, rank: int, places: Sequence[int]) -> None:
        """Switch to another placement, also in captured graphs; rank r has the slots of the rank at `places[r]`."""
        per_rank, most = placement.num_slots_per_rank, self._replicas.shape[1]
        own = range(rank * per_rank, (rank + 1) * per_rank)
        replicas = placement.replicas(layer)
        nearest = [next((slot for slot in slots if slot in own), slots[0]) for slots in replicas]
        padded = [(*slots, *[NO_EXPERT] * (most - len(slots))) for slots in replicas] + [(NO_EXPERT,) * most]
        places_of = torch.tensor(
            [*(place * per_rank + slot for place in places for slot in range(per_rank)), NO_EXPERT]
        )
        self._nearest.copy_(places_of[torch.tensor([*nearest, NO_EXPERT])])
        self._replicas.copy_(places_of[torch.tensor(padded)])
        self._counts.copy_(torch.tensor([*map(len, replicas), 1]))

    def slots(self, topk_ids: torch.Tensor, first_row: int, few_rows: bool) -> torch.Tensor:
        """Return each choice's slot, `[num_rows, top_k]`, int32; rows count from `first_row` over all ranks."""
        if few_rows or not self._spreads:
            return self._nearest[topk_ids]
        ids = topk_ids.long()
        rows = torch.arange(first_row, first_row + len(ids), device=ids.device)[:, None]
        return self._replicas[ids, (rows + ids) % self._counts[ids]]
