"""One forward pass over rows of many requests, packed into one sequence: Transformers' own layers, or fused ones."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from lockstep.engine.attention import AttentionOptions, attend_decode, attend_prompts, write_keys
from lockstep.engine.attention_gathered import attend_batch
from lockstep.engine.kv_cache import KVCache, KVShape
from lockstep.errors import ConfigurationError
from lockstep.models.experts_modules import find_experts

ATTENTION_NAME = "lockstep_paged"


@dataclass(frozen=True)
class Prompts:
    """The rows of a step that belong to prompts; they follow the rows that generate. All are int32."""

    row_seqs: Tensor  # row of the block table of each prompt, `[num_prompts]`
    cu_rows: Tensor  # where each prompt's rows begin among the rows of the step, and their end, `[num_prompts + 1]`
    lengths: Tensor  # tokens of each prompt that are in pages after this step, `[num_prompts]`


@dataclass(frozen=True)
class Rows:
    """What one forward pass works on. All tensors are on the device of the model."""

    ids: Tensor  # tokens, `[num_rows]` int64
    positions: Tensor  # of the tokens in their requests, `[num_rows]` int64
    row_seqs: Tensor  # row of the block table of each row, `[num_rows]` int32; -1 for rows that pad a graph
    lengths: Tensor  # keys that each row sees that generates, its own included, `[num_rows]` int32; 0 for padding
    slots: Tensor  # `page * PAGE_SIZE + offset` where each row's key goes, `[num_rows]` int32; -1 for nowhere
    num_decode: int  # rows that generate, or in a graph the most that may; they come first
    prompts: Prompts | None = None  # of the other rows
    sampled: Tensor | None = None  # rows whose logits are wanted, `[num_sampled]` int64; None for all


_pass: ContextVar[tuple[Rows, KVCache] | None] = ContextVar("lockstep_pass", default=None)
_probed: ContextVar[dict[int, tuple[KVShape, torch.dtype]] | None] = ContextVar("lockstep_probed", default=None)


def attend(query: Tensor, layer: int, rows: Rows, cache: KVCache, options: AttentionOptions) -> Tensor:
    """Attend with all rows of a step, whose keys are in pages: `[num_rows, heads, head_dim]` to `[.., value_dim]`."""
    pages = cache.key_pages[layer], cache.value_pages[layer], cache.block_table
    output = query.new_empty(*query.shape[:2], pages[1].shape[3])
    if split := rows.num_decode:
        generating, workspace = (rows.row_seqs[:split], rows.lengths[:split]), cache.workspace(query.shape[1], layer)
        attend_decode(query[:split], *pages, *generating, options, out=output[:split], workspace=workspace)
    if rows.prompts is not None:  # behind the other call, which writes zeros for rows that do not generate
        prompts = rows.prompts
        attend_prompts(query, *pages, prompts.row_seqs, prompts.cu_rows, prompts.lengths, options, out=output)
    return output


class TransformersDecoder:
    """Runs a Transformers model over packed rows by its own forward pass. Outside of a call, the model stays usable."""

    name = "Transformers'"

    def __init__(self, model: Any, cache: KVCache) -> None:
        take_over_attention(model)
        self._model = model
        self._cache = cache
        self._pages = _PageCache(layers=[])
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, rows: Rows) -> Tensor:
        """Run one pass; return the logits of `rows.sampled`, `[num_sampled, vocabulary]`."""
        keep = {}
        if self._takes_logits_to_keep and rows.sampled is not None:
            keep = {"logits_to_keep": rows.sampled}
        inputs = {"input_ids": rows.ids[None], "position_ids": rows.positions[None], "past_key_values": self._pages}
        token = _pass.set((rows, self._cache))
        try:
            logits: Tensor = self._model(**inputs, use_cache=True, **keep).logits[0]
        finally:
            _pass.reset(token)
        return logits if keep or rows.sampled is None else logits[rows.sampled]


class _PageCache(Cache):
    """Placeholder for Transformers' cache: keeps nothing, since attention writes and reads pages."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new rows alone."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: nothing depends on it, since every row has an explicit position."""
        return 0


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Replace the mask that Transformers makes: None in a pass, where lengths determine which keys a row sees."""
    return None if _pass.get() is not None else sdpa_mask(*args, **kwargs)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function for Transformers: `[batch, heads, rows, dim]` to `[batch, rows, heads, value_dim]`.

    In a pass, batch 0 has the step's rows. Outside of one, `key` and `value` are of all keys. `s_aux` are the sinks.
    """
    if (shapes := _probed.get()) is not None:
        shapes[module.layer_idx] = KVShape(key.shape[1], key.shape[3], value.shape[3]), key.dtype
    options = AttentionOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    current = _pass.get()
    if current is None:
        groups, is_causal = query.shape[1] // key.shape[1], attention_mask is None and query.shape[2] > 1
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return attend_batch(query, key, value, attention_mask, options, is_causal).transpose(1, 2).contiguous(), None
    (rows, cache), layer = current, module.layer_idx
    new_rows = key[0].transpose(0, 1), value[0].transpose(0, 1)
    write_keys(*new_rows, cache.key_pages[layer], cache.value_pages[layer], rows.slots)
    return attend(query[0].transpose(0, 1).contiguous(), layer, rows, cache, options)[None], None


def take_over_attention(model: Any) -> None:
    """Make a model use `_attention`; refuse models that cache anything but a key and a value per token."""
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    other = [repr(kind) for kind in sorted(set(kinds) - {"full_attention", "sliding_attention"})]
    if other or getattr(model, "_is_stateful", False):
        kind = other[0] if other else "recurrent"
        raise ConfigurationError(f"{name} has {kind} layers; packed rows need full or sliding-window attention")
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigurationError(f"{name} does not call its attention through Transformers' attention interface")
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
    model.set_attn_implementation(ATTENTION_NAME)


@torch.no_grad()
def probe_shapes(model: Any) -> tuple[list[KVShape], torch.dtype]:
    """Send one token through a model, without its experts; return shapes and dtype of each layer's key and value."""
    take_over_attention(model)
    shapes: dict[int, tuple[KVShape, torch.dtype]] = {}
    token = _probed.set(shapes)
    try:
        with stub_experts(model, lambda rows, *_: torch.zeros_like(rows)):
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
            # The class's own forward pass: a spread model's needs all ranks.
            type(model).forward(model, input_ids=ids, use_cache=False)
    finally:
        _probed.reset(token)
    if not shapes or sorted(shapes) != list(range(len(shapes))):
        raise ConfigurationError(f"{type(model).__name__} calls attention in layers {sorted(shapes)} only")
    return [shapes[index][0] for index in range(len(shapes))], shapes[0][1]


@contextlib.contextmanager
def stub_experts(model: Any, function: Callable[..., Tensor]) -> Iterator[None]:
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
