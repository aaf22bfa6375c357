"""Sampling on the device: facts by hand, laws against a slow reference, bad input."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lockstep
from lockstep import ConfigurationError
from lockstep.engine.sampling import (
    Sampler,
    SamplingParams,
    draw_from_blocks,
    draw_from_sorted,
    seed_key,
    top_ids,
    uniforms,
)

EOS = 3


def draw(logits, params, *, seed=0, position=4, prompt=(0, 1, 2, 0), generated=(), eos=()):
    """The token of one row alone."""
    sampler = Sampler(1, len(logits), "cpu", eos_token_ids=eos)
    sampler.set(0, params, seed, prompt, generated)
    return sample(sampler, torch.tensor([logits]), [0], [position]).tokens.item()


def sample(sampler, logits, slots, positions):
    return sampler.sample(logits, torch.tensor(slots, dtype=torch.int32), torch.tensor(positions), slots)


def kept_by_reference(logits, params):
    """The tokens that may be drawn, one at a time, in plain Python."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weights = [math.exp((logits[token] - logits[order[0]]) / params.temperature) for token in order]
    kept = [(token, weight) for token, weight in zip(order, weights, strict=True) if weight >= params.min_p]
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    total, before, nucleus = sum(weight for _, weight in kept), 0.0, {}
    for token, weight in kept:
        if before >= params.top_p * total:
            break
        nucleus[token] = weight
        before += weight
    return {token: weight / before for token, weight in nucleus.items()}


# ------------------------------------------------------------------------------------------------------ parameters


def test_defaults_are_vllms():
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "max_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "min_tokens": 0,
        "logprobs": None,
    }
    assert lockstep.SamplingParams is SamplingParams


def test_values_take_the_types_of_their_fields():
    import numpy as np

    params = SamplingParams(temperature=0, top_k=np.int64(5), min_p=np.float32(0.5), stop="x", stop_token_ids=[1])
    assert (params.temperature, params.top_k, params.min_p) == (0.0, 5, 0.5)
    assert [type(value) for value in (params.temperature, params.top_k, params.min_p)] == [float, int, float]
    assert params.stop == params.stop_strings == ("x",)
    assert params.stop_token_ids == (1,)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 2**31, True, 1.0, "8", None, math.nan]),
        ("min_tokens", [-1, 17, True, 1.5, None]),
        ("temperature", [-0.1, math.nan, math.inf, 10001, 10**400, True, "1", None, 1j]),
        ("top_p", [0, 0.0, -0.1, 1.01, math.nan, math.inf, True, None]),
        ("top_k", [-2, 2**31, 1.0, True, None]),
        ("min_p", [-0.1, 1.1, math.nan, False, None]),
        ("presence_penalty", [-2.1, 2.1, math.nan, True]),
        ("frequency_penalty", [-2.1, 2.1, -math.inf, True]),
        ("repetition_penalty", [0, 0.001, 101, -1, math.nan, True]),
        ("seed", [2**63, -(2**63) - 1, 1.0, True, "7"]),
        ("stop", ["", [""], [1], 5, b"x", ["a", None], ["x"] * 65, "x" * 4097, ["x" * 2049] * 2]),
        ("stop_token_ids", [[-1], [True], [1.0], 5, "12", [2**31], None, [1] * 257]),
        ("ignore_eos", [1, 0, None, "yes"]),
        ("logprobs", [-1, 6, True, 1.0]),
    ],
)
def test_a_wrong_value_is_named(field, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=field) as caught:
            SamplingParams(**{field: value})
        assert len(str(caught.value)) < 200


def test_the_message_has_field_limit_and_value():
    with pytest.raises(ConfigurationError, match=r"^top_k must be an integer in -1..2147483647, got -7$"):
        SamplingParams(top_k=-7)
    with pytest.raises(ConfigurationError, match=r"^temperature must be a number in 0..10000, got nan$"):
        SamplingParams(temperature=math.nan)
    with pytest.raises(ConfigurationError, match=r"^min_tokens must be an integer in 0..8, got 9$"):
        SamplingParams(max_tokens=8, min_tokens=9)


def test_parameters_need_no_torch():
    code = "import sys, lockstep; lockstep.SamplingParams(top_k=5); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -------------------------------------------------------------------------------------------------- random numbers


def splitmix64(state):
    """The published algorithm, in Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_the_hash_is_splitmix64():
    # The first outputs of SplitMix64 for the state 1234567, published with many of its implementations.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = uniforms(torch.full((3,), 1234567), torch.arange(3))
    assert drawn.tolist() == [(value >> 11) * 2.0**-53 for value in published]
    assert seed_key(0) == 0xE220A8397B1DCDAF - 2**64


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1))
def test_the_hash_equals_plain_integers(seed, position):
    key = splitmix64((seed + 0x9E3779B97F4A7C15) % 2**64)
    assert seed_key(seed) % 2**64 == key
    expected = splitmix64((key + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)
    drawn = uniforms(torch.tensor([seed_key(seed)]), torch.tensor([position], dtype=torch.int32))
    assert drawn.dtype == torch.float64
    assert drawn.item() == (expected >> 11) / 2**53


def test_neighbouring_seeds_and_positions_are_independent():
    keys = torch.tensor([seed_key(seed) for seed in range(64)])
    grid = torch.stack([uniforms(keys, torch.full((64,), position)) for position in range(64)])
    assert abs(grid.mean().item() - 0.5) < 0.02
    for shifted in (grid[1:] * grid[:-1], grid[:, 1:] * grid[:, :-1]):
        assert abs(shifted.mean().item() - 0.25) < 0.02
    assert grid.unique().numel() == grid.numel()


# ------------------------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=9e-6),
        SamplingParams(temperature=5, top_k=1),
        SamplingParams(temperature=0, top_p=0.1, min_p=0.5, top_k=70),
    ],
)
def test_greedy_takes_the_first_of_the_largest(params):
    assert draw([0.0, 7.0, 7.0, -1.0], params) == 1


def test_a_tiny_top_p_leaves_the_most_likely():
    assert {draw([0.0, 2.0, 1.0], SamplingParams(top_p=1e-9), seed=seed) for seed in range(50)} == {1}


def test_equal_logits_are_cut_at_exactly_top_k_lower_ids_first():
    for k in (2, 70):
        drawn = {draw([1.0] * 200, SamplingParams(top_k=k, temperature=3), seed=seed) for seed in range(600)}
        assert drawn == set(range(k))


def test_top_p_stops_at_the_token_that_reaches_it():
    # Ten equally likely tokens: 0.9 is reached by nine of them, exactly; 0.3 by three.
    for top_p, kept in ((0.9, 9), (0.3, 3), (0.31, 4), (1.0, 10)):
        drawn = {draw([0.0] * 10, SamplingParams(top_p=top_p), seed=seed) for seed in range(300)}
        assert drawn == set(range(kept)), top_p


def test_top_p_is_of_what_top_k_and_min_p_left():
    # e**0 : e**-1 : e**-2 : e**-3. Of the first two, 0.73 is the first one's share: top_p 0.7 keeps it alone.
    logits = [0.0, -1.0, -2.0, -3.0]
    for extra in ({"top_k": 2}, {"min_p": 0.3}):
        drawn = {draw(logits, SamplingParams(top_p=0.7, **extra), seed=seed) for seed in range(200)}
        assert drawn == {0}
    assert {draw(logits, SamplingParams(top_p=0.7), seed=seed) for seed in range(200)} == {0, 1}


filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 4.0]),
        "top_k": st.sampled_from([0, -1, 2, 5, 64, 65, 1000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.6, 0.2]),
        "min_p": st.sampled_from([0.0, 0.05, 0.4]),
    }
)


@given(st.integers(0, 2**31), st.sampled_from([1, 3, 40, 130, 300]), filters)
@settings(max_examples=60)
def test_every_draw_is_what_the_reference_keeps_and_often_enough(seed, vocab_size, fields):
    # Logits a quarter apart: a filter's border never lies within a rounding of a token.
    steps = torch.randint(-16, 16, (vocab_size,), generator=torch.Generator().manual_seed(seed))
    logits = (steps.float() / 4 + 0.001).tolist()
    params = SamplingParams(**fields)
    expected = kept_by_reference(logits, params)
    num_draws = 256
    sampler = Sampler(num_draws, vocab_size, "cpu")
    for slot in range(num_draws):
        sampler.set(slot, params, seed + slot, [0])
    slots = list(range(num_draws))
    drawn = sample(sampler, torch.tensor([logits] * num_draws), slots, [1] * num_draws).tokens.tolist()
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        deviation = math.sqrt(num_draws * probability * (1 - probability)) + 1
        assert abs(drawn.count(token) - num_draws * probability) < 6 * deviation


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 6},
        {"top_k": 200},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.8},
    ],
    ids=str,
)
def test_20000_draws_are_distributed_as_they_should_be(fields):
    vocab_size, num_draws, num_slots = 300, 20_000, 100
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5)) * 2
    params = SamplingParams(**fields)
    expected = kept_by_reference(logits.tolist(), params)
    sampler = Sampler(num_slots, vocab_size, "cpu")
    for slot in range(num_slots):
        sampler.set(slot, params, slot, [0])
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    slots = list(range(num_slots))
    for position in range(num_draws // num_slots):
        drawn = sample(sampler, logits.expand(num_slots, -1), slots, [position] * num_slots)
        counts += torch.bincount(drawn.tokens, minlength=vocab_size)
    assert set(counts.nonzero().flatten().tolist()) <= set(expected)
    # Chi-square over the tokens with at least 5 expected draws, all others as one more class.
    common = [token for token in expected if expected[token] * num_draws >= 5]
    observed = [counts[token].item() for token in common]
    wanted = [expected[token] * num_draws for token in common]
    rest = num_draws - sum(wanted)
    if rest >= 5:
        observed.append(num_draws - sum(observed))
        wanted.append(rest)
    chi_square = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    freedom = len(wanted) - 1
    # Four standard deviations of the chi-square distribution: a fair sampler fails for one seed in many thousands.
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_token_is_the_same_alone_and_in_any_batch():
    vocab_size, num_slots = 1000, 24
    generator = torch.Generator().manual_seed(1)
    choices = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"top_k": 20, "top_p": 0.9},
        {"top_k": 64, "min_p": 0.01},
        {"top_k": 5, "temperature": 2.0},
        {"top_p": 0.8},
        {"top_k": 300},
        {"min_p": 0.02, "repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "top_k": 50},
        {"min_tokens": 6, "stop_token_ids": [4, 9], "temperature": 1.5},
        {"logprobs": 3, "temperature": 1.2},
        {"frequency_penalty": 0.5, "temperature": 0.0},
    ]
    params = [SamplingParams(**choices[slot % len(choices)]) for slot in range(num_slots)]
    prompts = [torch.randint(0, vocab_size, (slot + 1,), generator=generator).tolist() for slot in range(num_slots)]
    logits = torch.randn(num_slots, vocab_size, generator=generator).bfloat16()  # many equal values
    alone = []
    for slot in range(num_slots):
        sampler = Sampler(1, vocab_size, "cpu", eos_token_ids=[EOS])
        sampler.set(0, params[slot], slot, prompts[slot])
        alone.append(sample(sampler, logits[slot : slot + 1], [0], [len(prompts[slot])]).tokens.item())
    for seed in range(6):
        order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))[
            : num_slots - 2 * seed
        ].tolist()
        rows = [*order[:3], -1, *order[3:], -1, -1]
        sampler = Sampler(num_slots, vocab_size, "cpu", eos_token_ids=[EOS])
        for slot in order:
            sampler.set(slot, params[slot], slot, prompts[slot])
        batch = torch.full((len(rows), vocab_size), torch.nan, dtype=torch.bfloat16)  # padding rows hold anything
        for row, slot in enumerate(rows):
            if slot >= 0:
                batch[row] = logits[slot]
        before = batch.clone()
        positions = [len(prompts[slot]) if slot >= 0 else 0 for slot in rows]
        drawn = sample(sampler, batch, rows, positions).tokens.tolist()
        assert drawn == [alone[slot] if slot >= 0 else 0 for slot in rows]
        assert torch.equal(batch.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize(
    "fields", [{"temperature": 1.5}, {"temperature": 0.0}, {"top_k": 8, "temperature": 3.0}], ids=str
)
def test_a_preempted_request_draws_the_same_tokens_again(fields):
    vocab_size = 50
    params = SamplingParams(
        repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.4, min_tokens=9, stop_token_ids=[2], **fields
    )
    logits = torch.randn(12, vocab_size, generator=torch.Generator().manual_seed(3)) * 3
    prompt = [5, 6, 5]

    def run(sampler, slot, start, tokens):
        for position in range(start, 12):
            drawn = sample(sampler, logits[position : position + 1], [slot], [len(prompt) + position])
            tokens.append(drawn.tokens.item())
        return tokens

    undisturbed = Sampler(2, vocab_size, "cpu", eos_token_ids=[EOS])
    undisturbed.set(0, params, 11, prompt)
    expected = run(undisturbed, 0, 0, [])
    assert len(set(expected)) > 3
    for cut in (1, 5, 11):
        sampler = Sampler(2, vocab_size, "cpu", eos_token_ids=[EOS])
        sampler.set(0, SamplingParams(presence_penalty=2.0), 4, [1, 2])  # somebody else had the slot before
        sample(sampler, logits[:1], [0], [2])
        sampler.clear(0)
        sampler.set(0, params, 11, prompt, expected[:cut])
        assert run(sampler, 0, cut, expected[:cut]) == expected


# ---------------------------------------------------------------------------------------------- penalties, min_tokens


def test_penalties_by_hand():
    # Prompt: token 0. Output: token 1 twice, token 2 once. Repetition 2: 4 -> 2, 6 -> 3, -1 -> -2; then frequency and
    # presence: token 1 loses 2 * 0.5 + 1, token 2 loses 0.5 + 1. Left: 2, 1, -3.5, 1.5.
    fields = {"temperature": 0.0, "repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 1.0}
    logits = [4.0, 6.0, -1.0, 1.5]
    arguments = {"prompt": [0], "generated": [1, 2, 1], "position": 4}
    assert draw(logits, SamplingParams(temperature=0), **arguments) == 1
    assert draw(logits, SamplingParams(**fields), **arguments) == 0
    assert draw([2.9, *logits[1:]], SamplingParams(**fields), **arguments) == 3  # 1.45 < 1.5
    assert draw([3.1, *logits[1:]], SamplingParams(**fields), **arguments) == 0  # 1.55 > 1.5
    # Presence and frequency do not count the prompt, repetition does.
    assert draw([4.0, 3.9], SamplingParams(temperature=0, presence_penalty=2), prompt=[0]) == 0
    assert draw([4.0, 3.9], SamplingParams(temperature=0, frequency_penalty=2), prompt=[0]) == 0
    assert draw([4.0, 3.9], SamplingParams(temperature=0, repetition_penalty=1.1), prompt=[0]) == 1


penalties = st.fixed_dictionaries(
    {
        "presence_penalty": st.sampled_from([0.0, 1.5, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.75, -0.25]),
        "repetition_penalty": st.sampled_from([1.0, 1.25, 0.8]),
    }
)


@given(penalties, st.integers(0, 1000), st.lists(st.integers(0, 19), max_size=10))
@settings(max_examples=60)
def test_penalised_greedy_tokens_equal_the_reference(fields, seed, prompt):
    params = SamplingParams(temperature=0, **fields)
    logits = torch.randn(15, 20, generator=torch.Generator().manual_seed(seed))
    sampler = Sampler(3, 20, "cpu")
    sampler.set(2, params, seed, prompt)
    generated = []
    for row in logits:
        scores = row.clone()
        for token in range(20):
            if token in prompt or token in generated:
                factor = params.repetition_penalty
                scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
            scores[token] -= params.frequency_penalty * generated.count(token)
            scores[token] -= params.presence_penalty * (token in generated)
        drawn = sample(sampler, row[None], [2], [len(prompt) + len(generated)]).tokens.item()
        assert drawn == scores.argmax().item()
        generated.append(drawn)


def test_ends_are_held_back_until_min_tokens():
    logits = [0.0, 1.0, 5.0, 9.0]
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2])
    # Prompt of 4 tokens: positions 4 and 5 are the first two tokens.
    assert [draw(logits, params, position=position, eos=[EOS]) for position in (4, 5, 6)] == [1, 1, 3]
    # A longer list in another slot does not change a shorter one.
    sampler = Sampler(3, 8, "cpu", eos_token_ids=[EOS, 99])
    sampler.set(0, params, 0, [0])
    sampler.set(1, SamplingParams(temperature=0, min_tokens=5, stop_token_ids=[7, 6, 5, 4]), 0, [0])
    sampler.set(2, SamplingParams(temperature=0, min_tokens=5), 0, [0])
    rows = torch.arange(8.0).expand(3, -1)
    assert sample(sampler, rows, [0, 1, 2], [1, 1, 1]).tokens.tolist() == [7, 2, 7]
    assert sample(sampler, rows.flip(1), [2, 1, 0], [1, 1, 1]).tokens.tolist() == [0, 0, 0]
    rows = torch.tensor([[0.0, 1, 2, 9, 8, 7, 6, 5]]).expand(3, -1)
    assert sample(sampler, rows, [0, 1, 2], [1, 1, 1]).tokens.tolist() == [4, 2, 4]


# ------------------------------------------------------------------------------------------------ log probabilities


def test_logprobs_are_of_the_distribution_before_everything():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0, 2.5], [0.0] * 6, [5.0, 0, 0, 0, 0, 0], [1.0] * 6])
    sampler = Sampler(4, 6, "cpu")
    sampler.set(0, SamplingParams(temperature=0, logprobs=5, presence_penalty=2.0), 0, [0], [1])
    sampler.set(1, SamplingParams(temperature=0), 0, [0])
    sampler.set(3, SamplingParams(temperature=0, logprobs=0), 0, [0])
    drawn = sample(sampler, logits, [0, 1, -1, 3], [2, 1, 0, 1])
    assert drawn.tokens.tolist() == [5, 0, 0, 0]
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs[[0, 3]], torch.stack([expected[0, 5], expected[3, 0]]))
    assert drawn.logprobs[[1, 2]].isnan().all()
    assert drawn.top_ids[0].tolist() == [1, 5, 2, 0, 3]
    torch.testing.assert_close(drawn.top_logprobs[0], expected[0, [1, 5, 2, 0, 3]])
    assert drawn.top_ids[[1, 2]].eq(-1).all() and drawn.top_logprobs[[1, 2]].isnan().all()


def test_logprobs_come_only_where_somebody_asks():
    sampler = Sampler(2, 3, "cpu")
    sampler.set(0, SamplingParams(temperature=0), 0, [0])
    sampler.set(1, SamplingParams(temperature=0, logprobs=0), 0, [0])
    logits = torch.zeros(2, 3)
    drawn = sample(sampler, logits[:1], [0], [1])
    assert drawn.logprobs is drawn.top_ids is drawn.top_logprobs is None
    drawn = sample(sampler, logits, [0, 1], [1, 1])
    assert drawn.logprobs is not None and drawn.top_ids is drawn.top_logprobs is None
    sampler.set(0, SamplingParams(temperature=0, logprobs=5), 0, [0])
    assert sample(sampler, logits[:1], [0], [1]).top_ids.tolist() == [[0, 1, 2, -1, -1]]


@given(st.integers(0, 2**31), st.sampled_from([7, 300, 1024, 5000]), st.integers(1, 7), st.booleans())
@settings(max_examples=40)
def test_top_ids_equal_a_stable_sort(seed, num_tokens, k, coarse):
    values = torch.randn(3, num_tokens, generator=torch.Generator().manual_seed(seed))
    if coarse:  # many equal values, zeros of both signs, tokens that cannot be drawn
        values = values.round()
        values[:, ::3] = -torch.inf
    expected = values.sort(descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_ids(values, k), expected)
    assert torch.equal(
        top_ids(values.bfloat16(), k), values.bfloat16().sort(descending=True, stable=True).indices[:, :k]
    )


def test_top_ids_where_hardly_a_token_may_be_drawn():
    values = torch.full((1, 1000), -torch.inf)
    values[0, 999] = 1.0
    assert top_ids(values, 3).tolist() == [[999, 0, 1]]


# ------------------------------------------------------------------------------------------------------- large, broken


def test_every_unit_of_weight_is_drawn_once():
    # 4, 3, 2, 1: nine units in the first three, seven of which reach a top_p of 0.7.
    weights = torch.tensor([[4, 3, 0, 0, 2, 1]]).sort(descending=True).values.expand(9, -1).contiguous()
    everything, k = torch.ones(9, dtype=torch.float64), torch.full((9,), 3)
    units = (torch.arange(9) + 0.5).double() / 9
    assert draw_from_sorted(weights, units, everything, k).tolist() == [0] * 4 + [1] * 3 + [2] * 2
    units = (torch.arange(7) + 0.5).double() / 7
    assert draw_from_sorted(weights[:7], units, everything[:7] * 0.7, k[:7]).tolist() == [0] * 4 + [1] * 3
    # In the vocabulary's order over blocks of 128, with tokens in between that cannot be drawn.
    weights = torch.ones(300)
    weights[[0, 5, 127, 128, 299]] = torch.tensor([0.0, 3.0, 0.0, 0.0, 2.0])
    expected = [token for token, weight in enumerate(weights.tolist()) for _ in range(int(weight))]
    units = (torch.arange(len(expected)) + 0.5).double() / len(expected)
    assert draw_from_blocks(weights.expand(len(expected), -1).clone(), units, 1.0).tolist() == expected


def test_a_broken_weight_never_leads_beyond_the_vocabulary():
    weights = torch.zeros(1, 130)
    weights[0, 129] = torch.nan
    for unit in (0.0, 0.5, 0.999):
        drawn = draw_from_blocks(weights.clone(), torch.tensor([unit], dtype=torch.float64), 2.0**40)
        assert 0 <= drawn.item() < 130


def test_a_large_vocabulary_goes_in_chunks():
    vocab_size = 5000
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(0))
    results = []
    for limit in (2**24, 2 * vocab_size, 1):
        sampler = Sampler(9, vocab_size, "cpu", chunk_logits=limit)
        for slot in range(9):
            sampler.set(slot, SamplingParams(top_p=0.9, logprobs=2) if slot % 2 else SamplingParams(), slot, [0])
        drawn = sample(sampler, logits, list(range(9)), [1] * 9)
        results.append((drawn.tokens.tolist(), drawn.top_ids.tolist()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}, {"presence_penalty": 1.0}], ids=str
)
@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_broken_row_gets_a_valid_token_and_disturbs_no_other(fields, broken):
    sampler = Sampler(3, 700, "cpu")
    for slot in range(3):
        sampler.set(slot, SamplingParams(logprobs=5, **fields), slot, [0])
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    healthy = sample(sampler, logits, [0, 1, 2], [1, 1, 1]).tokens.tolist()
    for slot in range(3):
        sampler.set(slot, SamplingParams(logprobs=5, **fields), slot, [0])
    logits[1] = broken
    drawn = sample(sampler, logits, [0, 1, 2], [1, 1, 1]).tokens.tolist()
    assert (drawn[0], drawn[2]) == (healthy[0], healthy[2])
    assert 0 <= drawn[1] < 700


def test_tokens_that_cannot_be_drawn_never_are():
    logits = torch.full((1, 400), -torch.inf)
    logits[0, [17, 390]] = torch.tensor([1.0, 1.0])
    for fields in ({}, {"top_k": 9}, {"top_p": 0.99}, {"top_k": 100, "temperature": 100}):
        assert {draw(logits[0].tolist(), SamplingParams(**fields), seed=seed) for seed in range(40)} == {17, 390}


def test_a_warm_sampler_is_as_good_as_new():
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    drawn = []
    for warm in (False, True):
        sampler = Sampler(3, 300, "cpu", eos_token_ids=[EOS])
        if warm:
            sampler.warm_up(torch.bfloat16)
            assert sampler.counts is None
            with pytest.raises(ConfigurationError, match="slot 0 of row 0 has no request"):
                sample(sampler, logits[:1], [0], [1])
        for slot, fields in enumerate(({}, {"top_k": 5, "presence_penalty": 1.0}, {"top_p": 0.9})):
            sampler.set(slot, SamplingParams(**fields), slot, [1])
        drawn.append(sample(sampler, logits, [0, 1, 2], [1, 1, 1]))
    assert drawn[0].tokens.tolist() == drawn[1].tokens.tolist()
    assert drawn[1].logprobs is None


def test_bad_calls_are_refused_by_name():
    sampler = Sampler(2, 10, "cpu")
    sampler.set(0, SamplingParams(), 0, [1])
    logits = torch.zeros(1, 10)
    with pytest.raises(ConfigurationError, match=r"slot 1 of row 0 has no request"):
        sample(sampler, logits, [1], [1])
    with pytest.raises(ConfigurationError, match=r"expected logits \[1, 10\].*got \[1, 9\]"):
        sample(sampler, logits[:, :9], [0], [1])
    assert sample(sampler, logits, [0], [1]).tokens.shape == (1,)  # the slot still has its request
    sampler.clear(0)
    with pytest.raises(ConfigurationError, match="has no request"):
        sample(sampler, logits, [0], [1])
    assert sample(sampler, logits[:0], [], []).tokens.shape == (0,)


def test_a_prompt_may_have_tokens_that_are_never_drawn():
    """An embedding can have more entries than there are logits."""
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert draw([3.0, 2.0, 0.0], params, prompt=(0, 7, 3)) == 1


def test_nothing_is_read_back_and_no_shape_depends_on_data():
    """Tensors without values: whatever asks for one raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    choices = [
        {"temperature": 0.0, "min_tokens": 3},
        {"temperature": 0.8, "min_p": 0.1, "logprobs": 0},
        {"top_k": 20, "top_p": 0.9, "presence_penalty": 1.0},
        {"top_p": 0.8, "logprobs": 5},
        {"top_k": 300, "repetition_penalty": 1.2},
    ]
    num_slots, vocab_size = len(choices), 9000
    sampler = Sampler(num_slots, vocab_size, "cpu", eos_token_ids=[EOS])
    for slot, fields in enumerate(choices):
        sampler.set(slot, SamplingParams(**fields), slot, [1, 2], [3, 3])
    mode = FakeTensorMode()
    for name, value in vars(sampler).items():
        if isinstance(value, torch.Tensor):
            setattr(sampler, name, mode.from_tensor(value))
    with mode:
        for rows in ([4, 3, 2, 1, 0], [0, -1, 4, 2, 3, 1, -1]):
            inputs = [torch.tensor(rows), torch.tensor(rows)]
            drawn = sampler.sample(torch.empty(len(rows), vocab_size, dtype=torch.bfloat16), *inputs, rows)
            assert drawn.tokens.shape == (len(rows),)
            assert drawn.top_ids.shape == (len(rows), 5)
            with pytest.raises(DataDependentOutputException):
                drawn.tokens[0].item()
