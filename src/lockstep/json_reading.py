"""JSON from outside: an error says in one sentence what is wrong with it."""

import json
from typing import Any

from lockstep.errors import ConfigurationError


def json_object(where: object, text: str | bytes) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        raise ConfigurationError(f"{where} is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where} must be a JSON object, got {json.dumps(value):.60}")
    return value
