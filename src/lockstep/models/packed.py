"""One forward pass of a Transformers model over rows of many requests, whatever phase each is in.

Nothing is padded: the model sees one sequence of all rows. Each row has its own position and attends to the keys of its
own request only, which a cache of ours keeps apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from lockstep.errors import ConfigurationError, TokenCountError

ATTENTION_NAME = "lockstep_packed"
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class _Segment:
    """The rows of one request in a step: `num_rows` new ones after `num_past` whose keys are in the cache."""

    request: _Request
    num_rows: int
    num_past: int


@dataclass
class _Request:
    tokens: list[int]
    num_prompt_tokens: int
    capacity: int
    temperature: float
    generator: torch.Generator
    num_computed: int = 0
    # Per layer: keys and values, each [1, heads, capacity, head_dim].
    keys_and_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


_step: ContextVar[list[_Segment] | None] = ContextVar("lockstep_packed_step", default=None)


class PackedEngine:
    """Runs steps of a model over packed rows and keeps each request's tokens and keys.

    The model stays usable otherwise: outside `step`, its attention is that of any batch.

    Args:
        model: a Transformers causal language model with full or sliding-window attention, called through Transformers'
            attention interface.

    Attributes:
        logits: of the last step, one entry per request that sampled, `[vocabulary]`, float32.

    Raises:
        ConfigurationError: if the model keeps a state other than one key and value per token (recurrent layers), or has
            its attention hard-coded; the message names the class and the layer.

    Example:
        >>> engine = PackedEngine(model)  # doctest: +SKIP
        >>> engine.add_request("a", [1, 2, 3], max_new_tokens=2)  # doctest: +SKIP
        >>> engine.step([("a", 2, False)])  # the first two rows of the prompt  # doctest: +SKIP
        {}
        >>> engine.step([("a", 1, True)])  # its last row, which yields a token  # doctest: +SKIP
        {'a': 17}
    """

    def __init__(self, model: Any) -> None:
        _check_supported(model)
        AttentionInterface.register(ATTENTION_NAME, _attention)
        AttentionMaskInterface.register(ATTENTION_NAME, _mask)
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.logits: dict[Any, torch.Tensor] = {}
        self._device = model.get_input_embeddings().weight.device
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._requests: dict[Any, _Request] = {}
        self._cache = _PackedCache()

    def add_request(
        self,
        request_id: Any,
        prompt_token_ids: Sequence[int],
        max_new_tokens: int,
        seed: int = 0,
        temperature: float = 0.0,
    ) -> None:
        """Take a request in; nothing is computed yet.

        Args:
            request_id: any hashable name, not in use.
            prompt_token_ids: at least one.
            max_new_tokens: most tokens that will be sampled, >= 1.
            seed: of the request's own random state, so that its tokens do not depend on what runs beside it.
            temperature: 0 takes the most likely token; above, one is drawn.

        Raises:
            ConfigurationError: for a name in use, an empty prompt, or a number out of its range.
        """
        if request_id in self._requests:
            raise ConfigurationError(f"request {request_id!r} is already there")
        if not prompt_token_ids or max_new_tokens < 1:
            raise ConfigurationError(
                f"request {request_id!r} needs at least 1 prompt token and 1 new token, "
                f"got {len(prompt_token_ids)} and {max_new_tokens}"
            )
        if temperature < 0:
            raise ConfigurationError(f"temperature of request {request_id!r} must be >= 0, got {temperature}")
        self._requests[request_id] = _Request(
            tokens=list(prompt_token_ids),
            num_prompt_tokens=len(prompt_token_ids),
            capacity=len(prompt_token_ids) + max_new_tokens,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        )

    def preempt(self, request_id: Any) -> None:
        """Free a request's keys; its tokens stay, and all their rows are to be computed again."""
        request = self._requests[request_id]
        request.num_computed = 0
        request.keys_and_values.clear()

    def remove(self, request_id: Any) -> list[int]:
        """Forget a request and free its keys.

        Returns:
            The tokens sampled for it.
        """
        request = self._requests.pop(request_id)
        return request.tokens[request.num_prompt_tokens :]

    def tokens(self, request_id: Any) -> list[int]:
        """Return the tokens sampled so far for a request, in order."""
        request = self._requests[request_id]
        return request.tokens[request.num_prompt_tokens :]

    @torch.no_grad()
    def step(
        self,
        entries: Sequence[tuple[Any, int, bool]],
        forced_tokens: Mapping[Any, int] | None = None,
    ) -> dict[Any, int]:
        """Run one forward pass over the next rows of some requests. Without entries, the model is not called.

        Args:
            entries: `(request_id, num_query_tokens, samples)` of each request that has rows in this step, each at most
                once. `samples` where the rows reach the request's last token, and only there.
            forced_tokens: for these requests, the token to go on with in place of the one returned.

        Returns:
            The next token of each request that samples; `logits` holds what it was taken from.

        Raises:
            TokenCountError: for rows that a request does not have, or a request that samples before its last token.
        """
        self.logits = {}
        if not entries:
            return {}
        segments = [self._segment(*entry) for entry in entries]
        if len({id(segment.request) for segment in segments}) < len(segments):
            raise TokenCountError("each request must be in a step at most once")
        ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for segment, (_, _, samples) in zip(segments, entries, strict=True):
            stop = segment.num_past + segment.num_rows
            ids += segment.request.tokens[segment.num_past : stop]
            positions += range(segment.num_past, stop)
            if samples:
                last_rows.append(len(ids) - 1)
        rows = torch.tensor(last_rows, dtype=torch.int64, device=self._device)
        keep = {"logits_to_keep": rows} if self._takes_logits_to_keep else {}
        token = _step.set(segments)
        try:
            logits = self.model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                past_key_values=self._cache,
                use_cache=True,
                **keep,
            ).logits[0]
        finally:
            _step.reset(token)
        if not self._takes_logits_to_keep:
            logits = logits[rows]
        for segment in segments:
            segment.request.num_computed += segment.num_rows
        return self._sample(entries, logits.float(), forced_tokens or {})

    def _segment(self, request_id: Any, num_rows: int, samples: bool) -> _Segment:
        request = self._requests[request_id]
        left = len(request.tokens) - request.num_computed
        if not 1 <= num_rows <= left:
            raise TokenCountError(f"request {request_id!r} has {left} rows to compute, {num_rows} were asked for")
        if samples and num_rows < left:
            raise TokenCountError(f"request {request_id!r} cannot sample after {num_rows} of its {left} rows")
        if samples and len(request.tokens) >= request.capacity:
            raise TokenCountError(
                f"request {request_id!r} has its {request.capacity - request.num_prompt_tokens} new tokens already"
            )
        return _Segment(request, num_rows, request.num_computed)

    def _sample(
        self, entries: Sequence[tuple[Any, int, bool]], logits: torch.Tensor, forced_tokens: Mapping[Any, int]
    ) -> dict[Any, int]:
        sampling = [request_id for request_id, _, samples in entries if samples]
        greedy = logits.argmax(dim=-1).tolist()  # one wait for the device, for all requests
        chosen = {}
        for row, request_id in enumerate(sampling):
            request = self._requests[request_id]
            self.logits[request_id] = logits[row]
            token = greedy[row]
            if request.temperature > 0:
                probabilities = torch.softmax(logits[row].cpu() / request.temperature, dim=-1)
                token = int(torch.multinomial(probabilities, 1, generator=request.generator))
            chosen[request_id] = token
            request.tokens.append(forced_tokens.get(request_id, token))
        return chosen


def top2_gap(logits: torch.Tensor) -> float:
    """Return by how much the most likely token leads the second: a smaller error of the logits cannot change the token.

    Args:
        logits: `[vocabulary]`.
    """
    first, second = torch.topk(logits.float(), 2).values.tolist()
    return first - second


class _PackedCache(Cache):
    """Keys and values of the requests of the running step; each request owns its own."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new rows, `[1, heads, rows, head_dim]`, and return all rows of the step's requests, one by one."""
        segments = _step.get()
        assert segments is not None, "the packed cache was used outside PackedEngine.step"
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        start = 0
        for segment in segments:
            stop, end = start + segment.num_rows, segment.num_past + segment.num_rows
            stored = segment.request.keys_and_values.get(layer_idx)
            if stored is None:
                stored = (_empty(key_states, segment.request.capacity), _empty(value_states, segment.request.capacity))
                segment.request.keys_and_values[layer_idx] = stored
            for store, states, parts in zip(stored, (key_states, value_states), (keys, values), strict=True):
                store[:, :, segment.num_past : end] = states[:, :, start:stop]
                parts.append(store[:, :, :end])
            start = stop
        if len(segments) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given for every row, so nothing is derived from this."""
        return 0


def _empty(states: torch.Tensor, capacity: int) -> torch.Tensor:
    return states.new_empty((*states.shape[:2], capacity, states.shape[3]))


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask that Transformers makes before the layers: none in a step, where `_attention` knows each row's keys."""
    return None if _step.get() is not None else sdpa_mask(*args, **kwargs)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend request by request.

    Args:
        module: the attention layer.
        query: new rows of all requests, `[1, heads, rows, head_dim]`.
        key: all rows of the same requests, from `_PackedCache.update`, `[1, kv_heads, past + rows, head_dim]`.
        value: likewise, `[1, kv_heads, past + rows, value_dim]`.
        attention_mask: unused inside a step; outside, which keys each row sees, `[batch, 1, rows, keys]`.
        scaling: of the scores; `head_dim ** -0.5` where None.
        sliding_window: keys that a row sees, its own included; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: attention sinks, one more score per head that takes its share and gives nothing, `[heads]`.
        **kwargs: of other attention functions, unused.

    Returns:
        `[1, rows, heads, value_dim]`, and no attention weights.
    """
    segments = _step.get()
    if segments is None:
        return _attend(query, key, value, attention_mask, scaling, softcap, s_aux).transpose(1, 2).contiguous(), None
    outputs, row, start = [], 0, 0
    for segment in segments:
        num_keys = segment.num_past + segment.num_rows
        # The first row sees the window's keys before it; earlier ones are seen by no row.
        first = max(0, segment.num_past + 1 - sliding_window) if sliding_window else 0
        rows = slice(row, row + segment.num_rows)
        keys = slice(start + first, start + num_keys)
        mask = _segment_mask(segment.num_rows, num_keys - first, sliding_window, query.device)
        outputs.append(_attend(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, scaling, softcap, s_aux))
        row, start = row + segment.num_rows, start + num_keys
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _segment_mask(
    num_rows: int, num_keys: int, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Which keys a request's last rows see, `[rows, keys]`; None where that is plainly causal or all of them."""
    if num_rows == 1:
        return None  # the caller has cut the keys to the window
    window = sliding_window or num_keys
    if num_rows == num_keys <= window:
        return None
    position = torch.arange(num_keys - num_rows, num_keys, device=device)[:, None]
    seen = torch.arange(num_keys, device=device)[None, :]
    return (seen <= position) & (seen > position - window)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of some rows, `[batch, heads, rows, value_dim]`; causal where several rows have no mask."""
    num_rows, num_keys = query.shape[2], key.shape[2]
    is_causal = mask is None and num_rows > 1
    if s_aux is None and softcap is None:
        enable_gqa = query.shape[1] != key.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=enable_gqa
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(query.shape[0], -1, num_rows, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :num_keys].to(value.dtype)
    return weights @ value


def _check_supported(model: Any) -> None:
    """An error for a model whose layers keep something else than one key and value per token."""
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    if other := sorted(set(kinds) - _ATTENTION_LAYERS):
        raise ConfigurationError(f"{name} has {other[0]!r} layers; packed rows need full or sliding-window attention")
    if getattr(model, "_is_stateful", False):
        raise ConfigurationError(f"{name} has recurrent layers; packed rows need full or sliding-window attention")
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigurationError(f"{name} does not call its attention through Transformers' attention interface")
