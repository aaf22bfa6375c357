"""Dispatch and combine over the peer-mapped memory of one host's GPUs: one launch each, no wait on the host."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import triton

from lockstep.coordination.waits import await_work, peers_of, within
from lockstep.dispatch.base import Abilities, DispatchHandle, Route, check_experts
from lockstep.dispatch.collectives import check_sizes
from lockstep.dispatch.kernels_combine import combine_kernel
from lockstep.dispatch.kernels_dispatch import dispatch_kernel
from lockstep.dispatch.kernels_wire import ALL_TOKENS, FLAG_LATE, TOO_MANY_TOKENS
from lockstep.dispatch.mapped_layout import FP8_GROUP, LaunchSizes, launch_sizes, make_layout
from lockstep.errors import ConfigurationError, LockstepError, RankAbsentError, TokenCountError

MAX_RANKS = 8
_FIRST_CELLS = (1, 1, 0)  # epochs of the next dispatch and combine, blocks at the barrier
_WAITS_ENDED = 3  # a code like those of the kernels, but written by the host
_FAR_AHEAD = 2**62  # word of a lost rank: flags raised and no tokens in every epoch
_THREADS = 256
_REGISTERS = 128  # two blocks of 256 threads on one multiprocessor


class MappedMemory:
    """Maps the memory of a process group's GPUs by torch's symmetric memory. Tests replace it."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._group = process_group
        self._kept: Any = None

    def map(self, nbytes: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
        """Return `nbytes` of this rank, mapped by all while this object lives, and all ranks' addresses. Collective."""
        import torch.distributed._symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        self._kept = symmetric_memory.rendezvous(buffer, self._group)
        return buffer, [int(address) for address in self._kept.buffer_ptrs]

    def synchronize(self, device: torch.device) -> None:
        """Wait for all work that this rank has launched."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def rejoin(self, process_group: dist.ProcessGroup) -> None:
        """Meet the ranks of another group from now on; existing mappings stay."""
        self._group = process_group

    def meet(self, deadline_s: float) -> None:
        """Wait for all ranks. Collective; raises as `await_work`."""
        await_work(dist.barrier(self._group, async_op=True), "barrier", self._group, deadline_s)


class Buffers:
    """What the kernels read and write: sections of this rank's `mapped` memory, and private memory."""

    def __init__(self, dispatcher: NvlinkDispatcher, mapped: torch.Tensor, addresses: Sequence[int]) -> None:
        layout, device = dispatcher.layout, mapped.device
        slots = dispatcher.num_ranks * dispatcher.max_tokens_per_rank

        def section(offset: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
            return mapped[offset : offset + slots * columns * dtype.itemsize].view(dtype).view(slots, columns)

        def own(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        row_dtype = torch.float8_e4m3fn if dispatcher.fp8 else torch.bfloat16
        self.mapped = mapped
        self.rows = section(layout.rows, dispatcher.hidden_stride, row_dtype)[:, : dispatcher.hidden_size]
        self.scales = section(layout.scales, dispatcher.groups, torch.float32) if dispatcher.fp8 else None
        self.peers = torch.tensor(list(addresses), dtype=torch.int64, device=device)
        self.cells = torch.tensor(_FIRST_CELLS, dtype=torch.int64, device=device)
        self.scratch = own(dispatcher.launch.order_blocks * _expert_lanes(dispatcher.num_local_experts))
        self.counts = own(triton.next_power_of_2(dispatcher.num_ranks))
        self.gather_index, self.inverse = own(slots * dispatcher.top_k), own(slots * dispatcher.top_k)
        self.pair_weights = own(slots * dispatcher.top_k, torch.float32)
        self.tokens_per_expert = own(dispatcher.num_local_experts)
        self.expert_offsets = own(dispatcher.num_local_experts + 1)


class NvlinkDispatcher:
    """Sends tokens to their experts and back over NVLink; shapes are capacities, the counts stay on the device.

    Every rank must make the same calls in the same order **on one stream**, since each kernel waits for its peers. A
    captured graph may be replayed with any counts, by all ranks together. A handle is valid until the next dispatch:
    `hidden_states` has slot `rank * max_tokens_per_rank + token` for every token, defined where `gather_index` names
    it; of `gather_index` and `pair_weights`, `[ranks * max_tokens_per_rank * top_k]`, the first `expert_offsets[-1]`
    entries count.

    `deadline_s`: longest wait for a peer in later calls, in seconds; a graph keeps that of its capture. `launch`: None
    takes the measured sizes. `share_device`: several ranks run on one GPU, for tests. `memory`: maps the
    ranks' memory. `status`: the word in host memory by which a kernel reports that a rank did not come.
    """

    name = "nvlink"

    def __init__(
        self, process_group: dist.ProcessGroup, *, num_experts: int, hidden_size: int, top_k: int,
        max_tokens_per_rank: int, fp8: bool = False, deadline_s: float = 30.0, launch: LaunchSizes | None = None,
        share_device: bool = False, device: torch.device | None = None, memory: MappedMemory | None = None,
        warm_up: bool = True,
    ) -> None:  # fmt: skip
        self.rank, self.num_ranks = process_group.rank(), process_group.size()
        if self.num_ranks > MAX_RANKS:
            raise ConfigurationError(f"{self.num_ranks} ranks, but at most {MAX_RANKS} GPUs of one host can be joined")
        sizes = {"hidden_size": hidden_size, "top_k": top_k, "max_tokens_per_rank": max_tokens_per_rank}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigurationError(f"{name} must be >= 1, got {value}")
        self.num_experts = num_experts
        self.num_local_experts = check_experts(num_experts, self.num_ranks)
        self.hidden_size, self.top_k, self.fp8 = hidden_size, top_k, fp8
        self.max_tokens_per_rank = max_tokens_per_rank
        self.groups = -(-hidden_size // FP8_GROUP)
        self.hidden_stride = -(-hidden_size // 16) * 16  # rows begin at multiples of 16 bytes
        slots = self.num_ranks * max_tokens_per_rank
        if max_tokens_per_rank >= 2**20 or slots * max(self.hidden_stride, top_k) >= 2**31:
            raise ConfigurationError(
                f"{self.num_ranks} ranks x {max_tokens_per_rank} tokens x {hidden_size} values exceed 2**31 elements: "
                f"lower max_tokens_per_rank and use chunks"
            )
        self.abilities = Abilities(
            (torch.bfloat16,), max_rows_per_rank=max_tokens_per_rank, counts_on_device=True, rejoins=True
        )
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.launch = launch or launch_sizes(
            torch.cuda.get_device_properties(self.device).multi_processor_count, self.num_ranks,
            self.num_local_experts, hidden_size, max_tokens_per_rank,
        )  # fmt: skip
        words, skew = self.launch.word_tokens, self.launch.skew_tokens
        if words >= skew:
            raise ConfigurationError(f"word_tokens {words} must be below skew_tokens {skew}")
        self.layout = make_layout(
            self.num_ranks, max_tokens_per_rank, top_k, self.hidden_stride, self.groups, fp8, self.launch
        )
        self._group = process_group
        self.places = tuple(range(self.num_ranks))  # of the working ranks, among those that map their memory
        self.deadline_s = deadline_s
        self.status = torch.zeros(1, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._status_word = self.status.numpy()  # the same memory, read ten times as fast
        self._ended = torch.tensor([_WAITS_ENDED << 32], pin_memory=self.device.type == "cuda")
        self._side_stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._side_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._sink: torch.Tensor | None = None
        self._compiled: dict[Any, Any] = {}
        self._all_tokens = torch.full((1,), ALL_TOKENS.value, dtype=torch.int32, device=self.device)
        self._memory = memory or MappedMemory(process_group)
        mapped, addresses = self._memory.map(self.layout.nbytes, self.device)
        mapped.zero_()
        self.buffers = Buffers(self, mapped, addresses)
        self._under_way: DispatchHandle | None = None  # dispatched and not combined yet
        # A kernel may begin while its predecessor ends; its blocks then wait on the GPU, so each rank needs its own.
        early = self.device.type == "cuda" and not share_device
        self._dispatch_options, self._combine_options = self._options(early)
        self._settle()
        if warm_up:
            self._warm_up()

    def _options(self, early: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the compile-time arguments and launch options of dispatch and of combine, by name."""
        launch, layout = self.launch, self.layout
        common = {
            "WORLD": self.num_ranks, "WORLD_POW2": triton.next_power_of_2(self.num_ranks), "HIDDEN": self.hidden_size,
            "HIDDEN_STRIDE": self.hidden_stride, "TOPK": self.top_k, "TOPK_POW2": triton.next_power_of_2(self.top_k),
            "CAPACITY": self.max_tokens_per_rank, "EXPERTS": self.num_local_experts, "BLOCK_COLUMNS": launch.columns,
            "SKEW_TOKENS": launch.skew_tokens, "CHAIN_ROUND": launch.chain_round, "IDS": layout.ids,
            "WEIGHTS": layout.weights, "ABORT": layout.abort, "PDL": early,
            "num_warps": _THREADS // 32, "maxnreg": _REGISTERS, "launch_pdl": early,
        }  # fmt: skip
        for_dispatch = dict(
            common, GROUPS=self.groups, FP8=self.fp8, ORDER_BLOCKS=launch.order_blocks, PUSH_BLOCKS=launch.push_blocks,
            BLOCK_TOKENS=launch.dispatch_tokens, WORD_TOKENS=layout.row_word_tokens, ROW_WORDS=layout.words_per_row,
            TINY_TILE=launch.tiny_tile, TILES=launch.tiles, SLICE=launch.slice, PAIRS=launch.pairs,
            EXPERTS_POW2=_expert_lanes(self.num_local_experts),
            COPIES_POW2=triton.next_power_of_2(launch.order_blocks + launch.push_blocks), ROWS=layout.rows,
            SCALES=layout.scales, ROWS_AS_WORDS=layout.rows_as_words, COUNTS=layout.counts, FLAGS=layout.dispatch_flags,
        )  # fmt: skip
        for_combine = dict(
            common, BLOCKS=launch.combine_blocks, BLOCK_TOKENS=launch.combine_tokens, WORD_TOKENS=launch.word_tokens,
            ROW_WORDS=self.hidden_stride // 2, ROUND=launch.round, RETURNED=layout.returned,
            RETURNED_AS_WORDS=layout.returned_as_words, FLAGS=layout.combine_flags,
        )  # fmt: skip
        return for_dispatch, for_combine

    def route(self, sizes: Sequence[int], limit: int | None = None, *, capture: bool = False) -> Route:
        """See `Dispatcher.route`. A step of one chunk can always be captured."""
        check_sizes("route", sizes, len(self.places))
        chunk_size = min(limit or self.max_tokens_per_rank, self.max_tokens_per_rank)
        in_one = max(sizes) <= chunk_size
        if capture and not in_one:
            raise ConfigurationError(
                f"a CUDA graph holds one chunk of at most {chunk_size} rows per rank, got sizes {tuple(sizes)}"
            )
        return Route(self.name, tuple(sizes), chunk_size, captures=in_one)

    def dispatch(
        self, route: Route, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
        num_tokens: torch.Tensor | None = None,
    ) -> DispatchHandle:  # fmt: skip
        """See `Dispatcher.dispatch`. Returns at once; raises as `check`. Graphs read `num_tokens` at each replay."""
        self.check()
        rows, buffers = hidden_states.shape[0], self.buffers
        if rows > self.max_tokens_per_rank:
            raise ConfigurationError(
                f"{rows} rows on rank {self.rank}, but max_tokens_per_rank is {self.max_tokens_per_rank}"
            )
        if hidden_states.dtype is not torch.bfloat16 or hidden_states.shape[1] != self.hidden_size:
            raise self._unlike("hidden_states", f"bfloat16 [rows, {self.hidden_size}]", hidden_states)
        if num_tokens is not None and (num_tokens.dtype is not torch.int32 or num_tokens.numel() != 1):
            raise self._unlike("num_tokens", "int32 [1]", num_tokens)
        for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            if tensor.shape != (rows, self.top_k):
                raise self._unlike(name, f"[{rows}, {self.top_k}]", tensor)
        if self._under_way is not None:
            raise ConfigurationError(f"rank {self.rank} holds a dispatch that was not combined: combine it first")
        arguments = (
            _aligned(hidden_states), topk_ids.contiguous(), topk_weights.contiguous(),
            self._all_tokens if num_tokens is None else num_tokens, buffers.peers, buffers.cells, buffers.counts,
            buffers.gather_index, buffers.pair_weights, buffers.tokens_per_expert, buffers.expert_offsets,
            buffers.inverse, buffers.scratch, self.status.data_ptr(), rows, self.rank, int(self.deadline_s * 1e9),
        )  # fmt: skip
        blocks = self.launch.order_blocks + self.launch.push_blocks
        kind = (topk_ids.dtype, topk_weights.dtype)
        self._run(dispatch_kernel, blocks, kind, arguments, self._dispatch_options)
        self._under_way = DispatchHandle(
            route, rows, buffers.rows, buffers.scales, buffers.gather_index, buffers.tokens_per_expert,
            buffers.expert_offsets, buffers.pair_weights, num_pairs=None,
        )  # fmt: skip
        return self._under_way

    def combine(
        self, expert_output: torch.Tensor, handle: DispatchHandle, *, reduced: bool = False,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See `Dispatcher.combine`. `reduced`: a row per slot, already weighted and summed over this rank's experts."""
        self.check()
        if self._under_way is not handle:
            raise ConfigurationError(f"this handle was combined before, on rank {self.rank}")
        if expert_output.dtype is not torch.bfloat16 or expert_output.shape[1:] != (self.hidden_size,):
            raise self._unlike("expert_output", f"bfloat16 [rows, {self.hidden_size}]", expert_output)
        slots = self.num_ranks * self.max_tokens_per_rank
        if reduced and expert_output.shape[0] < slots:
            raise ConfigurationError(
                f"reduced expert_output must have a row for each of the {slots} slots, got {expert_output.shape[0]} on "
                f"rank {self.rank}"
            )
        if output is None:
            output = expert_output.new_empty((handle.num_rows, self.hidden_size))
        fits = output.shape[0] >= handle.num_rows and output.shape[1:] == (self.hidden_size,)
        if output.dtype is not torch.bfloat16 or not fits or not output.is_contiguous():
            raise self._unlike("output", f"bfloat16 [>= {handle.num_rows}, {self.hidden_size}] and contiguous", output)
        buffers = self.buffers
        arguments = (
            _aligned(expert_output), output, buffers.inverse, buffers.peers, buffers.cells, buffers.counts,
            self.status.data_ptr(), self.rank, int(self.deadline_s * 1e9),
        )  # fmt: skip
        kind = (reduced, output.data_ptr() % 16 == 0)
        options = self._combine_options | {"REDUCED": reduced}
        self._run(combine_kernel, self.launch.combine_blocks, kind, arguments, options)
        self._under_way = None
        return output

    def _unlike(self, name: str, expected: str, tensor: torch.Tensor) -> ConfigurationError:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        return ConfigurationError(f"{name} must be {expected}, got {found} on rank {self.rank}")

    def _run(
        self, kernel: Any, blocks: int, kind: tuple[Any, ...], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Launch a kernel; calls after the first of a `kind` skip Triton's per-call argument specialization."""
        compiled = self._compiled.get((kernel, kind))
        if compiled is None:
            compiled = kernel[(blocks,)](*arguments, **options)
            if compiled is not None:  # None under Triton's interpreter
                constants = tuple(options[name] for name in kernel.arg_names if name in options)
                self._compiled[kernel, kind] = compiled[(blocks, 1, 1)], constants
            return
        launch, constants = compiled
        launch(*arguments, *constants)

    def forget_capture(self) -> None:
        """See `Dispatcher.forget_capture`."""
        self._under_way = None

    def check(self, *, wait: bool = False) -> None:
        """See `Dispatcher.check`: `RankAbsentError`, or `TokenCountError` for a device-side count above the rows."""
        if wait:
            self._memory.synchronize(self.device)
        word = int(self._status_word[0])
        if word == 0:
            return
        code, reporter, absent = word >> 32, (word >> 16) & 0xFFFF, (word & 0xFFFF) - 1
        if code == TOO_MANY_TOKENS.value:
            raise TokenCountError(
                f"rank {reporter} set num_tokens above the rows that it handed in, or above the capacity of "
                f"{self.max_tokens_per_rank}; call reset() on all ranks to go on"
            )
        if code == _WAITS_ENDED:
            raise LockstepError(f"rank {self.rank} has ended its waits for others; call reset() on all ranks to go on")
        if code != FLAG_LATE.value:
            raise LockstepError(f"unknown status {word:#x} from the kernels of rank {self.rank}")
        reporter, absent = self.places.index(reporter), self.places.index(absent)
        peers = peers_of(self._group)
        name = peers.name if peers is not None else int
        late = f"rank {name(absent)} did not come within {self.deadline_s:g} s; rank {name(reporter)} gave up first"
        if peers is not None:
            raise peers.absent(late, (absent,))
        raise RankAbsentError(f"{late}; call reset() on all ranks to go on", (absent,))

    def end_waits(self) -> None:
        """See `Dispatcher.end_waits`. By a copy: waiting kernels may leave no room for another kernel."""
        cell = self.buffers.mapped[self.layout.abort :][:8].view(torch.int64)
        with torch.cuda.stream(self._side_stream):  # no stream, on a CPU
            cell.copy_(self._ended, non_blocking=True)

    def rejoin(self, process_group: dist.ProcessGroup, places: Sequence[int]) -> None:
        """See `Dispatcher.rejoin`. The kernels see a lost rank as always on time, with no tokens."""
        self._group, self.places = process_group, tuple(places)
        self._memory.rejoin(process_group)
        self.reset()

    def reset(self) -> None:
        """Start over after an error. Collective: all ranks of the process group must be alive."""
        within(functools.partial(self._memory.synchronize, self.device), self.deadline_s)
        self._memory.meet(self.deadline_s)
        self.buffers.mapped[: self.layout.scales].zero_()
        self.buffers.cells.copy_(torch.tensor(_FIRST_CELLS))
        self._leave_out([place for place in range(self.num_ranks) if place not in self.places])
        self._under_way = None
        self._settle()

    def _leave_out(self, lost: Sequence[int]) -> None:
        """Redirect sends to lost ranks into a sink, and mark all waits for them as satisfied, for all epochs."""
        layout, launch = self.layout, self.launch
        words = self.buffers.mapped[: layout.scales].view(torch.int64)
        sections = (
            (layout.counts, launch.order_blocks + launch.push_blocks), (layout.dispatch_flags, launch.push_blocks),
            (layout.combine_flags, launch.combine_blocks),
        )  # fmt: skip
        for place in lost:
            for offset, length in sections:
                words[offset // 8 + place * length :][:length] = _FAR_AHEAD
            if self._sink is None:  # rows are only sent to experts; everything else lies before the scales
                self._sink = torch.empty(layout.scales, dtype=torch.uint8, device=self.device)
            self.buffers.peers[place] = self._sink.data_ptr()

    def _settle(self) -> None:
        """Clear the status after the buffers are zeroed, and wait until all ranks have done so."""
        self._memory.synchronize(self.device)
        self.status.zero_()
        self._memory.meet(self.deadline_s)

    def _warm_up(self) -> None:
        """Compile and load the kernels in a round without tokens, with a deadline long enough for that."""
        deadline_s, self.deadline_s = self.deadline_s, max(self.deadline_s, 300.0)
        rows = torch.empty(0, self.hidden_size, dtype=torch.bfloat16, device=self.device)
        ids = torch.empty(0, self.top_k, dtype=torch.int32, device=self.device)
        route = self.route([0] * self.num_ranks)
        self.combine(rows, self.dispatch(route, rows, ids, ids.float()))
        self.check(wait=True)
        self.deadline_s = deadline_s


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows contiguous and 16-byte aligned: another alignment would need another compiled kernel."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _expert_lanes(num_local_experts: int) -> int:
    """Return the length of count vectors over the experts: a power of two, at least a warp."""
    return int(max(32, triton.next_power_of_2(num_local_experts)))
