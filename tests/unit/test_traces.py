import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import ConfigurationError
from lockstep.workload import WorkloadOptions, load_trace, load_workload
from lockstep.workload.traces import ReadLimits

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.6805900,396,109\n"
    "2023-11-16 18:15:48.6805900,879,55\n"
)
MOONCAKE = '{"timestamp": 500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n' * 2
PROMPTS = '{"prompt": "A café", "max_new_tokens": 5}\n{"prompt": "b", "max_new_tokens": 1, "arrival_s": 2.5}\n'
TRACES = Path(__file__).parents[3] / "shared" / "data"


def write(folder, text, name="trace"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lengths(trace):
    return [(r.num_prompt_tokens, r.max_new_tokens) for r in trace.requests]


def test_azure_rows_are_sorted_by_arrival_and_start_at_zero(tmp_path):
    trace = load_trace(write(tmp_path, AZURE))
    assert trace.format == "azure-csv"
    assert lengths(trace) == [(374, 44), (879, 55), (396, 109)]
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0, 2, 4], abs=1e-5)
    assert [r.request_id for r in trace.requests] == [0, 1, 2]


def test_azure_columns_may_stand_in_any_order_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    text = "\ufeffGeneratedTokens, TIMESTAMP ,ContextTokens\r\n7,2024-05-10 00:00:00.009930+00:00,9\r\n\r\n"
    assert lengths(load_trace(write(tmp_path, text))) == [(9, 7)]


def test_mooncake_and_prompts_are_recognised_from_their_keys(tmp_path):
    trace = load_trace(write(tmp_path, MOONCAKE, "a.csv"))
    assert (trace.format, lengths(trace)) == ("mooncake-jsonl", [(6758, 500)] * 2)
    assert [(request.block_ids, request.block_size) for request in trace.requests] == [((0, 1), 512)] * 2
    scaled = load_trace(write(tmp_path, MOONCAKE), WorkloadOptions(length_scale=0.05)).requests[0]
    assert (scaled.num_prompt_tokens, scaled.block_size) == (338, 25.6)
    trace = load_trace(write(tmp_path, PROMPTS))
    assert (trace.format, lengths(trace)) == ("prompts-jsonl", [(7, 5), (1, 1)])  # bytes: "é" is two
    assert [r.prompt for r in trace.requests] == ["A café", "b"]
    assert trace.requests[1].arrival_s == 2.5


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AT = "2023-11-16 18:15:46"


@pytest.mark.parametrize(
    "text",
    [
        f'hash_ids,{HEADER}\n"[12, 7, 8, 9]",{AT},374,44\n',
        f'"TIMESTAMP","ContextTokens","GeneratedTokens"\n"{AT}","374","44"\n',
        f'"TIMESTAMP", "ContextTokens", "GeneratedTokens"\n"{AT}", "374", "44"\n',
        f"\ufeff{HEADER}\r\n{AT},374,44\r\n",
        f'\ufeff"TIMESTAMP","ContextTokens","GeneratedTokens"\r\n{AT},374,44',
        f"{HEADER}\r{AT},374,44\r",  # as old Macintoshes end lines
        HEADER.replace(",", ";") + f"\n{AT};374;44\n",
        HEADER.replace(",", "\t") + f'\n{AT}\t374\t"44"\n',
        f'{HEADER},prompt\n{AT},374,44,"first line\nsecond, ""quoted"", line\n\nlast"\n',
        f'{HEADER},prompt\r\n{AT},374,44,"{"x" * 200_000}"\r\n',  # beyond what the module csv takes by default
        f"{HEADER},model,cost\n{AT},374,44,,\n",
        f"{HEADER}\n{AT},374,44,,\n",
        f"{HEADER}\n{AT},374.0,44.0\n",  # as pandas writes a column that lacks a value somewhere
        f"GeneratedTokens,TIMESTAMP,ContextTokens\n44,{AT},374\n",
        f"{HEADER}\n,,\n{AT},374,44\n\n\n",
    ],
)
def test_a_table_is_read_as_a_spreadsheet_reads_it(tmp_path, text):
    trace = load_trace(write(tmp_path, text))
    assert (trace.format, lengths(trace), trace.num_malformed) == ("azure-csv", [(374, 44)], 0)


def test_digits_in_groups_are_read_where_commas_separate_cells_and_refused_where_they_may_be_decimals(tmp_path):
    assert lengths(load_trace(write(tmp_path, f'{HEADER}\n{AT},"14,050","1,374"\n'))) == [(14050, 1374)]
    for text in (f"{AT};374;1,374", f"{AT};1.374;44", f"{AT};1_374;44", f"{AT};+374;44", f"{AT};３７４;44"):
        with pytest.raises(ConfigurationError, match="Tokens is "):
            load_trace(write(tmp_path, HEADER.replace(",", ";") + f"\n{text}\n"))


@pytest.mark.parametrize(
    "row",
    [
        f"[12, 7, 8, 9],{AT},374,44",  # without quotes: which cell is which cannot be known
        f'{AT},374,44,"never closed',
        f'{AT},"374,44,ab',
        f'{AT},374,44,"a"b',
        "1700112312345,374,44,a",  # milliseconds since 1970, of which Python would make the year 1700
        f"{AT},374,44",
    ],
)
def test_a_row_that_is_no_row_costs_that_row_alone(tmp_path, row):
    rows = [f"{AT},{n},{n},note" for n in (1, 2)] + [row] + [f"{AT},{n},{n},note" for n in range(3, 9)]
    trace = load_trace(write(tmp_path, "\n".join([HEADER + ",note", *rows])))
    assert lengths(trace) == [(n, n) for n in range(1, 9)]
    assert [line.split(":")[0] for line in trace.malformed] == ["line 4"]


def test_quotes_that_are_not_closed_swallow_no_rows(tmp_path):
    rows = [f'{AT},{n},{n},"note' if n in (3, 7) else f"{AT},{n},{n},note" for n in range(1, 10)]
    trace = load_trace(write(tmp_path, "\n".join([HEADER + ",note", *rows])), WorkloadOptions(max_malformed_share=0.5))
    assert lengths(trace) == [(n, n) for n in (1, 2, 4, 5, 6, 8, 9)]
    many = "\n".join([HEADER + ",note", f'{AT},1,1,"note', *[f"{AT},2,2,note"] * 3000])
    assert load_trace(write(tmp_path, many)).num_malformed == 1


def test_a_header_that_comes_again_may_have_another_order_and_none_names_a_column_twice(tmp_path):
    text = f"{HEADER}\n{AT},1,2\n{HEADER}\n{AT},3,4\nTIMESTAMP,GeneratedTokens,ContextTokens\n{AT},6,5\n"
    trace = load_trace(write(tmp_path, text))
    assert (lengths(trace), trace.num_malformed) == ([(1, 2), (3, 4), (5, 6)], 0)
    with pytest.raises(ConfigurationError, match="trace: the header names ContextTokens 2 times"):
        load_trace(write(tmp_path, f"{HEADER},ContextTokens\n{AT},1,2,3\n"))
    with pytest.raises(ConfigurationError, match=r"no request could be read: line 1: .* fits no known format"):
        load_trace(write(tmp_path, f"{AT},1,2\n"))


def test_a_key_that_stands_twice_in_an_object_could_mean_either(tmp_path):
    trace = load_trace(write(tmp_path, MOONCAKE + '{"timestamp": 0, "input_length": 5, "input_length": 7}\n'))
    assert "a key appears twice" in trace.malformed[0]
    whole = load_trace(write(tmp_path, '{"timestamp": 0, "input_length": 5.0, "output_length": 7}\n'))
    assert lengths(whole) == [(5, 7)]


def test_lengths_of_thousands_of_digits_are_malformed_lines(tmp_path):
    digits = "9" * 5000
    assert "ContextTokens is " in str(load_trace(write(tmp_path, AZURE + f"{AT},{digits},1\n")).malformed[0])
    line = f'{{"timestamp": 0, "input_length": {digits}, "output_length": 1}}\n'
    assert load_trace(write(tmp_path, MOONCAKE + line)).num_malformed == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PAR1", "Parquet"), (AZURE.encode("utf-16"), "UTF-16")],
)
def test_other_kinds_of_files_are_named(tmp_path, content, what):
    with pytest.raises(ConfigurationError, match=f"trace is {what}.*; a workload is UTF-8 text"):
        load_trace(write(tmp_path, content))


def test_what_unpacks_to_far_more_than_a_trace_is_refused(tmp_path):
    limits = ReadLimits(unpacked_bytes=2**20)
    for content in (b"\n", AZURE.encode() + b"x" * 100):
        with pytest.raises(ConfigurationError, match=r"unpacks to more than .* over 200 times its size"):
            load_trace(write(tmp_path, gzip.compress(content + b"\n" * 2**23)), limits=limits)
    with pytest.raises(ConfigurationError, match="has more than 5 requests"):
        load_trace(write(tmp_path, MOONCAKE * 3), limits=ReadLimits(rows=5))


def test_gzip_is_recognised_from_its_first_bytes(tmp_path):
    plain, packed = load_trace(write(tmp_path, AZURE)), load_trace(write(tmp_path, gzip.compress(AZURE.encode()), "b"))
    assert packed.requests == plain.requests


def test_rate_lengths_and_limits(tmp_path):
    path = write(tmp_path, AZURE)
    trace = load_trace(path, WorkloadOptions(rate_scale=4, length_scale=0.1, max_prompt_tokens=50, max_new_tokens=8))
    assert lengths(trace) == [(37, 4), (50, 6), (40, 8)]
    assert trace.requests[-1].arrival_s == pytest.approx(1, abs=1e-5)
    assert len(load_trace(path, WorkloadOptions(num_requests=2)).requests) == 2
    assert lengths(load_trace(path, WorkloadOptions(length_scale=1e-9)))[0] == (1, 1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2023-11-16 18:15:46,12", "2 columns"),
        ("yesterday,12,3", "TIMESTAMP is 'yesterday'"),
        ("2023-11-16 18:15:46,0,3", "ContextTokens is 0"),
        ("2023-11-16 18:15:46,12,-3", "GeneratedTokens is '-3'"),
        ("2023-11-16 18:15:46,12,3.5", "GeneratedTokens is '3.5'"),
        ("2023-11-16 18:15:46,12,99999999999", "GeneratedTokens is"),
        (b"\xff\xfe,1,2", "not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_and_the_rows_around_it_are_kept(tmp_path, line, problem):
    text = AZURE.encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n2023-11-16 19:00:00,1,2\n"
    trace = load_trace(write(tmp_path, text))
    assert len(trace.requests) == 4
    assert trace.num_malformed == 1
    assert trace.malformed[0].startswith("line 5: ")
    assert problem in trace.malformed[0]
    assert "integers >= 1" in trace.malformed[0]
    assert "trace: left out 1 malformed line: line 5: " in trace.left_out
    assert load_trace(write(tmp_path, AZURE)).left_out == ""


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "{",
        '{"timestamp": -1, "input_length": 1, "output_length": 1}',
        '{"timestamp": NaN, "input_length": 1, "output_length": 1}',
        '{"timestamp": 0, "input_length": true, "output_length": 1}',
        '{"timestamp": 0, "input_length": 1.5, "output_length": 1}',
        '{"timestamp": 0, "input_length": 1}',
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": "0, 1"}',
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0, -1]}',
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0, true]}',
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0, 9223372036854775808]}',
        "[" * 100_000,
    ],
)
def test_malformed_json_lines(tmp_path, line):
    trace = load_trace(write(tmp_path, MOONCAKE + line + "\n" + MOONCAKE))
    assert (len(trace.requests), trace.malformed[0][:8]) == (4, "line 3: ")


@pytest.mark.parametrize("line", ['{"prompt": "", "max_new_tokens": 1}', '{"prompt": 3}', '{"prompt": "a"}'])
def test_malformed_prompts(tmp_path, line):
    assert load_trace(write(tmp_path, PROMPTS + line + "\n")).num_malformed == 1


def test_more_malformed_lines_than_the_share_are_refused(tmp_path):
    path = write(tmp_path, AZURE + "x\ny\n")
    with pytest.raises(
        ConfigurationError, match=r"trace: 2 of 5 lines .* share max_malformed_share=0.01: line 5: 1 col"
    ):
        load_trace(path)
    assert load_trace(path, WorkloadOptions(max_malformed_share=0.4)).num_malformed == 2


@pytest.mark.parametrize("text", ["", "\n\n", "hello\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n", '{"a": 1}\n'])
def test_a_file_without_a_request_says_what_was_expected(tmp_path, text):
    with pytest.raises(ConfigurationError, match=r"trace: no request could be read.*ContextTokens.*max_new_tokens"):
        load_trace(write(tmp_path, text))


def test_an_archive_that_breaks_off_keeps_the_rows_before(tmp_path):
    text = AZURE + "".join(f"2023-11-16 19:00:{i % 60:02},{i + 1},{i * 37 % 1000 + 1}\n" for i in range(5000))
    packed = gzip.compress(text.encode())
    trace = load_trace(write(tmp_path, packed[: len(packed) // 2]))
    assert len(trace.requests) > 1000
    assert "gzip data ends or breaks" in trace.malformed[0]


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path):
    text = AZURE + "x" * 1000 + "\n2023-11-16 19:00:00,1,2\n"
    for content in (text, gzip.compress(text.encode())):
        with pytest.raises(ConfigurationError, match=r"trace: line 5 is longer than 200 bytes, the most"):
            load_trace(write(tmp_path, content), limits=ReadLimits(line_bytes=200))


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe"])
def test_what_can_be_read_once_or_for_ever_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it: opening it would wait
    with pytest.raises(ConfigurationError, match="is a pipe or a device: a workload is read several times"):
        load_trace(tmp_path / name)


def test_a_missing_file_is_an_os_error():
    with pytest.raises(FileNotFoundError):
        load_workload("/no/such/file")


@pytest.mark.parametrize(
    "options",
    [
        {"rate_scale": 0},
        {"rate_scale": float("nan")},
        {"length_scale": -1},
        {"length_scale": float("inf")},
        {"max_prompt_tokens": 0},
        {"max_new_tokens": -1},
        {"num_requests": 0},
        {"max_malformed_share": 2},
    ],
)
def test_options_below_their_limit_name_value_and_limit(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigurationError, match=rf"{name} must be .*, got {value}"):
        WorkloadOptions(**options)


@given(st.binary(max_size=300))
def test_no_content_does_anything_but_load_or_be_refused(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("t"), content)
    try:
        assert load_trace(path).requests
    except ConfigurationError as error:
        assert str(path) in str(error)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 9999), st.integers(1, 999)), min_size=1))
def test_every_row_becomes_one_request(tmp_path_factory, rows):
    text = "".join(json.dumps({"timestamp": t, "input_length": i, "output_length": o}) + "\n" for t, i, o in rows)
    trace = load_trace(write(tmp_path_factory.mktemp("t"), text))
    assert sorted(lengths(trace)) == sorted((i, o) for _, i, o in rows)
    arrivals = [r.arrival_s for r in trace.requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0


@pytest.mark.parametrize(("name", "num", "prompt_tokens"), [("conv", 19366, 22361870), ("code", 8819, 18059974)])
def test_the_published_traces(name, num, prompt_tokens):
    path = TRACES / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.exists():
        pytest.skip(f"{path} is not part of the project")
    trace = load_trace(path)
    assert (len(trace.requests), trace.num_malformed) == (num, 0)
    assert sum(r.num_prompt_tokens for r in trace.requests) == prompt_tokens
