"""A spread model's MoE layers: made with kernels and buffers, or continued with those of the ranks before."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lockstep.coordination.groups import Groups
from lockstep.dispatch.base import Dispatcher, ExpertsShape
from lockstep.dispatch.choose import MAPPED_ROWS, DispatcherOptions, make_dispatcher
from lockstep.dispatch.constants import DispatchConstants
from lockstep.metadata.config import ParallelConfig
from lockstep.models.options import ParallelOptions
from lockstep.moe.experts import LocalExperts
from lockstep.moe.layer import MoELayer, SlotTable
from lockstep.moe.layers import MoELayers


def make_layers(
    experts: Sequence[LocalExperts], shapes: Sequence[ExpertsShape], config: ParallelConfig, options: ParallelOptions,
    groups: Groups, can_map: bool, constants: DispatchConstants | None,
) -> list[MoELayer]:  # fmt: skip
    """Return the layers in forward order, with loaded kernels. Collective."""
    wanted = DispatcherOptions(
        deadline_s=options.deadline_s, max_rows_per_rank=options.max_chunk_size_per_rank, fp8=options.fp8_dispatch,
        can_map=can_map, constants=constants,
    )  # fmt: skip
    # Layers run one after another, so those of one shape share a dispatcher, and its buffers.
    made: dict[tuple[ExpertsShape, bool], Dispatcher] = {}
    layers, warm, placement = [], set(), options.placement
    for index, (own, shape) in enumerate(zip(experts, shapes, strict=True)):
        key = shape, own.run_on_device
        if key not in made:
            made[key] = make_dispatcher(
                options.dispatcher, groups.data, shape, replace(wanted, experts_on_device=own.run_on_device)
            )
        slots = load = None
        if placement is not None and not placement.is_identity:
            slots = SlotTable(placement, index, config.rank, shape.device)
        if options.count_expert_load:
            load = torch.zeros(own.num_local_experts, dtype=torch.int64, device=shape.device)
        layers.append(
            MoELayer(
                own, made[key], config, shape, tensor_parallel_group=groups.tensor_parallel,
                deadline_s=options.deadline_s, slots=slots, load=load,
            )
        )  # fmt: skip
        kind = own.module.down_proj.shape, shape.top_k
        if shape.device.type == "cuda" and made[key].abilities.counts_on_device and kind not in warm:
            warm.add(kind)  # its kernels are loaded before anybody waits for anybody in a step
            rows = config.world_size * (options.max_chunk_size_per_rank or MAPPED_ROWS)
            own.warm_up(rows * shape.top_k, options.fp8_dispatch)
    return layers


def follow_layers(
    before: MoELayers, experts: Sequence[LocalExperts], shapes: Sequence[ExpertsShape], config: ParallelConfig,
    options: ParallelOptions, groups: Groups, places: Sequence[int],
) -> list[MoELayer]:  # fmt: skip
    """Return layers that reuse the device memory of those `before`, by the new placement. Collective.

    `places` are the ranks' numbers among the ranks that made `before`.
    """
    placement = options.placement
    assert placement is not None
    for dispatcher in before.dispatchers:
        dispatcher.rejoin(groups.data, places)
    layers = []
    for index, (old, own, shape) in enumerate(zip(before, experts, shapes, strict=True)):
        assert old.slots is not None
        old.slots.follow(placement, index, config.rank, places)
        if old.load is not None:
            old.load.zero_()
        layers.append(
            MoELayer(own, old.dispatcher, config, shape, deadline_s=options.deadline_s, slots=old.slots, load=old.load)
        )
    return layers
