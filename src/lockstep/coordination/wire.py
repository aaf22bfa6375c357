"""Wire format of step records, and of short messages in their place. Pure Python."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lockstep._version import __version__
from lockstep.coordination.step import StepRecord, by_rank, fields_of
from lockstep.errors import RankMismatchError, TokenCountError

PROTOCOL_VERSION = 2
HEAD_BYTES = 32
WIRE_BYTES = 1016  # the longest message; records are shorter
MESSAGE_BYTES = WIRE_BYTES - HEAD_BYTES

Wire = bytes
"""A record on the wire: a head of 32-bit words, which must be equal on all ranks, and 64 bits per field."""

_MASK = 0xFFFFFFFF
# The upper half of the first word; the lower half is the length in bytes.
_RECORD, _MESSAGE = 0x4C53 << 16, 0x4C4D << 16  # "LS" and "LM"
_HEAD = struct.Struct("<8I")
_HEAD_NAMES = (
    "record length", "protocol version", "package version", "epoch", "step", "fingerprint", "record fields",
    "the collectives that they have issued (hash; debug=True names the first)",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """Values that must be equal on all ranks before their records are trusted; `package` is Lockstep's version."""

    epoch: int = 0
    fingerprint: int = 0
    protocol: int = PROTOCOL_VERSION
    package: int = sum(int(part) * 1000 ** (2 - i) for i, part in enumerate(__version__.split(".")[:3]))


@cache
def _record(num_fields: int) -> struct.Struct:
    return struct.Struct(f"<8I{num_fields}q")


@cache
def _records(num_fields: int, num_ranks: int) -> struct.Struct:
    """Layout of all ranks' records, one after another: the head as bytes, and the values."""
    return struct.Struct("<" + num_ranks * f"{HEAD_BYTES}s{num_fields}q")


def encode(header: Header, step: int, record: StepRecord, collectives: int = 0) -> Wire:
    """Return a record as bytes, at most `WIRE_BYTES`; `collectives` is a hash of those that this rank has issued."""
    known = fields_of(record.__class__)
    layout, values = _record(len(known.names)), known.values_of(record)
    head = (header.protocol, header.package, header.epoch, step & _MASK, header.fingerprint, known.fingerprint)
    try:
        return layout.pack(_RECORD | layout.size, *head, collectives, *values)
    except struct.error:
        for name, value in zip(known.names, values, strict=True):
            try:
                struct.pack("q", value)
            except struct.error:
                raise TokenCountError(f"{name} must be an integer that fits into 64 bits, got {value!r}") from None
        raise


def decode(
    received: Sequence[Wire], mine: Wire, record_class: type[StepRecord], names: Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return all ranks' values field by field, `[fields][ranks]`, if every head equals that of `mine`, as sent.

    Otherwise all ranks raise `RankMismatchError`.
    """
    num_ranks, num_fields = len(received), len(fields_of(record_class).names)
    layout, records = _records(num_fields, num_ranks), b"".join(received)
    values = layout.unpack(records) if len(records) == layout.size else ()
    heads, *columns = [values[part :: num_fields + 1] for part in range(num_fields + 1)]
    if heads.count(mine[:HEAD_BYTES]) != num_ranks:
        raise _mismatch(received, mine, names)
    return tuple(columns)


def cut(words: bytes) -> Wire:
    """Return the record at the beginning of a transport's raw bytes."""
    return words[: max(int.from_bytes(words[:2], "little"), HEAD_BYTES)]


def _mismatch(received: Sequence[Wire], mine: Wire, names: Sequence[int] | None) -> RankMismatchError:
    """Return the error in the ranks' words; there is one."""
    heads, names = [], names or range(len(received))
    for name, wire in zip(names, received, strict=True):
        if len(wire) < HEAD_BYTES or int.from_bytes(wire[:4], "little") != _RECORD | len(wire):
            return RankMismatchError(f"rank {name} sent a record that is damaged or not Lockstep's")
        heads.append(_HEAD.unpack(wire[:HEAD_BYTES]))
    # The length last: records of other fields have another one.
    for part in (1, 2, 3, 4, 5, 6, 7, 0):
        column = [head[part] for head in heads]
        if len(set(column)) > 1:
            return RankMismatchError(f"ranks disagree about {_HEAD_NAMES[part]}: {by_rank(column, names)}")
    # All ranks agree with each other; a difference to `mine` would be a fault of the transport on this rank alone.
    sent = _HEAD.unpack(mine[:HEAD_BYTES])
    return RankMismatchError(f"the exchange returned head {heads[0]}, this rank sent {sent}")


def encode_message(message: bytes) -> Wire:
    """Return at most `MESSAGE_BYTES` bytes in a form that cannot be mistaken for a record."""
    return (_MESSAGE | HEAD_BYTES + len(message)).to_bytes(HEAD_BYTES, "little") + message


def decode_message(wire: Wire) -> bytes:
    """Return the bytes of `encode_message`; empty for anything else."""
    return wire[HEAD_BYTES:] if int.from_bytes(wire[:4], "little") == _MESSAGE | len(wire) else b""
