"""A spread model's MoE layers, each with its dispatcher, made when the ranks have opened their groups."""

from collections.abc import Sequence

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
    """Make the layers, in forward order, with their kernels loaded. Collective.

    Args:
        experts: this rank's, `[layers]`.
        shapes: of the layers, `[layers]`.
        config: this rank's place.
        groups: that the ranks have opened.
        options: of the model.
        constants: by which a dispatcher chooses, if it does.
        can_map: all ranks can map each other's memory.
    """
    made: dict[tuple[ExpertsShape, bool], Dispatcher] = {}
    for shape, on_device in dict.fromkeys((s, e.run_on_device) for s, e in zip(shapes, experts, strict=True)):
        # Layers run one after another, so those of one shape share a dispatcher, and its buffers.
        wanted = DispatcherOptions(
            deadline_s=options.deadline_s,
            max_rows_per_rank=options.max_chunk_size_per_rank,
            fp8=options.fp8_dispatch,
            can_map=can_map,
            experts_on_device=on_device,
            constants=constants,
        )
        made[shape, on_device] = make_dispatcher(options.dispatcher, groups.data, shape, wanted)
    layers = [
        MoELayer(
            one,
            made[shape, one.run_on_device],
            config,
            shape,
            tensor_parallel_group=groups.tensor_parallel,
            deadline_s=options.deadline_s,
        )
        for one, shape in zip(experts, shapes, strict=True)
    ]
    if shapes[0].device.type == "cuda":
        _warm_up(layers, experts, config.world_size * (options.max_chunk_size_per_rank or MAPPED_ROWS), options)
    return layers


def _warm_up(
    layers: Sequence[MoELayer], experts: Sequence[LocalExperts], num_rows: int, options: ParallelOptions
) -> None:
    """Load the experts' kernels before anybody waits for anybody in a step."""
    warm = set()
    for layer, one in zip(layers, experts, strict=True):
        kind = one.module.down_proj.shape, layer.shape.top_k
        if layer.dispatcher.abilities.counts_on_device and kind not in warm:
            warm.add(kind)
            one.warm_up(num_rows * layer.shape.top_k, options.fp8_dispatch)
