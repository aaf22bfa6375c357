"""JSON from outside: an error says in one sentence what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lockstep.errors import ConfigurationError

T = TypeVar("T")


def json_object(where: object, text: str | bytes) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        raise ConfigurationError(f"{where} is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where} must be a JSON object, got {json.dumps(value):.60}")
    return value


def json_lines(path: Path, kind: str, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Parse a file's lines, each an object of a kind such as `a step record`; an incomplete last line is skipped."""
    parsed = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
                parsed.append(parse(value))
            except (ValueError, TypeError, RecursionError) as error:
                if line.endswith(b"\n"):  # otherwise its writer was interrupted
                    raise ConfigurationError(f"{path}: line {number} is not {kind} ({error})") from None
    return parsed
