"""The exception tree. Every message names the value, the limit and, where there is one, the rank."""


class LockstepError(Exception):
    """Base of all errors that Lockstep raises on its own account."""


class ConfigurationError(LockstepError, ValueError):
    """Sizes, ranks or options that cannot work together."""


class TokenCountError(LockstepError, ValueError):
    """A token count that is wrong on this rank."""


class RankMismatchError(LockstepError, RuntimeError):
    """Ranks disagree about the step that they are about to run. Raised on all ranks, before any data moves."""


class RankAbsentError(LockstepError, TimeoutError):
    """Ranks that did not arrive before the deadline.

    Attributes:
        absent_ranks: the ranks that did not come, ascending; empty if they could not be identified.
    """

    def __init__(self, message: str, absent_ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.absent_ranks = absent_ranks


class PeerFailedError(LockstepError, RuntimeError):
    """Another rank raised; this one has stopped with it.

    Attributes:
        rank: the rank that raised, or the lowest of several.
        peer_message: what it raised, as `"Type: message"`.
    """

    def __init__(self, message: str, rank: int = -1, peer_message: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.peer_message = peer_message
