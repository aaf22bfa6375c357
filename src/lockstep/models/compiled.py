"""`torch.compile` of a spread model: each MoE layer is one operation; the first one begins with the agreement."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.peers import Peers
from lockstep.moe.step import Step, current_step

_due: ContextVar[CompiledCall | None] = ContextVar("lockstep_compiled_call", default=None)


@torch.library.custom_op("lockstep::moe", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def moe(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: int) -> torch.Tensor:
    """Run rows through an MoE layer in this thread's step; shapes as in `Step.run_layer`."""
    step, call = current_step(), _due.get()
    if step is None and call is not None:
        step = call.begin()
    if step is None:
        raise RuntimeError(f"MoE layer {layer} ran outside of a step: call the compiled model inside lockstep.join")
    return step.run_layer(layer, hidden_states, topk_ids, topk_weights)


@moe.register_fake
def _(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@contextmanager
def _announce_compiling(peers: Peers) -> Iterator[None]:
    """Stop other ranks' deadlines while this rank compiles inside a step, as after a graph break."""
    from torch._dynamo.callback import callback_handler

    compiling = ExitStack()
    begins = callback_handler.register_start_callback(
        lambda _: compiling.enter_context(peers.before_layer(Phase.COMPILE))
    )
    ends = callback_handler.register_end_callback(lambda _: compiling.close())
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begins)
        callback_handler.remove_end_callback(ends)


class CompiledCall:
    """One call of a compiled model; it enters `step`, a context manager, at the first MoE layer.

    Until then the model may be compiled, for minutes, while this rank takes part in other ranks' steps with zero rows.
    `check` raises if a step ended without having run all layers.
    """

    def __init__(self, step: AbstractContextManager[Step], check: Callable[[Step | None], None]) -> None:
        self._context, self._check = step, check
        self._entered = ExitStack()
        self._step: Step | None = None
        self._token = _due.set(self)

    def begin(self) -> Step:
        """Agree on the step and enter it."""
        self._step = self._entered.enter_context(self._context)
        self._entered.enter_context(_announce_compiling(self._step.peers))
        return self._step

    def end(self, error: BaseException | None = None) -> None:
        """Leave the step, if one has begun, with the error that ended the forward pass, if any."""
        _due.reset(self._token)
        with self._entered:
            if error is not None:
                raise error
            self._check(self._step)


def when_compiled(
    forward: Callable[..., Any], original: Callable[..., Any], call: Callable[..., CompiledCall | None]
) -> Callable[..., Any]:
    """Return a forward function in which `call` begins steps and of which a compiler sees only `original`."""
    begin = torch.compiler.disable(call)
    end = torch.compiler.disable(CompiledCall.end)

    @torch.compiler.disable(recursive=False)
    def run(*args: Any, **kwargs: Any) -> Any:
        if get_eval_frame_callback() is None:
            return forward(*args, **kwargs)
        started = begin(args, kwargs)
        if started is None:
            return original(*args, **kwargs)
        try:
            output = original(*args, **kwargs)
        except BaseException as error:
            end(started, error)
            raise
        end(started)
        return output

    @functools.wraps(original)
    def from_outside(*args: Any, **kwargs: Any) -> Any:  # torch.compile(model.forward) would look into `run`
        return run(*args, **kwargs)

    return from_outside
