"""Uneven data-parallel ranks through Mixture-of-Experts layers, in lockstep."""

import ast
import importlib
from pathlib import Path
from typing import Any

# The public names and where each lives are said once, in the stub that type checkers read. They are imported on first
# use, so that `lockstep simulate --help` never waits for torch.
_PUBLIC = {
    name.name: str(node.module)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for name in node.names
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        from lockstep.extras import lacking

        if error.name is None or not (says := lacking(error.name.partition(".")[0])):
            raise
        raise ModuleNotFoundError(says.format(f"lockstep.{name}"), name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
