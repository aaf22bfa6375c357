"""Decode and idle steps of `generate` as CUDA graphs: captured at the second step of a kind, valid for any counts."""

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
_SEEN = object()


class StepGraphs:
    """The graphs of one model on one rank: idle steps, and decode steps with a cache of fixed size (`StaticCache`)."""

    def __init__(self, layers: MoELayers) -> None:
        self._layers = layers
        # The graph of each kind of step, `_SEEN` after one call, None if a capture failed; dropped with the cache.
        self._idle: dict[Any, Any] = {}
        self._forwards: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def run_idle(self, step: Step) -> None:
        """Take part in a step without rows whose `captures` is true; from the second time on by a graph."""
        graph = _captured(self._idle, self._kernels(step), lambda: self._capture(step, Step.take_part_in_rest))
        if graph is None:
            step.take_part_in_rest()
        else:
            graph.replay()
            step.replayed()

    def run_forward(
        self, step: Step, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any | None:
        """Run a forward pass by a graph if a pass of its kind was seen before; None leaves it to the caller."""
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if args or ids is None or ids.shape[-1] != 1 or not getattr(cache, "is_compileable", False):
            return None
        if not all(getattr(layer, "is_initialized", False) for layer in getattr(cache, "layers", [None])):
            return None  # the prompt comes first: it makes the cache's tensors
        inputs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        leaves, structure = pytree.tree_flatten(inputs)
        # A graph is fixed by all arguments that are not tensors, and by the shapes of tensors.
        key = (str(structure), *(_key(leaf) for leaf in leaves), *self._kernels(step))

        def capture() -> _CapturedForward:
            static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            static_inputs = pytree.tree_unflatten(static, structure)
            outputs: list[Any] = []
            cache_of = weakref.ref(cache)  # a graph must not keep its cache alive
            graph = self._capture(step, lambda _: outputs.append(forward(past_key_values=cache_of(), **static_inputs)))
            return _CapturedForward(graph, static, outputs[0])

        captured = _captured(self._forwards.setdefault(cache, {}), key, capture)
        if captured is None:
            return None
        kinds = ((kept, key, graph) for kept in self._forwards.values() for key, graph in kept.items())
        others = [kind for kind in kinds if isinstance(kind[2], _CapturedForward) and kind[2] is not captured]
        for kept, other, _ in others[: 1 - MOST_GRAPHS]:
            kept[other] = _SEEN
        output = captured.replay(leaves, cache)
        step.replayed()
        return output

    def _kernels(self, step: Step) -> tuple[bool, ...]:
        """Return whether each layer runs the kernels for few rows: graphs with other kernels are slow, not wrong."""
        num_rows = sum(step.route.sizes)
        return tuple(layer.takes_few_rows(num_rows) for layer in self._layers)

    def _capture(self, step: Step, issue: Callable[[Step], Any]) -> torch.cuda.CUDAGraph:
        """Capture what `issue` launches, without running it, in a step made for the capture."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._layers.begin_capture(step.route.sizes) as captured:
            # Other threads (NCCL's watchdog, the script's) may use the GPU meanwhile; only this thread must not wait.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                issue(captured)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


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
    def __init__(self, graph: torch.cuda.CUDAGraph, static: list[Any], output: Any) -> None:
        self._graph, self._static, self._class = graph, static, type(output)
        self._output = {name: value for name, value in output.items() if name != "past_key_values"}

    def replay(self, leaves: list[Any], cache: Any) -> Any:
        for mine, theirs in zip(self._static, leaves, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(theirs)
        self._graph.replay()
        # Copies: the next replay writes into the same tensors.
        own = pytree.tree_map_only(torch.Tensor, torch.clone, self._output)
        return self._class(**own, past_key_values=cache)


def _key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, str | int | float | bool | type(None)) else id(leaf)
