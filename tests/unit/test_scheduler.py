from dataclasses import replace

import pytest
from cluster import WorkloadScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import ConfigurationError
from lockstep.workload import (
    RankScheduler,
    Request,
    SchedulerConfig,
    SchedulerState,
    StepEntry,
    random_prompt_ids,
)
from lockstep.workload.policies import LOAD_BALANCING, LoadBalancer, prefills_run


def run_cluster(requests, config, num_ranks, max_steps=10_000):
    """Run all ranks' schedulers as a run loop would; return each step's plans, [steps][ranks], and the schedulers."""
    ranks = [WorkloadScheduler(requests, config, num_ranks, rank) for rank in range(num_ranks)]
    states = ranks[0].initial_states()
    steps = []
    while not ranks[0].done(states):
        assert len({scheduler.done(states) for scheduler in ranks}) == 1
        steps.append([scheduler.next_step(states) for scheduler in ranks])
        states = [scheduler.state() for scheduler in ranks]
        assert len(steps) < max_steps, "requests starve"
    return steps, ranks


def counts(steps):
    return [[plan.num_tokens for plan in plans] for plans in steps]


def first_steps(steps):
    """The step in which each request first ran."""
    found = {}
    for plans in steps:
        for plan in plans:
            for entry in plan.entries:
                found.setdefault(entry.request_id, plan.step)
    return found


requests_of_a_workload = st.lists(
    st.tuples(st.floats(0, 1), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=30
).map(lambda rows: [Request(i, t, p, o) for i, (t, p, o) in enumerate(sorted(rows))])
configs = st.builds(
    SchedulerConfig,
    load_balancing=st.sampled_from(LOAD_BALANCING),
    max_num_batched_tokens=st.integers(1, 50),
    max_num_seqs=st.integers(1, 8),
    max_prefill_delay_steps=st.sampled_from([0, 1, 3, 10]),
    kv_capacity_tokens=st.sampled_from([None, 64, 150]),
    seconds_per_step=st.sampled_from([0.01, 0.05, 0.3]),
)


def test_one_request_worked_by_hand():
    scheduler = RankScheduler(SchedulerConfig(max_num_batched_tokens=4))
    scheduler.add(Request(7, 0.0, num_prompt_tokens=6, max_new_tokens=3), step=0)
    assert scheduler.state() == SchedulerState(8, 9, 0, 0)
    expected = [
        (StepEntry(7, 0, 4, is_prefill=True, samples=False, finishes=False), SchedulerState(4, 9, 0, 1)),
        (StepEntry(7, 4, 2, is_prefill=True, samples=True, finishes=False), SchedulerState(2, 9, 1, -1)),
        (StepEntry(7, 6, 1, is_prefill=False, samples=True, finishes=False), SchedulerState(1, 9, 1, -1)),
        (StepEntry(7, 7, 1, is_prefill=False, samples=True, finishes=True), SchedulerState(0, 0, 0, -1)),
    ]
    for step, (entry, state) in enumerate(expected):
        assert scheduler.next_step(step).entries == (entry,)
        assert scheduler.state() == state
    assert scheduler.next_step(4).entries == ()


def test_requests_join_and_leave_between_steps_and_generation_goes_first():
    requests = [Request(0, 0.0, 4, 3), Request(1, 0.05, 10, 1), Request(2, 0.05, 2, 2)]
    steps, _ = run_cluster(requests, SchedulerConfig(max_num_batched_tokens=8), 1)
    assert [[(e.request_id, e.num_tokens) for e in plan.entries] for (plan,) in steps] == [
        [(0, 4)],
        [(0, 1), (1, 7)],
        [(0, 1), (1, 3), (2, 2)],
        [(2, 1)],
    ]


def test_context_tokens_worked_by_hand():
    requests = [Request(0, 0.0, 4, 3), Request(1, 0.05, 10, 1)]
    scheduler = RankScheduler(SchedulerConfig(max_num_batched_tokens=7))
    for step, request in enumerate(requests):
        scheduler.add(request, step)
        plan = scheduler.next_step(step)
    # Request 0 attends to 5 entries; the prompt's first six tokens to 1, 2, 3, 4, 5 and 6.
    assert (plan.decode_context_tokens, plan.prefill_context_tokens) == (5, 21)
    plan = scheduler.next_step(2)
    assert (plan.decode_context_tokens, plan.prefill_context_tokens) == (6, 7 + 8 + 9 + 10)


def test_round_robin_and_least_loaded():
    requests = [Request(i, 0.0, prompt, 1) for i, prompt in enumerate([100, 10, 10, 10])]
    states = [SchedulerState()] * 2
    assert LoadBalancer("round-robin", 2).assign(requests, states) == [0, 1, 0, 1]
    assert LoadBalancer("least-tokens", 2).assign(requests, states) == [0, 1, 1, 1]
    states = [SchedulerState(num_outstanding_tokens=0, num_kv_tokens=99), SchedulerState(50, 0)]
    assert LoadBalancer("least-tokens", 2).assign(requests[1:], states) == [0, 0, 0]
    assert LoadBalancer("least-kv-cache", 2).assign(requests[1:], states) == [1, 1, 1]


def test_round_robin_goes_on_where_it_stopped():
    balancer = LoadBalancer("round-robin", 3)
    requests = [Request(i, 0.0, 1, 1) for i in range(4)]
    assert balancer.assign(requests, []) == [0, 1, 2, 0]
    assert balancer.assign(requests, []) == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("waits", "decoding", "delay", "expected"),
    [
        ([3, -1], [5, 5], 0, True),  # holding is off
        ([3, -1], [5, 5], 10, False),  # one rank has a prompt, the other would wait for it
        ([10, -1], [5, 5], 10, True),  # held long enough
        ([3, 0], [5, 5], 10, True),  # every rank has one
        ([3, -1], [0, 0], 10, True),  # nobody is disturbed
        ([-1, -1], [5, 5], 10, False),  # a prompt that arrives now waits for others
    ],
)
def test_when_prompts_run(waits, decoding, delay, expected):
    assert prefills_run(waits, decoding, delay) is expected


def test_prompts_of_two_ranks_run_in_one_step():
    # Rank 0 generates from step 0 on; its next prompt arrives at step 2, rank 1's at step 4.
    requests = [Request(0, 0.0, 1, 20), Request(1, 0.0, 1, 20), Request(2, 0.1, 9, 2), Request(3, 0.2, 9, 2)]
    steps, _ = run_cluster(requests, SchedulerConfig(max_prefill_delay_steps=0), 2)
    assert [step for step, row in enumerate(counts(steps)) if max(row) > 2] == [2, 4]
    steps, _ = run_cluster(requests, SchedulerConfig(max_prefill_delay_steps=10), 2)
    assert [step for step, row in enumerate(counts(steps)) if max(row) > 2] == [5]  # known to all after step 4
    assert [plans[0].prefills_held for plans in steps[:6]] == [False, False, True, True, True, False]


@pytest.mark.parametrize("delay", [1, 2, 7])
def test_a_prompt_is_held_exactly_as_long_as_allowed_where_no_other_comes(delay):
    requests = [Request(0, 0.0, 1, 40), Request(1, 0.0, 1, 40), Request(2, 0.1, 9, 2)]
    steps, _ = run_cluster(requests, SchedulerConfig(max_prefill_delay_steps=delay), 2)
    assert first_steps(steps)[2] == 2 + delay


def test_a_lone_prompt_on_idle_ranks_is_not_held():
    steps, _ = run_cluster([Request(0, 0.0, 9, 1)], SchedulerConfig(max_prefill_delay_steps=30), 4)
    assert counts(steps) == [[9, 0, 0, 0]]


@given(st.lists(st.integers(1, 40), min_size=2, max_size=20), st.sampled_from([1, 5, 20]), st.integers(1, 4))
def test_holding_delays_a_queue_once_and_not_again(prompts, delay, num_ranks):
    # All arrive together, so the policy may hold them once; waiting that fed on itself would grow with the queue.
    requests = [Request(i, 0.0, prompt, 5) for i, prompt in enumerate(prompts)]
    config = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=4)
    without, _ = run_cluster(requests, config, num_ranks)
    held, _ = run_cluster(requests, replace(config, max_prefill_delay_steps=delay), num_ranks)
    assert len(held) <= len(without) + delay


def test_kv_cache_that_is_full_makes_requests_wait_and_counts_them():
    # Two pages: request 2 waits until one of the others has finished.
    requests = [Request(i, 0.0, 10, 6) for i in range(3)]
    steps, _ = run_cluster(requests, SchedulerConfig(kv_capacity_tokens=128), 1)
    assert [plan.num_waiting_for_kv for (plan,) in steps] == [1] * 5 + [0] * 7
    assert first_steps(steps) == {0: 0, 1: 0, 2: 6}


def test_a_request_that_can_never_fit_is_refused_at_once():
    with pytest.raises(ConfigurationError, match=r"request 3 needs 120 tokens .* kv_capacity_tokens=100"):
        WorkloadScheduler([Request(3, 0.0, 100, 20)], SchedulerConfig(kv_capacity_tokens=100), 2, 0)


def test_virtual_time_jumps_over_a_time_without_any_work():
    steps, _ = run_cluster([Request(0, 0.0, 3, 1), Request(1, 1e6, 3, 1)], SchedulerConfig(), 2)
    assert counts(steps) == [[3, 0], [0, 3]]


def test_requests_may_stop_before_their_last_token():
    scheduler = RankScheduler(SchedulerConfig(max_num_batched_tokens=8))
    for request in [Request(0, 0.0, 3, 100), Request(1, 0.0, 9, 5), Request(2, 0.0, 3, 5)]:
        scheduler.add(request, 0)
    scheduler.next_step(0)  # request 0 generates, 1 has begun, 2 waits
    scheduler.stop([0, 1, 2])
    assert scheduler.state() == SchedulerState(0, 0, 0, -1)
    assert scheduler.next_step(99).entries == ()
    with pytest.raises(ConfigurationError, match="request 9 is not"):
        scheduler.stop([9])


def test_steps_may_be_left_out_only_where_nothing_happens():
    scheduler = RankScheduler(SchedulerConfig())
    scheduler.add(Request(0, 0.0, 3, 10), 0)
    scheduler.next_step(0)
    assert scheduler.next_step(5).entries == (StepEntry(0, 7, 1, False, True, False),)
    assert scheduler.state().num_outstanding_tokens == 4
    assert scheduler.decode_context_base == 3  # 3 + 6 tokens of KV cache are read in step 6
    with pytest.raises(ConfigurationError, match="step 9 may not be left out: a request ends in it"):
        scheduler.next_step(11)
    with pytest.raises(ConfigurationError, match="above the last one, 5, got 5"):
        scheduler.next_step(5)


@settings(max_examples=200)
@given(requests_of_a_workload, configs, st.integers(1, 4))
def test_every_token_is_computed_once_in_order_and_no_limit_is_exceeded(requests, config, num_ranks):
    steps, ranks = run_cluster(requests, config, num_ranks)
    by_id = {request.request_id: request for request in requests}
    position = dict.fromkeys(by_id, 0)
    sampled = dict.fromkeys(by_id, 0)
    finished = set()
    rank_of = {request.request_id: rank for rank, s in enumerate(ranks) for request in s.assigned}
    assert len(rank_of) == sum(len(s.assigned) for s in ranks) == len(requests)
    for step, plans in enumerate(steps):
        assert any(plan.num_tokens for plan in plans), "an empty step"
        for rank, plan in enumerate(plans):
            assert plan.step == step
            assert plan.num_tokens == sum(e.num_tokens for e in plan.entries) <= config.max_num_batched_tokens
            assert plan.num_prefill_tokens == sum(e.num_tokens for e in plan.entries if e.is_prefill)
            assert len(plan.entries) <= config.max_num_seqs
            for request_id in plan.preempted:
                position[request_id] = 0
            for entry in plan.entries:
                request = by_id[entry.request_id]
                known = request.num_prompt_tokens + sampled[entry.request_id]
                assert rank_of[entry.request_id] == rank
                assert entry.start == position[entry.request_id]
                position[entry.request_id] += entry.num_tokens
                assert entry.samples == (position[entry.request_id] == known)
                assert entry.is_prefill or entry.start >= request.num_prompt_tokens
                sampled[entry.request_id] += entry.samples
                assert entry.finishes == (sampled[entry.request_id] == request.max_new_tokens)
            assert sorted(plan.finished) == sorted(e.request_id for e in plan.entries if e.finishes)
            if config.kv_capacity_tokens:
                begun = {r for r in rank_of if rank_of[r] == rank and position[r]}
                held = [-(-position[r] // 64) for r in begun if r not in finished or r in plan.finished]
                assert sum(held) <= config.kv_capacity_tokens // 64
            finished.update(plan.finished)
    assert position == {r.request_id: r.num_computed_tokens for r in requests}
    assert sampled == {r.request_id: r.max_new_tokens for r in requests}


@settings(max_examples=50)
@given(requests_of_a_workload, configs, st.integers(1, 4))
def test_the_same_workload_gives_the_same_steps(requests, config, num_ranks):
    assert run_cluster(requests, config, num_ranks)[0] == run_cluster(requests, config, num_ranks)[0]


@settings(max_examples=100)
@given(requests_of_a_workload, st.sampled_from([1, 3, 10]), st.integers(1, 4))
def test_a_prompt_that_could_run_is_held_at_most_so_many_steps(requests, delay, num_ranks):
    # Without other limits every prompt could run on arrival: what it waits is what the policy holds it.
    config = SchedulerConfig(max_num_batched_tokens=10**6, max_prefill_delay_steps=delay, seconds_per_step=0.05)
    steps, ranks = run_cluster(requests, config, num_ranks)
    arrival = {request_id: step for scheduler in ranks for request_id, step in scheduler.arrival_steps.items()}
    assert all(step - arrival[request_id] <= delay for request_id, step in first_steps(steps).items())


@settings(max_examples=100)
@given(requests_of_a_workload, configs, st.integers(1, 4))
def test_no_rank_is_held_once_its_first_prompt_is_old_enough(requests, config, num_ranks):
    # A prompt of many steps, too, is held in at most so many of them all in all.
    steps, ranks = run_cluster(requests, config, num_ranks)
    delay = config.max_prefill_delay_steps
    for rank, scheduler in enumerate(ranks):
        ended = {}
        for plans in steps:
            ended.update({e.request_id: plans[rank].step for e in plans[rank].entries if e.is_prefill and e.samples})
        for request_id, arrived in scheduler.arrival_steps.items():
            late = [plans[rank] for plans in steps[arrived + max(delay, 1) : ended[request_id] + 1]]
            first = min(i for i in scheduler.arrival_steps if ended[i] >= arrived)
            assert first != request_id or not any(plan.prefills_held for plan in late)


@settings(max_examples=50)
@given(requests_of_a_workload, configs)
def test_state_describes_the_rank_after_the_step(requests, config):
    config = replace(config, max_prefill_delay_steps=0, kv_capacity_tokens=None)
    steps, _ = run_cluster(requests, config, 1)
    fresh = WorkloadScheduler(requests, config, 1, 0)
    states = fresh.initial_states()
    left = sum(plan.num_tokens for (plan,) in steps)
    for (plan,), (following,) in zip(steps, [*steps[1:], [None]], strict=True):
        assert fresh.next_step(states) == plan
        states = [fresh.state()]
        left -= plan.num_tokens
        assert states[0].num_outstanding_tokens <= left
        assert fresh.unfinished == (left > 0)
        assert (
            following is None
            or states[0].num_outstanding_tokens == 0
            or (states[0].num_decoding == following.num_decode_tokens)
        )
    assert states == [SchedulerState(0, 0, 0, -1)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"load_balancing": "random"},
        {"max_num_batched_tokens": 0},
        {"max_num_seqs": -1},
        {"max_prefill_delay_steps": -1},
        {"kv_capacity_tokens": 0},
        {"seconds_per_step": 0},
        {"seconds_per_step": float("nan")},
    ],
)
def test_options_outside_their_limits(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigurationError, match=rf"{name} must be .*got '?{value}"):
        SchedulerConfig(**wrong)


def test_ranks_and_states_are_checked():
    with pytest.raises(ConfigurationError, match=r"rank must be in 0..1, got 2"):
        WorkloadScheduler([], SchedulerConfig(), 2, 2)
    with pytest.raises(ConfigurationError, match="num_ranks must be >= 1, got 0"):
        LoadBalancer("round-robin", 0)
    with pytest.raises(ConfigurationError, match="one entry per rank, 2, got 1"):
        WorkloadScheduler([], SchedulerConfig(), 2, 0).next_step([SchedulerState()])
    with pytest.raises(ConfigurationError, match=r"request 0: .* got 0, 1 and 0.0"):
        Request(0, 0.0, 0, 1)


def test_made_up_prompts_depend_on_seed_and_request_alone():
    request = Request(5, 0.0, 20, 1)
    assert random_prompt_ids(request, 100, 1) == random_prompt_ids(replace(request, arrival_s=9.0), 100, 1)
    assert random_prompt_ids(request, 100, 1) != random_prompt_ids(request, 100, 2)
    assert random_prompt_ids(request, 100, 1) != random_prompt_ids(replace(request, request_id=6), 100, 1)
    assert set(random_prompt_ids(request, 2, 1)) == {0, 1}
