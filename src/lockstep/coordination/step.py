"""What one rank says before a step, and what all ranks then know. Pure Python: no torch, no clocks."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from operator import attrgetter, call, index, itemgetter
from typing import Any, Literal, NamedTuple, SupportsIndex
from zlib import crc32

from lockstep._version import __version__
from lockstep.errors import ConfigurationError, RankMismatchError, TokenCountError

PROTOCOL_VERSION = 1
HEAD_WORDS = 8
MAX_FIELDS = 24
WORDS = HEAD_WORDS + 1 + 2 * MAX_FIELDS
"""Longest record on the wire, in words: a head, two per field, or one if all values are small, and a checksum."""
WORD_BYTES = 8
HEAD_BYTES = WORD_BYTES * HEAD_WORDS

_MAGIC = 0x4C53 << 16  # "LS"; the low half of the first word is the record's length in words
_MASK = 0xFFFFFFFF
# Words on their way are guarded by TCP or the memory; the checksum tells that something else altogether has come. The
# value of a CRC after data and their own CRC does not depend on the data. Each body's begins with that value and so
# comes back to it: the bodies of all ranks, one after another, are checked at once.
_CRC = crc32(bytes(WORD_BYTES))

Wire = bytes
"""A record on the wire: words of 8 bytes, lowest byte first, of which the lower halves count. The upper ones are 0, and
a transport's own while they travel. The head must be equal on all ranks, but for the record's length."""

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
        failed: this rank has raised; every rank stops here.
    """

    num_tokens: int = decided("gather", 0)
    unfinished: bool = decided("any", False)
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


class Said(NamedTuple):
    """What all ranks said, field by field: records are made of it only where somebody asks for them.

    Attributes:
        record_class: of every rank's record.
        columns: each field's values, in the order of the fields, `[fields][ranks]`.
    """

    record_class: type[StepRecord]
    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, records: Sequence[StepRecord]) -> "Said":
        """Return what records say, at least one; those of different classes raise `RankMismatchError`."""
        record_class = type(records[0])
        for rank, record in enumerate(records):
            if record.__class__ is not record_class:
                raise RankMismatchError(
                    f"rank {rank} sent a {type(record).__name__} where rank 0 sent a {record_class.__name__}"
                )
        return cls(record_class, tuple(zip(*map(_layout(record_class).values_of, records), strict=True)))

    def column(self, name: str) -> tuple[int, ...]:
        """Return every rank's value of a field, `[ranks]`."""
        return self.columns[_layout(self.record_class).names.index(name)]

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """Each rank's record, `[ranks]`."""
        pairs = zip(self.columns, _layout(self.record_class).decided_by, strict=True)
        columns = [map(bool, column) if by in ("any", "all") else column for column, by in pairs]
        return tuple(self.record_class(*row) for row in zip(*columns, strict=True))


class StepDecision(NamedTuple):
    """What all ranks know after an agreement; equal on all of them, whatever each had said.

    Attributes:
        said: what each rank said.
        num_tokens_across_dp: rows that each data-parallel rank takes into the step, `[data_parallel_size]`. Not always
            what it asked for: see `decide`.
        values: every field's decided value by name (a tuple `[ranks]` for `gather`).
    """

    said: Said
    num_tokens_across_dp: tuple[int, ...]
    values: dict[str, Any]

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """What each rank said, `[ranks]`."""
        return self.said.records

    @property
    def runs_step(self) -> bool:
        """Whether any rank has rows: otherwise no rank runs anything."""
        return any(self.num_tokens_across_dp)

    @property
    def unfinished(self) -> bool:
        """Whether any rank may have more work."""
        return bool(self.values["unfinished"])

    @property
    def failed_ranks(self) -> tuple[int, ...]:
        """Ranks that have raised, ascending."""
        return tuple(rank for rank, failed in enumerate(self.said.column("failed")) if failed)


class _Layout:
    """How the fields of one record class travel: their names, reducers and places, worked out once per class."""

    def __init__(self, record_class: type[StepRecord]) -> None:
        items = fields(record_class)
        name = record_class.__name__
        for item in items:
            if "decided_by" not in item.metadata:
                raise ConfigurationError(f"field {item.name!r} of {name} does not say how it is decided: use decided()")
        if len(items) > MAX_FIELDS:
            raise ConfigurationError(f"{name} has {len(items)} fields; at most {MAX_FIELDS} travel")
        self.names = tuple(item.name for item in items)
        self.decided_by: tuple[Reducer, ...] = tuple(item.metadata["decided_by"] for item in items)
        self.reducers = tuple(_REDUCERS[by] for by in self.decided_by)
        self.must_be_equal = [place for place, by in enumerate(self.decided_by) if by == "equal"]
        self.values_of: Callable[[StepRecord], tuple[int, ...]] = attrgetter(*self.names)
        # Unlike classes are told apart by it.
        self.fingerprint = crc32(repr(tuple(zip(self.names, self.decided_by, strict=True))).encode())
        # Nearly all values fit into 32 bits: then one word carries each, otherwise two.
        self.num_words = HEAD_WORDS + len(items) + 1
        self.num_words_large = self.num_words + len(items)
        self.small = struct.Struct("<" + HEAD_WORDS * "I4x" + len(items) * "i4x")
        self.large = struct.Struct("<" + HEAD_WORDS * "I4x" + len(items) * "I4xi4x")
        self.columns_of: Callable[[tuple[int, ...]], tuple[tuple[int, ...], ...]] = itemgetter(
            *[slice(place, None, len(items)) for place in range(len(items))]
        )
        # All values of all ranks, rank by rank, where one word carries each; the checksums are passed over.
        self.table: Callable[[int], struct.Struct] = cache(
            lambda num_ranks: struct.Struct("<" + num_ranks * (len(items) * "i4x" + "8x"))
        )


# mypy takes the hash of the records for that of their class.
_layout: Callable[[type[StepRecord]], _Layout] = cache(_Layout)  # type: ignore[assignment]


def decide(
    records: Sequence[StepRecord] | Said, tensor_parallel_size: int = 1, names: Sequence[int] | None = None
) -> StepDecision:
    """Turn what all ranks said into what all ranks do. Pure: the same records give the same decision everywhere.

    The ranks of one tensor-parallel group share their requests, so they run them together or not at all: until all of
    them have said so, the group takes part with zero rows. Where any rank has failed, no rank has rows.

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
    num_ranks = len(records.columns[0]) if isinstance(records, Said) else len(records)
    if not num_ranks or tensor_parallel_size < 1 or num_ranks % tensor_parallel_size:
        text = f"{num_ranks} records cannot form groups of tensor_parallel_size {tensor_parallel_size}"
        raise ConfigurationError(text)
    said = records if isinstance(records, Said) else Said.of(records)
    layout, columns = _layout(said.record_class), said.columns
    for place in layout.must_be_equal:
        if len(set(columns[place])) > 1:
            raise RankMismatchError(f"ranks disagree about {layout.names[place]}: {_by_rank(columns[place], names)}")
    values: dict[str, Any] = dict(zip(layout.names, map(call, layout.reducers, columns), strict=True))
    num_tokens: tuple[int, ...] = values["num_tokens"]
    if min(num_tokens) < 0:
        rank = next(rank for rank, count in enumerate(num_tokens) if count < 0)
        raise TokenCountError(f"num_tokens must be >= 0, got {num_tokens[rank]} on rank {_name(rank, names)}")
    if values["failed"]:
        counts = (0,) * (num_ranks // tensor_parallel_size)
    elif tensor_parallel_size == 1:
        counts = num_tokens
    else:
        groups = [num_tokens[i : i + tensor_parallel_size] for i in range(0, num_ranks, tensor_parallel_size)]
        for number, group in enumerate(groups):
            if min(group) > 0 and len(set(group)) > 1:
                members = range(number * tensor_parallel_size, (number + 1) * tensor_parallel_size)
                first, last = (_name(rank, names) for rank in (members[0], members[-1]))
                raise RankMismatchError(
                    f"the ranks of tensor-parallel group {number} share their requests but are about to run "
                    f"{list(group)} rows (ranks {first} to {last})"
                )
        counts = tuple([min(group) for group in groups])
    return StepDecision(said, counts, values)


def encode(header: Header, step: int, record: StepRecord, collectives: int = 0) -> Wire:
    """Return a record as words, at most `WORDS`: a head, the values, and their checksum.

    Args:
        header: of this rank.
        step: number of the agreement within the epoch, from 0.
        record: of any class.
        collectives: hash of the collectives that this rank has issued so far.

    Raises:
        TokenCountError: a value that does not fit into 64 bits.
    """
    layout = _layout(record.__class__)
    values = layout.values_of(record)
    head = (
        header.protocol, header.package, header.epoch, step & _MASK, header.fingerprint, layout.fingerprint,
        collectives,
    )  # fmt: skip
    try:
        words = layout.small.pack(_MAGIC | layout.num_words, *head, *values)
    except struct.error:
        halves: list[int] = []
        for name, value in zip(layout.names, values, strict=True):
            if not isinstance(value, SupportsIndex) or not -(2**63) <= index(value) < 2**63:
                raise TokenCountError(f"{name} must be an integer that fits into 64 bits, got {value!r}") from None
            halves += (index(value) & _MASK, index(value) >> 32)
        words = layout.large.pack(_MAGIC | layout.num_words_large, *head, *halves)
    return words + crc32(words[HEAD_BYTES:], _CRC).to_bytes(WORD_BYTES, "little")


class Alike(Sequence[Wire]):
    """Records of all ranks that begin with the same head and are of one length; `bodies` is what follows in each."""

    __slots__ = ("bodies", "head", "num_ranks")

    def __init__(self, head: bytes, bodies: bytes, num_ranks: int) -> None:
        self.head = head
        self.bodies = bodies
        self.num_ranks = num_ranks

    def __len__(self) -> int:
        return self.num_ranks

    def __getitem__(self, rank: Any) -> Any:
        size = len(self.bodies) // self.num_ranks
        start = size * range(self.num_ranks)[rank]
        return self.head + self.bodies[start : start + size]


def decode(
    received: Sequence[Wire], mine: Wire, record_class: type[StepRecord], names: Sequence[int] | None = None
) -> Said:
    """Check every rank's head against the others' and return what the records say.

    Every rank checks all heads, so either all ranks raise or none does.

    Args:
        received: what each rank sent, `[ranks]`; `Alike` only with the head of `mine`.
        mine: what this rank sent.
        record_class: the class of this rank's record.
        names: each rank's number for messages; by default its index.

    Raises:
        RankMismatchError: naming the first part of the head that differs and each rank's value of it.
    """
    layout = _layout(record_class)
    if isinstance(received, Alike) and len(mine) == WORD_BYTES * layout.num_words:
        if crc32(received.bodies, _CRC) != _CRC:
            raise _mismatch(received, mine, names)
        return Said(record_class, layout.columns_of(layout.table(received.num_ranks).unpack(received.bodies)))
    rows = []
    my_head = (_words(mine) or ())[1:HEAD_WORDS]
    for wire in received:
        words = _words(wire)
        if words is None or words[1:HEAD_WORDS] != my_head:
            raise _mismatch(received, mine, names)
        body = words[HEAD_WORDS:-1]
        if len(words) == layout.num_words:
            rows.append([_signed(word) for word in body])
        elif len(words) == layout.num_words_large:
            rows.append([low | _signed(high) << 32 for low, high in zip(body[::2], body[1::2], strict=True)])
        else:
            raise _mismatch(received, mine, names)
    return Said(record_class, tuple(zip(*rows, strict=True)))


def cut(words: bytes) -> Wire:
    """Return the record at the beginning of words of a transport that knows nothing of their meaning."""
    return words[: WORD_BYTES * max(int.from_bytes(words[:2], "little"), HEAD_WORDS)]


def _words(wire: Wire) -> tuple[int, ...] | None:
    """A record's words, or None if it is damaged or no record."""
    count, rest = divmod(len(wire), WORD_BYTES)
    if rest or not HEAD_WORDS < count <= WORDS:
        return None
    words = struct.unpack("<" + count * "I4x", wire)
    fields = struct.pack("<" + (count - HEAD_WORDS - 1) * "I4x", *words[HEAD_WORDS:-1])
    return words if words[0] == _MAGIC | count and words[-1] == crc32(fields, _CRC) else None


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)


_HEAD_NAMES = (
    "record length", "protocol version", "package version", "epoch", "step", "fingerprint", "record fields",
    "the collectives that they have issued (hash; debug=True names the first)",
)  # fmt: skip


def _mismatch(received: Sequence[Wire], mine: Wire, names: Sequence[int] | None) -> RankMismatchError:
    """Say what is wrong with the ranks' words. Something is."""
    heads = []
    for rank, wire in enumerate(received):
        words = _words(wire)
        if words is None:
            return RankMismatchError(f"rank {_name(rank, names)} sent a record that is damaged or not Lockstep's")
        heads.append(words[:HEAD_WORDS])
    for part in (1, 2, 3, 4, 5, 6, 7, 0):  # unlike lengths of records that are otherwise alike are no fault
        column = [head[part] for head in heads]
        if len(set(column)) > 1:
            return RankMismatchError(f"ranks disagree about {_HEAD_NAMES[part]}: {_by_rank(column, names)}")
    # All ranks agree with each other; a difference to `mine` would be a fault of the transport on this rank alone.
    sent = struct.unpack("<" + HEAD_WORDS * "I4x", mine[:HEAD_BYTES])
    return RankMismatchError(f"the exchange returned head {heads[0]}, this rank sent {sent}")


MESSAGE_BYTES = 4 * (WORDS - HEAD_WORDS - 1)
"""Bytes of a message that travel in one exchange."""
_message = struct.Struct("<" + WORDS * "I4x")
_message_body = struct.Struct(f"<{MESSAGE_BYTES // 4}I")
_MESSAGE_HEAD = (WORDS,) * HEAD_WORDS


def encode_message(part: bytes) -> Wire:
    """Return at most `MESSAGE_BYTES` bytes as `WORDS` words that no record begins like."""
    return _message.pack(*_MESSAGE_HEAD, len(part), *_message_body.unpack(part.ljust(MESSAGE_BYTES, b"\0")))


def decode_message(wire: Wire) -> bytes:
    """Return the bytes of `encode_message`; nothing where the words are of something else."""
    if len(wire) != _message.size:
        return b""
    words = _message.unpack(wire)
    if words[:HEAD_WORDS] != _MESSAGE_HEAD:
        return b""
    return _message_body.pack(*words[HEAD_WORDS + 1 :])[: min(words[HEAD_WORDS], MESSAGE_BYTES)]


def odd_ones_out(values: Sequence[Any], names: Sequence[int] | None = None) -> str:
    """Return `; rank 1 differs from the others` where most ranks say the same, to stand after what each says.

    Args:
        values: what each rank says.
        names: each rank's number for the text; by default its index.

    Example:
        >>> odd_ones_out([4, 5, 4])
        '; rank 1 differs from the others'
    """
    most = max(values, key=values.count)
    odd = [rank for rank, value in enumerate(values) if value != most]
    if not 0 < len(odd) < len(values) / 2:
        return ""
    named = ", ".join(str(_name(rank, names)) for rank in odd)
    return f"; rank {named} differs from the others" if len(odd) == 1 else f"; ranks {named} differ from the others"


def _name(rank: int, names: Sequence[int] | None) -> int:
    return names[rank] if names is not None else rank


def _by_rank(values: Sequence[int], names: Sequence[int] | None) -> str:
    """Return `rank 0: 4, rank 1: 5`, ranks with the same value together where there are many."""
    names = names or range(len(values))
    if len(values) <= 8:
        listed = ", ".join(f"rank {rank}: {value}" for rank, value in zip(names, values, strict=True))
        return listed + odd_ones_out(values, names)
    groups: dict[int, list[int]] = {}
    for rank, value in zip(names, values, strict=True):
        groups.setdefault(value, []).append(rank)
    return "; ".join(
        f"{value} on {len(ranks)} ranks ({', '.join(map(str, ranks[:4]))}{', ...' if len(ranks) > 4 else ''})"
        for value, ranks in groups.items()
    )
