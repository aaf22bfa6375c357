"""The MoE layers of a model on this rank: they begin steps, and check how a step ended on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from lockstep.coordination.coordinator import Coordinator
from lockstep.coordination.peers import Peers
from lockstep.coordination.waits import DEADLINE_S, wait_until
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.sizes import sp_rows
from lockstep.moe.layer import MoELayer
from lockstep.moe.step import Step

# Extra wait beyond the deadline, so that a kernel that timed out can report the missing rank.
_KERNELS_S = 0.5


class MoELayers:
    """The MoE layers of a model on this rank, in forward order, and what their steps share.

    Args:
        layers: at least one; all on one device.
        max_chunk_size_per_rank: maximum rows per rank and chunk; None for no limit.
        coordinator: is told where this rank is, and when a step breaks the ranks' groups. Omit it in engines that
            agree by other means.
        deadline_s: longest wait for the end of a step on the device, in seconds.
        abort: called after a step that broke the ranks' groups; ends collectives that wait on the device.
        shares_attention: the model's own layers have collectives, so that other ranks cannot continue without this one.
    """

    def __init__(
        self,
        layers: Sequence[MoELayer],
        *,
        max_chunk_size_per_rank: int | None = None,
        coordinator: Coordinator | None = None,
        deadline_s: float = DEADLINE_S,
        abort: Callable[[], None] | None = None,
        shares_attention: bool = False,
    ) -> None:
        self.layers, self.config, self.device = tuple(layers), layers[0].config, layers[0].shape.device
        self.dispatchers = tuple(dict.fromkeys(layer.dispatcher for layer in layers))
        self.max_chunk_size_per_rank = max_chunk_size_per_rank
        self.deadline_s = deadline_s
        self.silent_peers = Peers(self.config.rank, self.config.world_size)
        self.peers = self.silent_peers if coordinator is None else coordinator.peers
        self._coordinator = coordinator
        self._abort = abort
        self.shares_attention = shares_attention
        self._last_event: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[MoELayer]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> MoELayer:
        return self.layers[index]

    def begin(
        self, num_tokens_across_dp: Sequence[int], *, num_rows: torch.Tensor | None = None, capacity: int | None = None
    ) -> Step:
        """Begin a step with agreed counts.

        Args:
            num_tokens_across_dp: rows of every data-parallel rank, `[data_parallel_size]`, agreed.
            num_rows: this rank's count in device memory, `[1]`, int32, for a model that runs in larger buffers; rows
                beyond the count go to no expert. None if the model has exactly the agreed rows.
            capacity: rows of those buffers; required with `num_rows`. Entering the step raises `ConfigurationError` if
                they are too few, if ranks share their rows, or if the step has several chunks.
        """
        if self._last_event is not None:
            self._last_event.wait()  # steps run one after another, whichever stream each is on
        config = self.config
        rows = sp_rows(num_tokens_across_dp, config.tensor_parallel_size)
        routes = [self.dispatchers[0].route(rows, self.max_chunk_size_per_rank)]
        routes += [dispatcher.route(rows, routes[0].chunk_size) for dispatcher in self.dispatchers[1:]]
        plan = ChunkPlan(num_tokens_across_dp, config.tensor_parallel_size, routes[0].chunk_size, config.rank)
        return Step(self, routes, plan, num_rows, capacity)

    def begin_capture(
        self, sizes: Sequence[int], *, num_rows: torch.Tensor | None = None, capacity: int | None = None
    ) -> Step:
        """Begin a step that a CUDA graph captures, valid for any counts of the other ranks.

        Replay it inside an agreed step whose `captures` is true. Each replay reads this rank's count from `num_rows`;
        without it, there are `capacity` rows. `sizes`, roughly the expected ones, choose kernels, not results.
        """
        if self.config.tensor_parallel_size > 1:
            raise ConfigurationError("steps of ranks that share their rows cannot be CUDA graphs")
        limit = self.max_chunk_size_per_rank
        routes = [dispatcher.route(sizes, limit, capture=True) for dispatcher in self.dispatchers]
        return Step(self, routes, None, num_rows, sizes[self.config.rank] if capacity is None else capacity)

    @property
    def can_capture(self) -> bool:
        """Whether steps can be CUDA graphs, see `begin_capture`."""
        on_device = all(dispatcher.abilities.counts_on_device for dispatcher in self.dispatchers)
        return self.device.type == "cuda" and on_device and self.config.tensor_parallel_size == 1

    def typical_sizes(self, many: bool) -> list[int]:
        """Return `sizes` for `begin_capture`, for steps with few or with many rows per expert."""
        nobody = [0] * self.config.world_size
        most = self.dispatchers[0].route(nobody, self.max_chunk_size_per_rank, capture=True).chunk_size
        return [most] * self.config.world_size if many else nobody

    def end_step(self) -> torch.cuda.Event | None:
        """Record an event at the end of the step issued last."""
        if self.device.type == "cuda":
            self._last_event = torch.cuda.current_stream().record_event()
        return self._last_event

    def wait(self, event: torch.cuda.Event, number: int) -> None:
        """Wait until the deadline for an event at or after a step's end; raise if a rank did not take part."""
        try:
            wait_until(event.query, self.deadline_s + _KERNELS_S, self.peers.check)
            for dispatcher in self.dispatchers:
                dispatcher.check()
        except (LockstepError, RuntimeError, TimeoutError) as error:
            failure: Exception = error
            if isinstance(error, TimeoutError) and not isinstance(error, LockstepError):
                failure = self.peers.absent(f"step {number} did not end on the GPU: {error}")
            self.give_up(failure)
            raise failure from None

    def give_up(self, failure: BaseException) -> None:
        """Stop using the ranks' groups, report why to the other ranks, and end collectives that wait on the device."""
        if self._coordinator is not None:
            self._coordinator.give_up(failure)
        self.end_waits()

    def end_waits(self) -> None:
        """End waits on the device for ranks that are gone; their results are invalid. Not collective."""
        for dispatcher in self.dispatchers:
            dispatcher.end_waits()
        if self._abort is not None:
            self._abort()
