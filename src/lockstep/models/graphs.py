"""Decode steps and idle steps as CUDA graphs: captured when a step of the same kind comes again, right for any counts.

A rank's graph does not know what the others do: a captured dispatch reads their counts from the flags when it is
replayed. So one rank may replay its graph while another runs a prompt step by step; each issues the same exchanges.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from lockstep.moe.layers import MoELayers
from lockstep.moe.step import Step

logger = logging.getLogger(__name__)

_Graph = TypeVar("_Graph")
_MOST_GRAPHS = 8  # kept at a time, for as many caches; the oldest goes first


class StepGraphs:
    """The graphs of one model on one rank.

    A forward pass is captured if it has one row per sequence and a cache of fixed size (Transformers' `StaticCache`, or
    `generate(cache_implementation="static", disable_compile=True)`), at its second call with the same shapes; before,
    and where a capture fails, it runs as it is.

    Args:
        layers: the MoE layers in forward order.
    """

    def __init__(self, layers: MoELayers) -> None:
        self._layers = layers
        self._seen: set[Any] = set()
        self._failed: set[Any] = set()
        self._forwards: dict[Any, _CapturedForward] = {}
        self._idle: dict[Any, torch.cuda.CUDAGraph] = {}

    def run_idle(self, step: Step) -> None:
        """Take part in a step without rows, whose `captures` is true, by a graph from the second time on."""
        key = ("idle", *self._experts_kernels(step))
        graph = self._captured("an idle", self._idle, key, lambda: self._capture(step, Step.take_part_in_rest))
        if graph is None:
            step.take_part_in_rest()
        else:
            graph.replay()
            step.replayed()

    def run_forward(
        self, step: Step, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any | None:
        """Run a forward pass by a graph, if it is of a kind that was seen before.

        Args:
            step: that the pass belongs to; its `captures` is true.
            forward: the model's own.
            args: its positional arguments; with any, no graph is used.
            kwargs: its keyword arguments.

        Returns:
            The output with logits of its own, or None where the caller has to run the pass itself.
        """
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if args or ids is None or ids.shape[-1] != 1 or not getattr(cache, "is_compileable", False):
            return None
        if not all(getattr(layer, "is_initialized", False) for layer in getattr(cache, "layers", [None])):
            return None  # the prompt comes first: it makes the cache's tensors
        inputs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        leaves, structure = pytree.tree_flatten(inputs)
        # What is no tensor is part of the graph; of tensors only the shape is.
        key = (id(cache), str(structure), *(_key(leaf) for leaf in leaves), *self._experts_kernels(step))
        if key not in self._seen:
            weakref.finalize(cache, self._forget, key)

        def capture() -> _CapturedForward:
            static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            static_inputs = pytree.tree_unflatten(static, structure)
            outputs: list[Any] = []
            cache_of = weakref.ref(cache)  # a graph must not keep its cache alive
            graph = self._capture(step, lambda _: outputs.append(forward(past_key_values=cache_of(), **static_inputs)))
            return _CapturedForward(graph, static, outputs[0])

        captured = self._captured("a decode", self._forwards, key, capture)
        if captured is None:
            return None
        if len(self._forwards) > _MOST_GRAPHS:
            self._forwards.pop(next(iter(self._forwards)))
        output = captured.replay(leaves, cache)
        step.replayed()
        return output

    def _captured(self, kind: str, kept: dict[Any, _Graph], key: Any, capture: Callable[[], _Graph]) -> _Graph | None:
        """What was captured for a key: captured at its second coming, None at its first and where that fails."""
        if key not in kept and key in self._seen and key not in self._failed:
            try:
                kept[key] = capture()
            except RuntimeError as error:
                logger.info("%s step cannot be a CUDA graph: %s", kind, error)
                self._failed.add(key)
        self._seen.add(key)
        return kept.get(key)

    def _experts_kernels(self, step: Step) -> tuple[bool, ...]:
        """Which kernels each layer's experts run by in a step: a graph that has the others would be slow, not wrong."""
        num_rows = sum(step.route.sizes)
        return tuple(layer.takes_few_rows(num_rows) for layer in self._layers)

    def _capture(self, step: Step, issue: Callable[[Step], Any]) -> torch.cuda.CUDAGraph:
        """Record what `issue` launches, in a step of its own that is captured, without running it.

        Not through `torch.cuda.graph`, which waits for the whole device: the script may stand in a barrier on it that
        other ranks come to only after this step.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._layers.begin_capture(step.route.sizes) as captured:
            # Other threads (NCCL's watchdog, the script's) may use the GPU meanwhile; only this one must not wait.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                issue(captured)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph

    def _forget(self, key: Any) -> None:
        self._seen.discard(key)
        self._failed.discard(key)
        self._forwards.pop(key, None)


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
