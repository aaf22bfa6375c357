"""Steps of `generate` and `generate_batch` as CUDA graphs: captured at the second of a kind, valid for any counts."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lockstep.moe.layers import MoELayers
from lockstep.moe.step import Step

logger = logging.getLogger(__name__)

MOST_GRAPHS = 8  # graphs of forward passes that are kept at a time; the oldest goes first
MOST_BATCH_GRAPHS = 32  # the same for each manager of `generate_batch`, whose graphs share their memory
_SEEN = object()


class StepGraphs:
    """The graphs of one model on one rank: idle steps, decode steps with a `StaticCache`, padded batches."""

    def __init__(self, layers: MoELayers) -> None:
        self._layers = layers
        # The graph of each kind of step, `_SEEN` after one call, None if a capture failed; dropped with the cache.
        self._idle: dict[Any, Any] = {}
        self._forwards: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
        # The memory pool of each paged cache's batches: steps run one by one, and outputs are copied within theirs.
        # Never one whose graphs are all gone: torch refuses to capture into what may be left of it.
        self._pools: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._batch_stream: torch.cuda.Stream | None = None

    def run_idle(self, step: Step) -> None:
        """Take part in a step without rows whose `captures` is true; from the second time on by a graph."""
        graph = _captured(self._idle, self._kernels(step), lambda: self._capture(step, Step.take_part_in_rest))
        if graph is None:
            step.take_part_in_rest()
        else:
            graph.replay()
            step.replayed()

    def run_forward(
        self, step: Step, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        num_rows: int | None = None,
    ) -> Any | None:  # fmt: skip
        """Run a forward pass by a graph if a pass of its kind was seen before; None leaves it to the caller.

        With `num_rows`, it is a batch of continuous batching, over a paged cache: the rows behind them are padding.
        """
        ids, cache_name = kwargs.get("input_ids"), "past_key_values" if num_rows is None else "cache"
        cache = kwargs.get(cache_name)
        if args or ids is None or cache is None:
            return None
        if num_rows is None and not _decodes(ids, cache):
            return None
        if num_rows is not None and ids.numel() > self._layers.typical_sizes(many=True)[0]:
            return None  # more rows than the buffers of the MoE layers have
        inputs = {name: value for name, value in kwargs.items() if name != cache_name}
        leaves, structure = pytree.tree_flatten(inputs)
        # A graph is fixed by all arguments that are not tensors, and by the shapes of tensors.
        key = (str(structure), *(_key(leaf) for leaf in leaves), *self._kernels(step))

        def capture() -> _CapturedForward:
            static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            static_inputs = pytree.tree_unflatten(static, structure)
            outputs: list[Any] = []
            cache_of = weakref.ref(cache)  # a graph must not keep its cache alive

            def issue(_: Step) -> None:
                outputs.append(forward(**{cache_name: cache_of()}, **static_inputs))

            if num_rows is None:
                return _CapturedForward(self._capture(step, issue), static, outputs[0])
            cell = torch.zeros(1, dtype=torch.int32, device=ids.device)
            pool = self._pools.get(cache) or torch.cuda.graph_pool_handle()
            graph = self._capture(step, issue, cell, ids.numel(), pool)
            self._pools[cache] = pool
            return _CapturedForward(graph, static, outputs[0], cell)

        own = self._forwards.setdefault(cache, {})
        captured = _captured(own, key, capture)
        if captured is None:
            return None
        caches, most = ([own], MOST_BATCH_GRAPHS) if captured.pads else (self._forwards.values(), MOST_GRAPHS)
        kinds = ((kept, key, graph) for kept in caches for key, graph in kept.items() if graph is not captured)
        others = [kind for kind in kinds if isinstance(kind[2], _CapturedForward) and kind[2].pads == captured.pads]
        for kept, other, _ in others[: 1 - most]:
            kept[other] = _SEEN
        output = captured.replay(leaves, cache, num_rows)
        step.replayed()
        return output

    def _kernels(self, step: Step) -> tuple[bool, ...]:
        """Return whether each layer runs the kernels for few rows: graphs with other kernels are slow, not wrong."""
        num_rows = sum(step.route.sizes)
        return tuple(layer.takes_few_rows(num_rows) for layer in self._layers)

    def _capture(
        self, step: Step, issue: Callable[[Step], Any], num_rows: torch.Tensor | None = None,
        capacity: int | None = None, pool: Any = None,
    ) -> torch.cuda.CUDAGraph:  # fmt: skip
        """Capture what `issue` launches, without running it, in a step made for the capture.

        `num_rows` holds the count of this rank's rows at each replay, of `capacity`; None for the step's own count.
        """
        # Other threads (NCCL's watchdog, the script's) may use the GPU meanwhile; only this thread must not wait.
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"capture_error_mode": "thread_local"}
        if num_rows is None:
            stream = torch.cuda.Stream()
        else:
            # Relaxed: kernels may be loaded here, since a batch that was not captured has left its padding out.
            options = {"capture_error_mode": "relaxed", "pool": pool}
            stream = self._batch_stream = self._batch_stream or torch.cuda.Stream()  # memory is reused on one alone
        stream.wait_stream(torch.cuda.current_stream())
        begun = self._layers.begin_capture(step.route.sizes, num_rows=num_rows, capacity=capacity)
        with torch.cuda.stream(stream), begun as captured:
            graph.capture_begin(**options)
            try:
                if num_rows is not None and capacity is not None:
                    captured.padding = torch.arange(capacity, device=num_rows.device)[:, None] >= num_rows
                issue(captured)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


def _decodes(ids: torch.Tensor, cache: Any) -> bool:
    """Return whether a pass adds one token per request to a cache of fixed size, whose tensors the prompt has made."""
    layers = getattr(cache, "layers", [None])
    is_filled = all(getattr(layer, "is_initialized", False) for layer in layers)
    return ids.shape[-1] == 1 and getattr(cache, "is_compileable", False) and is_filled


def _captured(kept: dict[Any, Any], key: Any, capture: Callable[[], Any]) -> Any:
    """Return the graph of a key, captured at its second call; None at the first call, or if the capture failed."""
    if key not in kept:
        kept[key] = _SEEN
        return None
    if kept[key] is _SEEN:
        try:
            kept[key] = capture()
        except RuntimeError as error:
            logger.info("a step cannot be a CUDA graph: %s", error)
            kept[key] = None
    return kept[key]


class _CapturedForward:
    def __init__(
        self, graph: torch.cuda.CUDAGraph, static: list[Any], output: Any, num_rows: torch.Tensor | None = None
    ) -> None:
        self._graph, self._static, self._class, self._num_rows = graph, static, type(output), num_rows
        self._output = {name: value for name, value in output.items() if name != "past_key_values"}

    @property
    def pads(self) -> bool:
        return self._num_rows is not None

    def replay(self, leaves: list[Any], cache: Any, num_rows: int | None = None) -> Any:
        for mine, theirs in zip(self._static, leaves, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(theirs)
        if self._num_rows is not None and num_rows is not None:
            self._num_rows.fill_(num_rows)
        self._graph.replay()
        # Copies: the next replay writes into the same tensors.
        own = pytree.tree_map_only(torch.Tensor, torch.clone, self._output)
        # Continuous batching keeps its cache to itself.
        return self._class(**own) if self.pads else self._class(**own, past_key_values=cache)


def _key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, str | int | float | bool | type(None)) else id(leaf)
