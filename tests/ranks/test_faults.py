"""One of three ranks breaks, in every phase and way: no hang, no wrong output, the right rank named, in time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_matrix import (
    DEADLINE_S,
    OUTER_ACTIONS,
    OUTER_PHASES,
    SHORT_DEADLINE_S,
    late_cases,
    lethal_cases,
    outer_cases,
    run_lethal,
    run_outer,
    run_survivable,
    survivable_cases,
    tensor_parallel_cases,
    tensor_parallel_late_cases,
    tensor_parallel_lethal_cases,
    verdict,
)

from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

# The long version, `make soak`, runs all cases in random order; here those that differ most.
LETHAL = [case for case in lethal_cases() if case.fault.action == "kill" and not case.idle] + [
    case for case in lethal_cases() if case.fault.phase == "experts" and (case.idle or case.fault.action == "exit")
]
LATE = [case for case in late_cases() if case.fault.action == "stop" or not case.idle]
SHARED = [case for case in tensor_parallel_cases() if not case.idle and (case.leave or case.fault.action != "ctrl_c")]
SHARED_LATE = [
    case
    for case in tensor_parallel_late_cases()
    if not case.idle and case.fault.phase in ("agreement", "model", "experts")
]
SHARED_LETHAL = [case for case in tensor_parallel_lethal_cases() if case.fault.phase == "model" and not case.idle]
# Every phase and every action, once with and once without tensor parallelism.
OUTER = [
    case
    for index, case in enumerate(outer_cases())
    if (index // len(OUTER_ACTIONS) + index + case.tensor_parallel) % len(OUTER_ACTIONS) in (0, 1)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("tiny"), num_layers=2, num_experts=12))


def check(cases, results, deadline_s=DEADLINE_S):
    wrong = {
        case.name: verdict(case, ranks, deadline_s)
        for case, ranks in zip(cases, zip(*results, strict=True), strict=True)
    }
    assert {name: sentences for name, sentences in wrong.items() if sentences} == {}


@pytest.mark.ranks(3)
@pytest.mark.parametrize("part", range(3))
def test_ranks_that_raise_disagree_or_leave(tiny, tmp_path, part):
    cases = survivable_cases()[part::3]
    check(cases, run_ranks(3, run_survivable, tiny, cases, str(tmp_path), deadline_s=280))


@pytest.mark.ranks(9)
def test_a_rank_that_is_late_is_named_and_never_added_into_a_later_operation(tiny, tmp_path):
    # Three times three ranks at once: most of the time they wait.
    parts = [LATE[part::3] for part in range(3)]

    def run(cases):
        return run_ranks(3, run_survivable, tiny, cases, str(tmp_path), SHORT_DEADLINE_S, deadline_s=280)

    with ThreadPoolExecutor(3) as pool:
        for cases, results in zip(parts, pool.map(run, parts), strict=True):
            check(cases, results, SHORT_DEADLINE_S)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("case", LETHAL + SHARED_LETHAL, ids=lambda case: case.name)
def test_a_rank_whose_process_ends(tiny, tmp_path, case):
    results = run_ranks(case.num_ranks, run_lethal, tiny, case, str(tmp_path), deadline_s=60, may_die=[1])
    assert results[1] is None
    assert verdict(case, results) == []
    assert all("is gone" in result["message"] for result in results if result is not None)


@pytest.mark.ranks(4)
def test_of_ranks_that_share_their_requests_the_right_one_is_named(tiny, tmp_path):
    check(SHARED, run_ranks(4, run_survivable, tiny, SHARED, str(tmp_path), deadline_s=280))


@pytest.mark.ranks(4)
def test_of_ranks_that_share_their_requests_the_late_one_is_named(tiny, tmp_path):
    results = run_ranks(4, run_survivable, tiny, SHARED_LATE, str(tmp_path), SHORT_DEADLINE_S, deadline_s=280)
    check(SHARED_LATE, results, SHORT_DEADLINE_S)


@pytest.mark.ranks(12)
def test_outside_of_steps_waits_have_a_deadline_too(tiny, tmp_path):
    assert {case.fault.phase if case.fault else "leave" for case in OUTER} == set(OUTER_PHASES)
    assert {case.fault.action if case.fault else case.leave for case in OUTER} == set(OUTER_ACTIONS)

    def run(case):
        folder = tmp_path / case.name
        folder.mkdir()
        results = run_ranks(case.num_ranks, run_outer, tiny, case, str(folder), deadline_s=100, may_die=[1])
        return case.name, verdict(case, results, case.outer_deadline_s)

    with ThreadPoolExecutor(3) as pool:
        wrong = {name: sentences for name, sentences in pool.map(run, OUTER) if sentences}
    assert wrong == {}


def every_case():
    makes = (
        survivable_cases, tensor_parallel_cases, late_cases, tensor_parallel_late_cases, lethal_cases,
        tensor_parallel_lethal_cases, outer_cases,
    )  # fmt: skip
    return [case for make in makes for case in make()]


def test_every_case_is_another_one():
    names = [case.name for case in every_case()]
    assert len(set(names)) == len(names)
    assert len(names) >= 250


def test_the_published_table_has_every_case_of_three_ranks_in_a_step():
    table = (Path(__file__).parents[2] / "docs" / "benchmarks" / "faults.md").read_text().split("<!-- cases: begin")[1]
    published = [line.split("|")[1].strip() for line in table.splitlines()[3:] if line.startswith("|")]
    assert published == [case.name for case in survivable_cases() + late_cases() + lethal_cases()]
    assert "WRONG" not in table
