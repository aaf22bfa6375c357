"""What can be said of a checkpoint before any rank has started. No torch here: a command answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_object


def check_checkpoint(model: str, world_size: int) -> None:
    """Say what can be said of a checkpoint before any rank has started.

    Args:
        model: a folder, or a Hub id, of which nothing is known yet.
        world_size: ranks over which its experts are divided.

    Raises:
        ConfigurationError: no such folder, no checkpoint in it, or experts that the ranks do not divide.
    """
    path = Path(model)
    if not path.exists():
        if path.is_absolute() or len(path.parts) > 2 or model.startswith("."):
            raise ConfigurationError(f"no checkpoint at {path}: there is no such folder")
        return
    if not (path / "config.json").is_file():
        raise ConfigurationError(f"{path} is no checkpoint: it has no config.json")
    config = json_object(path / "config.json", (path / "config.json").read_bytes())
    text_config = config.get("text_config")
    for names in (config, text_config if isinstance(text_config, dict) else {}):
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            num_experts = names.get(name)
            if isinstance(num_experts, int) and num_experts % world_size:
                raise ConfigurationError(f"{num_experts} experts cannot be divided over {world_size} ranks")


def check_config(model: str) -> Any:
    """Let Transformers read a checkpoint's configuration, from the Hub too, and return it.

    Raises:
        ConfigurationError: it cannot.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigurationError(f"the configuration of {model} cannot be read: {first}") from None
