import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep import ConfigurationError
from lockstep.dispatch.base import NO_EXPERT
from lockstep.models.checkpoint import StoredTensor, check_room
from lockstep.moe.layer import SlotTable
from lockstep.moe.placement import EMPTY, ExpertLoad, Placement, busiest_over_mean, place

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


CPU = torch.device("cpu")


@given(cases(), st.booleans(), st.integers(0, 10_000))
def test_every_choice_becomes_a_slot_that_holds_its_expert(case, few_rows, first_row):
    load, num_ranks, num_slots_per_rank = case
    placement = place(load, num_ranks, num_slots_per_rank)
    ids = torch.arange(-1, placement.num_experts, dtype=torch.int32).repeat(5, 1)
    for layer, held in enumerate(placement.physical_to_logical):
        for rank in range(num_ranks):
            slots = SlotTable(placement, layer, rank, CPU).slots(ids, first_row, few_rows)
            assert (slots[:, 0] == NO_EXPERT).all()
            assert torch.equal(torch.tensor(held)[slots[:, 1:]], ids[:, 1:].long())


def test_few_rows_stay_on_their_rank_and_many_are_spread_by_number():
    placement = Placement(3, 2, ((0, 1, EMPTY, 2, 0, EMPTY),))  # expert 0 on both ranks
    ids = torch.tensor([[0, 1], [2, 0], [0, NO_EXPERT]])
    own = [SlotTable(placement, 0, rank, CPU).slots(ids, 7, few_rows=True).tolist() for rank in range(2)]
    assert own == [[[0, 1], [3, 0], [0, -1]], [[4, 1], [3, 4], [4, -1]]]
    spread = SlotTable(placement, 0, 0, CPU).slots(ids, 7, few_rows=False)  # rows 7, 8, 9
    assert spread.tolist() == [[4, 1], [3, 0], [4, -1]]


def zipf_ids(num_tokens, num_experts, top_k, layer, seed):
    """Choices of a router whose k-th most popular expert is chosen 1/k as often as the first one."""
    popularity = 1 / torch.arange(1, num_experts + 1, dtype=torch.float64)
    popularity = popularity[torch.randperm(num_experts, generator=torch.Generator().manual_seed(layer))]
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(popularity.expand(num_tokens, -1), top_k, generator=generator)


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (8, 2)])
def test_zipf_routing_over_100_000_tokens_is_within_a_tenth_of_the_mean(num_experts, top_k):
    """4 ranks, 8 spare slots in all: placed by the load of other tokens than those that are counted."""
    num_layers, num_ranks, num_tokens = 3, 4, 100_000
    recorded = [
        zipf_ids(20_000, num_experts, top_k, layer, seed=1).flatten().bincount(minlength=num_experts).tolist()
        for layer in range(num_layers)
    ]
    placed = ExpertLoad("any", tuple(map(tuple, recorded)), ()).place("any", num_ranks, num_redundant_experts=8)
    assert placed.num_slots == num_experts + 8
    figures = {}
    for name, placement in (("even", Placement.even(num_layers, num_experts, num_ranks)), ("placed", placed)):
        per_rank = []
        for layer in range(num_layers):
            ids = zipf_ids(num_tokens, num_experts, top_k, layer, seed=2)
            table = SlotTable(placement, layer, 0, CPU)
            slots = torch.cat([table.slots(step, 5000 * i, False) for i, step in enumerate(ids.split(5000))])
            counts = slots.flatten().bincount(minlength=placement.num_slots).view(num_ranks, -1).sum(dim=1)
            assert int(counts.sum()) == num_tokens * top_k
            per_rank.append(counts.tolist())
        figures[name] = busiest_over_mean(per_rank)
    print(f"{num_experts} experts, busiest over mean: {figures}")
    assert figures["even"] > 1.2
    assert figures["placed"] <= 1.1


LOAD = ExpertLoad("qwen3_moe", ((1, 2, 30, 4), (5, 6, 7, 8)), ((3, 34), (11, 15)))


def test_a_load_is_read_as_it_was_written_from_its_file_or_its_folder(tmp_path):
    LOAD.write(tmp_path / "expert_load.json")
    assert ExpertLoad.read(tmp_path) == ExpertLoad.read(tmp_path / "expert_load.json") == LOAD
    assert LOAD.place("qwen3_moe", 2, 1).num_slots == 6
    counts = [[[1, 2], [5, 6]], [[30, 4], [7, 8]]]
    assert ExpertLoad.of_slots("qwen3_moe", Placement.even(2, 4, 2), counts) == LOAD


def test_a_load_of_another_model_is_refused_by_both_names():
    with pytest.raises(ConfigurationError, match=r"of a model of type 'qwen3_moe', and this one is 'mixtral'"):
        LOAD.place("mixtral", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no expert load at .*: No such file or directory; record one with --expert-load"),
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ({"model": "m", "pairs": [[1]]}, "is no expert load: .*rank_pairs"),
        ({"model": "m", "pairs": 3, "rank_pairs": [[1]]}, "is no expert load"),
        ({"model": "m", "pairs": [[1, 2], [1]], "rank_pairs": [[3], [1]]}, "is no expert load: .*as many numbers"),
        ({"model": "m", "pairs": [[1, -2]], "rank_pairs": [[1]]}, "is no expert load: .*numbers in 0"),
        ({"model": "m", "pairs": [["1"]], "rank_pairs": [[1]]}, "is no expert load"),
        ({"model": "m", "pairs": [[10**400]], "rank_pairs": [[1]]}, "is no expert load: .*in 0..2"),
        ({"model": "m", "pairs": [[1, 2], [3, 4]], "rank_pairs": [[1]]}, "is no expert load: .*one per layer"),
        ({"model": "m", "pairs": [[]], "rank_pairs": [[]]}, "is no expert load"),
        ({"model": "m", "pairs": [], "rank_pairs": []}, "is no expert load"),
    ],
)
def test_files_that_are_no_load(tmp_path, content, message):
    file = tmp_path / "load.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigurationError, match=message):
        ExpertLoad.read(file)


def test_more_slots_than_memory_are_refused_before_anything_is_read():
    tensors = {f"model.layers.0.mlp.experts.{e}.w": StoredTensor(Path("f"), "F32", (1,), 0, 2**42) for e in range(8)}
    check_room({"model.norm.weight": StoredTensor(Path("f"), "F32", (1,), 0, 2**50)}, Placement.even(1, 8, 2), CPU)
    with pytest.raises(
        ConfigurationError, match=r"5 slots for experts in each layer take 20480\.0 GiB of each rank, and"
    ):
        check_room(tensors, Placement.even(1, 8, 2, num_slots_per_rank=5), CPU)
