"""What one rank says before a step, and what all ranks then know. Pure Python: no torch, no clocks."""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter, itemgetter
from typing import Any, Literal

from lockstep._version import __version__
from lockstep.errors import ConfigurationError, RankMismatchError, TokenCountError

PROTOCOL_VERSION = 1
HEAD_WORDS = 8
MAX_FIELDS = 24
WORDS = HEAD_WORDS + 1 + 2 * MAX_FIELDS
"""Longest record on the wire, in words of 32 bits: a head, a checksum, then two words per field."""

_MAGIC = 0x4C53 << 16  # "LS"; the low half of the first word is the record's length in words
_MASK = 0xFFFFFFFF
_MAX_CACHED_RECORDS = 4096

Words = tuple[int, ...]
Wire = tuple[Words, Words]
"""A record on the wire: its head, which must be equal on all ranks, and its body."""

Reducer = Literal["gather", "max", "min", "all", "any", "equal"]

_FIRST = itemgetter(0)
_REDUCERS: dict[str, Callable[[Sequence[int]], Any]] = {
    "gather": tuple,
    "max": max,
    "min": min,
    "all": all,
    "any": any,
    "equal": _FIRST,
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
    """What must be the same on all ranks before any of their numbers may be believed. Each fits into 32 bits.

    Attributes:
        epoch: how often the ranks have opened new groups after an error.
        fingerprint: hash of what this rank is about to run (model, sizes, options).
        protocol: version of the wire format.
        package: version of Lockstep, as `major * 10**6 + minor * 10**3 + patch`.
    """

    epoch: int = 0
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


class _Layout:
    """How the fields of one record class travel: their names, reducers and places, worked out once per class."""

    def __init__(self, record_class: type[StepRecord]) -> None:
        items = fields(record_class)
        for item in items:
            if "decided_by" not in item.metadata:
                raise ConfigurationError(
                    f"field {item.name!r} of {record_class.__name__} does not say how it is decided: use decided(...)"
                )
        if len(items) > MAX_FIELDS:
            raise ConfigurationError(f"{record_class.__name__} has {len(items)} fields; at most {MAX_FIELDS} travel")
        self.record_class = record_class
        self.names = tuple(item.name for item in items)
        self.reducers = tuple(item.metadata["decided_by"] for item in items)
        pairs = zip(self.names, self.reducers, strict=True)
        self.fields = tuple((name, attrgetter(name), _REDUCERS[by]) for name, by in pairs)
        self.values_of: Callable[[StepRecord], tuple[int, ...]] = attrgetter(*self.names)
        # Unlike classes are told apart by it.
        self.fingerprint = zlib.crc32(repr(tuple(zip(self.names, self.reducers, strict=True))).encode())
        self.num_words = HEAD_WORDS + 1 + 2 * len(items)
        self.as_longs = struct.Struct(f"<{len(items)}q")
        self.as_words = struct.Struct(f"<{2 * len(items)}I")
        self.records: dict[Words, StepRecord] = {}
        """By body. Records never change and few differ, so they are kept."""

    def record(self, body: Words) -> StepRecord:
        """Return the record of a body, and keep it.

        Raises:
            ValueError: the body is damaged.
        """
        if len(body) != self.num_words - HEAD_WORDS or body[0] != _checksum(body[1:]):
            raise ValueError("damaged")
        longs = self.as_longs.unpack(self.as_words.pack(*body[1:]))
        values = [bool(v) if r in ("any", "all") else v for v, r in zip(longs, self.reducers, strict=True)]
        if len(self.records) >= _MAX_CACHED_RECORDS:
            self.records.clear()
        record = self.records[body] = self.record_class(*values)
        return record


_layouts: dict[type[StepRecord], _Layout] = {}


def _layout(record_class: type[StepRecord]) -> _Layout:
    layout = _layouts.get(record_class)
    if layout is None:
        layout = _layouts[record_class] = _Layout(record_class)
    return layout


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
    for record in records:
        if record.__class__ is not record_class:
            rank, other = next((i, type(r).__name__) for i, r in enumerate(records) if type(r) is not record_class)
            raise RankMismatchError(f"rank {rank} sent a {other} where rank 0 sent a {record_class.__name__}")
    layout = _layout(record_class)
    values: dict[str, Any] = {}
    for name, value_of, reduce in layout.fields:
        column = [*map(value_of, records)]
        if reduce is _FIRST and len(set(column)) > 1:
            raise RankMismatchError(f"ranks disagree about {name}: {_by_rank(column)}")
        values[name] = reduce(column)
    num_tokens: tuple[int, ...] = values["num_tokens"]
    if min(num_tokens) < 0:
        rank = next(rank for rank, count in enumerate(num_tokens) if count < 0)
        raise TokenCountError(f"num_tokens must be >= 0, got {num_tokens[rank]} on rank {rank}")

    if values["paused"] or values["failed"]:
        counts = (0,) * (len(records) // tensor_parallel_size)
    elif tensor_parallel_size == 1:
        counts = num_tokens
    else:
        groups = [num_tokens[i : i + tensor_parallel_size] for i in range(0, len(records), tensor_parallel_size)]
        for index, group in enumerate(groups):
            if min(group) > 0 and len(set(group)) > 1:
                first = index * tensor_parallel_size
                raise RankMismatchError(
                    f"the ranks of tensor-parallel group {index} share their requests but are about to run "
                    f"{list(group)} rows (ranks {first} to {first + tensor_parallel_size - 1})"
                )
        counts = tuple([min(group) for group in groups])
    return StepDecision(tuple(records), counts, values)


def encode(header: Header, step: int, record: StepRecord, collectives: int = 0) -> Wire:
    """Return a record as words of 32 bits, at most `WORDS`: a head, and a body that begins with its checksum.

    Args:
        header: of this rank.
        step: number of the agreement within the epoch, from 0.
        record: of any class.
        collectives: hash of the collectives that this rank has issued so far.

    Raises:
        TokenCountError: a value that does not fit into 64 bits.
    """
    layout = _layout(type(record))
    try:
        fields = layout.as_words.unpack(layout.as_longs.pack(*layout.values_of(record)))
    except struct.error:
        name, value = next(
            (name, value)
            for name, value in zip(layout.names, layout.values_of(record), strict=True)
            if not isinstance(value, int) or not -(2**63) <= value < 2**63
        )
        raise TokenCountError(f"{name} must be an integer that fits into 64 bits, got {value!r}") from None
    head = (
        _MAGIC | layout.num_words, header.protocol, header.package, header.epoch, step & _MASK, header.fingerprint,
        layout.fingerprint, collectives,
    )  # fmt: skip
    return head, (_checksum(fields), *fields)


def decode(received: Sequence[Wire], mine: Wire, record_class: type[StepRecord]) -> tuple[StepRecord, ...]:
    """Check every rank's head against the others' and return the records, in rank order.

    Every rank checks all heads, so either all ranks raise or none does.

    Args:
        received: what each rank sent, `[ranks]`.
        mine: what this rank sent.
        record_class: the class of this rank's record.

    Raises:
        RankMismatchError: naming the first part of the head that differs and each rank's value of it.
    """
    layout = _layout(record_class)
    my_head, known, records = mine[0], layout.records, []
    for head, body in received:
        if head is not my_head and head != my_head:
            raise _mismatch(received, mine)
        record = known.get(body)
        if record is None:
            try:
                record = layout.record(body)
            except (ValueError, struct.error):
                raise _mismatch(received, mine) from None
        records.append(record)
    return tuple(records)


def split(words: Sequence[int]) -> Wire:
    """Return words of a transport that knows nothing of their meaning as head and body; what follows is dropped."""
    words = tuple(words)
    length = words[0] & 0xFFFF if words else 0
    return words[:HEAD_WORDS], words[HEAD_WORDS : max(length, HEAD_WORDS)]


def _checksum(fields: Words) -> int:
    # Words on their way are guarded by TCP or the memory; this one tells that something else altogether has come.
    return (sum(fields) * 0x9E3779B1 + len(fields)) & _MASK


_HEAD_NAMES = (
    "record length", "protocol version", "package version", "epoch", "step", "fingerprint", "record fields",
    "the collectives that they have issued (hash; debug=True names the first)",
)  # fmt: skip


def _mismatch(received: Sequence[Wire], mine: Wire) -> RankMismatchError:
    """Say what is wrong with the ranks' words. Something is."""
    for rank, (head, body) in enumerate(received):
        words = (*head, *body)
        if (
            len(head) != HEAD_WORDS
            or not body
            or not all(0 <= word <= _MASK for word in words)
            or head[0] != _MAGIC | len(words)
            or body[0] != _checksum(body[1:])
        ):
            return RankMismatchError(f"rank {rank} sent a record that is damaged or not Lockstep's")
    for index in (1, 2, 3, 4, 5, 6, 0, 7):
        column = [head[index] for head, _ in received]
        if len(set(column)) > 1:
            return RankMismatchError(f"ranks disagree about {_HEAD_NAMES[index]}: {_by_rank(column)}")
    # All ranks agree with each other; a difference to `mine` would be a fault of the transport on this rank alone.
    return RankMismatchError(f"the exchange returned head {received[0][0]}, this rank sent {mine[0]}")


MESSAGE_BYTES = 4 * (WORDS - HEAD_WORDS - 1)
"""Bytes of a message that travel in one exchange."""
_message_words = struct.Struct(f"<{MESSAGE_BYTES // 4}I")


def encode_message(part: bytes) -> Wire:
    """Return at most `MESSAGE_BYTES` bytes as `WORDS` words that no record begins like."""
    return (WORDS,) * HEAD_WORDS, (len(part), *_message_words.unpack(part.ljust(MESSAGE_BYTES, b"\0")))


def decode_message(wire: Wire) -> bytes:
    """Return the bytes of `encode_message`; nothing where the words are of something else."""
    head, body = wire
    try:
        if head != (WORDS,) * HEAD_WORDS:
            return b""
        return _message_words.pack(*body[1:])[: max(0, min(body[0], MESSAGE_BYTES))]
    except struct.error:
        return b""


def odd_ones_out(values: Sequence[Any]) -> str:
    """Return `; rank 1 differs from the others` where most ranks say the same, to stand after what each says.

    Example:
        >>> odd_ones_out([4, 5, 4])
        '; rank 1 differs from the others'
    """
    most = max(values, key=values.count)
    odd = [rank for rank, value in enumerate(values) if value != most]
    if not 0 < len(odd) < len(values) / 2:
        return ""
    named = ", ".join(map(str, odd))
    return f"; rank {named} differs from the others" if len(odd) == 1 else f"; ranks {named} differ from the others"


def _by_rank(values: Sequence[int]) -> str:
    """Return `rank 0: 4, rank 1: 5`, ranks with the same value together where there are many."""
    if len(values) <= 8:
        return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values)) + odd_ones_out(values)
    groups: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "; ".join(
        f"{value} on {len(ranks)} ranks ({', '.join(map(str, ranks[:4]))}{', ...' if len(ranks) > 4 else ''})"
        for value, ranks in groups.items()
    )
