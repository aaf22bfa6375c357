"""A model that is spread over ranks, spread anew over those that are left: missing experts are read, nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lockstep.coordination.groups import parallel_config
from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import change_slots, find_experts, slots_held
from lockstep.models.huggingface import attach
from lockstep.models.loading import load_pretrained
from lockstep.models.parallel import ModelParallel, parallel_of
from lockstep.moe.placement import EMPTY, Placement
from lockstep.moe.survivors import to_read


class Respreader:
    """Gives this rank's model other experts, as often as ranks are lost; `how_loaded` is for `load_pretrained`."""

    def __init__(self, model: Any, path: str, **how_loaded: Any) -> None:
        parallel = parallel_of(model)
        assert parallel is not None
        self._model, self._path, self._how_loaded = model, path, how_loaded
        self._files = _files_of(path)
        layers = find_experts(model)
        num_experts, num_ranks = slots_held(layers[0][1])[1], parallel.config.world_size
        self.placement = parallel.options.placement or Placement.even(len(layers), num_experts, num_ranks)

    def spread(self, placement: Placement) -> None:
        """Hold what a placement over all ranks says, and work among them. Groups of earlier ranks must be closed."""
        parallel, modules, process_group = parallel_of(self._model), find_experts(self._model), dist.group.WORLD
        assert parallel is not None and process_group is not None
        config = parallel_config(process_group, 1)
        wanted = [placement.slots_of(layer, config.rank) for layer in range(len(modules))]
        missing = [
            set(slots).difference(slots_held(module)[0], {EMPTY})
            for slots, (_, module) in zip(wanted, modules, strict=True)
        ]
        fresh = self._read(to_read(missing, placement.num_experts)) if any(missing) else {}
        for slots, (name, module) in zip(wanted, modules, strict=True):
            change_slots(module, slots, fresh.get(name))
        self._model.forward = parallel.forward
        del self._model.__dict__["_lockstep_parallel"]
        attach(ModelParallel(self._model, config, process_group, replace(parallel.options, placement=placement)))

    def _read(self, placement: Placement) -> dict[str, Any]:
        """Experts modules with the experts of a placement's first rank; of dense weights, views are made at most."""
        if _files_of(self._path) != self._files:
            raise ConfigurationError(f"{self._path} is not the checkpoint any more that the ranks have loaded")
        model = load_pretrained(
            self._path, ep_rank=0, ep_size=placement.num_ranks, placement=placement, **self._how_loaded
        )
        return dict(find_experts(model))


def _files_of(path: str) -> list[tuple[str, int, int]]:
    """Name, size and time of a folder's weights; a Hub id's never change in the cache."""
    found = sorted(Path(path).glob("*.safetensors"))
    return [(file.name, (about := file.stat()).st_size, about.st_mtime_ns) for file in found]
