"""Numbers from environment variables that torchrun or another launcher sets; an error is one sentence."""

import os

from lockstep.errors import ConfigurationError


def environment_number(variable: str, low: int, high: int = 2**31 - 1, *, default: int | None = None) -> int:
    """Return a variable's number, which must be in `low..high`; without a default it must be set."""
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    value = int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) <= 10 else -1
    if not low <= value <= high:
        limits = f">= {low}" if high == 2**31 - 1 else f"in {low}..{high}"
        got = "it is not set" if text is None else f"got {text!r:.60}"
        raise ConfigurationError(f"the environment variable {variable} must be a number {limits}, {got}")
    return value
