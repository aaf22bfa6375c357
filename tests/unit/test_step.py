"""What a rank says before a step and what all then know: `decide`, the wire format, and what is refused."""

import struct
from dataclasses import astuple, dataclass, make_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.coordination.step import MAX_FIELDS, StepRecord, decide, decided
from lockstep.coordination.wire import (
    HEAD_BYTES,
    MESSAGE_BYTES,
    WIRE_BYTES,
    Header,
    cut,
    decode,
    decode_message,
    encode,
    encode_message,
)
from lockstep.errors import ConfigurationError, RankMismatchError, TokenCountError


@dataclass(frozen=True)
class EngineRecord(StepRecord):
    graph_mode: int = decided("min")
    padded_to: int = decided("max")
    may_overlap: bool = decided("all", True)
    layers: int = decided("equal", 32)


records = st.builds(StepRecord, st.integers(0, 2**31 - 1), st.booleans())  # what `decide` must take in any mixture
HEADER = Header(epoch=3, fingerprint=77)


def exchange(some_records, header=HEADER, step=5):
    return [encode(header, step, record) for record in some_records]


def columns_of(records):
    """What each rank said, field by field."""
    return tuple(zip(*map(astuple, records), strict=True))


# decide


def test_counts_and_flags_of_three_ranks():
    decision = decide([StepRecord(5, True), StepRecord(0, False), StepRecord(7, False)])
    assert decision.num_tokens_across_dp == (5, 0, 7)
    assert decision.unfinished
    assert decision.runs_step
    assert not decide([StepRecord(0, True), StepRecord()]).runs_step


def test_every_reducer():
    decision = decide([EngineRecord(4, graph_mode=2, padded_to=8), EngineRecord(1, graph_mode=1, may_overlap=False)])
    assert decision.values == {
        "num_tokens": (4, 1), "unfinished": False,
        "graph_mode": 1, "padded_to": 8, "may_overlap": False, "layers": 32,
    }  # fmt: skip


def test_a_tensor_parallel_group_runs_when_all_its_ranks_have_come():
    said = [StepRecord(6), StepRecord(0), StepRecord(3), StepRecord(3)]
    assert decide(said, tensor_parallel_size=2).num_tokens_across_dp == (0, 3)


def test_ranks_that_share_requests_must_bring_the_same_rows():
    with pytest.raises(RankMismatchError, match=r"tensor-parallel group 1 .* \[3, 4\] rows \(ranks 2 to 3\)"):
        decide([StepRecord(6), StepRecord(6), StepRecord(3), StepRecord(4)], tensor_parallel_size=2)


def test_an_equal_field_that_differs_is_named_with_each_ranks_value():
    with pytest.raises(RankMismatchError, match=r"ranks disagree about layers: rank 0: 32, rank 1: 31"):
        decide([EngineRecord(), EngineRecord(layers=31)])


def test_many_ranks_are_named_by_value():
    said = [EngineRecord(layers=31 if rank == 7 else 32) for rank in range(20)]
    with pytest.raises(RankMismatchError, match=r"32 on 19 ranks \(0, 1, 2, 3, ...\); 31 on 1 ranks \(7\)"):
        decide(said)


def test_a_negative_count_names_the_rank():
    with pytest.raises(TokenCountError, match="got -3 on rank 1"):
        decide([StepRecord(2), StepRecord(-3)])


def test_records_of_unlike_classes_are_refused():
    with pytest.raises(RankMismatchError, match="rank 1 sent a EngineRecord where rank 0 sent a StepRecord"):
        decide([StepRecord(), EngineRecord()])


@pytest.mark.parametrize(("count", "tp_size"), [(0, 1), (3, 2), (2, 0)])
def test_records_that_form_no_groups(count, tp_size):
    with pytest.raises(ConfigurationError, match=f"{count} records cannot form groups of tensor_parallel_size"):
        decide([StepRecord()] * count, tp_size)


def test_an_unknown_reducer_and_an_undeclared_field():
    with pytest.raises(ConfigurationError, match="got 'median'"):
        decided("median")

    @dataclass(frozen=True)
    class Undeclared(StepRecord):
        extra: int = 0

    with pytest.raises(ConfigurationError, match="'extra' of Undeclared does not say how it is decided"):
        decide([Undeclared()])


def test_too_many_fields():
    extra = {f"f{i}": decided("max") for i in range(23)}
    many = dataclass(frozen=True)(type("Many", (StepRecord,), {"__annotations__": dict.fromkeys(extra, int), **extra}))
    with pytest.raises(ConfigurationError, match="Many has 25 fields; at most 24 travel"):
        encode(HEADER, 0, many())


@given(st.lists(records, min_size=1, max_size=9))
def test_a_step_runs_exactly_what_was_asked_for(said):
    decision = decide(said)
    assert decision.num_tokens_across_dp == tuple(record.num_tokens for record in said)
    assert decision.unfinished == any(record.unfinished for record in said)
    assert decision.records == tuple(said)


@given(st.lists(st.sampled_from([0, 4]), min_size=1, max_size=4), st.integers(1, 3), st.randoms())
def test_a_group_has_rows_only_if_all_its_ranks_do(counts, tp_size, random):
    said = [StepRecord(count if random.random() < 0.7 else 0) for count in counts for _ in range(tp_size)]
    decision = decide(said, tp_size)
    for group, count in enumerate(decision.num_tokens_across_dp):
        members = said[group * tp_size : (group + 1) * tp_size]
        assert count == min(member.num_tokens for member in members)


# the wire


@given(st.lists(records, min_size=1, max_size=9), st.integers(0, 2**40))
def test_what_was_encoded_is_decoded_on_every_rank(said, step):
    wires = exchange(said, step=step)
    for mine in wires:
        assert decode(wires, mine, StepRecord) == columns_of(said)
    assert [cut(wire + b"\0" * 16 + b"more") for wire in wires] == wires  # a transport may add bytes


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2), st.integers(-(2**63), 2**63 - 1))
def test_fields_of_an_engine_travel_whole(graph_modes, layers):
    said = tuple(EngineRecord(4, True, mode, 9, False, layers) for mode in graph_modes)
    wires = exchange(said)
    for mine in wires:
        assert decode(wires, mine, EngineRecord) == columns_of(said)


def test_the_longest_record_fits_into_one_exchange():
    values = [(f"value_{index}", int, decided("max")) for index in range(MAX_FIELDS - 2)]
    longest = make_dataclass("Longest", values, bases=(StepRecord,), frozen=True)
    wire = encode(HEADER, 0, longest())
    assert len(wire) == HEAD_BYTES + 8 * MAX_FIELDS <= WIRE_BYTES
    assert decode([wire], wire, longest) == columns_of([longest()])


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1.5, "7", None])
def test_a_value_that_cannot_travel(value):
    with pytest.raises(TokenCountError, match="graph_mode must be an integer that fits into 64 bits, got"):
        encode(HEADER, 0, EngineRecord(graph_mode=value))


@pytest.mark.parametrize(
    ("other", "step", "message"),
    [
        (Header(3, 77, protocol=1), 5, "protocol version: rank 0: 2, rank 1: 1"),
        (Header(3, 77, package=5), 5, "package version"),
        (Header(4, 77), 5, "epoch: rank 0: 3, rank 1: 4"),
        (Header(3, 78), 5, "fingerprint: rank 0: 77, rank 1: 78"),
        (Header(3, 77), 6, "step: rank 0: 5, rank 1: 6"),
    ],
)
def test_a_header_that_differs_is_named_alike_on_both_ranks(other, step, message):
    words = [encode(HEADER, 5, StepRecord(1)), encode(other, step, StepRecord(2))]
    said = set()
    for mine in words:
        with pytest.raises(RankMismatchError, match=f"ranks disagree about {message}") as caught:
            decode(words, mine, StepRecord)
        said.add(str(caught.value))
    assert len(said) == 1


def test_collectives_that_differ_are_noticed_at_the_next_agreement():
    words = [encode(HEADER, 5, StepRecord(), 11), encode(HEADER, 5, StepRecord(), 12)]
    with pytest.raises(RankMismatchError, match="the collectives that they have issued"):
        decode(words, words[0], StepRecord)


def test_record_classes_that_differ_are_told_apart():
    words = [encode(HEADER, 5, StepRecord()), encode(HEADER, 5, EngineRecord())]
    with pytest.raises(RankMismatchError, match="record fields"):
        decode(words, words[0], StepRecord)
    with pytest.raises(RankMismatchError, match="record fields"):
        decode(words, words[1], EngineRecord)


def test_an_exchange_that_returns_another_step_to_all_is_named():
    words = exchange([StepRecord(), StepRecord()], step=4)
    with pytest.raises(RankMismatchError, match="the exchange returned head"):
        decode(words, encode(HEADER, 5, StepRecord()), StepRecord)


@given(st.integers(0, HEAD_BYTES // 4 - 1), st.integers(1, 2**32 - 1), st.integers(0, 2))
def test_one_damaged_word_of_the_head_never_passes(place, change, rank):
    wires = exchange([StepRecord(3), StepRecord(4), StepRecord(5)])
    words = [*struct.unpack(f"<{len(wires[rank]) // 4}I", wires[rank])]
    words[place] = (words[place] + change) % 2**32
    mine = wires[(rank + 1) % 3]
    wires[rank] = struct.pack(f"<{len(words)}I", *words)
    with pytest.raises(RankMismatchError, match=f"rank {rank} sent a record that is damaged|ranks disagree about"):
        decode(wires, mine, StepRecord)


@given(st.binary(max_size=300))
def test_anything_at_all_from_a_peer_ends_in_a_sentence(garbage):
    mine = encode(HEADER, 5, StepRecord(1))
    for wire in (cut(garbage), garbage):
        with pytest.raises(RankMismatchError, match=r"^rank 1 sent a record that is damaged or not Lockstep's"):
            decode([mine, wire], mine, StepRecord)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12))
def test_any_body_behind_a_right_head_is_a_record_or_damaged(body):
    mine = encode(HEADER, 5, StepRecord(1))
    try:
        columns = decode([mine, mine[:HEAD_BYTES] + struct.pack(f"<{len(body)}q", *body)], mine, StepRecord)
    except RankMismatchError as error:
        assert "rank 1 sent a record that is damaged" in str(error)
        assert len(body) != 2
    else:
        assert [column[1] for column in columns] == body


@given(st.binary(max_size=MESSAGE_BYTES))
def test_messages_travel(data):
    wire = encode_message(data)
    assert len(wire) <= WIRE_BYTES
    assert decode_message(cut(wire + b"more")) == data


@given(st.binary(max_size=WIRE_BYTES), records)
def test_what_is_no_message_is_nothing(anything, record):
    assert decode_message(anything) == decode_message(encode(HEADER, 5, record)) == b""
