"""Wire format of step records, and of short messages in their place. Pure Python."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import index, itemgetter
from typing import Any, SupportsIndex
from zlib import crc32

from lockstep._version import __version__
from lockstep.coordination.step import RecordFields, Said, StepRecord, by_rank
from lockstep.errors import ConfigurationError, RankMismatchError, TokenCountError

PROTOCOL_VERSION = 1
HEAD_WORDS = 8
MAX_FIELDS = 24
WORDS = HEAD_WORDS + 1 + 2 * MAX_FIELDS  # longest record: a head, two per field (one if all are small), a checksum
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


@dataclass(frozen=True, slots=True)
class Header:
    """Values that must be equal on all ranks before their records are trusted; `package` is Lockstep's version."""

    epoch: int = 0
    fingerprint: int = 0
    protocol: int = PROTOCOL_VERSION
    package: int = sum(int(part) * 1000 ** (2 - i) for i, part in enumerate(__version__.split(".")[:3]))


class _Layout(RecordFields):
    """Wire layout of one record class, cached per class."""

    def __init__(self, record_class: type[StepRecord]) -> None:
        super().__init__(record_class)
        num_fields = len(self.names)
        if num_fields > MAX_FIELDS:
            raise ConfigurationError(f"{record_class.__name__} has {num_fields} fields; at most {MAX_FIELDS} travel")
        # Nearly all values fit into 32 bits: then one word carries each, otherwise two.
        self.num_words = HEAD_WORDS + num_fields + 1
        self.num_words_large = self.num_words + num_fields
        self.small = struct.Struct("<" + HEAD_WORDS * "I4x" + num_fields * "i4x")
        self.large = struct.Struct("<" + HEAD_WORDS * "I4x" + num_fields * "I4xi4x")
        self.columns_of: Callable[[tuple[int, ...]], tuple[tuple[int, ...], ...]] = itemgetter(
            *[slice(place, None, num_fields) for place in range(num_fields)]
        )
        # All values of all ranks, rank by rank, where one word carries each; the checksums are passed over.
        self.table: Callable[[int], struct.Struct] = cache(
            lambda num_ranks: struct.Struct("<" + num_ranks * (num_fields * "i4x" + "8x"))
        )


# mypy takes the hash of the records for that of their class.
_layout: Callable[[type[StepRecord]], _Layout] = cache(_Layout)  # type: ignore[assignment]


def encode(header: Header, step: int, record: StepRecord, collectives: int = 0) -> Wire:
    """Return a record as words, at most `WORDS`; `collectives` is a hash of those that this rank has issued so far."""
    layout = _layout(record.__class__)
    values = layout.values_of(record)
    head = (header.protocol, header.package, header.epoch, step & _MASK, header.fingerprint, layout.fingerprint)
    try:
        words = layout.small.pack(_MAGIC | layout.num_words, *head, collectives, *values)
    except struct.error:
        halves: list[int] = []
        for name, value in zip(layout.names, values, strict=True):
            if not isinstance(value, SupportsIndex) or not -(2**63) <= index(value) < 2**63:
                raise TokenCountError(f"{name} must be an integer that fits into 64 bits, got {value!r}") from None
            halves += (index(value) & _MASK, index(value) >> 32)
        words = layout.large.pack(_MAGIC | layout.num_words_large, *head, collectives, *halves)
    return seal(words)


def seal(words: bytes) -> Wire:
    """Return a record's words with their checksum, which covers what follows the head."""
    return words + crc32(words[HEAD_BYTES:], _CRC).to_bytes(WORD_BYTES, "little")


class Alike(Sequence[Wire]):
    """Records of all ranks that begin with the same head and are of one length; `bodies` is what follows in each."""

    __slots__ = ("bodies", "head", "num_ranks")

    def __init__(self, head: bytes, bodies: bytes, num_ranks: int) -> None:
        self.head, self.bodies, self.num_ranks = head, bodies, num_ranks

    def __len__(self) -> int:
        return self.num_ranks

    def __getitem__(self, rank: Any) -> Any:
        size = len(self.bodies) // self.num_ranks
        start = size * range(self.num_ranks)[rank]
        return self.head + self.bodies[start : start + size]


def decode(
    received: Sequence[Wire], mine: Wire, record_class: type[StepRecord], names: Sequence[int] | None = None
) -> Said:
    """Check every rank's head against that of `mine`, as sent: all ranks raise `RankMismatchError`, or none does."""
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
    """Return the record at the beginning of a transport's raw words."""
    return words[: WORD_BYTES * max(int.from_bytes(words[:2], "little"), HEAD_WORDS)]


def _words(wire: Wire) -> tuple[int, ...] | None:
    """Return a record's words, or None if they are damaged or not a record."""
    count, rest = divmod(len(wire), WORD_BYTES)
    if rest or not HEAD_WORDS < count <= WORDS:
        return None
    words = struct.unpack("<" + count * "I4x", wire)
    fields = struct.pack("<" + (count - HEAD_WORDS - 1) * "I4x", *words[HEAD_WORDS:-1])
    return words if words[0] == _MAGIC | count and words[-1] == crc32(fields, _CRC) else None


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)


_HEAD_NAMES = {
    1: "protocol version", 2: "package version", 3: "epoch", 4: "step", 5: "fingerprint", 6: "record fields",
    7: "the collectives that they have issued (hash; debug=True names the first)",
    0: "record length",  # last: unlike lengths of records that are otherwise alike are no fault
}  # fmt: skip


def _mismatch(received: Sequence[Wire], mine: Wire, names: Sequence[int] | None) -> RankMismatchError:
    """Return the error in the ranks' words; there is one."""
    heads, names = [], names or range(len(received))
    for name, wire in zip(names, received, strict=True):
        words = _words(wire)
        if words is None:
            return RankMismatchError(f"rank {name} sent a record that is damaged or not Lockstep's")
        heads.append(words[:HEAD_WORDS])
    for part, what in _HEAD_NAMES.items():
        column = [head[part] for head in heads]
        if len(set(column)) > 1:
            return RankMismatchError(f"ranks disagree about {what}: {by_rank(column, names)}")
    # All ranks agree with each other; a difference to `mine` would be a fault of the transport on this rank alone.
    sent = struct.unpack("<" + HEAD_WORDS * "I4x", mine[:HEAD_BYTES])
    return RankMismatchError(f"the exchange returned head {heads[0]}, this rank sent {sent}")


MESSAGE_BYTES = 4 * (WORDS - HEAD_WORDS - 1)  # bytes of a message that travel in one exchange
_message = struct.Struct("<" + WORDS * "I4x")
_message_body = struct.Struct(f"<{MESSAGE_BYTES // 4}I")
_MESSAGE_HEAD = (WORDS,) * HEAD_WORDS


def encode_message(part: bytes) -> Wire:
    """Return at most `MESSAGE_BYTES` bytes as `WORDS` words that cannot be mistaken for a record."""
    return _message.pack(*_MESSAGE_HEAD, len(part), *_message_body.unpack(part.ljust(MESSAGE_BYTES, b"\0")))


def decode_message(wire: Wire) -> bytes:
    """Return the bytes of `encode_message`; empty for any other words."""
    words = _message.unpack(wire) if len(wire) == _message.size else ()
    if words[:HEAD_WORDS] != _MESSAGE_HEAD:
        return b""
    return _message_body.pack(*words[HEAD_WORDS + 1 :])[: min(words[HEAD_WORDS], MESSAGE_BYTES)]
