"""Environment variables of whoever starts ranks, such as torchrun: numbers, or one sentence."""

import os

from lockstep.errors import ConfigurationError


def environment_number(variable: str, low: int, high: int = 2**31 - 1, *, default: int | None = None) -> int:
    """Return what whoever starts ranks has put into an environment variable.

    Args:
        variable: its name.
        low: least value.
        high: largest value.
        default: where it is not set; None where it must be.

    Raises:
        ConfigurationError: naming the variable, its limits and what it holds.
    """
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    value = int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) <= 10 else -1
    if not low <= value <= high:
        limits = f">= {low}" if high == 2**31 - 1 else f"in {low}..{high}"
        got = "it is not set" if text is None else f"got {text!r:.60}"
        raise ConfigurationError(f"the environment variable {variable} must be a number {limits}, {got}")
    return value
