"""Text and ends of a request on the host: facts by hand, laws against slow references, bad input."""

import doctest
import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from lockstep import ConfigurationError
from lockstep.engine import sampling_params, stopping, text
from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.stopping import StopChecker
from lockstep.engine.text import Detokenizer
from lockstep.models.tiny import byte_tokenizer

EOS = 257
BYTES = byte_tokenizer()
ENDLESS = 10**6


def sentencepiece_tokenizer():
    """What Llama 2 and Mixtral have: spaces as U+2581, rare characters as byte tokens, one space lost at the start."""
    words = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    words += ["▁", "▁▁", "▁Hello", "Hello", "▁wor", "ld", ".", "\ufffd", "€", "▁é", "a", "b", "ab"]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def merged_byte_tokenizer():
    """A byte-level tokenizer whose tokens are pieces of characters, as real ones have."""
    alphabet = {character: place for place, character in enumerate(sorted(set(BYTES.get_vocab())))}
    euro, family = (BYTES.convert_ids_to_tokens(BYTES.encode(text)) for text in ("€", "👨‍👩"))
    for token in (euro[0] + euro[1], family[0] + family[1] + family[2], family[3] + family[4], "Ġth", "e"):
        alphabet.setdefault(token, len(alphabet))
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eos|>"])
    tokenizer.add_tokens(["<tool>", "naïve 日本"])
    return tokenizer


class Plain:
    """A tokenizer in Python with nothing but `decode`: bytes, joined."""

    all_special_ids = (256,)

    def decode(self, token_ids, skip_special_tokens=False):
        kept = [token for token in token_ids if token != 256 or not skip_special_tokens]
        return bytes(token for token in kept if token < 256).decode(errors="replace")


TOKENIZERS = {
    "tiny": BYTES,
    "sentencepiece": sentencepiece_tokenizer(),
    "merged": merged_byte_tokenizer(),
    "metaspace": None,
    "plain": Plain(),
}
_metaspace = sentencepiece_tokenizer()
_metaspace.decoder = decoders.Metaspace()
TOKENIZERS["metaspace"] = _metaspace
LIMITS = {"tiny": 300, "sentencepiece": 290, "merged": 300, "metaspace": 290, "plain": 257}


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def byte_ids(text):
    return BYTES.encode(text)


# ----------------------------------------------------------------------------------------------------- detokenizing


@given(st.data())
@settings(max_examples=300)
def test_the_pieces_are_the_whole_whatever_the_ids(data):
    name = data.draw(st.sampled_from([name for name in TOKENIZERS if name != "plain"]))
    ids = data.draw(st.lists(st.integers(0, LIMITS[name]), max_size=40))
    tokenizer = TOKENIZERS[name]
    stream = Detokenizer(tokenizer).stream()
    pieces = [stream.push(token) for token in ids]
    text = "".join(pieces)
    assert whole(tokenizer, ids).startswith(text)
    assert text + stream.flush() == whole(tokenizer, ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_character_leaves_in_pieces(name):
    text = "naïve 日本 👨‍👩‍👧 €€ x"
    tokenizer = TOKENIZERS[name]
    if name in ("sentencepiece", "metaspace"):
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    else:
        ids = list(text.encode()) if name == "plain" else byte_ids(text)
        if name == "merged":
            ids = [tokenizer.token_to_id(token) for token in BYTES.convert_ids_to_tokens(ids)]
    stream = Detokenizer(tokenizer).stream()
    pieces = [stream.push(token) for token in ids]
    if name != "metaspace":  # which has no byte fallback: the tokens' names are the text
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.flush() == text
    else:
        assert "".join(pieces) + stream.flush() == whole(tokenizer, ids)


def test_bytes_that_are_no_text_leave_as_soon_as_that_is_known():
    stream = Detokenizer(BYTES).stream()
    euro = byte_ids("€")
    lonely = byte_ids("é")[1]  # a continuation byte
    assert [stream.push(token) for token in [lonely, euro[0], euro[1], byte_ids("a")[0], *euro]] == [
        "\ufffd",
        "",
        "",
        "\ufffda",
        "",
        "",
        "€",
    ]
    stream.push(euro[0])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_invalid_utf8_is_replaced_as_the_tokenizer_does():
    # Overlong forms, surrogates, code points beyond the last, lonely and missing continuations: all of length up to 4.
    kinds = [0x41, 0x80, 0x8F, 0x9F, 0xA0, 0xC0, 0xC3, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5]
    token_of = {value: BYTES.convert_tokens_to_ids(token) for token, value in text.BYTE_OF.items()}
    detokenizer = Detokenizer(BYTES)
    for length in (1, 2, 3, 4):
        for values in itertools.product(kinds, repeat=length):
            ids = [token_of[value] for value in values]
            stream = detokenizer.stream()
            pieces = "".join(map(stream.push, ids)) + stream.flush()
            assert pieces == BYTES.backend_tokenizer.decode(ids), bytes(values)


def test_a_run_of_byte_tokens_is_text_or_not_as_a_whole():
    tokenizer = TOKENIZERS["sentencepiece"]
    byte = {value: tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    stream = Detokenizer(tokenizer).stream()
    newline = [stream.push(token) for token in [tokenizer.token_to_id("Hello"), byte[10], tokenizer.token_to_id("ld")]]
    assert newline == ["Hello", "", "\nld"]
    stream = Detokenizer(tokenizer).stream()
    assert [stream.push(byte[value]) for value in (65, 66, 255)] == ["", "", ""]
    assert stream.flush() == "\ufffd" * 3 == whole(tokenizer, [byte[65], byte[66], byte[255]])


def test_the_text_of_single_tokens():
    def pushed(tokenizer, pieces):
        stream = Detokenizer(tokenizer).stream()
        return [stream.push(tokenizer.token_to_id(piece)) for piece in pieces] + [stream.flush()]

    found = pushed(TOKENIZERS["merged"], ["Ġth", "e", "<tool>", "naïve 日本", "<|eos|>"])
    assert found == [" th", "e", "<tool>", "naïve 日本", "", ""]
    found = pushed(TOKENIZERS["sentencepiece"], ["▁wor", "€", "▁", "▁wor", "</s>", "<0xE2>"])
    assert found == ["wor", "€", " ", " wor", "", "", "\ufffd"]


def test_a_token_without_text_is_no_context():
    tokenizer = sentencepiece_tokenizer()
    steps = [decoders.Replace("▁", " "), decoders.Replace("ld", ""), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    ids = [tokenizer.token_to_id(token) for token in ("ld", "▁Hello", "ld", "▁wor")]
    stream = Detokenizer(tokenizer).stream()
    assert [stream.push(token) for token in ids] == ["", "Hello", "", " wor"]
    assert whole(tokenizer, ids) == "Hello wor"


def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text():
    stream = Detokenizer(BYTES).stream()
    assert [stream.push(token) for token in (*byte_ids("a"), EOS, 256, 259, 100_000, *byte_ids("b"))] == [
        "a",
        "",
        "",
        "",
        "",
        "b",
    ]


def test_a_tokenizer_with_decode_only_works():
    stream = Detokenizer(Plain()).stream()
    assert [stream.push(token) for token in (97, 0xE2, 0x82, 0xAC, 256, 98)] == ["a", "", "", "€", "", "b"]


@pytest.mark.parametrize("module", [sampling_params, stopping])
def test_the_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert (results.failed, results.attempted > 0) == (0, True)


def test_an_object_that_cannot_decode_is_refused():
    with pytest.raises(ConfigurationError, match=r"must have decode\(\), got int"):
        Detokenizer(5)


# ---------------------------------------------------------------------------------------------------------- endings


def run(ids, tokenizer=BYTES, **fields):
    fields.setdefault("max_tokens", ENDLESS)
    checker = StopChecker(SamplingParams(**fields), eos_token_ids=[EOS], detokenizer=Detokenizer(tokenizer))
    return checker, [checker.push(token) for token in ids]


def test_stop_strings_end_the_text_before_them():
    checker, deltas = run(byte_ids("one two three"), stop=["two", "three"])
    assert checker.text == "one " == "".join(delta.text for delta in deltas)
    assert (checker.finish_reason, checker.stop_reason, len(checker.token_ids)) == ("stop", "two", 7)
    assert [delta.finish_reason for delta in deltas] == [None] * 6 + ["stop"] + [None] * 6


def test_text_that_may_begin_a_stop_string_waits_and_comes_after_all():
    _, deltas = run(byte_ids("a<en<end"), stop="<end>")
    assert [delta.text for delta in deltas] == ["a", "", "", "", "<en", "", "", ""]
    checker, deltas = run(byte_ids("a<end"), stop="<end>", max_tokens=5)
    assert (checker.text, deltas[-1].text, deltas[-1].finish_reason) == ("a<end", "<end", "length")
    checker, deltas = run([*byte_ids("a<en"), EOS], stop="<end>")
    assert (checker.text, checker.finish_reason, checker.stop_reason) == ("a<en", "stop", None)
    checker, _ = run(byte_ids("a<en"), stop="<end>")
    assert checker.text == "a"
    assert (checker.abort().text, checker.text, checker.finish_reason) == ("<en", "a<en", "abort")
    assert checker.abort() == checker.push(97) == type(checker.abort())()


def test_the_first_string_to_complete_wins_and_of_those_the_longest():
    assert run(byte_ids("xabcd"), stop=["abcd", "bc"])[0].text == "xa"
    assert run(byte_ids("xab"), stop=["b", "ab"])[0].text == "x"
    assert run(byte_ids("xab"), stop=["b", "ab"])[0].stop_reason == "ab"


def test_a_failed_beginning_may_hold_another():
    assert run(byte_ids("xaaab"), stop="aab")[0].text == "xa"
    assert run(byte_ids("xabababc"), stop="ababc")[0].text == "xab"


def test_a_stop_string_across_the_bytes_of_a_character():
    checker, _ = run(byte_ids("5 € 6"), stop="€ ")
    assert (checker.text, len(checker.token_ids)) == ("5 ", 6)


def offsets_of(ids, tokenizer=BYTES, **fields):
    return [delta.offset for delta in run(ids, tokenizer=tokenizer, logprobs=0, **fields)[1]]


def test_an_offset_is_where_a_token_begins_whatever_is_held_back():
    assert offsets_of(byte_ids("a<en<end")) == list(range(8)) == offsets_of(byte_ids("a<en<end"), stop="<end>x")
    assert offsets_of([*byte_ids("a<"), EOS], stop="<x") == [0, 1, 2]
    assert [delta.offset for delta in run(byte_ids("abc"))[1]] == [0, 0, 0]  # nobody asked
    assert offsets_of(byte_ids("5€6"), stop="€6x") == [0, 1, 1, 1, 2]
    detokenizer = Detokenizer(BYTES)
    id_of = {detokenizer.token_bytes(token): token for token in range(256)}
    parts = [id_of[bytes([byte])] for byte in b"\xc3a\xc3\xc3\xa9\xe0\x80b\xf0\x9fc"]
    assert whole(BYTES, parts) == "\ufffda\ufffdé\ufffd\ufffdb\ufffdc"
    assert offsets_of([*parts, EOS, *byte_ids("d")], ignore_eos=True) == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 9]
    words = TOKENIZERS["sentencepiece"]
    ids = [words.token_to_id(token) for token in ("▁Hello", "<0x0A>", "<0x0A>", "<0xC3>", "<0xA9>", "▁é", "ab")]
    assert whole(words, ids) == "Hello\n\né éab"
    assert offsets_of(ids, words, stop="éabx") == [0, 5, 6, 7, 7, 8, 10]
    broken = [words.token_to_id(token) for token in ("ab", "<0xE2>", "<0x82>", "▁é", "ab")]
    assert whole(words, broken) == "ab\ufffd\ufffd éab" and offsets_of(broken, words)[3:] == [4, 6]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_offsets_are_lengths_of_texts_that_end_with_whole_characters(data):
    """By the tokenizer's own decoding of the tokens before, whatever the stop strings."""
    name = data.draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer, ids = TOKENIZERS[name], data.draw(st.lists(st.integers(0, LIMITS[name]), max_size=12))
    stops = data.draw(st.lists(st.sampled_from(whole(tokenizer, ids) or "a").map("{}\0".format), max_size=3))
    fields = {"ignore_eos": True, "min_tokens": 99, "max_tokens": 99}
    offsets = offsets_of(ids, tokenizer, stop=stops, **fields)
    assert offsets == sorted(offsets) == offsets_of(ids, tokenizer, **fields)
    text = whole(tokenizer, ids)
    for place, offset in enumerate(offsets):
        before = whole(tokenizer, ids[:place])
        if "\ufffd" not in before and text.startswith(before):
            assert offset == len(before)


def test_stop_tokens_have_no_text():
    a, b, c = byte_ids("abc")
    checker, _ = run([a, b, c], stop_token_ids=[b])
    assert (checker.text, checker.token_ids, checker.stop_reason) == ("a", [a, b], b)
    checker, _ = run([a, EOS, c])
    assert (checker.text, checker.token_ids, checker.finish_reason, checker.stop_reason) == (
        "a",
        [a, EOS],
        "stop",
        None,
    )
    checker, _ = run([a, EOS, c], ignore_eos=True)
    assert (checker.text, checker.finish_reason) == ("ac", None)
    checker, _ = run([a, EOS, c], ignore_eos=True, stop_token_ids=[EOS])
    assert (checker.text, checker.finish_reason, checker.stop_reason) == ("a", "stop", EOS)


def test_the_last_token_may_be_a_stop_as_well():
    assert run(byte_ids("abc"), max_tokens=3)[0].finish_reason == "length"
    assert run(byte_ids("abc"), max_tokens=3, stop="c")[0].finish_reason == "stop"
    assert run([97, EOS], max_tokens=2)[0].finish_reason == "stop"


def test_a_character_in_pieces_at_the_end_is_the_tokenizers():
    ids = byte_ids("a€")[:-1]
    assert run(ids, max_tokens=len(ids))[0].text == whole(BYTES, ids) == "a\ufffd"
    assert run([*ids, EOS])[0].text == "a\ufffd"


def test_nothing_stops_before_min_tokens():
    ids = byte_ids("abXcdX")
    assert run(ids, stop="X", min_tokens=2)[0].text == "ab"
    assert run(ids, stop="X", min_tokens=3)[0].text == "abXcd"
    assert run(byte_ids("aXXX"), stop="XX", min_tokens=3)[0].text == "aX"  # complete with the third token, and again
    assert run([EOS, EOS, *ids], min_tokens=2)[0].token_ids == [EOS, EOS]
    assert run([EOS, 97, EOS], min_tokens=2)[0].token_ids == [EOS, 97, EOS]


def words_without_a_decoder():
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "token", "expected"),
    [
        (TOKENIZERS["sentencepiece"], "▁Hello", b" Hello"),
        (TOKENIZERS["sentencepiece"], "Hello", b"Hello"),
        (TOKENIZERS["sentencepiece"], "▁", b" "),
        (TOKENIZERS["sentencepiece"], "<0xE2>", b"\xe2"),
        (TOKENIZERS["sentencepiece"], "</s>", b""),
        (TOKENIZERS["metaspace"], "▁wor", b" wor"),
        (TOKENIZERS["merged"], "Ġth", b" th"),
        (TOKENIZERS["merged"], "naïve 日本", "naïve 日本".encode()),
        (words_without_a_decoder(), 1, b" two"),
        (Plain(), 65, b"A"),
        (Plain(), 256, b""),
    ],
)
def test_a_token_by_itself_is_the_text_that_it_adds_behind_others(tokenizer, token, expected):
    token_id = tokenizer.token_to_id(token) if isinstance(token, str) else token
    assert Detokenizer(tokenizer).token_bytes(token_id) == expected


def test_a_newline_of_a_byte_fallback_tokenizer_stops_at_once():
    tokenizer = TOKENIZERS["sentencepiece"]
    hello, newline, ld = (tokenizer.token_to_id(token) for token in ("Hello", "<0x0A>", "ld"))
    checker, deltas = run([hello, newline, ld], tokenizer=tokenizer, stop="\n")
    assert (checker.text, checker.token_ids) == ("Hello", [hello, newline])
    assert deltas[1].finish_reason == "stop"
    checker, _ = run([hello, newline, newline, ld], tokenizer=tokenizer, stop="\n\n")
    assert (checker.text, checker.token_ids) == ("Hello", [hello, newline, newline])


def test_without_a_tokenizer_ids_still_end():
    checker = StopChecker(SamplingParams(max_tokens=3, stop_token_ids=[7]), eos_token_ids=[9])
    assert [checker.push(token).finish_reason for token in (1, 2, 3, 4)] == [None, None, "length", None]
    assert (checker.text, checker.token_ids) == ("", [1, 2, 3])
    checker = StopChecker(SamplingParams(stop_token_ids=[7]), eos_token_ids=[9])
    assert [checker.push(token).finish_reason for token in (1, 9)] == [None, "stop"]
    with pytest.raises(ConfigurationError, match=r"stop=\('x',\) needs a tokenizer"):
        StopChecker(SamplingParams(stop="x"))


def by_characters(text, stops):
    """Where a text ends: one character at a time, all strings at every place."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    st.text(alphabet="ab€", max_size=40),
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), min_size=1, max_size=4),
)
@settings(max_examples=300)
def test_stop_strings_equal_a_search_by_characters(text, stops):
    expected, stopped = by_characters(text, stops)
    ids = byte_ids(text)
    checker, deltas = run([*ids, EOS], stop=stops)
    assert checker.text == expected == "".join(delta.text for delta in deltas)
    assert (checker.stop_reason in stops) == stopped
    # What has left is never taken back, and only what may begin a stop string waits.
    checker, so_far = run([], stop=stops)[0], ""
    for token in ids:
        so_far += checker.push(token).text
        if checker.finish_reason is not None:
            break
        seen = BYTES.decode(checker.token_ids).rstrip("\ufffd")
        waiting = max(length for stop in stops for length in range(len(stop)) if seen.endswith(stop[:length]))
        assert so_far == seen[: len(seen) - waiting]


@given(st.data())
@settings(max_examples=150)
def test_the_cut_does_not_depend_on_the_tokens(data):
    name = data.draw(st.sampled_from(["sentencepiece", "merged", "tiny"]))
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(3, LIMITS[name]), max_size=30))
    ids = [token for token in ids if token not in (256, EOS, 258)]
    candidates = ["\n", "a", "ab", "A", "Hello", " wor", "€", "ld.", "\ufffd"]
    stops = data.draw(st.lists(st.sampled_from(candidates), min_size=1))
    checker, _ = run(ids, tokenizer=tokenizer, stop=stops)
    checker.abort()
    # The tokens up to the end, decoded as a whole, cut by characters.
    expected, stopped = by_characters(whole(tokenizer, checker.token_ids), stops)
    assert (checker.text, checker.finish_reason == "stop") == (expected, stopped)
    if not stopped:
        assert checker.token_ids == ids
    elif "\ufffd" not in stops:  # which a character in pieces looks like to the reference
        assert not any(by_characters(whole(tokenizer, ids[:n]), stops)[1] for n in range(len(checker.token_ids)))


class CountingTokenizer:
    """A tokenizer that counts the token ids that it has decoded."""

    def __init__(self, tokenizer):
        self._tokenizer, self.num_decoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **options):
        self.num_decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


def work_of(push, ids):
    """Push ids; return how many calls, lines and returns of Python that took."""
    num_events = 0

    def trace(frame, event, argument):
        nonlocal num_events
        num_events += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for token in ids:
            push(token)
    finally:
        sys.settrace(before)
    return num_events


@pytest.mark.parametrize(
    ("name", "ids", "stop"),
    [
        ("tiny", [128] * 8000, "never"),
        ("tiny", [97] * 8000, "a" * 1000 + "b"),
        ("tiny", byte_ids("€") * 2600, ["€" * 600 + "x", "€€y"]),
        ("sentencepiece", [TOKENIZERS["sentencepiece"].token_to_id("<0x41>")] * 8000, "B"),
        ("sentencepiece", [TOKENIZERS["sentencepiece"].token_to_id("ab")] * 8000, "ab" * 1000 + "b"),
        ("plain", [128] * 8000, "never"),
    ],
    ids=["no text", "a long stop string", "characters in pieces", "a run of bytes", "a window", "an unknown decoder"],
)
def test_long_outputs_cost_no_more_per_token(name, ids, stop):
    tokenizer = CountingTokenizer(TOKENIZERS[name])
    checker, _ = run([], tokenizer=tokenizer, stop=stop)
    quarter, work, decoded = len(ids) // 4, [], []
    for start in range(0, 4 * quarter, quarter):
        before = tokenizer.num_decoded
        work.append(work_of(checker.push, ids[start : start + quarter]))
        decoded.append(tokenizer.num_decoded - before)
    assert checker.finish_reason is None
    assert work[3] <= work[1] + 100
    assert decoded[3] <= decoded[1] <= 100 * quarter


def test_the_sequences_of_a_request_share_the_work_for_its_stop_strings():
    """128 sequences with 64 strings of 64 characters took 35 ms on the front's thread, and as long on the ranks."""
    params = SamplingParams(stop=[f"{number:02d}" + "ab" * 31 for number in range(64)])
    first, *others = [work_of(lambda _: StopChecker(params, detokenizer=Detokenizer(BYTES)), [0]) for _ in range(3)]
    assert max(others) < first / 10


def test_a_long_run_of_byte_tokens_becomes_its_text():
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [tokenizer.token_to_id("<0x41>")] * 30_000
    checker, _ = run(ids, tokenizer=tokenizer, stop="B", max_tokens=len(ids))
    assert checker.text == "A" * 30_000
