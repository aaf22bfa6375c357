"""The expert of each slot of each rank: hot experts get several slots, so that the busiest rank has less to do."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_object

LOAD_FILE = "expert_load.json"  # name of the file, in a run's folder, that says how many rows came to each expert

EMPTY = -1  # in `Placement.physical_to_logical`: a slot without an expert

# A replica is memory, and weights to be read: none is added to balance the ranks better than this.
_BALANCED = 1.01


@dataclass(frozen=True)
class Placement:
    """The expert of each slot, per layer; equal on all ranks.

    Every rank has the same number of slots; rank r has those from `r * num_slots_per_rank` on, and no expert twice.

    Attributes:
        num_experts: number of experts in each layer.
        num_ranks: number of ranks that share them.
        physical_to_logical: the expert in each slot, `EMPTY` for none, `[layers][num_ranks * num_slots_per_rank]`.

    Raises:
        ConfigurationError: an expert that no rank holds, or a rank holds twice; names layer, expert and rank.

    Example:
        >>> Placement.even(num_layers=1, num_experts=8, num_ranks=3).physical_to_logical
        ((0, 1, 2, 3, 4, 5, 6, 7, -1),)
    """

    num_experts: int
    num_ranks: int
    physical_to_logical: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, slots in enumerate(self.physical_to_logical):
            if len(slots) != self.num_slots or len(slots) % self.num_ranks:
                raise ConfigurationError(f"layer {layer} has {len(slots)} slots, unlike layer 0 or the same on no rank")
            if missing := set(range(self.num_experts)) - set(slots):
                raise ConfigurationError(f"no rank holds expert {min(missing)} of layer {layer}")
            for rank in range(self.num_ranks):
                own = self.experts_of(layer, rank)
                if wrong := [e for e in own if own.count(e) > 1 or not 0 <= e < self.num_experts]:
                    raise ConfigurationError(
                        f"rank {rank} holds expert {wrong[0]} of layer {layer} {own.count(wrong[0])} times; experts "
                        f"must be in 0..{self.num_experts - 1}, each once per rank"
                    )

    @classmethod
    def even(
        cls, num_layers: int, num_experts: int, num_ranks: int, num_slots_per_rank: int | None = None
    ) -> Placement:
        """Return contiguous shares; the last ranks hold fewer experts if the ranks do not divide them."""
        share = -(-num_experts // num_ranks)
        held = [range(num_experts)[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
        return cls.of_ranks(num_experts, [held] * num_layers, check_slots(num_experts, num_ranks, num_slots_per_rank))

    @classmethod
    def of_ranks(cls, num_experts: int, held: Sequence[Sequence[Sequence[int]]], fewest: int) -> Placement:
        """Make a placement of each rank's experts, `[layers][ranks]`, padded with empty slots to at least `fewest`."""
        size = max(fewest, *(len(own) for ranks in held for own in ranks))
        slots = [tuple(slot for own in ranks for slot in (*own, *[EMPTY] * (size - len(own)))) for ranks in held]
        return cls(num_experts, len(held[0]), tuple(slots))

    @property
    def num_layers(self) -> int:
        """Number of layers with experts."""
        return len(self.physical_to_logical)

    @property
    def num_slots(self) -> int:
        """Slots of all ranks in each layer."""
        return len(self.physical_to_logical[0])

    @property
    def num_slots_per_rank(self) -> int:
        """Slots of one rank in each layer."""
        return self.num_slots // self.num_ranks

    @property
    def is_identity(self) -> bool:
        """Whether each slot has the number of its expert, so that no look-up is needed."""
        numbers, spare = tuple(range(self.num_experts)), (EMPTY,) * (self.num_slots - self.num_experts)
        return all(slots == numbers + spare for slots in self.physical_to_logical)

    @property
    def checksum(self) -> int:
        """A checksum of the whole placement, for comparison between ranks."""
        return zlib.crc32(repr((self.num_experts, self.num_ranks, self.physical_to_logical)).encode())

    def slots_of(self, layer: int, rank: int) -> tuple[int, ...]:
        """Return the expert of each slot of a rank, `EMPTY` for none, `[num_slots_per_rank]`."""
        start = rank * self.num_slots_per_rank
        return self.physical_to_logical[layer][start : start + self.num_slots_per_rank]

    def experts_of(self, layer: int, rank: int) -> tuple[int, ...]:
        """Return the experts that a rank holds, in the order of its slots."""
        return tuple(expert for expert in self.slots_of(layer, rank) if expert != EMPTY)

    def replicas(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Return the slots of each expert, ascending, `[num_experts][>= 1]`."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.physical_to_logical[layer]):
            if expert != EMPTY:
                found[expert].append(slot)
        return tuple(map(tuple, found))

    def rank_loads(self, layer: int, load: Sequence[float]) -> list[float]:
        """Return each rank's load, given every expert's, `[num_experts]`; replicas share an expert's load evenly."""
        copies = [len(slots) for slots in self.replicas(layer)]
        return [
            sum(load[expert] / copies[expert] for expert in self.experts_of(layer, rank))
            for rank in range(self.num_ranks)
        ]

    def busiest_over_mean(self, load: Sequence[Sequence[float]]) -> float:
        """Return `busiest_over_mean` of the ranks' loads, given the experts' loads, `[layers][num_experts]`."""
        return busiest_over_mean([self.rank_loads(layer, one) for layer, one in enumerate(load)])


def busiest_over_mean(loads: Sequence[Sequence[float]]) -> float:
    """Return the busiest rank's load over the mean, from `[layers][ranks]`: each layer waits for its busiest one."""
    total = sum(map(sum, loads))
    return len(loads[0]) * sum(map(max, loads)) / total if total else 1.0


def place(load: Sequence[Sequence[float]], num_ranks: int, num_slots_per_rank: int) -> Placement:
    """Place experts so that the busiest rank of each layer has little to do; hot experts get the spare slots.

    Longest processing time first (Graham, 1969) under a limit of slots, for every number of replicas until the ranks
    are balanced, then swaps between the busiest rank and another as long as they help. The busiest rank has at most 4/3
    of the minimum (found by trying all placements of small cases; no proof), and never more than with equal shares.
    Deterministic: equal arguments give equal placements on all ranks.

    Args:
        load: load of each expert, such as its number of rows, `[layers][num_experts]`, >= 0; any unit.
        num_ranks: ranks that share the experts, >= 1; need not divide their number.
        num_slots_per_rank: slots of a rank in each layer. Slots beyond the number of experts are spare; they stay
            empty if no replica helps.

    Raises:
        ConfigurationError: fewer slots than experts, no layer, layers with different numbers of experts, or a load
            that is not a number >= 0.

    Example:
        >>> place([[90, 10, 20, 30]], num_ranks=2, num_slots_per_rank=3).physical_to_logical
        ((0, 3, -1, 0, 1, 2),)
    """
    if not load or any(len(one) != len(load[0]) for one in load):
        raise ConfigurationError(f"load must have layers of equally many experts, got {[len(one) for one in load]}")
    if wrong := [value for one in load for value in one if not 0 <= value < float("inf")]:
        raise ConfigurationError(f"load must be >= 0, got {wrong[0]}")
    even = Placement.even(len(load), len(load[0]), num_ranks, num_slots_per_rank)
    held: list[list[Sequence[int]]] = []
    for layer, one in enumerate(load):
        ranks = _place_layer(one, num_ranks, num_slots_per_rank)
        if _busiest(ranks) < max(even.rank_loads(layer, one)):
            held.append([sorted(own) for own in ranks])
        else:
            held.append([even.experts_of(layer, rank) for rank in range(num_ranks)])
    return Placement.of_ranks(len(load[0]), held, num_slots_per_rank)


def check_slots(num_experts: int, num_ranks: int, num_slots_per_rank: int | None = None) -> int:
    """Return the slots per rank, by default as few as hold all experts; `ConfigurationError` if they are too few."""
    fewest = -(-num_experts // num_ranks)
    if num_slots_per_rank is None:
        return fewest
    if num_slots_per_rank < fewest:
        raise ConfigurationError(
            f"{num_experts} experts need {fewest} slots on each of {num_ranks} ranks, got {num_slots_per_rank}"
        )
    return num_slots_per_rank


_Rank = dict[int, float]  # the experts of a rank, each with the load that comes to its replica there


def _place_layer(load: Sequence[float], num_ranks: int, num_slots_per_rank: int) -> list[_Rank]:
    """Return each rank's experts, with the first number of replicas that balances the ranks, or else the best one."""
    copies = [1] * len(load)
    best = _packed(load, copies, num_ranks, num_slots_per_rank)
    for _ in range(num_ranks * num_slots_per_rank - len(load)):
        if _busiest(best) <= _BALANCED * sum(load) / num_ranks:
            break
        may_have_more = [expert for expert in range(len(load)) if copies[expert] < num_ranks]
        if not may_have_more:
            break
        copies[max(may_have_more, key=lambda expert: load[expert] / copies[expert])] += 1
        packed = _packed(load, copies, num_ranks, num_slots_per_rank)
        if _busiest(packed) < _busiest(best):
            best = packed
    return best


def _packed(load: Sequence[float], copies: Sequence[int], num_ranks: int, num_slots_per_rank: int) -> list[_Rank]:
    """Give each replica, heaviest first, to the rank with least load that has a slot and not this expert."""
    ranks: list[_Rank] = [{} for _ in range(num_ranks)]
    heaviest_first = sorted(range(len(load)), key=lambda expert: (-load[expert] / copies[expert], expert))
    for expert in heaviest_first:
        for _ in range(copies[expert]):
            with_room = [own for own in ranks if len(own) < num_slots_per_rank]
            free = [own for own in with_room if expert not in own]
            if not free:
                # A full rank without this expert has one that the rank with room lacks: it holds more of them.
                free = [own for own in ranks if expert not in own][:1]
                moved = min((other for other in free[0] if other not in with_room[0]), key=lambda other: free[0][other])
                with_room[0][moved] = free[0].pop(moved)
            min(free, key=_load_of)[expert] = load[expert] / copies[expert]
    while _improved(ranks, num_slots_per_rank):
        pass
    return ranks


def _improved(ranks: list[_Rank], num_slots_per_rank: int) -> bool:
    """Move or swap an expert of the busiest rank with another rank, if the busier of the two then has less load."""
    busiest = max(ranks, key=_load_of)
    most = _load_of(busiest)
    least, best = most, None
    for other in ranks:
        if other is busiest:
            continue
        there = _load_of(other)
        swaps: list[int | None] = [expert for expert in other if expert not in busiest]
        if len(other) < num_slots_per_rank:
            swaps.append(None)
        for mine in busiest.keys() - other.keys():
            for theirs in swaps:
                gained = busiest[mine] - (other[theirs] if theirs is not None else 0)
                busier = max(most - gained, there + gained)
                if busier < least * (1 - 1e-9):
                    least, best = busier, (other, mine, theirs)
    if best is None:
        return False
    other, mine, theirs = best
    other[mine] = busiest.pop(mine)
    if theirs is not None:
        busiest[theirs] = other.pop(theirs)
    return True


def _load_of(rank: _Rank) -> float:
    return sum(rank.values())


def _busiest(ranks: list[_Rank]) -> float:
    return max(map(_load_of, ranks))


@dataclass(frozen=True)
class ExpertLoad:
    """Number of (row, expert) pairs per expert, `[layers][num_experts]`, and per rank, `[layers][ranks]`."""

    model: str
    pairs: tuple[tuple[int, ...], ...]
    rank_pairs: tuple[tuple[int, ...], ...]

    @classmethod
    def of_slots(cls, model: str, placement: Placement, counts: Sequence[Sequence[Sequence[int]]]) -> ExpertLoad:
        """Add up what each rank has counted for its own slots, `[ranks][layers][num_slots_per_rank]`."""
        pairs = [[0] * placement.num_experts for _ in placement.physical_to_logical]
        for rank, layers in enumerate(counts):
            for layer, slots in enumerate(layers):
                for expert, count in zip(placement.slots_of(layer, rank), slots, strict=True):
                    if expert != EMPTY:
                        pairs[layer][expert] += count
        ranks = zip(*([sum(slots) for slots in layers] for layers in counts), strict=True)
        return cls(model, tuple(map(tuple, pairs)), tuple(ranks))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ExpertLoad:
        """Read a load file, or the one in a run's folder; raise `ConfigurationError` if it is not one."""
        file = Path(path, LOAD_FILE) if Path(path).is_dir() else Path(path)
        try:
            text = file.read_bytes()
        except OSError as error:
            raise ConfigurationError(
                f"no expert load at {file}: {error.strerror}; record one with --expert-load"
            ) from None
        found = json_object(file, text)
        try:
            load = cls(str(found["model"]), *(tuple(map(tuple, found[name])) for name in ("pairs", "rank_pairs")))
            numbers = [count for layer in (*load.pairs, *load.rank_pairs) for count in layer]
            whole = {len(set(map(len, layers))) for layers in (load.pairs, load.rank_pairs)} == {1}
            whole = whole and len(load.pairs) == len(load.rank_pairs) and bool(load.pairs[0])
            if not (whole and all(type(count) is int and 0 <= count < 2**63 for count in numbers)):
                raise ValueError("pairs and rank_pairs must be lists, one per layer, of as many numbers in 0..2**63-1")
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{file} is no expert load: {error!r:.200}") from None
        return load

    def write(self, path: Path) -> None:
        """Write the file that `read` reads."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def place(self, model: str, num_ranks: int, num_redundant_experts: int = 0) -> Placement:
        """Place the experts of a model of this type by the load; the ranks get equally many spare slots, rounded up."""
        if model != self.model:
            raise ConfigurationError(f"the expert load is of a model of type {self.model!r}, and this one is {model!r}")
        num_slots = len(self.pairs[0]) + num_redundant_experts
        return place(self.pairs, num_ranks, -(-num_slots // num_ranks))
