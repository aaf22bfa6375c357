import pytest

from lockstep.errors import ConfigurationError
from lockstep.workload import Request, SyntheticParameters, WorkloadOptions, load_workload, synthetic_requests
from lockstep.workload.synthetic import describe, resembling


def test_the_same_seed_gives_the_same_workload():
    assert synthetic_requests(seed=3) == synthetic_requests(seed=3)
    assert synthetic_requests(seed=3) != synthetic_requests(seed=4)
    assert load_workload("synthetic", seed=3).requests == synthetic_requests(seed=3)


def test_burstiness_zero_is_a_clock():
    requests = synthetic_requests(SyntheticParameters(num_requests=4, rate=2, burstiness=0))
    assert [r.arrival_s for r in requests] == pytest.approx([0, 0.5, 1, 1.5])


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_what_is_made_resembles_what_was_asked_for(burstiness):
    asked = SyntheticParameters(
        num_requests=20_000, rate=40, burstiness=burstiness, prompt_median=300, prompt_sigma=0.9, output_sigma=0.5
    )
    found = resembling(synthetic_requests(asked, seed=1))
    for name in ("rate", "burstiness", "prompt_median", "prompt_sigma", "output_median", "output_sigma"):
        assert getattr(found, name) == pytest.approx(getattr(asked, name), rel=0.08), name


def test_options_scale_and_limit():
    options = WorkloadOptions(rate_scale=10, max_prompt_tokens=64, max_new_tokens=16, num_requests=500)
    requests = synthetic_requests(options=options, seed=0)
    assert len(requests) == 500
    assert max(r.num_prompt_tokens for r in requests) == 64
    assert max(r.max_new_tokens for r in requests) == 16
    assert resembling(requests).rate == pytest.approx(55, rel=0.15)


def test_description_of_a_workload_worked_by_hand():
    requests = [Request(i, float(i // 2), prompt, 10) for i, prompt in enumerate([1, 2, 3, 4, 100])]
    found = describe(requests)
    assert found["num_requests"] == 5
    assert found["duration_s"] == 2
    assert found["requests_per_s"] == 2
    assert found["peak_requests_per_s"] == 0.5
    assert found["prompt_tokens"] == {"total": 110, "mean": 22.0, "p50": 3, "p90": 100, "p99": 100, "max": 100}
    assert found["output_tokens"]["p99"] == 10
    assert SyntheticParameters(**found["synthetic"]).prompt_max == 100


def test_a_single_request_and_simultaneous_requests_can_be_described():
    assert describe([Request(0, 0.0, 5, 5)])["num_requests"] == 1
    assert synthetic_requests(resembling([Request(0, 0.0, 5, 5), Request(1, 0.0, 5, 5)]))
    with pytest.raises(ConfigurationError, match="needs at least 1 request, got 0"):
        describe([])


@pytest.mark.parametrize(
    "wrong", [{"num_requests": 0}, {"rate": 0}, {"burstiness": -1}, {"prompt_median": 0}, {"output_sigma": -0.1}]
)
def test_parameters_below_their_limit(wrong):
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))} must be .*, got"):
        SyntheticParameters(**wrong)
