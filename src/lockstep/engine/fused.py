"""Decoder layers with the small operations fused, each tried beside its module's own forward pass."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.engine import decoder_kernels as kernels
from lockstep.engine.attention import AttentionOptions
from lockstep.engine.decoder import Rows, attend, stub_experts
from lockstep.engine.kv_cache import KVCache
from lockstep.models.norms import is_fused, is_rms_norm

logger = logging.getLogger(__name__)

_TRIED_ROWS = 8
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


class _Unknown(Exception):
    """Why a model is not run by fused layers."""


@dataclass
class _Layer:
    """One decoder layer's parameters and settings."""

    index: int
    input_norm: Any
    post_norm: Any
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    output: torch.nn.Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    norm_eps: float
    num_heads: int
    options: AttentionOptions
    mlp: Any
    router: Any  # None: the block runs as the module that it is
    top_k: int
    renormalize: bool


class FusedDecoder:
    """Runs a model's layers over packed rows: 12 or 13 kernels each in place of some 40."""

    name = "fused"

    def __init__(self, model: Any, cache: KVCache, layers: list[_Layer]) -> None:
        self._model = model
        self._base = model.model
        self._cache = cache
        self._layers = layers

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, cache: KVCache) -> FusedDecoder | None:
        """Take a model on a GPU apart and try its layers, over the first page; None, and why in the log, if unknown."""
        try:
            base = model.model
            layers = [_take_apart(layer, index) for index, layer in enumerate(base.layers)]
            if not _is_norm(base.norm) or not isinstance(model.lm_head, torch.nn.Linear):
                raise _Unknown("another norm or head at the end")
            decoder = cls(model, cache, layers)
            decoder._try()
            decoder._share_weights()
        except (AttributeError, _Unknown) as reason:
            logger.info("%s runs by Transformers' own layers: %s", type(model).__name__, reason)
            return None
        return decoder

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Tensor:
        """Run one pass; return the logits of `rows.sampled`, `[num_sampled, vocabulary]`."""
        hidden = self._base.embed_tokens(rows.ids)
        cos, sin = self._base.rotary_emb(hidden[None], position_ids=rows.positions[None])
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
        residual: Tensor | None = None
        for layer in self._layers:
            hidden, residual = self._run(layer, hidden, residual, cos, sin, rows)
        if rows.sampled is not None:
            hidden, residual = hidden[rows.sampled], residual[rows.sampled] if residual is not None else None
        return self._head(hidden, residual)

    def _head(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Logits of the last layer's rows."""
        logits: Tensor = self._model.lm_head(_add_norm(hidden, residual, self._base.norm)[0])
        return logits

    def _run(
        self, layer: _Layer, hidden: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Run one layer; its last addition is left to the next one's norm."""
        cache = self._cache
        normed, residual = _add_norm(hidden, residual, layer.input_norm)
        qkv = torch.nn.functional.linear(normed, layer.qkv_weight, layer.qkv_bias)
        key_pages, value_pages = cache.key_pages[layer.index], cache.value_pages[layer.index]
        query = kernels.rope_and_write(
            qkv, cos, sin, layer.q_norm, layer.k_norm, layer.norm_eps, rows.slots, key_pages, value_pages,
            layer.num_heads,
        )  # fmt: skip
        attended = attend(query, layer.index, rows, cache, layer.options)
        hidden = layer.output(attended.flatten(1))
        normed, residual = _add_norm(hidden, residual, layer.post_norm)
        if layer.router is None:
            return layer.mlp(normed[None])[0], residual
        logits = torch.nn.functional.linear(normed, layer.router.weight)
        ids, weights = kernels.route(logits, layer.top_k, layer.renormalize)
        return layer.mlp.experts(normed, ids, weights), residual

    def _try(self) -> None:
        """Raise `_Unknown` unless every layer computes what its module does, up to rounding."""
        base, device = self._base, self._cache.block_table.device
        dtype = self._layers[0].qkv_weight.dtype
        generator = torch.Generator().manual_seed(0)
        width = self._layers[0].qkv_weight.shape[1]
        num_rows = min(_TRIED_ROWS, self._cache.block_table.shape[0])
        hidden = torch.randn(num_rows, width, generator=generator).to(device, dtype)
        places = torch.arange(num_rows, device=device)
        slots = places.to(torch.int32)
        table = self._cache.block_table
        kept, table[0, 0] = int(table[0, 0]), 0
        # Every row as a request that generates, all of them over one page: as if the rows before had come earlier.
        rows = Rows(places, places, torch.zeros_like(slots), slots + 1, slots, num_rows)
        cos, sin = base.rotary_emb(hidden[None], position_ids=places[None])
        with stub_experts(self._model, _sum_of_weights):
            for layer in self._layers:
                expected = base.layers[layer.index](
                    hidden[None], attention_mask=None, position_ids=places[None], position_embeddings=(cos, sin)
                )
                expected = expected[0] if isinstance(expected, tuple) else expected
                found, residual = self._run(layer, hidden, None, cos[0].contiguous(), sin[0].contiguous(), rows)
                error = float((found + residual - expected[0]).float().norm() / (expected[0] - hidden).float().norm())
                if not error < _TOLERANCE[dtype]:
                    raise _Unknown(f"layer {layer.index} computes something else, relative error {error:.2g}")
                if layer.router is not None:
                    _try_router(layer, hidden)
        table[0, 0] = kept
        embedded = base.embed_tokens(places[:1])
        if (embedded - base.embed_tokens.weight[:1]).abs().max() > 0:
            raise _Unknown("embeddings are scaled")
        # Nothing between the last norm and the logits but the head: compared on a pass without layers.
        first, second = self._own_logits(places[:1]), self._head(embedded, None)
        if not float((first - second).float().norm() / first.float().norm()) < _TOLERANCE[dtype]:
            raise _Unknown("logits are scaled or capped")

    def _share_weights(self) -> None:
        """Let the modules' projections be views of the joined ones, so that nothing is held twice."""
        for layer in self._layers:
            attention = self._base.layers[layer.index].self_attn
            parts = attention.q_proj, attention.k_proj, attention.v_proj
            sizes = [part.out_features for part in parts]
            for part, weight in zip(parts, layer.qkv_weight.split(sizes), strict=True):
                part.weight.data = weight
            if layer.qkv_bias is not None:
                for part, bias in zip(parts, layer.qkv_bias.split(sizes), strict=True):
                    part.bias.data = bias

    def _own_logits(self, ids: Tensor) -> Tensor:
        """Logits of the model's own forward pass with its layers taken out."""
        base = self._base
        layers, number = base.layers, base.config.num_hidden_layers
        base.layers, base.config.num_hidden_layers = torch.nn.ModuleList(), 0
        try:
            logits: Tensor = type(self._model).forward(self._model, input_ids=ids[None], use_cache=False).logits
        finally:
            base.layers, base.config.num_hidden_layers = layers, number
        return logits[0]


def _add_norm(hidden: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    return kernels.add_rms_norm(hidden, residual, norm.weight, norm.variance_epsilon)


def _is_norm(module: Any) -> bool:
    return is_fused(module) or is_rms_norm(module)


def _take_apart(layer: Any, index: int) -> _Layer:
    attention, head_dim = layer.self_attn, layer.self_attn.head_dim
    projections = *inputs, output = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    q_norm: Any = getattr(attention, "q_norm", None)
    k_norm: Any = getattr(attention, "k_norm", None)
    head_norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    biases = [part.bias for part in inputs if part.bias is not None]
    problem = None
    if any(type(part) is not torch.nn.Linear for part in projections):
        problem = "has projections that are no plain matrices"
    elif len(biases) not in (0, 3):
        problem = "has a bias on some projections only"
    elif len(head_norms) == 1:
        problem = "norms queries or keys only"
    elif not all(_is_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm, *head_norms)):
        problem = "has norms of another formula"
    elif head_norms and (len(q_norm.weight) != head_dim or q_norm.variance_epsilon != k_norm.variance_epsilon):
        problem = "norms queries over other than one head"
    elif head_dim % 2 or getattr(attention, "sinks", None) is not None:
        problem = "has attention of another kind"
    if problem is not None:
        raise _Unknown(f"layer {index} {problem}")
    router: Any = getattr(layer.mlp, "gate", None) if getattr(layer.mlp, "experts", None) is not None else None
    known = router is not None and set(dict(layer.mlp.named_children())) == {"gate", "experts"}
    known = known and set(dict(router.named_parameters())) == {"weight"} and getattr(router, "top_k", None) is not None
    return _Layer(
        index=index,
        input_norm=layer.input_layernorm,
        post_norm=layer.post_attention_layernorm,
        qkv_weight=torch.cat([part.weight.detach() for part in inputs]),
        qkv_bias=torch.cat([bias.detach() for bias in biases]) if biases else None,
        output=output,
        q_norm=q_norm.weight if head_norms else None,
        k_norm=k_norm.weight if head_norms else None,
        norm_eps=q_norm.variance_epsilon if head_norms else 0.0,
        num_heads=attention.q_proj.out_features // head_dim,
        options=AttentionOptions(scaling=attention.scaling, sliding_window=getattr(attention, "sliding_window", None)),
        mlp=layer.mlp,
        router=router if known else None,
        top_k=router.top_k if known else 0,
        # Mixtral's router has no switch for it: its weights always sum to 1, which `_try_router` checks.
        renormalize=bool(getattr(router, "norm_topk_prob", True)),
    )


def _try_router(layer: _Layer, hidden: Tensor) -> None:
    logits = torch.nn.functional.linear(hidden, layer.router.weight)
    ids, weights = kernels.route(logits, layer.top_k, layer.renormalize)
    outputs = layer.router(hidden)
    own_weights, own_ids = (outputs[1], outputs[2]) if len(outputs) == 3 else (outputs[0], outputs[1])
    if own_ids.shape != ids.shape or own_weights.shape != weights.shape:
        raise _Unknown(f"the router of layer {layer.index} returns something else")
    # Equal logits may be taken in any order, so not the experts are compared but what they have.
    same = torch.allclose(
        logits.gather(1, ids.long()).float().sort(1).values, logits.gather(1, own_ids.long()).float().sort(1).values
    )
    close = torch.allclose(weights.sort(1).values, own_weights.float().sort(1).values, rtol=1e-2, atol=1e-4)
    if not same or not close:
        raise _Unknown(f"the router of layer {layer.index} chooses otherwise")


def _sum_of_weights(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Stands in for experts: shows what they were called with, but for the experts' numbers."""
    return (rows.float() * weights.float().sum(-1, keepdim=True)).to(rows.dtype)
