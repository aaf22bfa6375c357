"""Optional packages: which extra installs each, and one sentence where it is missing."""

import importlib.util
import sys
from collections.abc import Mapping

_EXTRAS = {
    "cli": ("typer", "rich"),
    "models": ("transformers", "tokenizers", "safetensors"),
    "report": ("pyarrow",),
    "metrics": ("prometheus_client",),
    "serve": ("starlette", "uvicorn", "httptools", "pydantic"),
}


def require(*packages: str) -> None:
    """End with status 2 and the command to type where packages of an extra are missing."""
    if says := lacking(*packages):
        sys.stderr.write(f"lockstep: error: {says.format('this command')}\n")
        sys.exit(2)


def lacking(*packages: str) -> str:
    """Return which packages are missing, with the command that installs them; empty where none is."""
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        extras = [extra for extra, brought in _EXTRAS.items() if any(name in brought for name in missing)]
        if "numpy" in missing and not {"models", "report"} & set(extras):  # both bring it
            extras.append("report")
        verb = "is" if len(missing) == 1 else "are"
        extra = f"[{','.join(extras)}]" if extras else ""
        return f"{', '.join(missing)} {verb} not installed, which {{}} needs: pip install 'lockstep-moe{extra}'"
    return ""


def _is_there(name: str) -> bool:
    return sys.modules[name] is not None if name in sys.modules else importlib.util.find_spec(name) is not None


NEWEST_TRIED = {"torch": "2.14", "transformers": "5.24"}
"""Releases that the tests have passed with; the lowest are in pyproject.toml."""


def untried(versions: Mapping[str, str]) -> str:
    """Return a warning that names each package newer than any that was tried, beside that one; empty where none is.

    Args:
        versions: of packages, by name, such as `2.13.0+cpu`.

    Example:
        >>> untried({"torch": "2.13.0+cpu", "transformers": "6.0.0.dev0"})
        'transformers 6.0.0.dev0 is newer than 5.24, the newest that Lockstep was tried with'
    """
    newer = [
        f"{name} {version} is newer than {NEWEST_TRIED[name]}"
        for name, version in versions.items()
        if _release(version) > _release(NEWEST_TRIED[name])
    ]
    return f"{' and '.join(newer)}, the newest that Lockstep was tried with" if newer else ""


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
