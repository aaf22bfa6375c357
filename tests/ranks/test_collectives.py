"""Collectives over ranks with different numbers of rows: every size, dtype and refusal, many per spawn."""

import itertools
import time

import pytest
import torch
import torch.distributed as dist
from said import say, sleep_until_said

from lockstep.coordination.peers import Peers
from lockstep.coordination.transports import open_transport
from lockstep.coordination.waits import waited_s, watch_group
from lockstep.dispatch.collectives import all_gatherv, all_to_allv, record_collectives, reduce_scatterv
from lockstep.errors import ConfigurationError, RankAbsentError, RankMismatchError, TokenCountError
from lockstep.testing import run_ranks

SIZES = [(3, 1, 4), (0, 0, 5), (5, 0, 0), (0, 0, 0), (1, 1, 1), (0, 7, 0), (64, 0, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


def rows_of(rank, count, width, dtype):
    numbers = torch.arange(count * width).view(count, width) + 1000 * rank
    return (numbers % 2).to(dtype) if dtype == torch.bool else (numbers % 251).to(dtype)


def gathers_and_scatters():
    rank, group, wrong = dist.get_rank(), dist.group.WORLD, []
    logs = []
    for sizes, dtype in itertools.product(SIZES, DTYPES):
        with record_collectives() as log:
            first, second = rows_of(rank, sizes[rank], 5, dtype), rows_of(rank, sizes[rank], 2, torch.int32)
            gathered = all_gatherv([first, second, first[:, 0]], sizes, group)
            expected = [torch.cat([rows_of(r, sizes[r], 5, dtype) for r in range(3)])]
            expected.append(torch.cat([rows_of(r, sizes[r], 2, torch.int32) for r in range(3)]))
            expected.append(expected[0][:, 0])
            if not all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(gathered, expected, strict=True)):
                wrong.append(("all_gatherv", sizes, dtype))
            sent, received = [sizes[(rank + to) % 3] for to in range(3)], [sizes[(r + rank) % 3] for r in range(3)]
            rows = rows_of(rank, sum(sent), 4, dtype)
            back = all_to_allv(rows, sent, received, group)
            parts = []
            for r in range(3):
                theirs = [sizes[(r + to) % 3] for to in range(3)]
                start = sum(theirs[:rank])
                parts.append(rows_of(r, sum(theirs), 4, dtype)[start : start + theirs[rank]])
            if not torch.equal(back, torch.cat(parts)):
                wrong.append(("all_to_allv", sizes, dtype))
            if dtype.is_floating_point:
                mine = rows_of(rank, sum(sizes), 6, dtype)
                total = reduce_scatterv(mine, sizes, group)
                start = sum(sizes[:rank])
                every = [rows_of(r, sum(sizes), 6, dtype)[start : start + sizes[rank]].float() for r in range(3)]
                if not torch.equal(total, (every[0] + every[1] + every[2]).to(dtype)):
                    wrong.append(("reduce_scatterv", sizes, dtype))
        logs.append(list(log))
    return wrong, logs, waited_s()


def message_of(call):
    try:
        call()
    except (ConfigurationError, TokenCountError) as error:
        return type(error).__name__, str(error)
    return None


def refusals():
    rank, group = dist.get_rank(), dist.group.WORLD
    rows = torch.zeros(2, 3)
    said = [
        message_of(lambda: all_gatherv([rows], [2, 2], group)),
        message_of(lambda: all_gatherv([rows], [2, -1, 2], group)),
        message_of(lambda: all_gatherv([], [2, 2, 2], group)),
        message_of(lambda: all_gatherv([rows, rows[:1]], [2, 2, 2], group)),
        message_of(lambda: reduce_scatterv(rows, [2, 2, 2], group)),
        message_of(lambda: all_to_allv(rows, [1, 1, 1], [1, 1, 1], group)),
        message_of(lambda: all_to_allv(rows, [1, 1], [1, 1, 1], group)),
    ]
    # Refused before anything was sent: the ranks are still in step.
    return rank, said, all_gatherv([rows], [2, 2, 2], group)[0].shape[0]


def one_is_late(debug):
    rank = dist.get_rank()
    control, data = dist.new_group([0, 1, 2]), dist.new_group([0, 1, 2])
    _, board = open_transport(control, 20.0)
    watch_group(data, Peers(rank, 3, board=board))
    # Late by less than the deadline: the wait is in slices, and the result whole.
    if rank == 1:
        time.sleep(0.5)
    whole = all_gatherv([torch.full((1, 2), float(rank))], [1, 1, 1], data, 20.0)[0][:, 0].tolist()
    waited = waited_s()
    started = time.monotonic()
    if rank == 1:
        sleep_until_said(0, 2)
    try:
        all_gatherv([torch.full((1, 2), float(rank))], [1, 1, 1], data, 1.0)
    except RankAbsentError as error:
        say(rank)
        return whole, waited, error.absent_ranks, time.monotonic() - started, str(error)
    return whole, waited, None, 0.0, ""


def different_sizes(on_board):
    rank = dist.get_rank()
    control, data = dist.new_group([0, 1, 2]), dist.new_group([0, 1, 2])
    _, board = open_transport(control, 20.0)
    watch_group(data, Peers(rank, 3, board=board if on_board else None, debug=not on_board))
    sizes = [2, 2, 3] if rank == 2 else [2, 2, 2]
    try:
        all_gatherv([torch.zeros(sizes[rank], 2)], sizes, data, 5.0)
    except RankMismatchError as error:
        return str(error)
    return ""


@pytest.mark.ranks(3)
def test_every_size_and_dtype():
    results = run_ranks(3, gathers_and_scatters)
    for wrong, logs, waited in results:
        assert wrong == []
        assert logs == results[0][1]
        assert waited > 0


@pytest.mark.ranks(3)
def test_wrong_sizes_are_refused_before_anything_is_sent():
    for rank, said, still in run_ranks(3, refusals):
        assert still == 6
        assert said == [
            ("ConfigurationError", "all_gatherv needs one size per rank: 3 ranks, got 2 sizes"),
            ("TokenCountError", "all_gatherv: sizes must be >= 0, got -1 on rank 1"),
            ("ConfigurationError", "all_gatherv needs at least one tensor"),
            ("TokenCountError", f"all_gatherv: tensor 1 has 1 rows, but sizes says 2 on rank {rank}"),
            ("TokenCountError", f"reduce_scatterv needs sum(sizes) = 6 rows, got 2 on rank {rank}"),
            ("TokenCountError", f"all_to_allv needs sum(sizes) = 3 rows, got 2 on rank {rank}"),
            ("ConfigurationError", "all_to_allv needs one size per rank: 3 ranks, got 2 sizes"),
        ]


@pytest.mark.ranks(3)
def test_a_late_rank_is_waited_for_until_the_deadline_and_then_named():
    results = run_ranks(3, one_is_late, False)
    for rank, (whole, waited, absent, seconds, text) in enumerate(results):
        assert whole == [0.0, 1.0, 2.0]
        assert rank == 1 or waited > 0.3  # wherever that was: in the comparison, or in the collective itself
        assert absent == (1,), text
        assert rank == 1 or seconds < 2.0


@pytest.mark.ranks(3)
@pytest.mark.parametrize("on_board", [True, False], ids=["on the board", "debug, over the group"])
def test_sizes_that_differ_are_named_on_all_ranks_before_any_data_moves(on_board):
    for text in run_ranks(3, different_sizes, on_board):
        assert text.startswith("the ranks are about to issue different collectives: rank 0: all_gatherv[2, 2, 2]")
        assert "rank 2: all_gatherv[2, 2, 3]" in text
        assert "; rank 2 differs from the others" in text
