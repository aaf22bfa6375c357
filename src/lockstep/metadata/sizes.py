# Rows per rank: pure functions on integers, without torch.
#
# `counts` are tokens per data-parallel rank, `[dp_size]`. A size is the rows of one expert-parallel rank, `[ep_size]`
# with `ep_size = dp_size * sequence_parallel_size`, ranks of one data-parallel rank next to each other.

from collections.abc import Sequence
from itertools import accumulate
from operator import index

from lockstep.errors import ConfigurationError, LockstepError, TokenCountError

INT32_MAX = 2**31 - 1
"""Largest count and size. Engines keep them in int32 tensors, where one more would overflow."""

MAX_RANKS = 2**20
"""Maximum expert-parallel ranks. Catches slips such as a token count passed as a rank count before memory is full."""


def as_plain_int(value: object) -> int | None:
    """Return an `int`, or a value with `__index__` such as a one-element integer tensor, as `int`; else None."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)  # type: ignore[arg-type]  # misfits raise, see the except
    except Exception:  # from a foreign `__index__`; tensors alone raise half a dozen kinds
        return None


def shown(value: object, most: int = 200) -> str:
    """Return any value as text for a message: one line, at most `most` characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        # Python refuses to print an integer beyond 4300 digits; other values may have a repr that fails.
        if isinstance(value, int):
            return f"an integer of {value.bit_length()} bits"
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_int(
    name: str, value: object, minimum: int = 0, maximum: int | None = INT32_MAX,
    error: type[LockstepError] = ConfigurationError,
) -> int:  # fmt: skip
    """Return `value` as a plain `int` in `minimum..maximum`; None is no upper limit."""
    number = as_plain_int(value)
    if number is None:
        raise error(f"{name} must be an integer, got {shown(value)}")
    if number < minimum:
        raise error(f"{name} must be >= {minimum}, got {shown(number)}")
    if maximum is not None and number > maximum:
        raise error(f"{name} must be <= {maximum}, got {shown(number)}")
    return number


def check_counts(counts: object, name: str = "num_tokens_across_dp") -> tuple[int, ...]:
    """Return the token counts of a sequence, array or tensor as checked plain integers, `[dp_size]`."""
    dtype = getattr(counts, "dtype", None)
    try:
        if getattr(dtype, "kind", "i") in "mM":  # times, which `tolist` turns into integers
            raise TypeError(f"it must have an integer dtype, got {dtype}")
        tolist = getattr(counts, "tolist", None)
        listed = tolist() if callable(tolist) else counts
        is_text = isinstance(listed, str | bytes | bytearray)
        entries = tuple(listed) if isinstance(listed, Sequence) and not is_text else None
    except Exception as reason:
        # Tensors without values, or with values elsewhere, each fail in their own way.
        kind = type(counts).__name__
        raise TokenCountError(f"{name} cannot be read from this {kind}: {shown(str(reason))}") from reason
    if entries is None:
        raise TokenCountError(f"{name} must be a sequence of integers, one per DP rank, got {shown(counts)}")
    if not entries:
        raise TokenCountError(f"{name} must have one entry per DP rank, got none")
    # Almost always all is well, as two passes in C can tell; only otherwise look at each entry.
    plain = set(map(type, entries)) == {int}
    if plain and min(entries) >= 0 and max(entries) <= INT32_MAX:
        return entries
    checked = []
    for rank, entry in enumerate(entries):
        count = as_plain_int(entry)
        if count is None:
            raise TokenCountError(f"{name} must be integers, got {shown(entry)} on DP rank {rank}")
        if not 0 <= count <= INT32_MAX:
            raise TokenCountError(f"{name} must be in 0..{INT32_MAX}, got {shown(count)} on DP rank {rank}")
        checked.append(count)
    return tuple(checked)


def abridged(values: Sequence[int], most: int = 16) -> str:
    """Return a list of integers as text on one line, without its middle if it has more than `most` entries."""
    if len(values) <= most:
        return str(list(values))
    first, last = (", ".join(map(str, part)) for part in (values[: most // 2], values[-(most // 2) :]))
    return f"[{first}, ..., {last}] ({len(values)} entries)"


def sp_sizes(counts: Sequence[int], sequence_parallel_size: int) -> list[int]:
    """Return `ceil(count / sequence_parallel_size)` of each count, repeated that many times, `[ep_size]`."""
    sp = check_int("sequence_parallel_size", sequence_parallel_size, 1)
    num_ranks = len(counts) * sp
    if num_ranks > MAX_RANKS:
        raise ConfigurationError(
            f"sequence_parallel_size {sp} times {len(counts)} DP ranks must be <= {MAX_RANKS} ranks, got {num_ranks}"
        )
    if sp == 1:
        return list(counts)
    per_dp_rank = [-(-count // sp) for count in counts]
    # Filling every sp-th place copies references in C; a loop over 1024 x 8 ranks would cost more than 60 layers.
    sizes = [0] * num_ranks
    for sp_rank in range(sp):
        sizes[sp_rank::sp] = per_dp_rank
    return sizes


def sp_rows(counts: Sequence[int], sequence_parallel_size: int) -> tuple[int, ...]:
    """Return the real rows of each rank, `[ep_size]`: slices of `ceil(count / sp)`, the last ones shorter or empty."""
    padded = sp_sizes(counts, sequence_parallel_size)
    sp = len(padded) // len(counts) if counts else 1
    return tuple(min(size, max(0, counts[rank // sp] - (rank % sp) * size)) for rank, size in enumerate(padded))


def chunk_sizes(
    sizes: Sequence[int], max_chunk_size_per_rank: int, chunk_idx: int, min_rows: int = 1
) -> tuple[int, ...]:
    """Return the rows of each rank in one chunk, `min_rows` (0 or 1) if it has none left, `[ep_size]`."""
    limit = check_int("max_chunk_size_per_rank", max_chunk_size_per_rank, 1)
    start = check_int("chunk_idx", chunk_idx, 0, maximum=None) * limit
    least = check_int("min_rows", min_rows, 0, 1)
    return tuple(max(least, min(limit, size - start)) for size in sizes)


def chunked_rows(counts: Sequence[int], sequence_parallel_size: int, *args: int) -> list[int]:
    """Return the rows of each rank in one chunk, `[ep_size]`; `args` are those of `chunk_sizes`."""
    return list(chunk_sizes(sp_sizes(counts, sequence_parallel_size), *args))


def cumulative_rows(counts: Sequence[int], sp_size: int) -> list[int]:
    """Return the running sum of the rows of each rank, `[ep_size]`."""
    return list(accumulate(sp_sizes(counts, check_int("sp_size", sp_size, 1))))
