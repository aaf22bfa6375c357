import json

import pytest

from lockstep.errors import ConfigurationError
from lockstep.steplog.files import StepColumns, StepLogWriter, read_step_columns, read_step_log
from lockstep.steplog.record import FIELDS, StepLogRecord, summarize

RECORDS = [
    StepLogRecord(0, 0, real_rows=8, prefill_tokens=8, duration_s=2.0),
    StepLogRecord(0, 1, real_rows=2, decode_tokens=2, padding_rows=6, duration_s=2.0, busy_s=0.5),
    StepLogRecord(1, 0, real_rows=1, decode_tokens=1, start_s=2.0, duration_s=1.0, prefills_held=True, overrun_rows=1),
    StepLogRecord(1, 1, real_rows=0, dummy_rows=1, start_s=2.0, duration_s=1.0, num_waiting=3, preempted=2),
]


def write(path, records):
    with StepLogWriter(path) as log:
        for record in records:
            log.write(record)
    return path


def test_what_is_written_is_read_and_put_in_order(tmp_path):
    assert read_step_log(write(tmp_path / "log", [r for rank in (1, 0) for r in RECORDS if r.rank == rank])) == RECORDS


def test_a_record_is_in_the_file_before_the_log_is_closed(tmp_path):
    log = StepLogWriter(tmp_path / "log")
    log.write(RECORDS[0])
    assert read_step_log(tmp_path / "log") == RECORDS[:1]
    log.close()
    with pytest.raises(FileExistsError):
        StepLogWriter(tmp_path / "log")


def test_every_place_where_the_last_line_can_tear(tmp_path):
    content = write(tmp_path / "log", RECORDS[:2]).read_bytes()
    first = content.index(b"\n") + 1
    for end in range(first, len(content)):
        (tmp_path / "torn").write_bytes(content[:end])
        whole = end == len(content) - 1  # only the line's end is missing: the record is complete
        assert read_step_log(tmp_path / "torn") == RECORDS[: 2 if whole else 1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("x", "Expecting value"),
        ("[" * 100_000, "maximum recursion depth"),
        ("[1]", "not an object"),
        ("{}", "step is missing"),
        ('{"step": 0, "rank": 0}', "real_rows is missing"),
        ('{"step": 0, "rank": 0, "real_rows": -1}', "real_rows is -1"),
        ('{"step": 0, "rank": 0, "real_rows": 1.5}', "real_rows is 1.5"),
        ('{"step": 0, "rank": 0, "real_rows": 1e30}', "real_rows is 1e"),
        ('{"step": 0, "rank": 0, "real_rows": Infinity}', "real_rows is inf"),
        ('{"step": 0, "rank": 0, "real_rows": 1, "start_s": NaN}', "start_s is nan"),
        ('{"step": %s, "rank": 0, "real_rows": 1}' % ("9" * 30), "step is 999"),
        ('{"step": %s, "rank": 0, "real_rows": 1}' % ("9" * 5000), "Exceeds the limit"),
    ],
)
def test_a_broken_line_before_the_last_is_an_error(tmp_path, line, problem):
    path = tmp_path / "log"
    path.write_text(line + "\n" + json.dumps({"step": 0, "rank": 0, "real_rows": 1}) + "\n")
    with pytest.raises(ConfigurationError, match=rf"log: line 1 is not a step record \({problem}"):
        read_step_log(path)


def test_fields_of_a_later_version_are_left_out(tmp_path):
    (tmp_path / "log").write_text('{"step": 0, "rank": 0, "real_rows": 1, "colour": "red"}\n')
    assert read_step_log(tmp_path / "log") == [StepLogRecord(0, 0, 1)]


def test_columns_hold_the_same_records(tmp_path):
    with StepColumns(tmp_path / "log") as columns:
        for half in (RECORDS[:2], RECORDS[2:]):
            columns.write({name: [getattr(record, name) for record in half] for name in FIELDS})
    assert read_step_columns(tmp_path / "log") == RECORDS
    assert read_step_columns(tmp_path / "log", 3) == RECORDS[:3]


def test_columns_left_out_have_their_default(tmp_path):
    with StepColumns(tmp_path / "log") as columns:
        columns.write({"step": [0], "rank": [0], "real_rows": [5], "num_chunks": [1]})
    assert read_step_columns(tmp_path / "log") == [StepLogRecord(0, 0, 5)]


def test_summary_worked_by_hand():
    assert summarize(RECORDS) == {
        "ranks": 2,
        "steps": 2,
        "real_tokens": 11,
        "dummy_rows": 1,
        "padding_rows": 6,
        "prefill_tokens": 8,
        "decode_tokens": 3,
        "preempted": 2,
        "overrun_rows": 1,
        "cached_tokens": 0,
        "duration_s": 3.0,
    }
    assert summarize([])["duration_s"] == 0.0
