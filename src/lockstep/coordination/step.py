"""What one rank says before a step, and what all ranks then know. Pure Python: no torch, no clocks."""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lockstep._version import __version__
from lockstep.errors import ConfigurationError, RankMismatchError, TokenCountError

PROTOCOL_VERSION = 1
WORDS = 32
"""Length of a record on the wire, in 64-bit words. Fixed, so that even two unlike record classes can be told apart."""

_MAGIC = 0x4C4F434B53544550  # "LOCKSTEP"
_HEADER_WORDS = 8
MAX_FIELDS = WORDS - _HEADER_WORDS

Reducer = Literal["gather", "max", "min", "all", "any", "equal"]

_REDUCERS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "gather": lambda values: values,
    "max": max,
    "min": min,
    "all": all,
    "any": any,
    "equal": lambda values: values[0],
}


def decided(by: Reducer, default: int | bool = 0) -> Any:
    """Declare a field of a `StepRecord` and how all ranks' values of it become one decision.

    Args:
        by: `gather` keeps every rank's value; `max`, `min`, `all`, `any` reduce them; `equal` demands that they agree.
        default: what a rank says that does not mention the field.

    Returns:
        A dataclass field.

    Raises:
        ConfigurationError: if `by` is none of these.
    """
    if by not in _REDUCERS:
        raise ConfigurationError(f"a step field is decided by one of {sorted(_REDUCERS)}, got {by!r}")
    return field(default=default, metadata={"decided_by": by})


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one rank says before a step: a few integers, each of which declares how it is decided.

    Engines add fields of their own in a frozen subclass:

        >>> @dataclass(frozen=True)
        ... class MyRecord(StepRecord):
        ...     graph_mode: int = decided("min")
        >>> decide([MyRecord(num_tokens=4, graph_mode=2), MyRecord(graph_mode=1)]).values["graph_mode"]
        1

    Attributes:
        num_tokens: rows of this rank's requests in the step; 0 for an idle rank.
        unfinished: this rank will or may have more work. The run ends at the first agreement where no rank has.
        paused: no rank may run a step at present, although there may be work.
        failed: this rank has raised; every rank stops here.
    """

    num_tokens: int = decided("gather", 0)
    unfinished: bool = decided("any", False)
    paused: bool = decided("any", False)
    failed: bool = decided("any", False)


@dataclass(frozen=True, slots=True)
class Header:
    """What must be the same on all ranks before any of their numbers may be believed.

    Attributes:
        epoch: how often the ranks have opened new groups after an error.
        step: number of the agreement within the epoch, from 0.
        fingerprint: hash of what this rank is about to run (model, sizes, record fields); 0..2**62.
        protocol: version of the wire format.
        package: version of Lockstep, as `major * 10**6 + minor * 10**3 + patch`.
    """

    epoch: int = 0
    step: int = 0
    fingerprint: int = 0
    protocol: int = PROTOCOL_VERSION
    package: int = sum(int(part) * 1000 ** (2 - i) for i, part in enumerate(__version__.split(".")[:3]))


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What all ranks know after an agreement; equal on all of them, whatever each had said.

    Attributes:
        records: what each rank said, `[ranks]`.
        num_tokens_across_dp: rows that each data-parallel rank takes into the step, `[data_parallel_size]`. Not always
            what it asked for: see `decide`.
        values: every field's decided value by name (a tuple `[ranks]` for `gather`).
    """

    records: tuple[StepRecord, ...]
    num_tokens_across_dp: tuple[int, ...]
    values: dict[str, Any]

    @property
    def runs_step(self) -> bool:
        """Whether any rank has rows: otherwise no rank runs anything."""
        return any(self.num_tokens_across_dp)

    @property
    def unfinished(self) -> bool:
        """Whether any rank may have more work."""
        return bool(self.values["unfinished"])

    @property
    def paused(self) -> bool:
        """Whether any rank holds all of them."""
        return bool(self.values["paused"])

    @property
    def failed_ranks(self) -> tuple[int, ...]:
        """Ranks that have raised, ascending."""
        return tuple(rank for rank, record in enumerate(self.records) if record.failed)


_layouts: dict[type[StepRecord], tuple[tuple[str, str], ...]] = {}


def _layout(record_class: type[StepRecord]) -> tuple[tuple[str, str], ...]:
    """The (name, reducer) of each field of a record class, in wire order."""
    if record_class in _layouts:
        return _layouts[record_class]
    layout = []
    for item in fields(record_class):
        if "decided_by" not in item.metadata:
            raise ConfigurationError(
                f"field {item.name!r} of {record_class.__name__} does not say how it is decided: use decided(...)"
            )
        layout.append((item.name, item.metadata["decided_by"]))
    if len(layout) > MAX_FIELDS:
        raise ConfigurationError(f"{record_class.__name__} has {len(layout)} fields; at most {MAX_FIELDS} travel")
    _layouts[record_class] = tuple(layout)
    return _layouts[record_class]


def _layout_fingerprint(record_class: type[StepRecord]) -> int:
    """A hash of field names and reducers, so that unlike classes are told apart."""
    return zlib.crc32(repr(_layout(record_class)).encode())


def decide(records: Sequence[StepRecord], tensor_parallel_size: int = 1) -> StepDecision:
    """Turn what all ranks said into what all ranks do. Pure: the same records give the same decision everywhere.

    The ranks of one tensor-parallel group share their requests, so they run them together or not at all: until all of
    them have said so, the group takes part with zero rows. While any rank is paused or has failed, no rank has rows.

    Args:
        records: one of each rank, in rank order, `[data_parallel_size * tensor_parallel_size]`, all of one class.
        tensor_parallel_size: ranks per tensor-parallel group, >= 1.

    Returns:
        The decision.

    Raises:
        ConfigurationError: no records, or a number of them that `tensor_parallel_size` does not divide.
        TokenCountError: a negative `num_tokens`, naming the rank.
        RankMismatchError: records of different classes, an `equal` field whose values differ, or a tensor-parallel
            group whose ranks are about to run different numbers of rows.
    """
    if not records or tensor_parallel_size < 1 or len(records) % tensor_parallel_size:
        raise ConfigurationError(
            f"{len(records)} records cannot form groups of tensor_parallel_size {tensor_parallel_size}"
        )
    record_class = type(records[0])
    for rank, record in enumerate(records):
        if type(record) is not record_class:
            raise RankMismatchError(
                f"rank {rank} sent a {type(record).__name__} where rank 0 sent a {record_class.__name__}"
            )
        if record.num_tokens < 0:
            raise TokenCountError(f"num_tokens must be >= 0, got {record.num_tokens} on rank {rank}")
    values: dict[str, Any] = {}
    for name, reducer in _layout(record_class):
        column = tuple([getattr(record, name) for record in records])
        if reducer == "equal" and len(set(column)) > 1:
            raise RankMismatchError(f"ranks disagree about {name}: {_by_rank(column)}")
        values[name] = _REDUCERS[reducer](column)

    num_tokens = [record.num_tokens for record in records]
    if values["paused"] or values["failed"]:
        counts = (0,) * (len(records) // tensor_parallel_size)
    elif tensor_parallel_size == 1:
        counts = tuple(num_tokens)
    else:
        groups = [num_tokens[i : i + tensor_parallel_size] for i in range(0, len(records), tensor_parallel_size)]
        for index, group in enumerate(groups):
            if min(group) > 0 and len(set(group)) > 1:
                raise RankMismatchError(
                    f"the ranks of tensor-parallel group {index} share their requests but are about to run "
                    f"{group} rows (ranks {index * tensor_parallel_size} to {(index + 1) * tensor_parallel_size - 1})"
                )
        counts = tuple([min(group) for group in groups])
    return StepDecision(tuple(records), counts, values)


def encode(header: Header, record: StepRecord) -> list[int]:
    """Return a header and a record as `[WORDS]` integers of 64 bits, with a checksum.

    Raises:
        TokenCountError: a value that does not fit into 63 bits.
    """
    layout = _layout(type(record))
    values = [int(getattr(record, name)) for name, _ in layout]
    for (name, _), value in zip(layout, values, strict=True):
        if not -(2**63) <= value < 2**63:
            raise TokenCountError(f"{name} must fit into 64 bits, got {value}")
    words = [
        _MAGIC,
        header.protocol,
        header.package,
        header.epoch,
        header.step,
        header.fingerprint,
        _layout_fingerprint(type(record)),
        0,
        *values,
        *[0] * (MAX_FIELDS - len(values)),
    ]
    words[7] = _checksum(words)
    return words


def decode(all_words: Sequence[Sequence[int]], mine: Header, record_class: type[StepRecord]) -> list[StepRecord]:
    """Check every rank's header against the others' and return the records, in rank order.

    Every rank checks all headers, so either all ranks raise or none does.

    Args:
        all_words: what each rank sent, `[ranks][WORDS]`.
        mine: this rank's own header.
        record_class: the class of this rank's record.

    Raises:
        RankMismatchError: naming the first header field that differs and each rank's value of it.
    """
    for rank, words in enumerate(all_words):
        if len(words) != WORDS or words[0] != _MAGIC or words[7] != _checksum(words):
            raise RankMismatchError(f"rank {rank} sent a record that is damaged or not Lockstep's (checksum differs)")
    names = ("protocol version", "package version", "epoch", "step", "fingerprint", "record fields")
    for index, name in enumerate(names, start=1):
        column = [words[index] for words in all_words]
        if len(set(column)) > 1:
            raise RankMismatchError(f"ranks disagree about {name}: {_by_rank(column)}")
    layout = _layout(record_class)
    # All ranks agree with each other; a difference to `mine` would be a fault of the transport on this rank alone.
    expected = (mine.protocol, mine.package, mine.epoch, mine.step, mine.fingerprint, _layout_fingerprint(record_class))
    if tuple(all_words[0][1:7]) != expected:
        raise RankMismatchError(f"the exchange returned header {tuple(all_words[0][1:7])}, this rank sent {expected}")
    booleans = [reducer in ("any", "all") for _, reducer in layout]
    records = []
    for words in all_words:
        values: list[Any] = list(words[_HEADER_WORDS : _HEADER_WORDS + len(layout)])
        records.append(record_class(*[bool(v) if is_bool else v for v, is_bool in zip(values, booleans, strict=True)]))
    return records


_pack = struct.Struct(f"<{WORDS - 1}q").pack


def _checksum(words: Sequence[int]) -> int:
    return zlib.crc32(_pack(*words[:7], *words[8:]))


def _by_rank(values: Sequence[int]) -> str:
    """Return `rank 0: 4, rank 1: 5`, ranks with the same value together where there are many."""
    if len(values) <= 8:
        return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
    groups: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "; ".join(
        f"{value} on {len(ranks)} ranks ({', '.join(map(str, ranks[:4]))}{', ...' if len(ranks) > 4 else ''})"
        for value, ranks in groups.items()
    )
