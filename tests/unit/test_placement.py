import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep import ConfigurationError
from lockstep.moe.placement import EMPTY, Placement, place

loads_of_experts = st.lists(st.integers(0, 1000) | st.floats(0, 1e6), min_size=1, max_size=24)


@st.composite
def cases(draw):
    """Layers of equally many experts, ranks, and slots that are enough for them."""
    one = draw(loads_of_experts)
    load = [one, *draw(st.lists(st.permutations(one), max_size=2))]
    num_ranks = draw(st.integers(1, 7))
    return load, num_ranks, -(-len(one) // num_ranks) + draw(st.integers(0, 4))


def test_hot_experts_get_the_spare_slots():
    placement = place([[90, 10, 20, 30]], num_ranks=2, num_slots_per_rank=3)
    assert placement.physical_to_logical == ((0, 3, EMPTY, 0, 1, 2),)
    assert placement.rank_loads(0, [90, 10, 20, 30]) == [75, 75]
    assert placement.replicas(0) == ((0, 3), (4,), (5,), (1,))
    assert placement.experts_of(0, 0) == (0, 3)
    assert placement.busiest_over_mean([[90, 10, 20, 30]]) == 1.0


def test_where_ranks_do_not_divide_the_experts_the_last_have_empty_slots():
    assert Placement.even(1, 8, 3).physical_to_logical == ((0, 1, 2, 3, 4, 5, 6, 7, EMPTY),)
    of_128 = Placement.even(48, 128, 5)
    assert [len(of_128.experts_of(47, rank)) for rank in range(5)] == [26, 26, 26, 26, 24]
    assert Placement.even(2, 8, 4).is_identity and of_128.is_identity
    assert not Placement.even(1, 8, 4, num_slots_per_rank=3).is_identity


def test_equal_loads_are_the_even_split():
    assert place([[5] * 8] * 2, 4, 2) == Placement.even(2, 8, 4)
    assert place([[0] * 8], 3, 4) == Placement.even(1, 8, 3, 4)


@given(cases())
def test_every_expert_stands_somewhere_and_on_no_rank_twice(case):
    load, num_ranks, num_slots_per_rank = case
    placement = place(load, num_ranks, num_slots_per_rank)
    assert placement.num_slots_per_rank == num_slots_per_rank
    for layer, one in enumerate(load):
        held = [placement.experts_of(layer, rank) for rank in range(num_ranks)]
        assert set().union(*held) == set(range(len(one)))
        assert all(len(own) == len(set(own)) <= num_slots_per_rank for own in held)
        replicas = placement.replicas(layer)
        assert sorted(slot for slots in replicas for slot in slots) == [
            slot for slot, expert in enumerate(placement.physical_to_logical[layer]) if expert != EMPTY
        ]


@given(cases())
def test_never_worse_than_the_even_split(case):
    load, num_ranks, num_slots_per_rank = case
    placement = place(load, num_ranks, num_slots_per_rank)
    even = Placement.even(len(load), len(load[0]), num_ranks, num_slots_per_rank)
    for layer, one in enumerate(load):
        assert max(placement.rank_loads(layer, one)) <= max(even.rank_loads(layer, one)) * (1 + 1e-12)
    assert placement.busiest_over_mean(load) <= even.busiest_over_mean(load) * (1 + 1e-12)


@given(cases())
def test_equal_loads_give_equal_placements(case):
    load, *sizes = case
    first, second = place(load, *sizes), place([list(one) for one in load], *sizes)
    assert first == second and first.checksum == second.checksum


def least_possible(load, num_ranks, num_slots_per_rank):
    """The busiest rank's load in the best of all placements."""
    experts = range(len(load))
    held = [own for size in range(num_slots_per_rank + 1) for own in itertools.combinations(experts, size)]
    best = float("inf")
    for ranks in itertools.combinations_with_replacement(held, num_ranks):
        copies = [sum(expert in own for own in ranks) for expert in experts]
        if all(copies):
            best = min(best, max(sum(load[expert] / copies[expert] for expert in own) for own in ranks))
    return best


@pytest.mark.parametrize(("num_experts", "num_ranks", "slots"), [(4, 2, 3), (5, 2, 4), (3, 3, 2), (4, 3, 2), (4, 3, 3)])
def test_within_four_thirds_of_the_best_of_all_placements(num_experts, num_ranks, slots):
    for load in itertools.combinations_with_replacement((0, 1, 2, 3, 5, 8, 9), num_experts):
        if any(load) and sum(load) % 2 == 0:
            busiest = max(place([load], num_ranks, slots).rank_loads(0, load))
            assert busiest <= 4 / 3 * least_possible(load, num_ranks, slots) * (1 + 1e-12), load


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1] * 8], 3, 2), r"8 experts need 3 slots on each of 3 ranks, got 2"),
        (([], 2, 4), r"load must have layers of equally many experts, got \[\]"),
        (([[1, 2], [1]], 2, 4), r"got \[2, 1\]"),
        (([[1, -2]], 2, 4), r"load must be >= 0, got -2"),
        (([[1, float("nan")]], 2, 4), r"load must be >= 0, got nan"),
    ],
)
def test_loads_and_slots_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        place(*arguments)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((0, 1, 0, 1), r"no rank holds expert 2 of layer 1"),
        ((0, 2, 2, 1, 1), r"layer 1 has 5 slots"),
        ((0, 1, 2, 2), r"rank 1 holds expert 2 of layer 1.*2 times"),
        ((0, 1, 2, 3), r"rank 1 holds expert 3 of layer 1"),
    ],
)
def test_placements_that_are_none_are_refused_by_layer_and_rank(slots, message):
    good = Placement(3, 2, ((0, 1, 2, EMPTY),))
    with pytest.raises(ConfigurationError, match=message):
        replace(good, physical_to_logical=(good.physical_to_logical[0], slots))
