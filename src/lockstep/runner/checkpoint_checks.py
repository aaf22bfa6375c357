"""Checks of a checkpoint before any rank starts. No torch here, so that commands answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_object
from lockstep.moe.placement import ExpertLoad, Placement
from lockstep.runner.options import ModelOptions


def check_checkpoint(model: str) -> None:
    """Raise if a folder is missing or holds no checkpoint; a Hub id cannot be checked yet."""
    path = Path(model)
    if not path.exists():
        if path.is_absolute() or len(path.parts) > 2 or model.startswith("."):
            raise ConfigurationError(f"no checkpoint at {path}: there is no such folder")
        return
    if not (path / "config.json").is_file():
        raise ConfigurationError(f"{path} is no checkpoint: it has no config.json")
    json_object(path / "config.json", (path / "config.json").read_bytes())


def placement_of(options: ModelOptions) -> Placement | None:
    """Place the experts by the load named in the options; `ConfigurationError` if it is of another model."""
    if options.placement is None:
        if options.num_redundant_experts:
            raise ConfigurationError("num_redundant_experts needs a placement: which experts are hot is not known")
        return None
    load = ExpertLoad.read(options.placement)
    try:
        return load.place(check_config(options.model).model_type, options.world_size, options.num_redundant_experts)
    except ConfigurationError as error:
        raise ConfigurationError(f"{options.placement}: {error}") from None


def check_config(model: str) -> Any:
    """Return a checkpoint's configuration as read by Transformers, also from the Hub.

    Raises:
        ConfigurationError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigurationError(f"the configuration of {model} cannot be read: {first}") from None
