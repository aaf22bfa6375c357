# A vLLM worker's current step, the exchange of its rows, and its watch for ranks that have stopped. Nothing of vLLM
# is used here.

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lockstep.coordination.board import Board
from lockstep.dispatch.base import ExpertsShape
from lockstep.errors import LockstepError, TokenCountError
from lockstep.integrations.vllm import tell
from lockstep.moe.experts import LocalExperts

START_DEADLINE_S = 600.0  # longest wait before the first request: ranks compile and tune kernels at their own pace

_STARTS, _SERVES = 1, 2  # a worker's state on the board, see `Watch`; 0 before its first beat


def say(text: str, level: int = logging.INFO) -> None:
    """Log a line about the exchange, once per process."""
    tell(f"LOCKSTEP_VLLM=exchange: {text}", level)


@dataclass(eq=False)
class Step:
    """What a worker knows of its current step beyond vLLM's forward context."""

    num_tokens: int = 0  # of this rank's requests, without padding, 0 in a dummy batch; the host's copy
    cell: torch.Tensor | None = None  # the same on the device, `[1]` int32; captured graphs read it at each replay
    serving: bool = False  # a request has been seen
    # Start times of this worker's open calls into vLLM, `time.monotonic` seconds. There may be two: tokens of one
    # step are fetched in another thread while the next step begins.
    calls: dict[object, float] = field(default_factory=dict)
    exchanges: "dict[ExpertsShape, Exchange]" = field(default_factory=dict)
    watch: "Watch | None" = None  # None before the first exchange

    def begin(self, num_tokens: int) -> None:
        """Record this rank's tokens of requests. Call it before each step, on the step's stream; raises as `check`."""
        self.check()
        self.num_tokens = num_tokens
        self.serving = self.serving or num_tokens > 0
        if self.cell is not None:
            self.cell.fill_(num_tokens)

    def within(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of vLLM that may wait for other ranks."""
        call = object()
        self.calls[call] = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            del self.calls[call]

    def check(self) -> None:
        """Raise `RankAbsentError` for a rank that a kernel has missed: before a step, and before its tokens leave."""
        for exchange in self.exchanges.values():
            try:
                for dispatcher in exchange.dispatchers:
                    dispatcher.check()
            except LockstepError as error:
                say(str(error), logging.ERROR)
                raise


class Watch:
    """Detects ranks that are stopped or gone while vLLM itself, not one of our kernels, waits for them.

    vLLM agrees on each step by a collective that waits for minutes and names no rank. So each worker has a thread that
    writes the time on a shared board and reads the other ranks'. If the worker does not raise within `grace_s`, `end`
    ends it: vLLM's wait cannot be cancelled.
    """

    def __init__(
        self, step: Step, board: Board, rank: int, deadline_s: float, *, end: Callable[[int], None] = os._exit,
        period_s: float = 0.25, grace_s: float = 2.0,
    ) -> None:  # fmt: skip
        self.step, self.board, self.rank, self.deadline_s = step, board, rank, deadline_s
        self._end, self._period_s, self._grace_s = end, period_s, grace_s
        self._others = [other for other in range(board.num_ranks) if other != rank]
        self.beat()

    def start(self) -> None:
        """Start beating and watching, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="lockstep-watch", daemon=True).start()

    def beat(self) -> None:
        """Report that this rank is alive, and tell idle ranks, which see no requests, that some are served."""
        if any(self.board.place(other)[0] == _SERVES for other in self._others):
            self.step.serving = True
        self.board.write_place(self.rank, _SERVES if self.step.serving else _STARTS, time.monotonic_ns())

    def silent_ranks(self) -> list[int]:
        """Return the ranks that have been silent for the whole deadline while this rank is in a step."""
        now = time.monotonic()
        if not self.step.serving or now - min(list(self.step.calls.values()), default=now) < self.deadline_s:
            return []
        seen = {other: self.board.place(other) for other in self._others}
        return [other for other, (place, ago_s) in seen.items() if place and ago_s >= self.deadline_s]

    def look(self) -> str:
        """Return why this rank's step does not end, or an empty string."""
        try:
            self.step.check()
        except LockstepError as error:
            return str(error)
        silent = "".join(f", EP rank {rank}{self.board.process(rank).describe()}" for rank in self.silent_ranks())
        waited = f"silent for {self.deadline_s:g} s while EP rank {self.rank} is in a step"
        return f"{waited}: {silent[2:]}" if silent else ""

    def _run(self) -> None:
        while True:
            time.sleep(self._period_s)
            self.beat()
            reason = self.look()
            if reason:
                say(reason, logging.ERROR)
                time.sleep(self._grace_s)
                self._end(1)
                return


class Exchange:
    """Dispatch and combine for all layers of one shape: `decode` for steps in CUDA graphs, `prompt` for the rest."""

    def __init__(self, decode: Any, prompt: Any, *, rank: int = 0, sp_size: int = 1, deadline_s: float = 30) -> None:
        self.decode, self.prompt, self.dispatchers = decode, prompt, list(dict.fromkeys((decode, prompt)))
        self.rank, self.sp_size, self.deadline_s = rank, sp_size, deadline_s

    def run(
        self, step: Step, experts: LocalExperts, rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
        num_tokens_across_dp: Sequence[int],
    ) -> torch.Tensor:  # fmt: skip
        """Run this rank's rows, `[n, hidden]` bfloat16, tokens first and then padding, through their experts."""
        sizes = [-(-count // self.sp_size) for count in num_tokens_across_dp for _ in range(self.sp_size)]
        # The other ranks expect this rank's rows by vLLM's counts. Checked on the host before any row moves.
        if sizes[self.rank] != rows.shape[0] or step.num_tokens > num_tokens_across_dp[self.rank // self.sp_size]:
            raise TokenCountError(
                f"EP rank {self.rank} has {rows.shape[0]} rows for {step.num_tokens} tokens of its data-parallel rank, "
                f"but vLLM's counts of all data-parallel ranks are {list(num_tokens_across_dp)}"
            )
        largest = max(sizes)
        dispatcher = self.decode if largest <= self.decode.max_tokens_per_rank else self.prompt
        limit = dispatcher.max_tokens_per_rank
        # A graph keeps the deadline of its capture.
        in_earnest = step.serving or (rows.is_cuda and torch.cuda.is_current_stream_capturing())
        dispatcher.deadline_s = self.deadline_s if in_earnest else START_DEADLINE_S
        outputs = []
        for start in range(0, max(1, largest), limit):
            chunk = slice(start, start + limit)
            route = dispatcher.route([max(0, min(limit, size - start)) for size in sizes])
            num_tokens = self._num_tokens(step, rows.shape[0], start, limit)
            handle = dispatcher.dispatch(route, rows[chunk], topk_ids[chunk], topk_weights[chunk], num_tokens)
            rows_per_expert = sum(route.sizes) * dispatcher.top_k / dispatcher.num_experts
            result = experts.on_device(
                handle.hidden_states, handle.scales, handle.gather_index, handle.expert_offsets, rows_per_expert
            )
            outputs.append(dispatcher.combine(result, handle))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _num_tokens(self, step: Step, num_rows: int, start: int, limit: int) -> torch.Tensor:
        """Number of tokens in the chunk at `start`, `[1]` int32 on the device; this rank has `num_rows`."""
        assert step.cell is not None
        if self.sp_size == 1 and num_rows <= limit and start == 0:
            return step.cell
        # Tokens of the data-parallel rank that belong to its other ranks or to earlier chunks.
        before = self.rank % self.sp_size * num_rows + start
        return (step.cell - before).clamp_(0, max(0, min(limit, num_rows - start)))
