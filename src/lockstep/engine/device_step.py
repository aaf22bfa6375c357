"""A step on the device: lay out rows, run a forward pass or replay a graph, draw tokens. The host never waits here."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lockstep.dispatch.collectives import all_gatherv
from lockstep.engine.decoder import Prompts, Rows, TransformersDecoder
from lockstep.engine.engine_graphs import EngineGraphs, HostRows
from lockstep.engine.kv_cache import KVCache
from lockstep.engine.sampling import Sampled, Sampler
from lockstep.engine.sampling_params import SamplingParams
from lockstep.models.parallel import ModelParallel
from lockstep.moe.step import Step
from lockstep.workload import PAGE_SIZE, Schedule, SchedulerConfig, StepEntry
from lockstep.workload.kv_pages import PageKey

if TYPE_CHECKING:
    from lockstep.engine.fused import FusedDecoder

_NOWHERE = -1


@dataclass
class EngineRequest:
    """A request of one rank."""

    request_id: int
    prompt: list[int]
    params: SamplingParams
    seed: int  # of its random numbers
    generated: list[int] = field(default_factory=list)  # tokens that are on the host
    page_keys: Sequence[PageKey] = ()  # of whole pages of the prompt, where they may be shared
    row: int = _NOWHERE  # of the block table, while it holds pages
    scheduled_to_end: bool = False  # whether an issued step draws its last token

    @property
    def tokens(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt + self.generated


class DeviceStep:
    """Runs one rank's steps on its device: `decoder` runs a forward pass, `graphs`, if not None, whole steps."""

    def __init__(
        self, model: Any, parallel: ModelParallel | None, cache: KVCache, sampler: Sampler, config: SchedulerConfig,
        graphs: bool,
    ) -> None:  # fmt: skip
        self.cache = cache
        self.graphs: EngineGraphs | None = None
        self._parallel = parallel
        self._sampler = sampler
        self._device = cache.block_table.device
        # The last token of each row of the table; the host may not know it yet.
        self._last_tokens = torch.zeros(cache.block_table.shape[0], dtype=torch.int64, device=self._device)
        self._free_rows = list(range(cache.block_table.shape[0] - 1, -1, -1))
        fused: FusedDecoder | None = None
        if self._device.type == "cuda":
            from lockstep.engine.fused import FusedDecoder

            fused = FusedDecoder.of(model, cache)
            sampler.warm_up(model.get_output_embeddings().weight.dtype)  # no step of a run loads a kernel
        self.decoder = fused or TransformersDecoder(model, cache)
        if graphs and parallel is not None and parallel.layers.can_capture:
            most = config.max_num_batched_tokens
            max_rows = min(config.max_num_seqs, most)
            self.graphs = EngineGraphs(parallel, self.decoder, self.lay_out, max_rows, most, self._device)
            self.graphs.capture()

    def go_on(self, parallel: ModelParallel) -> None:
        """Continue with the steps of the remaining ranks."""
        self._parallel = parallel
        if self.graphs is not None:
            self.graphs.go_on(parallel.layers)

    def seat(self, request: EngineRequest, num_cached: int = 0) -> None:
        """Give a request a row of the block table, if it has none; its first `num_cached` tokens are in known pages."""
        if request.row == _NOWHERE:
            request.row = self._free_rows.pop()
            self._sampler.set(request.row, request.params, request.seed, request.prompt, request.generated)
            if num_cached:
                keys = request.page_keys[: num_cached // PAGE_SIZE]
                self.cache.share(request.row, keys, _packed(request.prompt[:num_cached]))

    def unseat(self, request: EngineRequest) -> None:
        """Free a request's row and pages, if any. Issued steps still read them; only later ones write to them."""
        if request.row != _NOWHERE:
            self.cache.release(request.row)
            self._sampler.clear(request.row)
            self._free_rows.append(request.row)
            request.row = _NOWHERE

    def run(
        self, schedule: Schedule, requests: Sequence[EngineRequest], step: Step | None
    ) -> tuple[Sampled | None, bool]:
        """Issue a step for the requests of the schedule's entries, in order; `step` is None in a single process.

        Returns the tokens of the entries that sample, or None where none does, and whether a graph was replayed.
        """
        captures = self.graphs is not None and step is not None and step.captures
        entries, num_decode = schedule.entries, schedule.num_decode_tokens
        if not entries and step is not None and not captures:
            step.take_part_in_rest()
            return None, False
        for request, entry in zip(requests, entries, strict=True):
            self.seat(request, entry.start)
            self.cache.grow(request.row, entry.start + entry.num_tokens)
        self.cache.flush()
        sampled = [request.row for request, entry in zip(requests, entries, strict=True) if entry.samples]
        replayed = None
        # Decided by agreed counts alone: a graph holds one backend, and all ranks must take the same.
        if captures:
            assert self.graphs is not None and step is not None
            if len(entries) == num_decode:
                replayed = self.graphs.run(sampled, [entry.start for entry in entries], step)
            else:
                replayed = self.graphs.run_mixed(_lay_out_on_host(entries, requests, num_decode), step)
        logits, rows, positions = replayed or self._run_eagerly(_lay_out_on_host(entries, requests, num_decode))
        drawn = self._sample(logits, rows, positions, sampled) if sampled and logits is not None else None
        # As in the scheduler, pages that prompts have filled are known from the next step on.
        for entry, request in zip(entries[num_decode:], requests[num_decode:], strict=True):
            first, stop = entry.start // PAGE_SIZE, (entry.start + entry.num_tokens) // PAGE_SIZE
            if keys := request.page_keys[first:stop]:
                self.cache.remember(request.row, first, keys, _packed(request.prompt))
        return drawn, replayed is not None

    def _run_eagerly(self, host: HostRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the sampled rows, their rows of the block table, and the positions of the next tokens."""
        # One copy for all, in stream order.
        lists = host.ids, host.positions, host.row_seqs, host.sampled, host.prompts, host.cu_rows, host.lengths
        packed = torch.tensor(list(itertools.chain.from_iterable(lists)), dtype=torch.int32)
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        ids, positions, row_seqs, sampled, *prompts = packed.split([len(part) for part in lists])
        rows, sampled = self.lay_out(ids, positions, row_seqs), sampled.long()
        if host.prompts:
            rows = replace(rows, num_decode=host.num_decode, prompts=Prompts(*prompts), sampled=sampled)
        return self.decoder(rows), row_seqs[sampled], rows.positions[sampled] + 1

    def lay_out(self, ids: Tensor | None, positions: Tensor, row_seqs: Tensor) -> Rows:
        """Return the rows of requests that generate, all `[num_rows]` int32; on the device alone, for CUDA graphs.

        A token of -1, or None for all, stands for the one its request drew last; `row_seqs` is -1 for padding.
        """
        real, seqs = row_seqs >= 0, row_seqs.clamp(min=0).long()
        last = self._last_tokens[seqs]
        ids = last if ids is None else torch.where(ids < 0, last, ids.long())
        pages = self.cache.block_table[seqs, (positions // PAGE_SIZE).long()]
        slots = torch.where(real, pages * PAGE_SIZE + positions % PAGE_SIZE, -1)
        lengths = torch.where(real, positions + 1, 0)
        return Rows(ids, positions.long(), row_seqs, lengths, slots, num_decode=len(row_seqs))

    def _sample(self, logits: Tensor, rows: Tensor, positions: Tensor, host_rows: list[int]) -> Sampled:
        """Draw a token for each row of `logits`, and start the copy to the host."""
        drawn = self._sampler.sample(logits, rows, positions, host_rows)
        drawn = replace(drawn, tokens=self._first_ranks_tokens(drawn.tokens))
        self._last_tokens.index_copy_(0, rows.long(), drawn.tokens)
        return drawn.to_host()

    def _first_ranks_tokens(self, tokens: Tensor) -> Tensor:
        """Take the tokens that a tensor-parallel group's first rank drew: ranks' logits may differ in the last bit."""
        parallel = self._parallel
        if parallel is None or parallel.config.tensor_parallel_size == 1:
            return tokens
        group = parallel.layers[0].tensor_parallel_group
        assert group is not None
        sizes = [len(tokens)] + [0] * (parallel.config.tensor_parallel_size - 1)
        own = tokens if parallel.config.tensor_parallel_rank == 0 else tokens[:0]
        return all_gatherv([own[:, None]], sizes, group, parallel.options.deadline_s)[0][:, 0]


def _lay_out_on_host(entries: Sequence[StepEntry], requests: Sequence[EngineRequest], num_decode: int) -> HostRows:
    """Lay out a step's rows as plain integers, those that generate first."""
    host = HostRows(num_decode, cu_rows=[num_decode])
    for index, (entry, request) in enumerate(zip(entries, requests, strict=True)):
        stop = entry.start + entry.num_tokens
        if index < num_decode:
            host.ids.append(-1)  # drawn by the step before; the host may not know it yet
        else:
            host.ids += request.tokens[entry.start : stop]
            host.prompts.append(request.row)
            host.cu_rows.append(host.cu_rows[-1] + entry.num_tokens)
            host.lengths.append(stop)
        host.positions += range(entry.start, stop)
        host.row_seqs += [request.row] * entry.num_tokens
        if entry.samples:
            host.sampled.append(len(host.positions) - 1)
    return host


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()
