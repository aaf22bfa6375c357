"""Packages that only some of us have: which extra brings each, and one sentence where it is missing."""

import importlib.util
import sys

_EXTRA_OF = {
    "typer": "cli",
    "rich": "cli",
    "transformers": "models",
    "tokenizers": "models",
    "safetensors": "models",
    "pyarrow": "report",
    "plotly": "report",
    "prometheus_client": "metrics",
}


def require(*packages: str) -> None:
    """End with status 2 and the command to type where packages of an extra are missing.

    Args:
        *packages: names as they are imported.
    """
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        extras = list(dict.fromkeys(_EXTRA_OF[name] for name in missing if name in _EXTRA_OF))
        if "numpy" in missing and not {"models", "report"} & set(extras):  # both bring it
            extras.append("report")
        verb = "is" if len(missing) == 1 else "are"
        sys.stderr.write(
            f"lockstep: error: {', '.join(missing)} {verb} not installed, which this command needs: "
            f"pip install 'lockstep-moe[{','.join(extras)}]'\n"
        )
        sys.exit(2)


def _is_there(name: str) -> bool:
    return sys.modules[name] is not None if name in sys.modules else importlib.util.find_spec(name) is not None
