"""What ranks hold once others are lost: laws of `moe.survivors`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import ConfigurationError
from lockstep.moe.placement import EMPTY, Placement, place
from lockstep.moe.survivors import placement_of_epoch, to_read, widened, without_lost


@st.composite
def placements(draw):
    """Even ones, and ones with replicas where a recorded load had hot experts."""
    num_experts, num_ranks, num_layers = draw(st.integers(1, 9)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        return Placement.even(num_layers, num_experts, num_ranks)
    layer = st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts)
    load = draw(st.lists(layer, min_size=num_layers, max_size=num_layers))
    return place(load, num_ranks, -(-num_experts // num_ranks) + draw(st.integers(0, 2)))


@given(placements(), st.data())
def test_survivors_keep_what_they_have_and_share_what_is_left_over(placement, data):
    left = data.draw(st.permutations(range(placement.num_ranks)).map(lambda order: order[: len(order) // 2 + 1]))
    after = without_lost(placement, left)  # which checks that every expert is somewhere, and on no rank twice
    assert after.num_ranks == len(left)
    for layer in range(placement.num_layers):
        for place_now, before in enumerate(left):
            own = placement.experts_of(layer, before)
            assert after.experts_of(layer, place_now)[: len(own)] == own
        there = {expert for before in left for expert in placement.experts_of(layer, before)}
        added = sum(len(after.experts_of(layer, rank)) for rank in range(len(left))) - sum(
            len(placement.experts_of(layer, before)) for before in left
        )
        assert added == placement.num_experts - len(there)  # read once


@given(placements(), st.data())
def test_slots_for_lost_ranks_are_enough_for_an_even_split(placement, data):
    num_lost = data.draw(st.integers(0, placement.num_ranks - 1))
    wide = widened(placement, num_lost)
    assert [wide.experts_of(0, rank) for rank in range(wide.num_ranks)] == [
        placement.experts_of(0, rank) for rank in range(placement.num_ranks)
    ]
    assert wide.num_slots_per_rank * (wide.num_ranks - num_lost) >= placement.num_experts


def test_slots_that_were_kept_are_used_before_any_is_added():
    even = Placement.even(num_layers=1, num_experts=12, num_ranks=4)
    assert even.num_slots_per_rank == 3
    assert without_lost(even, [0, 1, 3]).num_slots_per_rank == 4
    wide = widened(even, 2)
    assert (wide.num_slots_per_rank, without_lost(wide, [0, 1, 3]).num_slots_per_rank) == (6, 6)
    assert without_lost(without_lost(wide, [0, 1, 3]), [1, 2]).num_slots_per_rank == 6


@given(placements(), st.data())
def test_ranks_that_are_back_have_their_first_experts_again(first, data):
    """Whatever is lost and comes back: the last epoch depends on what follows the last return, and nothing else."""
    everyone = tuple(range(first.num_ranks))
    subsets = st.permutations(everyone).flatmap(lambda order: st.integers(1, len(order)).map(lambda n: order[:n]))
    epochs = [tuple(members) for members in data.draw(st.lists(subsets, max_size=5))]
    placement = placement_of_epoch(first, epochs)
    assert placement.num_ranks == len(epochs[-1] if epochs else everyone)
    assert placement_of_epoch(first, [*epochs, (0,), everyone]) == first
    for layer in range(first.num_layers):
        for place_now, rank in enumerate(epochs[-1] if epochs else everyone):
            own = first.experts_of(layer, rank)
            assert placement.experts_of(layer, place_now)[: len(own)] == own


@given(st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=3))
def test_what_is_to_be_read_is_on_the_first_rank(layers):
    read = to_read(layers, num_experts=7)
    for layer, wanted in enumerate(layers):
        assert [slot for slot in read.slots_of(layer, 0) if slot != EMPTY] == sorted(wanted)


@pytest.mark.parametrize("num_lost", [-1, 3])
def test_somebody_must_be_left(num_lost):
    with pytest.raises(ConfigurationError, match=rf"survive must be in 0\.\.2.* got {num_lost}"):
        widened(Placement.even(1, 6, 3), num_lost)
