"""A model that is spread over ranks, spread anew over those that are left: its experts are read again, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lockstep.coordination.groups import parallel_config
from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import find_experts, slots_held
from lockstep.models.huggingface import _attach
from lockstep.models.loading import load_pretrained
from lockstep.models.parallel import ModelParallel, parallel_of

if TYPE_CHECKING:
    import torch.distributed as dist


def respread(model: Any, path: str, process_group: dist.ProcessGroup, **how_loaded: Any) -> None:
    """Give this rank its part of a model among other ranks than before; without tensor parallelism. Collective.

    The model's groups must have been closed. Its dense weights stay; of the second model that reads the experts, those
    are views of the files, which nobody reads.
    """
    old = parallel_of(model)
    assert old is not None
    config = parallel_config(process_group, 1)
    fresh = dict(find_experts(load_pretrained(path, ep_rank=config.rank, ep_size=config.world_size, **how_loaded)))
    for name, module in find_experts(model):
        if slots_held(module)[1] % config.world_size:
            num_experts = slots_held(module)[1]
            raise ConfigurationError(f"{num_experts} experts cannot be divided over {config.world_size} ranks")
        module._parameters.update(fresh[name]._parameters)
        module.num_experts, module._lockstep_slots = fresh[name].num_experts, slots_held(fresh[name])
    model.forward = old.forward
    del model.__dict__["_lockstep_parallel"]
    _attach(ModelParallel(model, config, process_group, old.options))
