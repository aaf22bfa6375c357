"""One rank's record before a step, and the ranks' common decision. Pure Python: no torch, no clocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from operator import attrgetter, call, itemgetter
from typing import Any, Literal, NamedTuple
from zlib import crc32

from lockstep.errors import ConfigurationError, RankMismatchError, TokenCountError

MAX_FIELDS = 24  # of a record, so that it fits into one exchange

Reducer = Literal["gather", "max", "min", "all", "any", "equal"]

_REDUCERS: dict[str, Callable[[Sequence[int]], Any]] = {
    "gather": tuple, "max": max, "min": min, "all": all, "any": any, "equal": itemgetter(0),
}  # fmt: skip


def decided(by: Reducer, default: int | bool = 0) -> Any:
    """Declare a field of a `StepRecord` and how all ranks' values become one; `equal` demands that they agree."""
    if by not in _REDUCERS:
        raise ConfigurationError(f"a step field is decided by one of {sorted(_REDUCERS)}, got {by!r}")
    return field(default=default, metadata={"decided_by": by})


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One rank's record before a step: a few integers, each of which declares how it is decided.

    Engines add fields of their own in a frozen subclass:

        >>> @dataclass(frozen=True)
        ... class MyRecord(StepRecord):
        ...     graph_mode: int = decided("min")
        >>> decide([MyRecord(num_tokens=4, graph_mode=2), MyRecord(graph_mode=1)]).values["graph_mode"]
        1

    Attributes:
        num_tokens: rows of this rank's requests in the step; 0 for an idle rank.
        unfinished: this rank may have more work. The run ends at the first agreement where no rank has any.
    """

    num_tokens: int = decided("gather", 0)
    unfinished: bool = decided("any", False)


class StepDecision(NamedTuple):
    """The result of an agreement, equal on all ranks.

    Attributes:
        record_class: of the ranks' records.
        columns: what each rank said, field by field, `[fields][ranks]`; records are made of it only on request.
        num_tokens_across_dp: rows of each data-parallel rank in the step, `[data_parallel_size]`; see `decide`.
        values: every field's decided value by name (a tuple `[ranks]` for `gather`).
    """

    record_class: type[StepRecord]
    columns: tuple[tuple[int, ...], ...]
    num_tokens_across_dp: tuple[int, ...]
    values: dict[str, Any]

    def column(self, name: str) -> tuple[int, ...]:
        """Return every rank's value of a field, `[ranks]`."""
        return self.columns[fields_of(self.record_class).names.index(name)]

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """What each rank said, `[ranks]`."""
        pairs = zip(self.columns, fields_of(self.record_class).decided_by, strict=True)
        columns = [map(bool, column) if by in ("any", "all") else column for column, by in pairs]
        return tuple(self.record_class(*row) for row in zip(*columns, strict=True))

    @property
    def runs_step(self) -> bool:
        """Whether any rank has rows: otherwise no rank runs anything."""
        return any(self.num_tokens_across_dp)

    @property
    def unfinished(self) -> bool:
        """Whether any rank may have more work."""
        return bool(self.values["unfinished"])


class RecordFields:
    """The fields of one record class and how each is decided, cached per class; `fingerprint` identifies them."""

    def __init__(self, record_class: type[StepRecord]) -> None:
        for item in fields(record_class):
            if "decided_by" not in item.metadata:
                text = f"field {item.name!r} of {record_class.__name__} does not say how it is decided: use decided()"
                raise ConfigurationError(text)
        self.names = tuple(item.name for item in fields(record_class))
        if len(self.names) > MAX_FIELDS:
            text = f"{record_class.__name__} has {len(self.names)} fields; at most {MAX_FIELDS} travel"
            raise ConfigurationError(text)
        self.decided_by: tuple[Reducer, ...] = tuple(item.metadata["decided_by"] for item in fields(record_class))
        self.reducers = tuple(_REDUCERS[by] for by in self.decided_by)
        self.must_be_equal = [place for place, by in enumerate(self.decided_by) if by == "equal"]
        self.values_of: Callable[[StepRecord], tuple[int, ...]] = attrgetter(*self.names)
        self.fingerprint = crc32(repr(tuple(zip(self.names, self.decided_by, strict=True))).encode())


# mypy takes the hash of the records for that of their class.
fields_of: Callable[[type[StepRecord]], RecordFields] = cache(RecordFields)  # type: ignore[assignment]


def decide(
    records: Sequence[StepRecord], tensor_parallel_size: int = 1, names: Sequence[int] | None = None
) -> StepDecision:
    """Decide the step from all ranks' records. Pure: the same records give the same decision everywhere.

    The ranks of one tensor-parallel group share their requests, so they run them together or not at all: until all of
    them have said so, the group takes part with zero rows.

    Args:
        records: one of each rank, in rank order, `[data_parallel_size * tensor_parallel_size]`, all of one class.
        tensor_parallel_size: ranks per tensor-parallel group, >= 1.
        names: each rank's number for messages; by default its index.

    Raises:
        ConfigurationError: no records, or a number of them that `tensor_parallel_size` does not divide.
        TokenCountError: a negative `num_tokens`, naming the rank.
        RankMismatchError: records of different classes, an `equal` field whose values differ, or a tensor-parallel
            group whose ranks are about to run different numbers of rows.
    """
    if not records or tensor_parallel_size < 1 or len(records) % tensor_parallel_size:
        text = f"{len(records)} records cannot form groups of tensor_parallel_size {tensor_parallel_size}"
        raise ConfigurationError(text)
    names, record_class = names or range(len(records)), type(records[0])
    for name, record in zip(names, records, strict=True):
        if record.__class__ is not record_class:
            sent = f"a {type(record).__name__} where rank {names[0]} sent a {record_class.__name__}"
            raise RankMismatchError(f"rank {name} sent {sent}")
    columns = zip(*map(fields_of(record_class).values_of, records), strict=True)
    return decide_columns(record_class, tuple(columns), tensor_parallel_size, names)


def decide_columns(
    record_class: type[StepRecord], columns: tuple[tuple[int, ...], ...], tensor_parallel_size: int,
    names: Sequence[int],
) -> StepDecision:  # fmt: skip
    """As `decide`, from the ranks' values field by field, `[fields][ranks]`, in groups of the right size."""
    known = fields_of(record_class)
    for place in known.must_be_equal:
        if len(set(columns[place])) > 1:
            raise RankMismatchError(f"ranks disagree about {known.names[place]}: {by_rank(columns[place], names)}")
    values: dict[str, Any] = dict(zip(known.names, map(call, known.reducers, columns), strict=True))
    num_tokens: tuple[int, ...] = values["num_tokens"]
    if min(num_tokens) < 0:
        rank, count = next((rank, count) for rank, count in enumerate(num_tokens) if count < 0)
        raise TokenCountError(f"num_tokens must be >= 0, got {count} on rank {names[rank]}")
    if tensor_parallel_size == 1:
        return StepDecision(record_class, columns, num_tokens, values)
    counts: list[int] = []
    for start in range(0, len(names), tensor_parallel_size):
        group = num_tokens[start : start + tensor_parallel_size]
        if min(group) > 0 and len(set(group)) > 1:
            sharers = f"the ranks of tensor-parallel group {len(counts)} share their requests"
            rows = f"{list(group)} rows (ranks {names[start]} to {names[start + tensor_parallel_size - 1]})"
            raise RankMismatchError(f"{sharers} but are about to run {rows}")
        counts.append(min(group))
    return StepDecision(record_class, columns, tuple(counts), values)


def odd_ones_out(values: Sequence[Any], names: Sequence[int]) -> str:
    """Return `; rank 1 differs from the others` where most ranks say the same, to follow what each says."""
    most = max(values, key=values.count)
    odd = [str(name) for name, value in zip(names, values, strict=True) if value != most]
    if not 0 < len(odd) < len(values) / 2:
        return ""
    return f"; rank{'s' if odd[1:] else ''} {', '.join(odd)} differ{'' if odd[1:] else 's'} from the others"


def by_rank(values: Sequence[int | str], names: Sequence[int]) -> str:
    """Return `rank 0: 4, rank 1: 5`, ranks with the same value together where there are many."""
    if len(values) <= 8:
        listed = ", ".join(f"rank {name}: {value}" for name, value in zip(names, values, strict=True))
        return listed + odd_ones_out(values, names)
    groups: dict[int | str, list[int]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(value, []).append(name)
    return "; ".join(
        f"{value} on {len(ranks)} ranks ({', '.join(map(str, ranks[:4]))}{', ...' if len(ranks) > 4 else ''})"
        for value, ranks in groups.items()
    )
