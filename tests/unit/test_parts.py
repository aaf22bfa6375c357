"""What ranks of a run write as they go, and what is read back after a loss."""

import pytest

from lockstep.runner.parts import Notes, Parts, mend_lines


def parts_of(out, rank, read_ranks=(), start=0, age_s=0.0):
    parts = Parts(str(out), rank, read_ranks or {rank}, lambda own: own)
    parts.open(start, age_s)
    return parts


def test_requests_go_on_from_the_tokens_of_all_ranks_that_had_them(tmp_path):
    """Request 7 begins on rank 0, goes on on rank 1, and has a torn last line there; request 8 has ended."""
    first = parts_of(tmp_path, 0)
    first.write_notes(7, Notes(2, 0.5))
    first.write_notes(7, Notes(2, 0.5, first_step=2, first_token_step=3, first_token_s=0.75, num_cached_tokens=64))
    first.write_tokens([(7, 0, 40, -0.5), (8, 0, 50, None)])
    first.write_notes(9, Notes(3, 1.0))
    first.write_output({"request_id": 8})
    first.close()
    second = parts_of(tmp_path, 1, start=1)
    second.write_tokens([(7, 1, 41, -0.25)])
    second.write_tokens([])
    second.close()
    with (tmp_path / "parts" / "tokens-rank1.jsonl").open("a") as file:
        file.write('{"tokens":[[7,2,4')
    finished, begun, _ = Parts(str(tmp_path), 1, {0, 1}, lambda own: own).unfinished()
    assert finished == {8}
    assert begun == {7: Notes(2, 0.5, 2, 3, 0.75, 64, [40, 41], [-0.5, -0.25]), 9: Notes(3, 1.0)}


def test_tokens_behind_a_gap_are_computed_again(tmp_path):
    parts = parts_of(tmp_path, 0)
    parts.write_notes(1, Notes(0, 0.0))
    parts.write_tokens([(1, 0, 5, None)])
    parts.write_tokens([(1, 2, 7, None)])
    assert parts.unfinished()[1][1].tokens == [5]


def test_the_age_of_a_run_counts_from_its_first_start(tmp_path):
    parts_of(tmp_path, 0).close()
    parts_of(tmp_path, 1, start=1, age_s=100.0).close()
    for ranks, age_s in (({0}, 0.0), ({0, 1}, 100.0)):
        assert Parts(str(tmp_path), 0, ranks, lambda own: own).unfinished()[2] == pytest.approx(age_s, abs=20)


@pytest.mark.parametrize(
    ("data", "whole"),
    [(b"", b""), (b"{}\n{}\n", b"{}\n{}\n"), (b'{}\n{"a', b"{}\n"), (b'{"a', b""), (b"{}\n\0\0", b"{}\n")],
)
def test_a_torn_last_line_is_cut_off(tmp_path, data, whole):
    path = tmp_path / "lines.jsonl"
    assert mend_lines(path) == b""
    path.write_bytes(data)
    assert mend_lines(path) == whole
    assert path.read_bytes() == whole
