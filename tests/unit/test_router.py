"""The ledger of requests: which rank gets which, and what becomes of each. No ranks, no time."""

import pytest

pytest.importorskip("transformers")

from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.text import Detokenizer
from lockstep.errors import ConfigurationError
from lockstep.models.tiny import byte_tokenizer
from lockstep.runner.router import Router
from lockstep.workload.policies import SchedulerState

GREEDY = SamplingParams(max_tokens=8, temperature=0)
EOS = 257


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def make_router(num_ranks=3, load_balancing="least-tokens", **arguments):
    return Router(num_ranks, load_balancing, eos_token_ids=(EOS,), **arguments)


def send(router, entry, tokens, start=0):
    """Let the request's rank send tokens; what the last of them changed."""
    taken = None
    for position, token in enumerate(tokens, start):
        taken = router.take(entry.request_id, position, token)
    return taken


def test_the_rank_with_the_fewest_tokens_to_compute_gets_a_request():
    router = make_router()
    for rank, tokens in enumerate((40, 10, 20)):
        router.observe(rank, SchedulerState(num_outstanding_tokens=tokens), 0)
    assert router.add([1] * 5, GREEDY).rank == 1  # 10 + 12 rows on their way
    assert router.add([1] * 5, GREEDY).rank == 2  # 20 are fewer than 22
    assert router.add([1], GREEDY).rank == 1


def test_requests_on_their_way_count_until_the_rank_counts_them():
    router = make_router(num_ranks=2)
    first = router.add([1] * 20, GREEDY)
    assert first.rank == 0
    assert router.add([1], GREEDY).rank == 1
    router.sent(0)
    router.observe(0, SchedulerState(), 0)  # sent before the request came
    assert router.add([1], GREEDY).rank == 1  # 27 rows are on their way to rank 0
    router.observe(0, SchedulerState(num_outstanding_tokens=2), 1)
    assert router.add([1], GREEDY).rank == 0  # 2 rows are left there, and nothing is on its way


@pytest.mark.parametrize("load_balancing", ["least-tokens", "least-kv-cache"])
def test_aborted_requests_count_no_more_although_their_rank_has_not_heard(load_balancing):
    """Otherwise a crowd that leaves one rank's state behind sends all that come after it to the other ranks."""
    router = make_router(num_ranks=2, load_balancing=load_balancing)
    crowd = [router.add([1] * 20, GREEDY) for _ in range(4)]
    for rank in (0, 1):
        router.sent(rank)
        router.observe(rank, SchedulerState(num_outstanding_tokens=2 * 27, num_kv_tokens=2 * 28), 1)
    for entry in crowd:
        router.abort(entry.request_id)
    for rank in (0, 1):
        router.sent(rank)
    router.observe(0, SchedulerState(), 2)  # rank 1 has not acted on it yet
    assert sorted(router.add([1] * 20, GREEDY).rank for _ in range(4)) == [0, 0, 1, 1]
    router.sent(1)
    router.observe(1, SchedulerState(num_outstanding_tokens=2 * 27, num_kv_tokens=2 * 28), 1)  # said before it acted
    assert sorted(router.add([1] * 20, GREEDY).rank for _ in range(4)) == [0, 0, 1, 1]


def test_of_an_aborted_request_only_what_was_left_counts_no_more():
    router = make_router(num_ranks=2)
    entry = router.add([1] * 20, GREEDY)
    router.sent(0)
    send(router, entry, [10, 11, 12])
    router.observe(0, SchedulerState(num_outstanding_tokens=5 + 40), 1)  # of 8 new tokens, 5 are left
    router.observe(1, SchedulerState(num_outstanding_tokens=39), 0)
    assert router.abort(entry.request_id) is entry
    assert router.add([1], GREEDY).rank == 1  # 39 are fewer than 40


def test_least_kv_cache_looks_at_what_requests_will_hold():
    router = make_router(num_ranks=2, load_balancing="least-kv-cache")
    router.observe(0, SchedulerState(num_outstanding_tokens=1, num_kv_tokens=100), 0)
    router.observe(1, SchedulerState(num_outstanding_tokens=90, num_kv_tokens=90), 0)
    assert router.add([1], GREEDY).rank == 1


def test_round_robin_takes_turns():
    router = make_router(load_balancing="round-robin")
    assert [router.add([1], GREEDY).rank for _ in range(4)] == [0, 1, 2, 0]


def test_routers_of_several_ranks_give_no_number_twice():
    routers = [make_router(num_ranks=1, first_rank=rank, all_ranks=3) for rank in range(3)]
    entries = [router.add([1], GREEDY) for router in routers for _ in range(4)]
    assert len({entry.request_id for entry in entries}) == 12
    assert [entry.rank for entry in entries] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_request_goes_from_prompt_to_output():
    router = make_router(num_ranks=1)
    entry = router.add([5, 6], GREEDY, index=3)
    entry, delta = send(router, entry, range(10, 18))
    output = entry.output()
    assert delta.finish_reason == output.finish_reason == "length"
    assert (output.index, output.rank, output.token_ids) == (3, 0, tuple(range(10, 18)))
    assert output.text == "" and output.logprobs is None  # without a tokenizer, and not asked for
    assert not router.entries


def test_tokens_that_come_twice_change_nothing():
    router = make_router(num_ranks=1)
    entry = router.add([5], GREEDY)
    send(router, entry, [10, 11])
    assert router.take(entry.request_id, 0, 10) is None
    assert router.take(entry.request_id, 1, 99) is None
    taken, _ = router.take(entry.request_id, 2, 12)
    assert taken.checker.token_ids == [10, 11, 12]


def test_a_gap_names_rank_request_and_positions():
    router = make_router(num_ranks=1)
    entry = router.add([5], GREEDY)
    send(router, entry, [10])
    with pytest.raises(ConfigurationError, match="rank 0 sent token 2 of request 0 after 1 tokens"):
        router.take(entry.request_id, 2, 12)


def test_a_stop_string_ends_a_request_before_its_rank_knows(tokenizer):
    router = make_router(num_ranks=1, detokenizer=Detokenizer(tokenizer))
    entry = router.add([5], SamplingParams(max_tokens=50, stop=["END", "#"]))
    _, delta = send(router, entry, tokenizer.encode("one EN"))
    assert delta.finish_reason is None
    taken, delta = send(router, entry, tokenizer.encode("D"), start=6)
    output = taken.output()
    assert (delta.finish_reason, output.text, output.stop_reason) == ("stop", "one ", "END")
    assert len(output.token_ids) == 7
    assert send(router, entry, tokenizer.encode(" two"), start=7) is None  # overrun rows


def test_ends_by_stop_token_and_end_of_sequence(tokenizer):
    router = make_router(num_ranks=1, detokenizer=Detokenizer(tokenizer))
    first, second = (router.add([5], SamplingParams(max_tokens=50, stop_token_ids=[65])) for _ in range(2))
    taken, _ = send(router, first, [66, 65])
    assert (taken.output().finish_reason, taken.output().stop_reason) == ("stop", 65)
    taken, _ = send(router, second, [66, EOS])
    assert (taken.output().finish_reason, taken.output().stop_reason) == ("stop", None)
    third = router.add([5], SamplingParams(max_tokens=3, ignore_eos=True))
    taken, _ = send(router, third, [EOS, EOS, EOS])
    assert taken.output().finish_reason == "length"


def test_an_abort_keeps_what_was_there_and_drops_what_comes(tokenizer):
    router = make_router(num_ranks=1, detokenizer=Detokenizer(tokenizer))
    entry = router.add([5], GREEDY)
    send(router, entry, tokenizer.encode("ab"))
    aborted = router.abort(entry.request_id)
    assert (aborted.output().finish_reason, aborted.output().text) == ("abort", "ab")
    assert router.abort(entry.request_id) is None
    assert router.take(entry.request_id, 2, 7) is None


def test_logprobs_follow_their_tokens():
    router = make_router(num_ranks=1)
    entry = router.add([5], SamplingParams(max_tokens=2, temperature=0, logprobs=2))
    router.take(entry.request_id, 0, 10, -0.5, [[10, -0.5], [11, -1.5]])
    taken, _ = router.take(entry.request_id, 1, 12, -0.25, [[12, -0.25], [13, -3.0]])
    first, second = taken.output().logprobs
    assert (first.logprob, first.top) == (-0.5, ((10, -0.5), (11, -1.5)))
    assert (second.logprob, second.top) == (-0.25, ((12, -0.25), (13, -3.0)))


def test_what_cannot_run_is_refused_before_it_is_in_the_ledger():
    router = make_router()
    with pytest.raises(ConfigurationError, match="num_prompt_tokens and max_new_tokens must be >= 1"):
        router.add([], GREEDY, index=4)
    with pytest.raises(ConfigurationError, match="needs a tokenizer"):
        router.add([1], SamplingParams(stop="x"))
    assert not router.entries


def test_ranks_that_are_left_get_every_unfinished_request_once():
    router = make_router(num_ranks=3)
    entries = [router.add([5] * (1 + n), GREEDY) for n in range(6)]
    send(router, entries[0], [10, 11])
    router.abort(entries[1].request_id)
    router.begin_epoch([0, 2])
    assert {entry.rank for entry in router.entries.values()} == {0, 2}
    assert sorted(router.entries) == [entry.request_id for entry in entries if entry is not entries[1]]
    assert router.add([1], GREEDY).rank in (0, 2)
    router.observe(2, SchedulerState(num_outstanding_tokens=1000), 0)
    assert router.add([1], GREEDY).rank == 0


def test_a_token_of_an_epoch_that_has_ended_changes_nothing():
    router = make_router(num_ranks=2)
    entry = router.add([5], GREEDY)
    send(router, entry, [10, 11])
    router.begin_epoch([1])
    assert router.take(entry.request_id, 2, 99, epoch=0) is None  # of the rank that was lost, in the nick of time
    assert router.take(entry.request_id, 1, 11, epoch=1) is None  # computed again
    taken, _ = router.take(entry.request_id, 2, 12, epoch=1)
    assert taken.checker.token_ids == [10, 11, 12]
