"""A spread model's MoE layers, each with its dispatcher, made when the ranks have opened their groups."""

from collections.abc import Sequence
from dataclasses import replace

from lockstep.coordination.groups import Groups
from lockstep.dispatch.base import Dispatcher, ExpertsShape
from lockstep.dispatch.choose import MAPPED_ROWS, DispatcherOptions, make_dispatcher
from lockstep.dispatch.constants import DispatchConstants
from lockstep.metadata.config import ParallelConfig
from lockstep.models.options import ParallelOptions
from lockstep.moe.experts import LocalExperts
from lockstep.moe.layer import MoELayer


def make_layers(
    experts: Sequence[LocalExperts],
    shapes: Sequence[ExpertsShape],
    config: ParallelConfig,
    groups: Groups,
    options: ParallelOptions,
    constants: DispatchConstants | None,
    can_map: bool,
) -> list[MoELayer]:
    """Make the layers of this rank's experts, in forward order, with their kernels loaded. Collective.

    Args:
        experts: this rank's, `[layers]`.
        shapes: of the layers, `[layers]`.
        config: this rank's place.
        groups: that the ranks have opened.
        options: of the model.
        constants: by which a dispatcher chooses, if it does.
        can_map: all ranks can map each other's memory.
    """
    wanted = DispatcherOptions(
        deadline_s=options.deadline_s,
        max_rows_per_rank=options.max_chunk_size_per_rank,
        fp8=options.fp8_dispatch,
        can_map=can_map,
        constants=constants,
    )
    # Layers run one after another, so those of one shape share a dispatcher, and its buffers.
    made: dict[tuple[ExpertsShape, bool], Dispatcher] = {}
    for shape, on_device in dict.fromkeys((s, e.run_on_device) for s, e in zip(shapes, experts, strict=True)):
        own = replace(wanted, experts_on_device=on_device)
        made[shape, on_device] = make_dispatcher(options.dispatcher, groups.data, shape, own)
    layers, warm = [], set()
    for one, shape in zip(experts, shapes, strict=True):
        dispatcher = made[shape, one.run_on_device]
        tp_group, deadline_s = groups.tensor_parallel, options.deadline_s
        layers.append(MoELayer(one, dispatcher, config, shape, tensor_parallel_group=tp_group, deadline_s=deadline_s))
        kind = one.module.down_proj.shape, shape.top_k
        if shape.device.type == "cuda" and dispatcher.abilities.counts_on_device and kind not in warm:
            warm.add(kind)  # its kernels are loaded before anybody waits for anybody in a step
            rows = config.world_size * (options.max_chunk_size_per_rank or MAPPED_ROWS)
            one.warm_up(rows * shape.top_k, options.fp8_dispatch)
    return layers
