"""A rank's failure messages, and which of several failures caused the rest."""

import logging
import traceback
from collections.abc import Iterable
from typing import Any

import lockstep.errors
from lockstep.errors import LockstepError, PeerFailedError

logger = logging.getLogger(__name__)

_BROKEN_DEVICE = "AcceleratorError"  # torch's: the device accepts no more work, for example after a device-side assert
_ECHOES = ("PeerFailedError", "RankAbsentError")


def failure_of(rank: int, error: BaseException) -> dict[str, Any]:
    """Return the message for a rank's failure; unexpected errors are logged with their traceback."""
    if isinstance(error, LockstepError | OSError):
        kind = type(error).__name__ if isinstance(error, LockstepError) else "OSError"
        return {"failed": kind, "why": str(error)}
    if type(error).__name__ == _BROKEN_DEVICE:
        return {"failed": "died", "why": f"its device failed: {error}"}
    logger.error("rank %d failed:\n%s", rank, "".join(traceback.format_exception(error)))
    return {"failed": type(error).__name__, "why": f"{type(error).__name__}: {error}"}


def first_cause(failures: list[tuple[int, dict[str, Any]]]) -> tuple[int, dict[str, Any]]:
    """Return the failure that caused the rest: a rank that only reports another rank's failure comes last.

    Example:
        >>> first_cause([(0, {"failed": "PeerFailedError", "why": "rank 1"}), (1, {"failed": "died", "why": "-9"})])
        (1, {'failed': 'died', 'why': '-9'})
    """
    return min(failures, key=lambda failure: _ECHOES.index(failure[1]["failed"]) + 1 if is_echo(failure[1]) else 0)


def is_echo(message: dict[str, Any]) -> bool:
    """Return whether a failure may be another rank's doing."""
    return message["failed"] in _ECHOES


def rank_names(ranks: Iterable[int]) -> str:
    """Return `rank 3`, or `ranks 0, 3`."""
    numbers = ", ".join(map(str, sorted(ranks)))
    return f"rank{'s' * (',' in numbers)} {numbers}"


def error_of(rank: int, message: dict[str, Any]) -> Exception:
    """Return what to raise for a rank's failure."""
    if isinstance(message.get("error"), LockstepError):
        return message["error"]
    if message["failed"] == "OSError":  # a full disk is no fault of the ranks
        return OSError(f"rank {rank}: {message['why']}")
    kind = getattr(lockstep.errors, message["failed"], None)
    if isinstance(kind, type) and issubclass(kind, LockstepError) and kind is not PeerFailedError:
        return kind(message["why"])
    return PeerFailedError(f"rank {rank} failed: {message['why']}", rank, message["why"])
