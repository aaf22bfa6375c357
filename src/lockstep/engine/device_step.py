"""The device's side of a step: rows laid out, a forward pass or a graph's replay, tokens drawn. Nothing waits here."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lockstep.dispatch.collectives import all_gatherv
from lockstep.engine.decoder import Prompts, Rows, TransformersDecoder
from lockstep.engine.graphs import EngineGraphs, HostRows
from lockstep.engine.kv_cache import KVCache
from lockstep.engine.sampling import Sampler
from lockstep.engine.sampling_params import SamplingParams
from lockstep.models.parallel import ModelParallel
from lockstep.moe.step import Step
from lockstep.workload import PAGE_SIZE, Schedule, StepEntry
from lockstep.workload.kv_pages import PageKey

if TYPE_CHECKING:
    from lockstep.engine.fused import FusedDecoder

_NOWHERE = -1


@dataclass
class EngineRequest:
    """A request of one rank.

    Attributes:
        request_id: its number.
        prompt: its tokens.
        params: how to sample and when to stop.
        seed: of its random numbers.
        generated: tokens that are on the host.
        page_keys: of whole pages of the prompt, where they may be shared.
        row: of the block table, while it holds pages; -1 otherwise.
        scheduled_to_end: whether its last token is being drawn.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    generated: list[int] = field(default_factory=list)
    page_keys: Sequence[PageKey] = ()
    row: int = _NOWHERE
    scheduled_to_end: bool = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt + self.generated


@dataclass
class Drawn:
    """Tokens on their way to the host, one per sampling row; not to be read before the step's end."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def logprobs_of(self, row: int, wanted: int | None) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
        """Return one token's logprob and the `wanted` most likely tokens with theirs; None for what is not wanted."""
        if wanted is None or self.logprobs is None:
            return None, None
        if not wanted or self.top_ids is None or self.top_logprobs is None:
            return float(self.logprobs[row]), None
        top = zip(self.top_ids[row, :wanted].tolist(), self.top_logprobs[row, :wanted].tolist(), strict=True)
        return float(self.logprobs[row]), tuple(top)


class DeviceStep:
    """Runs the steps of one rank on its device.

    Args:
        model: a causal language model.
        parallel: what it carries with it where it is spread over ranks.
        cache: pages of keys and values.
        sampler: draws tokens.
        max_rows: of a decoding step.
        max_mixed_rows: of a step with prompts.
        graphs: run steps as CUDA graphs where that is possible.

    Attributes:
        decoder: runs a forward pass.
        graphs: of its steps; None where there are none.
    """

    def __init__(
        self,
        model: Any,
        parallel: ModelParallel | None,
        cache: KVCache,
        sampler: Sampler,
        max_rows: int,
        max_mixed_rows: int,
        graphs: bool,
    ) -> None:
        self.cache = cache
        self.graphs: EngineGraphs | None = None
        self._parallel = parallel
        self._sampler = sampler
        self._device = cache.block_table.device
        # The token that each row of the table goes on with; the host may not know it yet.
        self._last_tokens = torch.zeros(cache.block_table.shape[0], dtype=torch.int64, device=self._device)
        self._free_rows = list(range(cache.block_table.shape[0] - 1, -1, -1))
        self.decoder = _make_decoder(model, cache)
        if self._device.type == "cuda":  # no step of a run loads a kernel
            sampler.warm_up(model.get_output_embeddings().weight.dtype)
        if graphs and parallel is not None and parallel.layers.can_capture:
            self.graphs = EngineGraphs(
                parallel, self.decoder, self.lay_out, self._last_tokens, max_rows, max_mixed_rows, self._device
            )
            self.graphs.capture()

    def seat(self, request: EngineRequest, num_cached: int = 0) -> None:
        """Give a request a row of the block table, if it has none.

        Args:
            request: of the next step.
            num_cached: tokens of its first pages, if it begins behind known ones.
        """
        if request.row == _NOWHERE:
            request.row = self._free_rows.pop()
            self._sampler.set(request.row, request.params, request.seed, request.prompt, request.generated)
            if num_cached:
                keys = request.page_keys[: num_cached // PAGE_SIZE]
                self.cache.share(request.row, keys, _packed(request.prompt[:num_cached]))

    def unseat(self, request: EngineRequest) -> None:
        """Take row and pages back, if it has any. Steps that are issued still read them; later ones write to them."""
        if request.row != _NOWHERE:
            self.cache.release(request.row)
            self._sampler.clear(request.row)
            self._free_rows.append(request.row)
            request.row = _NOWHERE

    def run(
        self, schedule: Schedule, requests: Sequence[EngineRequest], step: Step | None
    ) -> tuple[Drawn | None, bool]:
        """Issue a step's forward pass and its sampling.

        Args:
            schedule: of this rank, with rows.
            requests: of its entries, in order.
            step: that the pass belongs to; None in a single process.

        Returns:
            The tokens, in the order of the entries that sample, or None where none does; whether a graph was replayed.
        """
        entries = schedule.entries
        for request, entry in zip(requests, entries, strict=True):
            self.seat(request, entry.start)
            self.cache.grow(request.row, entry.start + entry.num_tokens)
        self.cache.flush()
        sampled = [request.row for request, entry in zip(requests, entries, strict=True) if entry.samples]
        num_decode = schedule.num_decode_tokens
        replayed = None
        # By the agreed counts alone: a graph holds one backend, and all ranks have to take the same.
        if self.graphs is not None and step is not None and step.captures:
            if len(entries) == num_decode:
                replayed = self.graphs.run(sampled, [entry.start for entry in entries], step)
            else:
                replayed = self.graphs.run_mixed(_lay_out_on_host(entries, requests, num_decode), step)
        if replayed is not None:
            logits, rows, positions = replayed
        else:
            laid_out, rows, positions = self._lay_out_step(entries, requests, num_decode)
            logits = self.decoder(laid_out)
        drawn = self._sample(logits, rows, positions, sampled) if sampled and logits is not None else None
        self._remember_pages(entries[num_decode:], requests[num_decode:])
        return drawn, replayed is not None

    def _remember_pages(self, entries: Sequence[StepEntry], requests: Sequence[EngineRequest]) -> None:
        """Let the pages that prompts have filled be known from the next step on, as the scheduler does."""
        for entry, request in zip(entries, requests, strict=True):
            first, stop = entry.start // PAGE_SIZE, (entry.start + entry.num_tokens) // PAGE_SIZE
            if keys := request.page_keys[first:stop]:
                self.cache.remember(request.row, first, keys, _packed(request.prompt))

    def run_without_rows(self, step: Step) -> bool:
        """Take part in a step without rows; return whether by a graph."""
        if self.graphs is None or not step.captures:
            step.take_part_in_rest()
            return False
        self.graphs.run([], [], step)
        return True

    def _lay_out_step(
        self, entries: Sequence[StepEntry], requests: Sequence[EngineRequest], num_decode: int
    ) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """Lay out a step's rows.

        Returns:
            The rows; the table's row of each sampled one, `[num_sampled]` int32; and the position of the token to be
            drawn, `[num_sampled]` int64.
        """
        host = _lay_out_on_host(entries, requests, num_decode)
        parts = self._to_device(
            host.ids, host.positions, host.row_seqs, host.sampled, host.prompts, host.cu_rows, host.lengths
        )
        device_ids, device_positions, device_rows, sampled, prompt_rows, cu_rows, prompt_lengths = parts
        last = self._last_tokens[device_rows.long()]
        rows = self.lay_out(torch.where(device_ids < 0, last, device_ids.long()), device_positions, device_rows)
        sampled = sampled.long()
        if host.prompts:
            prompts = Prompts(prompt_rows, cu_rows, prompt_lengths)
            rows = replace(rows, num_decode=num_decode, prompts=prompts, sampled=sampled)
        return rows, device_rows[sampled], rows.positions[sampled] + 1

    def lay_out(self, ids: torch.Tensor, positions: torch.Tensor, row_seqs: torch.Tensor) -> Rows:
        """Return the rows of requests that generate; on the device alone, so that a graph may hold it.

        Args:
            ids: tokens, `[num_rows]` int64.
            positions: of these, `[num_rows]` int32.
            row_seqs: row of the block table of each, `[num_rows]` int32; -1 for rows that pad a graph.
        """
        real = row_seqs >= 0
        page_index = (positions // PAGE_SIZE).long()
        pages = self.cache.block_table[row_seqs.clamp(min=0).long(), page_index]
        slots = torch.where(real, pages * PAGE_SIZE + positions % PAGE_SIZE, -1)
        lengths = torch.where(real, positions + 1, 0)
        return Rows(ids, positions.long(), row_seqs, lengths, slots, num_decode=len(ids))

    def _to_device(self, *parts: Sequence[int]) -> list[torch.Tensor]:
        """Copy lists of small integers to the device at once, in the order of the stream; int32."""
        lengths = [len(part) for part in parts]
        packed = torch.tensor(list(itertools.chain.from_iterable(parts)), dtype=torch.int32)
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        return list(packed.split(lengths))

    def _sample(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, host_rows: list[int]) -> Drawn:
        """Draw a token for each row of `logits`, and start its way to the host."""
        drawn = self._sampler.sample(logits, rows, positions, host_rows)
        tokens = self._first_ranks_tokens(drawn.tokens)
        self._last_tokens.index_copy_(0, rows.long(), tokens)
        parts = (tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        return Drawn(*(None if part is None else part.to("cpu", non_blocking=True) for part in parts))  # type: ignore[arg-type]

    def _first_ranks_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take what the first rank of a tensor-parallel group has drawn: logits may differ there in a last bit."""
        parallel = self._parallel
        if parallel is None or parallel.config.tensor_parallel_size == 1:
            return tokens
        group = parallel.layers[0].tensor_parallel_group
        assert group is not None
        sizes = [len(tokens)] + [0] * (parallel.config.tensor_parallel_size - 1)
        own = tokens if parallel.config.tensor_parallel_rank == 0 else tokens[:0]
        return all_gatherv([own[:, None]], sizes, group, parallel.options.deadline_s)[0][:, 0]


def _lay_out_on_host(entries: Sequence[StepEntry], requests: Sequence[EngineRequest], num_decode: int) -> HostRows:
    """Lay out the rows of a step, those that generate first, as plain integers."""
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


def _make_decoder(model: Any, cache: KVCache) -> TransformersDecoder | FusedDecoder:
    if cache.block_table.device.type == "cuda":
        from lockstep.engine.fused import FusedDecoder

        fused = FusedDecoder.of(model, cache)
        if fused is not None:
            return fused
    return TransformersDecoder(model, cache)
