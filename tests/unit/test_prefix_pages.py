"""Prefix pages by the scheduler alone: worked by hand, and laws against a plain ledger of every page."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.workload import PAGE_SIZE, RankScheduler, Request, SchedulerConfig, random_prompt_ids
from lockstep.workload.kv_pages import KVPages, num_pages, token_page_keys
from lockstep.workload.request import block_page_keys


def request(request_id, num_prompt_tokens, block_ids, max_new_tokens=2, block_size=PAGE_SIZE):
    return Request(request_id, 0.0, num_prompt_tokens, max_new_tokens, block_ids=block_ids, block_size=block_size)


def shown(schedule):
    return [(entry.request_id, entry.start, entry.num_tokens) for entry in schedule.entries]


def test_a_second_prompt_begins_behind_the_pages_of_the_first():
    scheduler = RankScheduler(SchedulerConfig(kv_capacity_tokens=10 * PAGE_SIZE))
    scheduler.add(request(0, 150, (1, 2)), 0)
    assert shown(scheduler.next_step(0)) == [(0, 0, 150)]
    scheduler.add(request(1, 150, (1, 2)), 1)
    scheduler.add(request(2, 150, (1, 3)), 1)
    assert scheduler.state().num_outstanding_tokens == 1 + 151 + 151
    schedule = scheduler.next_step(1)
    assert shown(schedule) == [(0, 150, 1), (1, 128, 22), (2, 64, 86)]
    assert schedule.prefix_hits == ((1, 128), (2, 64))
    assert schedule.num_cached_tokens == 192
    assert schedule.num_prefill_tokens == 22 + 86
    # Rows 128 to 149 attend to 129 to 150 keys, rows 64 to 149 to 65 to 150.
    assert schedule.prefill_context_tokens == sum(range(129, 151)) + sum(range(65, 151))
    assert scheduler.state().num_outstanding_tokens == 2
    # Two pages are shared; request 1 has one of its own and request 2 has two; request 0 is done.
    assert scheduler.num_free_pages == 10 - 2 - 1 - 2
    scheduler.next_step(2)
    assert scheduler.num_free_pages == 10
    assert scheduler.state().num_outstanding_tokens == 0


def test_pages_of_a_step_are_shared_from_the_next_one_on():
    scheduler = RankScheduler(SchedulerConfig(kv_capacity_tokens=10 * PAGE_SIZE))
    for request_id in (0, 1):
        scheduler.add(request(request_id, 100, (1,)), 0)
    schedule = scheduler.next_step(0)
    assert shown(schedule) == [(0, 0, 100), (1, 0, 100)]
    assert schedule.prefix_hits == ()
    # Both have filled the same page: the second gives its own back.
    assert scheduler.num_free_pages == 10 - 3


def test_the_last_token_of_a_prompt_is_always_computed():
    scheduler = RankScheduler(SchedulerConfig())
    for request_id, num_tokens in enumerate((128, 128, 129)):
        scheduler.add(request(request_id, num_tokens, (1, 2, 3), max_new_tokens=9), request_id)
        entry = scheduler.next_step(request_id).entries[-1]
        assert (entry.start, entry.num_tokens) == [(0, 128), (64, 64), (128, 1)][request_id]


def test_without_a_limit_of_pages_they_are_known_while_somebody_holds_them():
    scheduler = RankScheduler(SchedulerConfig())
    scheduler.add(request(0, 70, (1,), max_new_tokens=1), 0)
    assert scheduler.next_step(0).forgotten == ()
    scheduler.add(request(1, 70, (1,), max_new_tokens=1), 1)
    schedule = scheduler.next_step(1)
    assert shown(schedule) == [(1, 0, 70)]
    assert schedule.forgotten == block_page_keys(request(0, 70, (1,)))


def test_the_least_recently_used_page_goes_first():
    scheduler = RankScheduler(SchedulerConfig(kv_capacity_tokens=6 * PAGE_SIZE))
    for step, block in enumerate((1, 2, 1)):  # page 1 is used again after page 2
        scheduler.add(request(step, 65, (block,), max_new_tokens=1), step)
        assert scheduler.next_step(step).num_cached_tokens == (64 if step == 2 else 0)
    scheduler.add(request(3, 5 * 64 - 1, (), max_new_tokens=1), 3)
    assert scheduler.next_step(3).forgotten == block_page_keys(request(0, 64, (2,)))
    scheduler.add(request(4, 6 * 64 - 1, (), max_new_tokens=1), 4)
    assert scheduler.next_step(4).forgotten == block_page_keys(request(0, 64, (1,)))


def test_prefix_caching_can_be_turned_off():
    scheduler = RankScheduler(SchedulerConfig(enable_prefix_caching=False))
    for step in (0, 1):
        scheduler.add(request(step, 70, (1,)), step, page_keys=["a"])
        schedule = scheduler.next_step(step)
        assert schedule.prefix_hits == schedule.forgotten == ()
        assert schedule.num_prefill_tokens == 70


def test_keys_stand_for_all_tokens_before_as_well():
    ids = list(range(200))
    keys = token_page_keys(ids)
    assert len(keys) == 3
    assert token_page_keys(ids[:128]) == keys[:2]
    other = token_page_keys([ids[0] + 1, *ids[1:]])
    assert not set(keys) & set(other)
    assert token_page_keys(ids[:63]) == ()
    # Blocks of a trace: also where they are longer or shorter than a page, and where not all of them are known.
    long = block_page_keys(request(0, 1100, (5, 6), block_size=512))
    assert len(long) == 16
    other = block_page_keys(request(0, 1100, (5, 7), block_size=512))
    assert other[:8] == long[:8]
    assert not set(other[8:]) & set(long)
    assert not set(long) & set(block_page_keys(request(0, 1100, (4, 6), block_size=512)))
    short = block_page_keys(request(0, 200, tuple(range(8)), block_size=25.6))
    assert len(short) == 3
    assert block_page_keys(request(0, 200, (0, 1, 2, 3), block_size=25.6)) == short[:1]


def test_made_up_prompts_are_equal_where_their_blocks_are():
    a = random_prompt_ids(request(0, 200, (1, 2, 3)), 1000, seed=4)
    b = random_prompt_ids(request(1, 180, (1, 2, 4)), 1000, seed=4)
    assert (len(a), len(b)) == (200, 180)
    assert a[:128] == b[:128]
    assert a[128:160] != b[128:160]
    assert a[:64] != random_prompt_ids(request(0, 200, (1, 2, 3)), 1000, seed=5)[:64]
    assert len(token_page_keys(a)) == len(block_page_keys(request(0, 200, (1, 2, 3))))


class Ledger:
    """What each request holds, page by page, told by schedules alone: a plain twin of the scheduler's counts."""

    def __init__(self, total):
        self.total = total
        self.requests = {}
        self.holders = {}  # key -> requests
        self.unheld = []  # least recently used first
        self.tokens = {}  # request -> tokens in the cache

    def keys(self, request_id, num_tokens):
        return block_page_keys(self.requests[request_id])[: num_tokens // PAGE_SIZE]

    def release(self, request_id):
        for key in reversed(self.keys(request_id, self.tokens.pop(request_id, 0))):
            self.holders[key].remove(request_id)
            if not self.holders[key]:
                del self.holders[key]
                if self.total is not None:
                    self.unheld.append(key)

    def num_held(self):
        private = sum(num_pages(n) - len(self.keys(request_id, n)) for request_id, n in self.tokens.items())
        return private + len(self.holders)

    def take(self, schedule):
        """Take a step in, and check that it was right."""
        for request_id in schedule.preempted:
            self.release(request_id)
        assert not set(schedule.forgotten) & self.holders.keys(), "a page is forgotten that somebody holds"
        known = {*self.holders, *self.unheld}  # filled in earlier steps
        hits = dict(schedule.prefix_hits)
        begun = [entry for entry in schedule.entries if entry.request_id not in self.tokens]
        held = [key for entry in begun for key in self.keys(entry.request_id, entry.start)]
        assert all(key in known for key in held), "a page is shared before it is filled"
        assert [entry.start for entry in begun if entry.start] == list(hits.values())
        if self.total is not None:
            unheld = [key for key in self.unheld if key not in held]
            assert list(schedule.forgotten) == unheld[: len(schedule.forgotten)], "not the least recently used"
            self.unheld = unheld[len(schedule.forgotten) :]
            # Nothing known was passed by, unless it had to be forgotten for a request before.
            for entry in begun:
                keys = self.keys(entry.request_id, self.sharable(entry))
                following = keys[len(self.keys(entry.request_id, entry.start)) :]
                assert not following or following[0] not in known or following[0] in schedule.forgotten
        filled = []
        for entry in schedule.entries:
            for key in self.keys(entry.request_id, entry.start) if entry in begun else ():
                self.holders.setdefault(key, []).append(entry.request_id)
            stop = entry.start + entry.num_tokens
            assert self.tokens.get(entry.request_id, entry.start) == entry.start
            self.tokens[entry.request_id] = entry.start
            filled.append((entry.request_id, stop))
        self.fill(filled, schedule.forgotten)

    def sharable(self, entry):
        """Tokens that a prompt could have taken over: its own first entry may be a preempted request's."""
        return min(self.requests[entry.request_id].num_prompt_tokens, entry.start + entry.num_tokens - 1)

    def fill(self, filled, forgotten):
        pages = self.num_held() + sum(num_pages(stop) - num_pages(self.tokens[i]) for i, stop in filled)
        if self.total is not None:
            assert pages + len(self.unheld) <= self.total, "more pages than there are"
            if forgotten:
                assert pages + len(self.unheld) == self.total, "a page was forgotten although others were free"
        for request_id, stop in filled:
            for key in self.keys(request_id, stop)[self.tokens[request_id] // PAGE_SIZE :]:
                if key in self.unheld:
                    self.unheld.remove(key)
                self.holders.setdefault(key, []).append(request_id)
            self.tokens[request_id] = stop


prompts = st.tuples(st.integers(1, 330), st.lists(st.integers(0, 1), max_size=5), st.integers(1, 80))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), prompts), min_size=1, max_size=25),
    st.sampled_from([None, 7, 9, 14]),
    st.sampled_from([30, 100, 400]),
    st.lists(st.tuples(st.integers(1, 120), st.integers(0, 24)), max_size=6),
)
def test_laws_of_shared_pages(arrivals, total, budget, stops):
    config = SchedulerConfig(
        max_num_batched_tokens=budget, max_num_seqs=6, kv_capacity_tokens=None if total is None else total * PAGE_SIZE
    )
    scheduler, ledger = RankScheduler(config), Ledger(total)
    arrivals = sorted((step, i, row) for i, (step, row) in enumerate(arrivals))
    rows = 0
    for step in range(6000):
        while arrivals and arrivals[0][0] <= step:
            _, request_id, (length, blocks, new) = arrivals.pop(0)
            ledger.requests[request_id] = request(request_id, length, tuple(blocks), new)
            scheduler.add(ledger.requests[request_id], step)
        for request_id in {i for at, i in stops if at == step and i in scheduler}:
            scheduler.stop([request_id])
            ledger.release(request_id)
        expected = scheduler.state().num_outstanding_tokens
        schedule = scheduler.next_step(step)
        ledger.take(schedule)
        for request_id in schedule.finished:
            ledger.release(request_id)
        rows += schedule.num_tokens
        if not schedule.preempted:
            done = schedule.num_tokens + schedule.num_cached_tokens
            assert scheduler.state().num_outstanding_tokens == expected - done
        if total is not None:
            assert scheduler.num_free_pages == total - ledger.num_held()
        if not arrivals and not scheduler.state().num_outstanding_tokens:
            break
    else:
        pytest.fail("requests starve")
    assert ledger.tokens == ledger.holders == {}
    if total is not None:
        assert scheduler.num_free_pages == total


def test_equal_requests_give_equal_steps_again():
    def plan():
        scheduler = RankScheduler(SchedulerConfig(max_num_batched_tokens=90, kv_capacity_tokens=9 * PAGE_SIZE))
        for request_id in range(12):
            scheduler.add(request(request_id, 40 + 37 * request_id % 300, (0, request_id % 3, 1), 30), 0)
        return [scheduler.next_step(step) for step in range(400)]

    first = plan()
    assert first == plan()
    assert sum(schedule.num_cached_tokens for schedule in first) > 500
    assert any(schedule.forgotten for schedule in first)


def test_a_page_is_never_forgotten_before_one_that_continues_it():
    pages = KVPages(3)
    pages.take(3)
    pages.fill("abc")
    pages.hold("ab")
    pages.release(3 * PAGE_SIZE, "abc")
    assert pages.num_free == pages.num_unheld == 1
    pages.release(2 * PAGE_SIZE, "ab")
    assert pages.num_free == pages.num_unheld == 3
    pages.take(3)
    assert pages.take_forgotten() == ("c", "b", "a")
    assert pages.take_forgotten() == ()
