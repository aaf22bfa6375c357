"""Draws the next token of every request in a step, on the device: the host never waits.

A token depends only on its request's logits, parameters, seed and position, for three reasons:

* The random number is a hash of seed and position. Without state, a preempted request draws the same tokens again.
* Each row's own parameters choose its path. Rows of one path run together.
* Probabilities are integers from the exponential on. Their sums are exact, so neither the number of rows nor the
  device's order of addition can move a border between two tokens.

The paths' cost, in passes over the logits of their rows (`benchmarks/bench_sampling.py`):

| row | work |
|---|---|
| greedy | one read |
| `1 <= top_k <= 64`, with `top_p` and `min_p` | one read for the maxima of blocks of 128, then `top_k` blocks |
| no `top_k`, no `top_p` | about eight elementwise passes |
| `top_k > 64`, or `top_p` alone | a stable sort of the vocabulary, the only path that sorts |
| penalties, `min_tokens` | a float32 copy and five more passes |
| log probabilities | two reads |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lockstep.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from lockstep.errors import ConfigurationError

_BLOCK = 128  # tokens per block: of the first stage of top-k, and of the running sum of the unfiltered path
_MAX_SMALL_TOP_K = 64

_MASK64 = 2**64 - 1
# SplitMix64 (Steele, Lea and Flood, 2014): a counter times an odd constant, then two rounds of xor-shift and multiply.
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_TEMPERATURE, _TOP_P, _MIN_P, _PRESENCE = range(4)  # then frequency and repetition penalty
_KEY, _TOP_K, _FREE_FROM = range(3)


@dataclass(frozen=True)
class Sampled:
    """The tokens of one step, on the device or on their way to the host."""

    tokens: Tensor  # `[rows]` int64; 0 in padding rows
    # Their log probabilities before penalties, temperature and filters: `[rows]` float32, NaN in rows that did not ask.
    logprobs: Tensor | None = None
    # The five most likely tokens, even if a row asked for fewer: `[rows, 5]` int64, -1 in rows that did not ask.
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None  # of `top_ids`, `[rows, 5]` float32, NaN where there is none

    def to_host(self) -> Sampled:
        """Start copies to the host; do not read them before the work issued so far has ended."""
        parts = (self.logprobs, self.top_ids, self.top_logprobs)
        optional = (None if part is None else part.to("cpu", non_blocking=True) for part in parts)
        return Sampled(self.tokens.to("cpu", non_blocking=True), *optional)

    def logprobs_of(self, row: int, wanted: int | None) -> tuple[float | None, tuple[tuple[int, float], ...] | None]:
        """Return a token's logprob, and those of the `wanted` most likely tokens; None for what is not wanted."""
        if wanted is None or self.logprobs is None:
            return None, None
        if not wanted or self.top_ids is None or self.top_logprobs is None:
            return float(self.logprobs[row]), None
        top = zip(self.top_ids[row, :wanted].tolist(), self.top_logprobs[row, :wanted].tolist(), strict=True)
        return float(self.logprobs[row]), tuple(top)


class _Kind(NamedTuple):
    """A row's path and extras. Rows of one kind run together. A tuple, since it is hashed for every row and step."""

    path: Literal["greedy", "small_top_k", "sorted", "unfiltered"]
    penalties: bool = False
    min_tokens: bool = False


_GREEDY = _Kind("greedy")


class Sampler:
    """Draws tokens for one rank. Parameters live on the device, one row per slot.

    `min_tokens` suppresses `eos_token_ids` besides a request's own stop tokens. Passes over the whole vocabulary take
    `chunk_logits` logits at a time, which bounds their memory.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device | str, *, eos_token_ids: Sequence[int] = (),
        chunk_logits: int = 2**24,
    ) -> None:  # fmt: skip
        self.max_num_seqs = max_num_seqs
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._chunk_rows = max(1, chunk_logits // vocab_size)
        # An end-of-sequence token beyond the logits can never be drawn.
        self._eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._params = [SamplingParams()] * max_num_seqs
        self._kinds: list[_Kind | None] = [None] * max_num_seqs
        self._asking: set[int] = set()  # slots whose request wants log probabilities
        # Not on the device yet: one copy takes all slots that a step fills.
        self._changes: dict[int, tuple[tuple[float, ...], tuple[int, int, int]]] = {}
        self._floats = torch.zeros(max_num_seqs, 6, dtype=torch.float64, device=self.device)
        self._ints = torch.zeros(max_num_seqs, 3, dtype=torch.int64, device=self.device)
        self._stop_ids = torch.zeros(max_num_seqs, 1, dtype=torch.int64, device=self.device)
        # From the first request with penalties on: occurrences of each token in each slot's output, and whether it is
        # in the prompt, `[max_num_seqs, vocab_size]` int32 and bool, 5 bytes per slot and token.
        self.counts: Tensor | None = None
        self._in_prompt: Tensor | None = None
        # Weights below 2**-scale of the largest are lost; a sum of vocab_size weights stays exact in float64.
        self._scale = float(2 ** (52 - vocab_size.bit_length()))

    def set(
        self, slot: int, params: SamplingParams, seed: int, prompt: Sequence[int], generated: Sequence[int] = ()
    ) -> None:
        """Assign a slot to a request; `seed` replaces that of `params`, `generated` is from before a preemption."""
        if params.has_penalties:
            self._count(slot, prompt, generated)
        stop_ids = self._eos_token_ids + tuple(params.stop_token_ids)
        holds_back = params.min_tokens > 0 and bool(stop_ids)
        if holds_back:
            self._set_stop_ids(slot, stop_ids)
        free_from = len(prompt) + params.min_tokens if holds_back else 0
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        floats = params.temperature, params.top_p, params.min_p, *penalties
        self._changes[slot] = floats, (seed_key(seed), top_k, free_from)
        self._params[slot] = params
        if params.is_greedy:
            kind = _GREEDY
        elif 0 < params.top_k <= _MAX_SMALL_TOP_K:
            kind = _Kind("small_top_k")
        else:
            kind = _Kind("sorted" if top_k < self.vocab_size or params.top_p < 1 else "unfiltered")
        self._kinds[slot] = kind._replace(penalties=params.has_penalties, min_tokens=holds_back)
        (self._asking.discard if params.logprobs is None else self._asking.add)(slot)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Run every path once with all slots, so that later steps load no kernel and need no more memory."""
        slots = torch.arange(self.max_num_seqs, device=self.device)
        logits = torch.zeros(self.max_num_seqs, self.vocab_size, dtype=dtype, device=self.device)
        for params in _ONE_OF_EACH_PATH:
            for slot in range(self.max_num_seqs):
                self.set(slot, params, 0, (0,))
            self.sample(logits, slots, slots, range(self.max_num_seqs))
        for slot in range(self.max_num_seqs):
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Free a slot. Steps already issued are not affected."""
        self._kinds[slot] = None
        self._asking.discard(slot)

    @torch.no_grad()
    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor, host_slots: Sequence[int]) -> Sampled:
        """Draw one token per row of `[rows, vocab_size]`, any float type. Reads nothing back, leaves `logits` alone.

        `slots` are the rows' on the device, `host_slots` on the host, -1 for padding; a slot has at most one row.
        `positions` are of the tokens to draw, on the device: the first after a prompt of 5 tokens has position 5.
        """
        num_rows = len(host_slots)
        if logits.shape != (num_rows, self.vocab_size):
            raise ConfigurationError(f"expected logits [{num_rows}, {self.vocab_size}], got {list(logits.shape)}")
        groups: dict[_Kind, list[int]] = {}
        for row, slot in enumerate(host_slots):
            if slot >= 0:
                kind = self._kinds[slot]
                if kind is None:
                    raise ConfigurationError(f"slot {slot} of row {row} has no request")
                groups.setdefault(kind, []).append(row)
        if self._changes and any(kind != _GREEDY for kind in groups):
            changed = self._upload(list(self._changes), torch.int64)
            floats, ints = zip(*self._changes.values(), strict=True)
            self._floats.index_copy_(0, changed, self._upload(floats, torch.float64))
            self._ints.index_copy_(0, changed, self._upload(ints, torch.int64))
            self._changes = {}
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        for kind, rows in groups.items():
            for chunk in [rows] if kind == _GREEDY else self._chunks(rows):
                index, params = self._index(chunk), [self._params[host_slots[row]] for row in chunk]
                chosen = self._sample_group(kind, logits[index], slots[index], positions[index], params)
                if len(chunk) == num_rows:
                    tokens = chosen
                else:
                    tokens[index] = chosen
        return self._with_logprobs(logits, tokens, host_slots)

    def _sample_group(
        self, kind: _Kind, logits: Tensor, slots: Tensor, positions: Tensor, params: list[SamplingParams]
    ) -> Tensor:
        """Return the tokens of rows of one kind: `[rows, vocab_size]` to `[rows]`."""
        if kind == _GREEDY:
            return logits.argmax(-1)
        floats, ints = self._floats.index_select(0, slots), self._ints.index_select(0, slots)
        if kind.penalties or kind.min_tokens:
            logits = logits.float()
        if kind.min_tokens:
            held, ids = positions < ints[:, _FREE_FROM], self._stop_ids.index_select(0, slots)
            # Rows past their min_tokens write back the same values; so do the ids that pad a shorter list.
            logits = logits.scatter(1, ids, logits.gather(1, ids).masked_fill_(held[:, None], -torch.inf))
        if kind.penalties:
            logits = self._penalise(logits, slots, floats)
        if kind.path == "greedy":
            tokens = logits.argmax(-1)
        else:
            tokens = self._draw(kind.path, logits, uniforms(ints[:, _KEY], positions), floats, ints, params)
        if kind.penalties:
            assert self.counts is not None
            where = (slots.long(), tokens)
            self.counts[where] = self.counts[where] + 1
        return tokens

    def _draw(
        self, path: str, logits: Tensor, draws: Tensor, floats: Tensor, ints: Tensor, params: list[SamplingParams]
    ) -> Tensor:
        min_p = floats[:, _MIN_P, None].float() if any(entry.min_p > 0 for entry in params) else None
        temperature = floats[:, _TEMPERATURE, None].float()
        if path == "unfiltered":
            values = logits.float()
            weights = _weights(values, values.amax(-1, keepdim=True), temperature, min_p)
            return draw_from_blocks(weights, draws, self._scale)
        if path == "small_top_k":
            # More candidates than a row keeps change nothing for it: its running sum is cut at its own top_k.
            ids = top_ids(logits, min(max(entry.top_k for entry in params), self.vocab_size))
            values = logits.gather(1, ids).float()
        else:
            # Sorted in their own type: bfloat16 needs half the passes of a radix sort.
            values, ids = logits.sort(descending=True, stable=True)
            values = values.float()
        weights = _weights(values, values[:, :1], temperature, min_p)
        rank = draw_from_sorted(weights.mul_(self._scale).long(), draws, floats[:, _TOP_P], ints[:, _TOP_K])
        return ids.gather(1, rank[:, None]).squeeze(1)

    def _penalise(self, logits: Tensor, slots: Tensor, floats: Tensor) -> Tensor:
        assert self.counts is not None and self._in_prompt is not None
        counts = self.counts.index_select(0, slots)
        generated = counts > 0
        seen = self._in_prompt.index_select(0, slots).logical_or_(generated)
        presence, frequency, repetition = floats[:, _PRESENCE:, None].float().unbind(1)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, repeated, logits)
        return logits.sub_(counts * frequency).sub_(generated * presence)

    def _with_logprobs(self, logits: Tensor, tokens: Tensor, host_slots: Sequence[int]) -> Sampled:
        if self._asking.isdisjoint(host_slots):
            return Sampled(tokens)
        asking = [row for row, slot in enumerate(host_slots) if slot in self._asking]
        num_rows, num_top = len(host_slots), min(MAX_LOGPROBS, self.vocab_size)
        logprobs = torch.full((num_rows,), torch.nan, device=self.device)
        top = ids = None
        if any(self._params[host_slots[row]].logprobs for row in asking):
            ids = torch.full((num_rows, MAX_LOGPROBS), -1, dtype=torch.int64, device=self.device)
            top = torch.full((num_rows, MAX_LOGPROBS), torch.nan, device=self.device)
        for chunk in self._chunks(asking):
            index = self._index(chunk)
            values = logits[index].float()
            total = values.logsumexp(-1, keepdim=True)
            logprobs[index] = (values.gather(1, tokens[index][:, None]) - total).squeeze(1)
            if ids is not None and top is not None:
                chunk_ids = top_ids(values, num_top)
                ids[index, :num_top] = chunk_ids
                top[index, :num_top] = values.gather(1, chunk_ids) - total
        return Sampled(tokens, logprobs, ids, top)

    def _count(self, slot: int, prompt: Sequence[int], generated: Sequence[int]) -> None:
        shape = (self.max_num_seqs, self.vocab_size)
        if self.counts is None or self._in_prompt is None:
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        in_prompt, counts = self._in_prompt[slot].zero_(), self.counts[slot].zero_()
        # A token beyond the logits is never drawn: nothing to penalise.
        in_prompt.index_fill_(0, self._upload([t for t in prompt if t < self.vocab_size], torch.int64), True)
        ids, repeats = torch.tensor(generated, dtype=torch.int64).unique(return_counts=True)
        counts.index_copy_(0, self._upload(ids, torch.int64), self._upload(repeats, torch.int32))

    def _set_stop_ids(self, slot: int, ids: Sequence[int]) -> None:
        width = self._stop_ids.shape[1]
        if len(ids) > width:
            # The first column pads the new ones: duplicate ids do no harm.
            more = self._stop_ids[:, :1].expand(-1, len(ids) - width)
            self._stop_ids = torch.cat([self._stop_ids, more], dim=1)
            width = len(ids)
        self._stop_ids[slot].copy_(self._upload([*ids, *[ids[0]] * (width - len(ids))], torch.int64))

    def _upload(self, values: Sequence[Any] | Tensor, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(values, dtype=dtype)
        if self.device.type == "cpu":
            return tensor
        # From pinned memory, which the allocator keeps until the copy is done: the host does not wait for the stream.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _chunks(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self._chunk_rows] for start in range(0, len(rows), self._chunk_rows)]

    def _index(self, rows: list[int]) -> slice | Tensor:
        """Return an index of rows: a slice if they are contiguous, so that nothing is copied, else a tensor."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return self._upload(rows, torch.int64)


_ONE_OF_EACH_PATH = (
    SamplingParams(temperature=0, min_tokens=1, logprobs=MAX_LOGPROBS),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=_MAX_SMALL_TOP_K),
    SamplingParams(top_p=0.9),
)


def seed_key(seed: int) -> int:
    """Return the first state of a seed's random numbers, a signed 64-bit integer; mixed, so that near seeds differ."""
    return int(_mix(torch.tensor(_signed((seed + _GOLDEN) & _MASK64))).item())


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Return each row's random number, a hash of key and position: `[rows]` float64 in `[0, 1)`, the same anywhere."""
    state = (positions.long() + 1) * _signed(_GOLDEN) + keys
    return _shift(_mix(state), 11).double() * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    """Return SplitMix64's output for a state, in int64 that wraps."""
    first, second = (_signed(multiplier) for multiplier in _MULTIPLIERS)
    state = (state ^ _shift(state, 30)) * first
    state = (state ^ _shift(state, 27)) * second
    return state ^ _shift(state, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift of int64 copies the sign."""
    return (values >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def top_ids(values: Tensor, k: int) -> Tensor:
    """Return the ids of each row's `k` largest values, `[rows, k]`, largest first, lower ids first among equal ones.

    The k blocks with the largest maxima hold the k largest values, so that the vocabulary is read once.
    """
    num_tokens = values.shape[1]
    if num_tokens <= 2 * k * _BLOCK:
        return _largest(values, torch.arange(num_tokens, device=values.device), k)
    num_blocks, rest = divmod(num_tokens, _BLOCK)
    maxima = values[:, : num_tokens - rest].unflatten(1, (num_blocks, _BLOCK)).amax(-1)
    if rest:
        maxima = torch.cat([maxima, values[:, -rest:].amax(-1, keepdim=True)], dim=1)
    blocks = _largest(maxima, torch.arange(maxima.shape[1], device=values.device), k)
    ids = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    candidates = values.gather(1, ids.clamp(max=num_tokens - 1))
    # Ids beyond the last token come after all others, whatever those hold: -inf and the highest ids.
    return _largest(candidates.masked_fill_(ids >= num_tokens, -torch.inf), ids, k)


def _largest(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest values per row; one int64 holds value and id: `topk` takes any of equal ones."""
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    keys = (0xFFFFFFFF - ids) + ascending.long() * 2**32
    return 0xFFFFFFFF - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def _weights(values: Tensor, largest: Tensor, temperature: Tensor, min_p: Tensor | None) -> Tensor:
    """Return probabilities relative to the largest one's, `[rows, tokens]` float32 in 0..1."""
    weights = (values - largest).div_(temperature).exp_()
    return weights if min_p is None else weights.masked_fill_(weights < min_p, 0)


def draw_from_sorted(weights: Tensor, draws: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Return the drawn token's place among descending weights, `[rows, tokens]` int64, whose sums are below 2**52."""
    last = weights.shape[1] - 1
    sums = weights.cumsum(-1)
    kept = sums.gather(1, (top_k - 1).clamp_(max=last)[:, None])
    share = (top_p[:, None] * kept.double()).ceil_().long()
    kept = sums.gather(1, torch.searchsorted(sums, share).clamp_(max=last))
    return torch.searchsorted(sums, _target(draws, kept), right=True).clamp_(max=last).squeeze(1)


def draw_from_blocks(weights: Tensor, draws: Tensor, scale: float) -> Tensor:
    """Return the drawn token of weights in 0..1, in the vocabulary's order: first its block, then its place there."""
    num_rows, num_tokens = weights.shape
    num_blocks = -(-num_tokens // _BLOCK)
    counts = weights.new_empty((num_rows, num_blocks * _BLOCK), dtype=torch.int64)
    counts[:, :num_tokens] = weights.mul_(scale)
    counts[:, num_tokens:] = 0
    blocks = counts.unflatten(1, (num_blocks, _BLOCK))
    block_sums = blocks.sum(-1)
    sums = block_sums.cumsum(-1)
    target = _target(draws, sums[:, -1:])
    block = torch.searchsorted(sums, target, right=True).clamp_(max=num_blocks - 1)
    target = target - sums.gather(1, block) + block_sums.gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1)
    place = torch.searchsorted(inside, target, right=True)
    # The clamps matter for rows of NaN only: such a row gets some valid token and disturbs no other.
    return (block * _BLOCK + place).clamp_(max=num_tokens - 1).squeeze(1)


def _target(draws: Tensor, totals: Tensor) -> Tensor:
    """Return where in its total each row draws, `[rows, 1]` int64 in `0..total - 1`."""
    return torch.minimum((draws[:, None] * totals.double()).long(), totals - 1)
