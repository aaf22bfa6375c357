"""One forward pass over rows of many requests, whatever phase each is in: Transformers' own layers, or fused ones.

Nothing is padded: the model sees one sequence of all rows. Each row has its own position, and attends to the keys of
its own request, which lie in pages.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from lockstep.engine.attention import AttentionOptions, attend_batch, attend_decode, attend_prompts, write_keys
from lockstep.engine.kv_cache import KVCache, KVShape
from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import find_experts

ATTENTION_NAME = "lockstep_paged"
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Prompts:
    """The rows of a step that belong to prompts; they follow the rows that generate.

    Attributes:
        row_seqs: row of the block table of each prompt, `[num_prompts]` int32.
        cu_rows: where each prompt's rows begin among the rows of the step, and their end, `[num_prompts + 1]` int32.
        lengths: tokens of each prompt that are in pages after this step, `[num_prompts]` int32.
    """

    row_seqs: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """What one forward pass works on. All tensors are on the device of the model.

    Attributes:
        ids: tokens, `[num_rows]` int64.
        positions: of the tokens in their requests, `[num_rows]` int64.
        row_seqs: row of the block table of each row, `[num_rows]` int32; -1 for rows that pad a graph.
        lengths: keys that each row sees that generates, its own included, `[num_rows]` int32; 0 for rows that pad a
            graph.
        slots: `page * PAGE_SIZE + offset` where each row's key goes, `[num_rows]` int32; -1 for nowhere.
        num_decode: rows that generate, or in a graph the most that may; they come first.
        prompts: of the other rows; None where there are none.
        sampled: rows whose logits are wanted, `[num_sampled]` int64; None for all.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    row_seqs: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    num_decode: int
    prompts: Prompts | None = None
    sampled: torch.Tensor | None = None


_pass: ContextVar[tuple[Rows, KVCache] | None] = ContextVar("lockstep_pass", default=None)
_probed: ContextVar[dict[int, tuple[KVShape, torch.dtype]] | None] = ContextVar("lockstep_probed", default=None)


def attend(query: torch.Tensor, layer: int, rows: Rows, cache: KVCache, options: AttentionOptions) -> torch.Tensor:
    """Attend with all rows of a step, whose keys are in their pages already.

    Args:
        query: `[num_rows, heads, head_dim]`.
        layer: index of the layer.
        rows: of the step.
        cache: the pages.
        options: scaling, window and so on.

    Returns:
        `[num_rows, heads, value_dim]`.
    """
    pages = cache.key_pages[layer], cache.value_pages[layer], cache.block_table
    output = query.new_empty(*query.shape[:2], pages[1].shape[3])
    split, workspace = rows.num_decode, cache.workspace(query.shape[1], layer)
    if split:
        generating = rows.row_seqs[:split], rows.lengths[:split]
        attend_decode(query[:split], *pages, *generating, options, out=output[:split], workspace=workspace)
    if rows.prompts is not None:  # behind the other call, which writes zeros for rows that do not generate
        prompts = rows.prompts
        attend_prompts(query, *pages, prompts.row_seqs, prompts.cu_rows, prompts.lengths, options, out=output)
    return output


class TransformersDecoder:
    """Runs a Transformers model over packed rows by its own forward pass, with attention over pages.

    The model stays usable otherwise: outside a call of this object, its attention is that of any batch.

    Args:
        model: a causal language model with full or sliding-window attention, called through Transformers' attention
            interface.
        cache: its pages.

    Raises:
        ConfigurationError: see `check_supported`.
    """

    name = "Transformers'"

    def __init__(self, model: Any, cache: KVCache) -> None:
        take_over_attention(model)
        self._model = model
        self._cache = cache
        self._pages = _PageCache()
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, rows: Rows) -> torch.Tensor:
        """Run one pass; return the logits of `rows.sampled`, `[num_sampled, vocabulary]`."""
        keep = {}
        if self._takes_logits_to_keep and rows.sampled is not None:
            keep = {"logits_to_keep": rows.sampled}
        token = _pass.set((rows, self._cache))
        try:
            logits: torch.Tensor = self._model(
                input_ids=rows.ids[None],
                position_ids=rows.positions[None],
                past_key_values=self._pages,
                use_cache=True,
                **keep,
            ).logits[0]
        finally:
            _pass.reset(token)
        return logits if keep or rows.sampled is None else logits[rows.sampled]


class _PageCache(Cache):
    """Stands where Transformers expects a cache, and keeps nothing: attention does."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new rows as they are: attention puts its keys into pages, and reads the others from there."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given for every row, so nothing is derived from this."""
        return 0


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask that Transformers makes before the layers: none in a pass, where lengths say which keys a row sees."""
    return None if _pass.get() is not None else sdpa_mask(*args, **kwargs)


def _attention(
    module: Any,
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
    """Stand among Transformers' attention functions.

    Args:
        module: the attention layer.
        query: `[1, heads, rows, head_dim]`; outside a pass, `[batch, heads, rows, head_dim]`.
        key: of the same rows, `[1, kv_heads, rows, head_dim]`; outside a pass, of all keys.
        value: likewise, `[1, kv_heads, rows, value_dim]`.
        attention_mask: unused inside a pass; outside, which keys each row sees, `[batch, 1, rows, keys]`.
        scaling: of the scores; `head_dim ** -0.5` where None.
        sliding_window: keys that a row sees, its own included; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: attention sinks, one more score per head that takes its share and gives nothing, `[heads]`.
        **kwargs: of other attention functions, unused.

    Returns:
        `[1, rows, heads, value_dim]`, and no attention weights.
    """
    current = _pass.get()
    shapes = _probed.get()
    if shapes is not None:
        shapes[module.layer_idx] = KVShape(key.shape[1], key.shape[3], value.shape[3]), key.dtype
    if current is None:
        return _attend_outside(query, key, value, attention_mask, scaling, softcap, s_aux), None
    rows, cache = current
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    key, value, layer = key[0].transpose(0, 1), value[0].transpose(0, 1), module.layer_idx
    write_keys(key, value, cache.key_pages[layer], cache.value_pages[layer], rows.slots)
    output = attend(query[0].transpose(0, 1).contiguous(), layer, rows, cache, options)
    return output[None], None


def _attend_outside(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of any batch, as the model was built for; see `_attention`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    options = AttentionOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap, sinks=sinks)
    is_causal = mask is None and query.shape[2] > 1
    return attend_batch(query, key, value, mask, options, is_causal).transpose(1, 2).contiguous()


def take_over_attention(model: Any) -> None:
    """Let a model call `_attention`, which outside a pass attends as the model's own does.

    Raises:
        ConfigurationError: see `check_supported`.
    """
    check_supported(model)
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
    model.set_attn_implementation(ATTENTION_NAME)


def check_supported(model: Any) -> None:
    """Raise for a model whose layers keep something else than one key and value per token.

    Raises:
        ConfigurationError: naming the class and the layer: recurrent or linear attention, or attention that is not
            called through Transformers' attention interface.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    if other := sorted(set(kinds) - _ATTENTION_LAYERS):
        raise ConfigurationError(f"{name} has {other[0]!r} layers; packed rows need full or sliding-window attention")
    if getattr(model, "_is_stateful", False):
        raise ConfigurationError(f"{name} has recurrent layers; packed rows need full or sliding-window attention")
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigurationError(f"{name} does not call its attention through Transformers' attention interface")


@torch.no_grad()
def probe_shapes(model: Any) -> tuple[list[KVShape], torch.dtype]:
    """Send one token through a model, without its experts, and return what each layer's attention reads of it.

    Returns:
        A shape per layer, in order, and the dtype of keys and values.

    Raises:
        ConfigurationError: see `check_supported`.
    """
    take_over_attention(model)
    shapes: dict[int, tuple[KVShape, torch.dtype]] = {}
    token = _probed.set(shapes)
    try:
        with stub_experts(model, lambda rows, *_: torch.zeros_like(rows)):
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
            # The class's own forward pass: that of a model which is spread over ranks needs all of them.
            type(model).forward(model, input_ids=ids, use_cache=False)
    finally:
        _probed.reset(token)
    if not shapes or sorted(shapes) != list(range(len(shapes))):
        raise ConfigurationError(f"{type(model).__name__} calls attention in layers {sorted(shapes)} only")
    return [shapes[index][0] for index in range(len(shapes))], shapes[0][1]


@contextlib.contextmanager
def stub_experts(model: Any, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Run a function of `(rows, ids, weights)` in place of every experts module."""
    modules = [module for _, module in find_experts(model)]
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = function
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own
