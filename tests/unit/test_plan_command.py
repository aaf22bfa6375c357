import json

import pytest

from lockstep.commands.plan import plan_document
from lockstep.errors import ConfigurationError
from lockstep.metadata.chunks import ChunkPlan


@pytest.fixture
def plan(command_line):
    def shown(*arguments):
        code, stdout, stderr = command_line("plan", *arguments, env={"COLUMNS": "120"})
        assert (code, stderr) == (0, "")
        return stdout

    return shown


def test_json_shows_the_three_size_lists_and_the_plan(plan):
    document = json.loads(plan("--tokens", "500,200,256", "--max-chunk-size", "256", "--sp", "2", "--json"))
    assert document["sp_local_sizes"] == [250, 250, 100, 100, 128, 128]
    assert document["cu_tokens_across_sp"] == [250, 500, 600, 700, 828, 956]
    assert document["chunked_sizes"] == [[250, 250, 100, 100, 128, 128]]
    assert document["chunks"][0]["spans"][0] == [0, 250]


def test_the_table_shows_every_rank_and_chunk(plan):
    shown = plan("--tokens", "500,200,256", "--max-chunk-size", "256")
    assert "sp_local_sizes(1)         [500, 200, 256]" in shown
    assert "cu_tokens_across_sp(1)    [500, 700, 956]" in shown
    assert "chunked_sizes(1, 256, 0)  [256, 200, 256]" in shown
    assert "chunked_sizes(1, 256, 1)  [244, 1, 1]" in shown
    assert "256..500" in shown
    assert "956 real rows; callers that need a row on every rank add 2 dummy and 0 padding rows" in shown


def test_many_ranks_and_chunks_are_abridged_in_the_table(plan):
    shown = plan("--tokens", ",".join(["100"] * 100), "--max-chunk-size", "10")
    assert "36 more ranks and 4 more chunks not shown; --json shows all" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "500,x"], "--tokens must be integers separated by commas, got 'x' on DP rank 1"),
        (["--tokens", "500,-3"], "--tokens must be in 0..2147483647, got -3 on DP rank 1"),
        (["--tokens", "500", "--sp", "0"], "--sp must be >= 1, got 0"),
        (["--tokens", "500", "--max-chunk-size", "0"], "--max-chunk-size must be >= 1, got 0"),
        (["--tokens", "2000000", "--max-chunk-size", "1"], "must be large enough for 10000 chunks, got 2000000 chunks"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, command_line):
    code, shown, stderr = command_line("plan", *arguments)
    assert (code, shown, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("lockstep: error: ")
    assert message in stderr


def test_spans_are_those_of_the_plan_and_as_many_ranks_as_are_simulated_take_no_time():
    document = plan_document([5, 0, 7, 1], 3, 2)
    chunk_plan = ChunkPlan([5, 0, 7, 1], 3, 2)
    assert document["sp_spans"] == [list(chunk_plan.sp_span(rank)) for rank in range(12)]
    assert plan_document([300_000], 100_000)["sp_spans"][-1] == [299_997, 300_000]
    with pytest.raises(ConfigurationError, match="2147483647 of 1 DP ranks must make <= 100000 ranks"):
        plan_document([5], 2147483647)


def test_rows_are_counted_apart():
    document = plan_document([5, 0], 2, 2)
    assert document["chunked_sizes"] == [[2, 2, 1, 1], [1, 1, 1, 1]]
    assert [chunk["real_rows"] for chunk in document["chunks"]] == [[2, 2, 0, 0], [1, 0, 0, 0]]
    assert (document["real_rows"], document["dummy_rows"], document["padding_rows"]) == (5, 4, 1)


def test_a_step_without_tokens_has_a_plan_of_no_chunks(plan):
    document = plan_document([0, 0], 1, 4)
    assert document["chunks"] == document["chunked_sizes"] == []
    assert "0 chunks" in plan("--tokens", "0,0")
