"""Spreads a model anew over the members of another epoch; only missing experts are read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.coordination.groups import Start, own_device, parallel_config
from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import change_slots, find_experts, only_fills, slots_held
from lockstep.models.huggingface import attach
from lockstep.models.loading import load_pretrained
from lockstep.models.options import ParallelOptions
from lockstep.models.parallel import ModelParallel, parallel_of
from lockstep.models.stored_experts import StoredExperts
from lockstep.moe.fp8 import is_fp8
from lockstep.moe.placement import EMPTY, Placement
from lockstep.moe.survivors import to_read


class Respreader:
    """Changes the experts of this rank's model whenever ranks are lost or come back.

    Args:
        path: folder or Hub id of the checkpoint.
        options: of the model over its ranks.
        store: holds which files the first rank has loaded, for all ranks, including those that come back.
        how_loaded: arguments of `load_pretrained`.
    """

    def __init__(self, path: str, options: ParallelOptions, store: dist.Store, **how_loaded: Any) -> None:
        self._path, self._options, self._how_loaded = path, options, how_loaded
        self._stored: StoredExperts | None = None
        self._made_by: tuple[int, ...] = ()  # members that made what the layers have on the device
        self._members: tuple[int, ...] = ()  # those of them that still have it: a rank that comes back does not
        self._files: bytes = store.compare_set("checkpoint", "", _files_of(path))

    def load_alone(self, rank: int, num_ranks: int, device: Any) -> Any:
        """Load a rank's initial part without the other ranks; None for this rank's device."""
        placement = self._options.placement
        return self._load(ep_rank=rank, ep_size=num_ranks, placement=placement, device=own_device(device))

    def first_placement(self, model: Any, num_ranks: int) -> Placement:
        """Return the initial placement over all ranks."""
        layers = find_experts(model)
        return self._options.placement or Placement.even(len(layers), slots_held(layers[0][1])[1], num_ranks)

    def spread(self, model: Any, placement: Placement, members: Sequence[int]) -> None:
        """Take the experts of a placement over the `members`, and open their groups; earlier groups must be closed.

        If none of them is new, and their slots have room for all experts, they continue with what the layers have on
        the device: captured CUDA graphs remain valid.
        """
        parallel, modules, process_group = parallel_of(model), find_experts(model), dist.group.WORLD
        assert process_group is not None
        config = parallel_config(process_group, 1)
        wanted = [placement.slots_of(layer, config.rank) for layer in range(len(modules))]
        missing = [
            set(slots).difference(slots_held(module)[0], {EMPTY})
            for slots, (_, module) in zip(wanted, modules, strict=True)
        ]
        fills = all(only_fills(module, slots) for slots, (_, module) in zip(wanted, modules, strict=True))
        with Start(process_group).whereabouts.working(f"reading experts of {self._path}"):
            read = self._reader(missing, placement.num_experts, in_fp8=is_fp8(modules[0][1]))
            self._check_files()
            for slots, (name, module) in zip(wanted, modules, strict=True):
                change_slots(module, slots, functools.partial(read, name))
            if self._stored is None and any(EMPTY in slots for slots in wanted):  # there may be something to fill
                self._stored = StoredExperts.of(self._path, modules)
        if parallel is not None:  # None where this rank has just loaded the model alone
            model.forward = parallel.forward
            del model.__dict__["_lockstep_parallel"]
        goes_on = (
            fills and parallel is not None and set(members) <= set(self._members) and parallel.can_go_on(placement)
        )
        self._members = tuple(members)
        self._made_by = self._made_by if goes_on else self._members
        options, places = replace(self._options, placement=placement), [self._made_by.index(rank) for rank in members]
        attach(
            ModelParallel(model, config, process_group, options, before=parallel if goes_on else None, places=places)
        )

    def _reader(self, missing: Sequence[set[int]], num_experts: int, in_fp8: bool) -> Callable[..., None]:
        """Return a function like `StoredExperts.read` for each layer's missing experts, which may be loaded for it."""
        if self._stored is not None:
            return self._stored.read
        loaded: dict[str, Any] = {}
        if any(missing):
            placement = to_read(missing, num_experts)  # dense weights stay views of the files
            part = {"ep_rank": 0, "ep_size": placement.num_ranks, "placement": placement}
            loaded = dict(find_experts(self._load(**part, quantize_experts="fp8" if in_fp8 else "none")))

        def read(module_name: str, name: str, expert: int, weight: torch.Tensor) -> None:
            module = loaded[module_name]
            weight.copy_(module._parameters[name].detach()[slots_held(module)[0].index(expert)])

        return read

    def _load(self, **part: Any) -> Any:
        self._check_files()
        return load_pretrained(self._path, **(self._how_loaded | part))

    def _check_files(self) -> None:
        if _files_of(self._path).encode() != self._files:
            raise ConfigurationError(f"{self._path} is not the checkpoint any more that the ranks have loaded")


def _files_of(path: str) -> str:
    """Return name, size and time of a folder's weight files; those of a Hub id never change in the cache."""
    found = sorted(Path(path).glob("*.safetensors"))
    return json.dumps([(file.name, (about := file.stat()).st_size, about.st_mtime_ns) for file in found])
