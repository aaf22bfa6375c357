from dataclasses import asdict, replace

import numpy as np
import pytest
from cluster import overrun_rows, run_cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import ConfigurationError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.simulation.config import SimulationConfig, Stop
from lockstep.simulation.cost import COST_CONSTANTS, CostConstants, fit
from lockstep.simulation.simulator import simulate
from lockstep.simulation.sink import filler_rows
from lockstep.steplog.files import StepColumns, read_step_columns
from lockstep.steplog.record import summarize
from lockstep.steplog.table import StepTable
from lockstep.workload import Request, SchedulerConfig, SyntheticParameters, synthetic_requests
from lockstep.workload.policies import LOAD_BALANCING

COST = CostConstants(1000, 3, 50, 0.1, 0.01, 2, 5, request_us=7, weights_us=400, expert_share=0.125)


requests_of_a_workload = st.lists(
    st.tuples(
        st.floats(0, 3),
        st.integers(1, 60) | st.integers(60, 190),
        st.integers(1, 15) | st.integers(60, 130),
        st.lists(st.integers(0, 1), max_size=3),
    ),
    min_size=1,
    max_size=40,
).map(lambda rows: [Request(i, t, p, o, block_ids=tuple(b)) for i, (t, p, o, b) in enumerate(sorted(rows))])
scheduler_configs = st.builds(
    SchedulerConfig,
    load_balancing=st.sampled_from(LOAD_BALANCING),
    max_num_batched_tokens=st.integers(1, 50),
    max_num_seqs=st.integers(1, 8),
    max_prefill_delay_steps=st.sampled_from([0, 1, 3, 10]),
    kv_capacity_tokens=st.sampled_from([None, 320, 400, 600]),
    seconds_per_step=st.sampled_from([0.01, 0.05, 0.3]),
)


stops_of_a_run = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 39), st.integers(0, 3)), max_size=8)


def check_equal(requests, config, num_ranks, tmp_path, chunk, stop_before=()):
    """Assert that the simulator's step log is what the real run's schedulers did, field by field; return the result."""
    stop_before = [stop for stop in stop_before if stop[1] < len(requests)]
    steps, ranks, stops = run_cluster(requests, config, num_ranks, stop_before)
    simulated = SimulationConfig(num_ranks, config, COST, max_chunk_size=chunk, clock="steps")
    path = tmp_path / "steps.parquet"
    with StepColumns(path) as log:
        result = simulate(requests, simulated, log, stops=stops)
    records = read_step_columns(path)
    overrun = overrun_rows(steps, requests, stops)
    assert len(records) == len(steps) * num_ranks
    for record, plan in zip(records, [plan for plans in steps for plan in plans], strict=True):
        assert record.step == plan.step
        assert record.real_rows == plan.num_tokens
        assert record.prefill_tokens == plan.num_prefill_tokens
        assert record.decode_tokens == plan.num_decode_tokens
        assert record.prefill_context_tokens == plan.prefill_context_tokens
        assert record.decode_context_tokens == plan.decode_context_tokens
        assert record.num_waiting == plan.num_waiting
        assert record.prefills_held == plan.prefills_held
        assert record.preempted == len(plan.preempted)
        assert record.cached_tokens == plan.num_cached_tokens
        assert record.overrun_rows == overrun[record.step][record.rank]
        row = [other.num_tokens for other in steps[plan.step]]
        assert record.num_chunks == len(ChunkPlan(row, max_chunk_size_per_rank=chunk))
    assert result.summary["kv_waits"] == sum(plan.num_waiting_for_kv > 0 for plans in steps for plan in plans)
    assert result.summary["preempted"] == sum(scheduler.num_preemptions for scheduler in ranks)
    assert result.summary["overrun_rows"] == sum(map(sum, overrun))
    assert result.summary["cached_tokens"] == sum(plan.num_cached_tokens for plans in steps for plan in plans)
    assert result.rank.tolist() == [
        next(rank for rank, s in enumerate(ranks) if request in s.assigned) for request in requests
    ]
    return result


@settings(max_examples=150, deadline=None)
@given(requests_of_a_workload, scheduler_configs, st.integers(1, 5), st.sampled_from([None, 1, 7]), stops_of_a_run)
def test_counts_are_those_of_the_real_run_step_by_step(tmp_path_factory, requests, config, num_ranks, chunk, stops):
    check_equal(requests, config, num_ranks, tmp_path_factory.mktemp("s"), chunk, stops)


def test_counts_are_those_of_the_real_run_over_10_000_steps(tmp_path):
    parameters = SyntheticParameters(num_requests=1200, prompt_median=150, prompt_max=2000, output_max=300, rate=3)
    requests = synthetic_requests(parameters, seed=5)
    config = SchedulerConfig(
        "least-tokens", 256, max_prefill_delay_steps=8, kv_capacity_tokens=2600, seconds_per_step=0.03
    )
    stops = [(step, step // 10, step % 4) for step in range(0, 9000, 70)]
    # Prompts of five kinds, each kind with a beginning of its own of up to 256 tokens.
    requests = [replace(request, block_ids=(request.request_id % 5,), block_size=256) for request in requests]
    summary = check_equal(requests, config, 3, tmp_path, 100, stops).summary
    assert summary["steps"] > 10_000
    assert summary["cached_tokens"] > 10_000
    assert summary["preempted"] > 50
    assert summary["overrun_rows"] > 10


def test_dummy_and_padding_rows_are_those_of_the_chunk_plans_over_10_000_steps():
    rng = np.random.default_rng(0)
    for trial in range(100):
        chunk = [None, 1, 5, 16, 64][trial % 5]
        tokens = rng.integers(0, 70, (100, 4)) * rng.integers(0, 2, (100, 4))
        for shapes in ("ragged", "dummy", "equal"):
            found = filler_rows(tokens, chunk, shapes)
            for row, filler in zip(tokens, found, strict=True):
                plan = ChunkPlan(row.tolist(), max_chunk_size_per_rank=chunk, min_rows=int(shapes == "dummy"))
                sizes = np.array([part.sizes for part in plan]).reshape(-1, 4)
                if shapes == "equal":
                    sizes = sizes.max(axis=1, keepdims=True).repeat(4, axis=1)
                assert filler.tolist() == (sizes.sum(axis=0) - row).tolist()


def test_times_of_one_request_worked_by_hand():
    # 10 prompt tokens in steps of 4, 4 and 2 rows, then two steps that generate; 1000 us and 10 us a row.
    config = SimulationConfig(2, SchedulerConfig(max_num_batched_tokens=4), CostConstants(1000, 10))
    result = simulate([Request(0, 5.0, 10, 3)], config)
    first = 3000e-6 + 10 * 10e-6
    assert result.ttft_s[0] == pytest.approx(first)
    assert result.queue_s[0] == 0
    assert result.tpot_s[0] == pytest.approx(1010e-6)
    summary = result.summary
    assert summary["steps"] == 5
    assert summary["duration_s"] == pytest.approx(5 + first + 2 * 1010e-6)
    assert summary["no_requests_fraction"] == pytest.approx(0.5)  # rank 1 never had a request
    assert summary["lost_fraction"] == 0


def test_loss_worked_by_hand():
    # Rank 0 has 8 rows, rank 1 has 2: it waits 6 * 10 us of 1080 us; then both are done.
    config = SimulationConfig(2, SchedulerConfig(), CostConstants(1000, 10))
    result = simulate([Request(0, 0.0, 8, 1), Request(1, 0.0, 2, 1)], config)
    assert result.summary["steps"] == 1
    assert result.summary["lost"]["other_prompts"] == pytest.approx(60 / (2 * 1080))
    assert result.summary["lost_fraction"] == pytest.approx(60 / (2 * 1080))


@pytest.mark.parametrize("shapes", ["ragged", "dummy", "equal"])
def test_step_times_are_those_of_the_formula(tmp_path, shapes):
    requests = synthetic_requests(SyntheticParameters(num_requests=60, prompt_median=80), seed=1)
    config = SimulationConfig(3, SchedulerConfig(max_num_batched_tokens=256), COST, 32, shapes)
    with StepColumns(tmp_path / "log") as log:
        result = simulate(requests, config, log)
    records = read_step_columns(tmp_path / "log")
    column = {
        name: np.array([getattr(record, name) for record in records]).reshape(-1, 3)
        for name in StepTable.__dataclass_fields__.keys()
        | {"decode_context_tokens", "prefill_context_tokens", "num_chunks"}
        if hasattr(records[0], name)
    }
    expected = COST.step_times_us(
        column["real_rows"],
        column["decode_tokens"],
        column["decode_context_tokens"],
        column["prefill_context_tokens"],
        column["num_chunks"][:, 0],
        column["dummy_rows"] + column["padding_rows"],
    )
    assert column["duration_s"][:, 0] * 1e6 == pytest.approx(expected)
    assert (column["busy_s"] <= column["duration_s"] + 1e-12).all()
    assert (column["busy_s"] >= 0).all()
    table = StepTable.from_records(read_step_columns(tmp_path / "log"))
    assert table.lost_by_cause() == pytest.approx(result.summary["lost"])
    assert summarize(records)["real_tokens"] == result.summary["real_tokens"]
    assert result.summary["dummy_rows"] == column["dummy_rows"].sum()
    assert result.summary["padding_rows"] == column["padding_rows"].sum()


def test_buffers_and_the_reports_table_may_be_small():
    requests = synthetic_requests(SyntheticParameters(num_requests=200, prompt_median=80), seed=1)
    config = SimulationConfig(4, cost=COST)
    whole = simulate(requests, config)
    small = simulate(requests, config, max_report_cells=128, buffer_cells=64)
    assert small.summary["lost"] == pytest.approx(whole.summary["lost"])
    assert small.summary["real_tokens"] == whole.summary["real_tokens"]
    assert small.steps.num_rows <= 34
    assert set(np.diff(small.steps.step)) == {small.steps.steps_per_row}
    assert small.steps.num_steps == whole.steps.num_steps == whole.summary["steps"]
    assert small.steps.real_rows.sum() == whole.steps.real_rows.sum()
    assert small.steps.duration_s.sum() == pytest.approx(whole.steps.duration_s.sum())
    assert small.steps.lost_by_cause() == pytest.approx(whole.steps.lost_by_cause())


def test_holding_prompts_loses_less_time_and_lets_them_wait_longer():
    requests = synthetic_requests(SyntheticParameters(num_requests=800, rate=30), seed=2)
    results = [
        simulate(requests, SimulationConfig(8, SchedulerConfig(max_prefill_delay_steps=delay))).summary
        for delay in (0, 10, 30)
    ]
    lost = [result["lost_fraction"] for result in results]
    assert lost[0] > 1.5 * lost[1] > 1.5 * lost[2]
    queue = [result["queue_s"]["mean"] for result in results]
    assert queue == sorted(queue)
    assert results[1]["queue_s"]["mean"] < 0.2


def test_holding_does_not_lower_throughput_under_overload():
    # Ten times more work than the ranks can do: the policy must not feed on the queue.
    requests = synthetic_requests(SyntheticParameters(num_requests=500, rate=500), seed=3)
    base = SimulationConfig(4, SchedulerConfig())
    without = simulate(requests, base).summary["tokens_per_s"]
    for delay in (5, 50, 500):
        config = replace(base, scheduler=SchedulerConfig(max_prefill_delay_steps=delay))
        assert simulate(requests, config).summary["tokens_per_s"] > 0.97 * without


def test_kv_cache_limit_is_counted():
    requests = [Request(i, 0.0, 10, 6) for i in range(3)]
    config = SimulationConfig(1, SchedulerConfig(kv_capacity_tokens=128))
    assert simulate(requests, config).summary["kv_waits"] == 5
    with pytest.raises(ConfigurationError, match="request 0 needs 70 tokens"):
        simulate([Request(0, 0.0, 10, 60)], SimulationConfig(1, SchedulerConfig(kv_capacity_tokens=127)))


def test_a_preempted_request_keeps_its_first_token_and_takes_longer():
    # Two requests and three pages, as in test_kv_pages: request 1 is preempted in step 5 and goes on in step 80.
    requests = [Request(0, 0.0, 60, 80), Request(1, 0.0, 60, 80)]
    cost = CostConstants(1000, 10)
    result = simulate(requests, SimulationConfig(1, SchedulerConfig(kv_capacity_tokens=192), cost))
    assert result.summary["preempted"] == 1
    assert result.summary["real_tokens"] == 2 * 139 + 64  # 60 + 4 rows of request 1 are computed twice
    assert result.summary["steps"] == 155
    first = 1000e-6 + 120 * 10e-6
    assert result.ttft_s == pytest.approx([first, first])
    assert result.queue_s == pytest.approx([0, 0])
    after = [4 * 1020 + 75 * 1010, 4 * 1020 + 75 * 1010 + 1650 + 74 * 1010]
    assert result.tpot_s == pytest.approx([us * 1e-6 / 79 for us in after])


def test_stops_worked_by_hand():
    # Request 0 ends with its third token (step 2), which is known before step 4; request 1 before it has begun.
    requests = [Request(0, 0.0, 10, 50), Request(1, 0.0, 5, 9)]
    config = SimulationConfig(1, SchedulerConfig(max_num_seqs=1), CostConstants(1000, 10), clock="steps")
    result = simulate(requests, config, stops={0: Stop(4, 3), 1: Stop(2, 0)})
    assert result.summary["overrun_rows"] == 1
    assert result.summary["real_tokens"] == 13
    assert result.summary["steps"] == 5  # the last of them empty: before it, all ranks knew of work left
    assert result.tpot_s[0] == pytest.approx(1010e-6)
    assert np.isnan(result.ttft_s[1])
    assert result.summary["output_tokens_per_s"] * result.summary["duration_s"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (Stop(0, 0), "request 1 cannot stop before step 0: it comes later"),
        (Stop(40, 2), "request 1 cannot stop before step 40: the last step is 21"),
        (Stop(21, 2), "request 1 is not an unfinished request of this rank"),
    ],
)
def test_stops_that_cannot_be_repeated(stop, message):
    requests = [Request(0, 0.0, 10, 22), Request(1, 0.5, 5, 3)]
    with pytest.raises(ConfigurationError, match=message):
        simulate(requests, SimulationConfig(1, clock="steps"), stops={1: stop})


def test_exchange_buffers_cut_chunks_smaller_and_it_is_counted(tmp_path):
    # 40 rows on rank 0 in the first step; buffers of 32 rows hold chunks of 16 rows of each of 2 ranks: 3 chunks.
    requests = [Request(0, 0.0, 40, 3), Request(1, 0.0, 2, 3)]
    counted = []
    for asked, capacity in ((None, None), (None, 32), (None, 80), (20, 32), (8, 32)):
        config = SimulationConfig(2, cost=COST, max_chunk_size=asked, buffer_capacity_rows=capacity)
        with StepColumns(tmp_path / "log") as log:
            summary = simulate(requests, config, log).summary
        first = read_step_columns(tmp_path / "log")[0]
        counted.append((config.chunk_size, first.num_chunks, summary["buffer_limited_steps"]))
    assert counted == [(None, 1, 0), (16, 3, 1), (40, 1, 0), (16, 3, 1), (8, 5, 0)]
    with pytest.raises(ConfigurationError, match="buffer_capacity_rows must be >= 4, a row of each of 4 ranks, got 3"):
        SimulationConfig(4, buffer_capacity_rows=3)


@pytest.mark.parametrize(
    "wrong", [{"num_ranks": 0}, {"num_ranks": 1, "max_chunk_size": 0}, {"num_ranks": 1, "row_shapes": "round"}]
)
def test_options_outside_their_limits(wrong):
    name, value = list(wrong.items())[-1]
    with pytest.raises(ConfigurationError, match=rf"{name} must be .*got '?{value}"):
        SimulationConfig(**wrong)


def test_fit_finds_the_constants_that_made_the_times():
    rng = np.random.default_rng(1)
    tokens = np.where(rng.random((400, 4)) < 0.2, rng.integers(50, 500, (400, 4)), rng.integers(0, 20, (400, 4)))
    requests = np.minimum(tokens, rng.integers(0, 20, (400, 4)))
    decode, prefill = rng.integers(0, 9000, (400, 4)), rng.integers(0, 90_000, (400, 4))
    chunks = -(-tokens.max(axis=1) // 128)
    truth = replace(COST, row_us=0.0)
    times = truth.step_times_us(tokens, requests, decode, prefill, chunks)
    found = fit(tokens, requests, decode, prefill, chunks, times, source="test")
    for name in asdict(truth).keys() - {"source"}:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    noisy = times * rng.normal(1, 0.05, len(times))
    noisy[::50] *= 30  # the machine did something else
    found = fit(tokens, requests, decode, prefill, chunks, noisy)
    predicted = found.step_times_us(tokens, requests, decode, prefill, chunks)
    assert np.median(np.abs(predicted - times) / times) < 0.02
    with pytest.raises(ConfigurationError, match="at least 10 steps are needed to fit a cost, got 3"):
        fit(tokens[:3], requests[:3], decode[:3], prefill[:3], chunks[:3], times[:3])


def test_constants_are_saved_loaded_and_checked(tmp_path):
    COST.save(tmp_path / "cost.json")
    assert CostConstants.load(str(tmp_path / "cost.json")) == COST
    assert CostConstants.load("linear") is COST_CONSTANTS["linear"]
    with pytest.raises(ConfigurationError, match=r"cost must be one of .* got 'nosuch'"):
        CostConstants.load("nosuch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "must be a JSON object, got []"),
        (b"7", "must be a JSON object, got 7"),
        (b"{}", ": cost constant step_us is missing"),
        (b'{"step_us": 1}', ": cost constant token_us is missing"),
        (b'{"step_us": 1, "token_us": 1, "steps": 1}', ": 'steps' is no cost constant; there are step_us, token_us,"),
        (b'{"step_us": -1, "token_us": 1}', ": cost constant step_us must be a number >= 0 and < 1e12, got -1"),
        (b'{"step_us": 1, "token_us": "x"}', ": cost constant token_us must be a number >= 0 and < 1e12, got 'x'"),
        (b'{"step_us": 1, "token_us": NaN}', ": cost constant token_us must be a number >= 0 and < 1e12, got nan"),
        (
            b'{"step_us": 1, "token_us": 1e12}',
            ": cost constant token_us must be a number >= 0 and < 1e12, got 1000000000000.0",
        ),
        (b'{"step_us": true, "token_us": 1}', ": cost constant step_us must be a number >= 0 and < 1e12, got True"),
        (b'{"step_us": 0, "token_us": 1}', ": cost constant step_us must be > 0, got 0"),
        (b'{"step_us": 1, "token_us": 1, "source": 5}', ": source of cost constants must be text, got 5"),
    ],
)
def test_a_file_of_other_constants_names_file_field_and_what_was_expected(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(ConfigurationError) as error:
        CostConstants.load(str(path))
    assert str(error.value).startswith(f"{path}{message}" if message[0] == ":" else f"{path} {message}")
    assert "__init__" not in str(error.value)
