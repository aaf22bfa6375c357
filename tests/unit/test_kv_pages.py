"""Pages of KV cache, preemption and stops: facts worked by hand, and laws against a scheduler that counts by hand."""

import copy
from math import ceil

import pytest
from cluster import WorkloadScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import ConfigurationError
from lockstep.workload import PAGE_SIZE, RankScheduler, Request, SchedulerConfig, SchedulerState
from lockstep.workload.kv_pages import KVPages, num_pages


class ByHand:
    """The rules of `RankScheduler` without its arithmetic: one count per request, everything else added up anew."""

    def __init__(self, config):
        self.budget = config.max_num_batched_tokens
        self.seats = min(config.max_num_seqs, self.budget)
        self.total = 10**9 if config.num_kv_pages is None else config.num_kv_pages
        self.queue, self.running = [], []
        self.step = -1

    def add(self, request, step):
        self.queue.append({"request": request, "arrival": step, "cached": 0, "sampled": 0, "target": 0})

    def stop(self, request_id):
        for line in (self.queue, self.running):
            line[:] = [r for r in line if r["request"].request_id != request_id]

    @property
    def free(self):
        return self.total - sum(ceil(r["cached"] / PAGE_SIZE) for r in self.running)

    @property
    def decoding(self):
        return [r for r in self.running if r["cached"] >= r["target"]]

    def next_step(self, run_prefills=True):
        self.step += 1
        preempted, entries = [], []
        while sum(r["cached"] % PAGE_SIZE == 0 for r in self.decoding) > self.free:
            preempted.append(self.running.pop())
            preempted[-1]["cached"] = 0
            self.queue.insert(0, preempted[-1])
        for r in self.decoding:
            entries.append(self.run_rows(r, 1, is_prefill=False))
        left = self.budget - len(entries)
        while run_prefills and left:
            if len(self.decoding) == len(self.running):
                known = self.queue[0]["request"].num_prompt_tokens + self.queue[0]["sampled"] if self.queue else 0
                if not self.queue or len(self.running) >= self.seats or ceil((known + 1) / PAGE_SIZE) > self.free:
                    break
                self.running.append(self.queue.pop(0))
                self.running[-1]["target"] = known
            r = self.running[-1]
            room = ceil(r["cached"] / PAGE_SIZE) * PAGE_SIZE - r["cached"] + self.free * PAGE_SIZE
            num_tokens = min(left, r["target"] - r["cached"], room)
            if not num_tokens:
                break
            entries.append(self.run_rows(r, num_tokens, is_prefill=True))
            left -= num_tokens
        finished = [r for r in self.running if r["sampled"] == r["request"].max_new_tokens]
        self.running = [r for r in self.running if r not in finished]
        return entries, [r["request"].request_id for r in preempted], {r["request"].request_id for r in finished}

    def run_rows(self, r, num_tokens, is_prefill):
        start = r["cached"]
        r["cached"] += num_tokens
        samples = r["cached"] >= r["target"]
        r["sampled"] += samples
        finishes = r["sampled"] == r["request"].max_new_tokens
        return r["request"].request_id, start, num_tokens, is_prefill, samples, finishes

    def state(self):
        unfinished = self.queue + self.running
        return SchedulerState(
            sum(r["request"].num_computed_tokens - r["cached"] for r in unfinished),
            sum(r["request"].num_kv_tokens for r in unfinished),
            len(self.decoding),
            self.wait_steps(),
        )

    def wait_steps(self, total=None):
        trial = copy.deepcopy(self)
        trial.total = total or self.total
        prompts = [entry[0] for entry in trial.next_step()[0] if entry[3]]
        arrivals = {r["request"].request_id: r["arrival"] for r in self.queue + self.running}
        return self.step + 1 - arrivals[prompts[0]] if prompts else -1

    def num_waiting_for_kv(self):
        return len(self.queue) if self.wait_steps() < 0 <= self.wait_steps(total=10**9) else 0


def schedules(requests, config, stops=None, arrivals=None, num_steps=1000):
    """Plan a rank's steps until nothing is left; `stops` and `arrivals` say before which step."""
    scheduler, left, found = RankScheduler(config), list(requests), []
    for step in range(num_steps):
        for request in [r for r in left if (arrivals or {}).get(r.request_id, 0) <= step]:
            scheduler.add(request, step)
            left.remove(request)
        scheduler.stop([r.request_id for r in requests if (stops or {}).get(r.request_id) == step])
        if not left and not scheduler.state().num_outstanding_tokens:
            return found
        found.append(scheduler.next_step(step))
    raise AssertionError("requests starve")


def rows(schedule):
    return [(e.request_id, e.start, e.num_tokens) for e in schedule.entries]


def test_two_requests_and_three_pages_worked_by_hand():
    # Both fill their first page in step 4; in step 5 both need a second one, and one page is free.
    found = schedules([Request(0, 0.0, 60, 80), Request(1, 0.0, 60, 80)], SchedulerConfig(kv_capacity_tokens=192))
    assert {s.step: s.preempted for s in found if s.preempted} == {5: (1,)}
    assert rows(found[4]) == [(0, 63, 1), (1, 63, 1)]
    assert rows(found[5]) == [(0, 64, 1)]
    # Request 1 needs 2 pages for its 60 + 5 tokens and the next one. Request 0 takes the last page in step 69.
    assert [(s.step, rows(s)) for s in found if s.num_prefill_tokens] == [
        (0, [(0, 0, 60), (1, 0, 60)]),
        (80, [(1, 0, 65)]),
    ]
    assert [s.step for s in found if s.num_waiting_for_kv] == list(range(5, 79))  # from step 80 on it fits
    assert {s.step: s.finished for s in found if s.finished} == {79: (0,), 154: (1,)}
    assert found[80].entries[0].is_prefill
    assert found[80].entries[0].samples


def test_the_request_that_needs_the_page_may_be_the_one_that_loses_its_own():
    # Request 1 fills its page first, in step 4, and no other page is free.
    found = schedules([Request(0, 0.0, 1, 100), Request(1, 0.0, 60, 20)], SchedulerConfig(kv_capacity_tokens=128))
    assert {s.step: s.preempted for s in found if s.preempted} == {5: (1,)}
    assert [(s.step, rows(s)) for s in found if s.num_prefill_tokens] == [
        (0, [(0, 0, 1), (1, 0, 60)]),
        (100, [(1, 0, 65)]),
    ]


def test_a_prompt_that_has_begun_is_preempted_before_requests_that_generate():
    config = SchedulerConfig(max_num_batched_tokens=30, kv_capacity_tokens=192)
    found = schedules([Request(0, 0.0, 60, 20), Request(1, 0.0, 120, 5)], config)
    assert rows(found[5]) == [(0, 63, 1), (1, 87, 29)]
    assert found[6].preempted == (1,)
    assert rows(found[6]) == [(0, 64, 1)]
    assert rows(found[21]) == [(1, 0, 30)]
    assert sum(s.num_tokens for s in found) == 79 + 124 + 116


def test_a_prompt_that_has_begun_waits_for_pages_where_none_is_left():
    config = SchedulerConfig(max_num_batched_tokens=30, kv_capacity_tokens=192)
    requests = [Request(0, 0.0, 60, 20), Request(1, 0.0, 120, 5)]
    found = schedules(requests, config, arrivals={1: 4})
    assert [rows(s)[1:] for s in found[4:8]] == [[(1, 0, 29)], [(1, 29, 29)], [(1, 58, 6)], []]
    assert not any(s.preempted for s in found)
    assert rows(found[21]) == [(1, 64, 30)]


def test_a_prompt_is_admitted_when_the_first_generated_token_fits_too():
    # One page is free: enough for 63 tokens and the next one, not for 64.
    for prompt, first_step in ((63, 1), (64, 50)):
        requests = [Request(0, 0.0, 1, 50), Request(1, 0.0, prompt, 2)]
        found = schedules(requests, SchedulerConfig(kv_capacity_tokens=128), arrivals={1: 1})
        assert [s.step for s in found if s.num_prefill_tokens] == [0, first_step]
        assert not any(s.preempted for s in found)


def test_pages_of_a_request_that_finishes_are_free_in_the_next_step():
    scheduler = RankScheduler(SchedulerConfig(kv_capacity_tokens=100))
    assert scheduler.num_free_pages == 1  # whole pages only
    scheduler.add(Request(0, 0.0, 63, 1), 0)
    scheduler.add(Request(1, 0.0, 1, 1), 0)
    assert [rows(scheduler.next_step(step)) for step in (0, 1)] == [[(0, 0, 63)], [(1, 0, 1)]]
    assert scheduler.num_free_pages == 1
    assert RankScheduler(SchedulerConfig()).num_free_pages is None


def test_stops_free_pages_in_every_state():
    scheduler = RankScheduler(SchedulerConfig(max_num_batched_tokens=30, kv_capacity_tokens=192))
    for request in (Request(0, 0.0, 60, 20), Request(1, 0.0, 120, 5), Request(2, 0.0, 9, 5)):
        scheduler.add(request, 0)
    for step in range(6):
        scheduler.next_step(step)
    # Request 0 generates, 116 rows of request 1 are done, and 2 waits.
    assert scheduler.num_free_pages == 0
    assert all(request_id in scheduler for request_id in range(3))
    scheduler.stop([2])
    assert scheduler.state() == SchedulerState(79 - 64 + 124 - 116, 80 + 125, 1, -1)
    scheduler.stop([1])
    assert scheduler.num_free_pages == 2
    assert scheduler.next_step(6).preempted == ()
    scheduler.stop([0])
    assert scheduler.state() == SchedulerState(0, 0, 0, -1)
    assert scheduler.num_free_pages == 3
    assert 0 not in scheduler
    with pytest.raises(ConfigurationError, match="request 0 is not an unfinished request of this rank"):
        scheduler.stop([0])


def test_a_preempted_request_can_be_stopped_and_its_number_used_again():
    scheduler = RankScheduler(SchedulerConfig(kv_capacity_tokens=192))
    scheduler.add(Request(0, 0.0, 60, 80), 0)
    scheduler.add(Request(1, 0.0, 60, 80), 0)
    for step in range(6):
        schedule = scheduler.next_step(step)
    assert schedule.preempted == (1,)
    assert scheduler.num_preemptions == 1
    assert scheduler.state() == SchedulerState((80 - 6) + 139, 280, 1, -1)
    with pytest.raises(ConfigurationError, match="request 1 is already there"):
        scheduler.add(Request(1, 0.0, 1, 1), 6)
    scheduler.stop([1])
    assert scheduler.state() == SchedulerState(80 - 6, 140, 1, -1)
    scheduler.add(Request(1, 0.0, 3, 1), 6)
    assert rows(scheduler.next_step(6)) == [(0, 65, 1), (1, 0, 3)]


def test_bad_requests_steps_and_capacities_are_named():
    scheduler = RankScheduler(SchedulerConfig(kv_capacity_tokens=100))
    with pytest.raises(ConfigurationError, match=r"request 3 needs 65 tokens .* 2 pages of 64, more than the 1 of kv_"):
        scheduler.add(Request(3, 0.0, 60, 5), 0)
    scheduler.add(Request(4, 0.0, 60, 4), 0)
    scheduler.next_step(0)
    with pytest.raises(ConfigurationError, match="step must be above the last one, 0, got 0"):
        scheduler.add(Request(5, 0.0, 1, 1), 0)
    with pytest.raises(ConfigurationError, match="kv_capacity_tokens must be >= 64, one page of the KV cache, got 63"):
        SchedulerConfig(kv_capacity_tokens=63)


def test_a_step_in_which_pages_run_out_may_not_be_left_out():
    scheduler = RankScheduler(SchedulerConfig(kv_capacity_tokens=192))
    for request_id in (0, 1):
        scheduler.add(Request(request_id, 0.0, 60, 80), 0)
    scheduler.next_step(0)
    assert scheduler.pages_change_at() == 5
    with pytest.raises(ConfigurationError, match="step 5 may not be left out: the KV cache runs out of pages in it"):
        scheduler.next_step(6)
    assert scheduler.next_step(5).preempted == (1,)


@given(st.lists(st.integers(1, 300), max_size=12), st.integers(0, 40), st.integers(0, 200))
def test_the_step_in_which_pages_run_out_is_found_without_walking(lengths, spare, step):
    pages = KVPages(10**6)
    for length in lengths:
        pages.join(length, step)
    cached = list(lengths)
    taken, walked = 0, step
    while lengths:
        walked += 1
        taken += sum(length % PAGE_SIZE == 0 for length in cached)
        cached = [length + 1 for length in cached]
        assert pages.needed_between(step + 1, walked + 1) == taken
        assert taken == sum(num_pages(n) for n in cached) - sum(num_pages(n) for n in lengths)
        if taken > spare:
            break
    assert pages.runs_out_at(step + 1, spare) == (walked if lengths else None)


CASES = {
    "requests": st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 120) | st.sampled_from([63, 64, 65]), st.integers(1, 72)),
        min_size=1,
        max_size=9,
    ).map(lambda found: [(arrival, Request(i, 0.0, p, n)) for i, (arrival, p, n) in enumerate(sorted(found))]),
    "config": st.builds(
        SchedulerConfig,
        max_num_batched_tokens=st.sampled_from([3, 40, 500]),
        max_num_seqs=st.integers(1, 8),
        kv_capacity_tokens=st.sampled_from([192, 200, 256, 330, None]),
    ),
    "stops": st.dictionaries(st.integers(0, 8), st.integers(0, 120), max_size=4),
    "holds": st.lists(st.integers(0, 150), max_size=6),
}


def drive(requests, stops, holds, scheduler, max_steps=5000):
    """Yield before every step who is stopped, and what is held; end when nothing is left."""
    held = {step for first in holds for step in range(first, first + 9)}
    waiting = list(requests)
    for step in range(max_steps):
        for _, request in [item for item in waiting if item[0] <= step]:
            scheduler.add(request, step)
        waiting = [item for item in waiting if item[0] > step]
        stopped = [i for i, at in stops.items() if at == step and i in scheduler]
        yield step, stopped, step not in held
        if not waiting and not scheduler.state().num_outstanding_tokens:
            return
    raise AssertionError("requests starve")


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_every_step_is_that_of_counting_by_hand(requests, config, stops, holds):
    scheduler, by_hand = RankScheduler(config), ByHand(config)
    num_preemptions = 0
    for step, stopped, run_prefills in drive(requests, stops, holds, scheduler):
        for request in [request for arrival, request in requests if arrival == step]:
            by_hand.add(request, step)
        scheduler.stop(stopped)
        for request_id in stopped:
            by_hand.stop(request_id)
        could_run = by_hand.state().prefill_wait_steps >= 0
        schedule = scheduler.next_step(step, run_prefills)
        entries, preempted, finished = by_hand.next_step(run_prefills)
        assert [tuple(entry) for entry in schedule.entries] == entries
        assert list(schedule.preempted) == preempted
        assert set(schedule.finished) == finished
        assert schedule.num_prefill_tokens == sum(e[2] for e in entries if e[3])
        assert schedule.num_decode_tokens == sum(e[2] for e in entries if not e[3])
        for is_prefill, context in ((True, schedule.prefill_context_tokens), (False, schedule.decode_context_tokens)):
            assert context == sum(start + i + 1 for _, start, n, p, *_ in entries if p == is_prefill for i in range(n))
        assert schedule.num_waiting == len(by_hand.queue)
        assert schedule.prefills_held == (not run_prefills and could_run)
        assert schedule.num_waiting_for_kv == by_hand.num_waiting_for_kv()
        assert scheduler.state() == by_hand.state()
        assert scheduler.num_free_pages == (None if config.num_kv_pages is None else by_hand.free)
        num_preemptions += len(preempted)
    assert scheduler.num_preemptions == num_preemptions


class Engine:
    """What an engine keeps: numbered pages, the tokens in them, and a "model" whose tokens depend on all before."""

    def __init__(self, num_pages):
        self.free = list(range(num_pages))
        self.table, self.cached, self.tokens = {}, {}, {}

    def drop(self, request_id):
        self.free += self.table.pop(request_id, [])
        self.cached.pop(request_id, None)

    def run(self, entry):
        cached, table = self.cached.setdefault(entry.request_id, []), self.table.setdefault(entry.request_id, [])
        assert entry.start == len(cached)
        new = self.tokens[entry.request_id][entry.start : entry.start + entry.num_tokens]
        assert len(new) == entry.num_tokens
        cached += new
        while len(table) < num_pages(len(cached)):
            table.append(self.free.pop())  # fails where the scheduler has promised too much
        if entry.samples:
            assert len(cached) == len(self.tokens[entry.request_id])
            self.tokens[entry.request_id].append(next_token(cached))


def next_token(tokens):
    return hash(tuple(tokens)) % 1000


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_an_engine_with_pages_gets_every_token_as_if_nothing_else_ran(requests, config, stops, holds):
    scheduler = RankScheduler(config)
    engine = Engine(config.num_kv_pages or 10_000)
    by_id = {request.request_id: request for _, request in requests}
    engine.tokens = {i: list(range(request.num_prompt_tokens)) for i, request in by_id.items()}
    ended, left_early, num_idle = [], set(), 0
    for step, stopped, run_prefills in drive(requests, stops, holds, scheduler):
        for request_id in ended:  # their last step has run by now
            engine.drop(request_id)
        scheduler.stop(stopped)
        left_early.update(stopped)
        for request_id in stopped:
            engine.drop(request_id)
        unfinished = scheduler.state().num_outstanding_tokens > 0
        schedule = scheduler.next_step(step, run_prefills)
        for request_id in schedule.preempted:
            engine.drop(request_id)
        for entry in schedule.entries:
            engine.run(entry)
        assert schedule.num_tokens or not unfinished or not run_prefills, "a step without progress"
        assert len(schedule.entries) <= config.max_num_seqs
        assert schedule.num_tokens <= config.max_num_batched_tokens
        assert scheduler.num_free_pages in (
            None,
            len(engine.free) + sum(len(engine.table[request_id]) for request_id in schedule.finished),
        )
        ended = schedule.finished
        num_idle += not schedule.num_tokens
    for request_id, request in by_id.items():
        alone = list(range(request.num_prompt_tokens))
        while len(alone) < request.num_kv_tokens:
            alone.append(next_token(alone))
        if request_id not in left_early:
            assert len(engine.tokens[request_id]) == request.num_kv_tokens
        assert engine.tokens[request_id] == alone[: len(engine.tokens[request_id])]


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_steps_that_are_left_out_change_nothing(requests, config, stops, holds):
    visited, skipping = RankScheduler(config), RankScheduler(config)
    must_visit = None
    for step, stopped, run_prefills in drive(requests, stops, holds, visited):
        arriving = [request for arrival, request in requests if arrival == step]
        for request in arriving:
            skipping.add(request, step)
        if stopped:
            skipping.skip_to(step)
            skipping.stop(stopped)
        visited.stop(stopped)
        waited = visited.state().prefill_wait_steps
        schedule = visited.next_step(step, run_prefills, list_entries=False)
        has_prompts = waited >= 0 or schedule.num_waiting > 0
        if arriving or stopped or schedule.finished or must_visit == step or (run_prefills and has_prompts):
            assert skipping.next_step(step, run_prefills, list_entries=False) == schedule
            must_visit = skipping.pages_change_at()
        else:
            assert not schedule.preempted
            now = visited.state().prefill_wait_steps
            assert now == (waited if waited < 0 else waited + 1), "the first prompt's turn came or went unseen"
        trial = copy.deepcopy(skipping)
        trial.skip_to(step + 1)
        assert trial.state() == visited.state()
        assert trial.num_free_pages == visited.num_free_pages


@settings(max_examples=60, deadline=None)
@given(CASES["requests"], CASES["config"], st.integers(1, 3), st.sampled_from([0, 4]))
def test_ranks_with_few_pages_end_and_repeat_exactly(requests, config, num_ranks, delay):
    config = SchedulerConfig("least-kv-cache", config.max_num_batched_tokens, 4, delay, config.kv_capacity_tokens)
    runs = []
    for _ in range(2):
        ranks = [WorkloadScheduler([r for _, r in requests], config, num_ranks, rank) for rank in range(num_ranks)]
        states, steps = ranks[0].initial_states(), []
        while not ranks[0].done(states):
            steps.append([scheduler.next_step(states) for scheduler in ranks])
            states = [scheduler.state() for scheduler in ranks]
            assert any(schedule.num_tokens for schedule in steps[-1]), "an empty step"
            assert len(steps) < 20_000
        runs.append(steps)
        assert sum(s.num_preemptions for s in ranks) == sum(len(s.preempted) for row in steps for s in row)
        assert all(scheduler.num_free_pages == config.num_kv_pages for scheduler in ranks)
    assert runs[0] == runs[1]
    ended = [e.request_id for row in runs[0] for s in row for e in s.entries if e.finishes]
    assert sorted(ended) == [request.request_id for _, request in requests]
