"""The engine behind the HTTP face: started, watched, started again when a rank has died; and who waits for it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Literal, NoReturn

from lockstep.engine.stopping import TextDelta
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.runner.engine import Engine
from lockstep.runner.front import NewRequest
from lockstep.runner.router import Entry
from lockstep.serve.answers import Piece, TokenTexts
from lockstep.serve.errors import ApiError
from lockstep.serve.metrics import ServiceMetrics

logger = logging.getLogger(__name__)

_LOOK_S = 0.2
_DEAD = ("stopped", "gone")
_MAX_LIVES = 3  # a request may be what its ranks die of: it is not kept for ever


class Generation:
    """One HTTP request's sequences: the engine's thread brings their tokens, the event loop takes them."""

    def __init__(self, post: Callable[[Generation, Piece | Exception], None], requests: Sequence[NewRequest]) -> None:
        self.requests = requests
        # A prompt with several choices counts once.
        self.num_prompt_tokens = sum({id(ids): len(ids) for ids in (new.prompt_token_ids for new in requests)}.values())
        self.num_tokens = self.num_lives = 0
        self.num_open = len(requests)
        self.begun: set[int] = set()  # sequences with a token
        self.began_s = self.last_token_s = time.monotonic()
        self._post = post
        self._pieces: list[Piece] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    async def steps(self) -> AsyncIterator[list[Piece]]:
        """Give what has come since the last time, until all has; raise what has ended it before."""
        while self._error is None:
            pieces, self._pieces = self._pieces, []
            if pieces:
                yield pieces
            elif not self.num_open:
                return
            else:
                await self._news.wait()
                self._news.clear()
        raise self._error

    def take(self, piece: Piece) -> None:
        """Take a token in."""
        self._pieces.append(piece)
        self.num_tokens += 1
        self.begun.add(piece.index)
        self.num_open -= piece.finish_reason is not None
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End it."""
        self._error, self.num_open = error, 0
        self._news.set()

    def on_token(self, entry: Entry, delta: TextDelta) -> None:
        """See `Listener`."""
        logprobs = entry.logprobs[-1] if entry.logprobs else None
        self._post(self, Piece(entry.index, entry.checker.token_ids[-1], delta.text, logprobs, delta.finish_reason))

    def on_error(self, error: Exception) -> None:
        """See `Listener`."""
        self._post(self, error)


class Service:
    """Keeps an engine running, and gives it requests. All but `_post` belongs to the event loop.

    Where an engine cannot go on, its ranks are started again, at most `max_restarts` times without a sequence being
    finished in between; requests without a token yet are kept for them, the others fail. At most `max_queue` sequences
    wait for their first token. `start_engine` blocks until the ranks are ready.
    """

    def __init__(
        self, start_engine: Callable[[], Engine], metrics: ServiceMetrics, max_queue: int, max_restarts: int
    ) -> None:
        self.state: Literal["starting", "ready", "restarting", "draining", "failed"] = "starting"
        self.engine: Engine | None = None
        self.texts: TokenTexts
        self.metrics = metrics
        self.num_restarts = 0
        self._start_engine = start_engine
        self._max_queue, self._max_restarts = max_queue, max_restarts
        self._failures, self._why = 0, ""
        self._running: dict[Generation, None] = {}  # until their answers are sent
        self._first_wait_s = 0.0
        self._events: deque[tuple[Generation, Piece | Exception]] = deque()
        self._wakes = False
        self._loop = asyncio.get_running_loop()
        self._tokenizing = ThreadPoolExecutor(1, "lockstep-tokenize")  # a tokenizer is safe in one thread at a time

    async def run(self) -> None:
        """Keep an engine until the service drains; raise what has ended it for good."""
        while self.state != "draining":
            try:
                self.engine = engine = await asyncio.to_thread(self._start_engine)
            except Exception as error:
                if isinstance(error, ConfigurationError) or not isinstance(error, LockstepError | OSError):
                    self._give_up(error)  # the next start would raise it too
                self._lost(error)
                continue
            self.texts = TokenTexts(engine.tokenizer)
            self.state = "ready" if self.state != "draining" else self.state
            for generation in self._running:
                if generation.num_open and not generation.begun:
                    engine.submit(generation, generation.requests)
            while engine.error is None:
                await asyncio.sleep(_LOOK_S)
            if self.state != "draining":
                await asyncio.to_thread(engine.close)  # after which nothing of it is heard
                self._lost(engine.error)

    def _lost(self, error: Exception) -> None:
        self._why, self._failures = str(error), self._failures + 1
        if self._failures > self._max_restarts:
            self._give_up(error)
        self.num_restarts += 1
        self.state = "restarting" if self.state != "draining" else self.state
        logger.warning("all ranks are started again (%d of %d): %s", self._failures, self._max_restarts, error)

    def _give_up(self, error: Exception) -> NoReturn:
        self.state, self._why = "failed", str(error)
        self._fail_all()
        raise error

    def health(self) -> dict[str, Any]:
        """Return how all is, as of now: `ready`; `degraded`, without ranks that are lost; `down`, with no answers."""
        engine, status = self.engine if self.state == "ready" else None, "down"
        ranks = engine.ranks() if engine is not None else []
        if engine is None:
            why = f"the service is {self.state}" + (f": {self._why}" if self.state in ("restarting", "failed") else "")
        elif engine.error is not None:
            why = str(engine.error)
        else:
            limit_s = engine.options.deadline_s
            bad = [one for one in ranks if not one.lost and (one.state in _DEAD or one.silent_s > limit_s)]
            status = "down" if bad else "degraded" if any(one.lost for one in ranks) else "ready"
            what = [f"rank {one.rank} is {one.state}, silent for {one.silent_s:.0f} s" for one in bad]
            why = "; ".join(what or [f"rank {one.rank} is lost, the others go on" for one in ranks if one.lost])
        shown = [asdict(one) | {"silent_s": round(one.silent_s, 1)} for one in ranks]
        return {"status": status, "why": why, "ranks": shown, "restarts": self.num_restarts}

    @property
    def num_waiting(self) -> int:
        """Sequences without a token yet."""
        return sum(len(one.requests) - len(one.begun) for one in self._running if one.num_open)

    @property
    def num_running(self) -> int:
        """Sequences that have begun and not ended."""
        return sum(one.num_open for one in self._running) - self.num_waiting

    async def prepare(self, make: Callable[[Engine], list[NewRequest]]) -> list[NewRequest]:
        """Tokenize and check a request beside the event loop."""
        return await self._loop.run_in_executor(self._tokenizing, make, self._usable())

    def submit(self, requests: Sequence[NewRequest]) -> Generation:
        """Start a request; 429 where the queue is full, 503 where nothing is taken in any more."""
        engine, waiting = self._usable(), self.num_waiting
        if waiting + len(requests) > self._max_queue:
            text = f"{waiting} sequences wait already, and at most {self._max_queue} may: try again later"
            after_s = min(60, max(1, math.ceil(self._first_wait_s)))
            raise ApiError(429, text, code="queue_full", Retry_After=str(after_s))
        generation = Generation(self._post, requests)
        self._running[generation] = None
        if self.state == "ready":
            engine.submit(generation, requests)
        return generation

    def leave(self, generation: Generation) -> None:
        """Let go of a request: it has ended, or nobody waits for it any more."""
        self._running.pop(generation)
        if self.engine is not None and generation.num_open:
            self.engine.abandon(generation)
            self.metrics.finished(generation, "abort", generation.num_open)
        elif self.engine is not None:
            self.engine.forget(generation)

    async def drain(self, limit_s: float) -> None:
        """Take nothing in any more, and wait until all has ended, at most this long; end the rest, and the ranks."""
        could_run, self.state = self.state == "ready", "draining"
        until = time.monotonic() + limit_s
        while self._running and could_run and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self._fail_all()
        if self.engine is not None and could_run:
            await asyncio.to_thread(self.engine.close)

    def _post(self, generation: Generation, news: Piece | Exception) -> None:
        """Hand news of the engine's thread to the event loop, which is woken once for all that comes meanwhile."""
        self._events.append((generation, news))
        if not self._wakes:
            self._wakes = True
            self._loop.call_soon_threadsafe(self._take_events)

    def _take_events(self) -> None:
        self._wakes = False  # before the last look: what comes after it wakes again
        now_s = time.monotonic()
        while self._events:
            generation, news = self._events.popleft()
            if generation not in self._running or not generation.num_open:
                continue
            if isinstance(news, Exception):
                self._take_loss(generation, news)
                continue
            is_first = news.index not in generation.begun
            self._first_wait_s = now_s - generation.began_s if is_first else self._first_wait_s
            self.metrics.token(generation, now_s, is_first=is_first)
            generation.last_token_s = now_s
            generation.take(news)
            if news.finish_reason is not None:
                self._failures = 0
                self.metrics.finished(generation, news.finish_reason, 1)

    def _take_loss(self, generation: Generation, error: Exception) -> None:
        generation.num_lives += 1
        if generation.begun or generation.num_lives >= _MAX_LIVES or self.state in ("draining", "failed"):
            text = f"the request was lost with the ranks that ran it ({error}); it may be sent again"
            self._fail(generation, ApiError(503, text, code="rank_failed", Retry_After="1"))

    def _usable(self) -> Engine:
        if self.engine is None or self.state in ("draining", "failed"):
            raise self._unavailable()
        return self.engine

    def _fail_all(self) -> None:
        for generation in self._running:
            if generation.num_open:
                self._fail(generation, self._unavailable())

    def _fail(self, generation: Generation, error: ApiError) -> None:
        self.metrics.finished(generation, "error", generation.num_open)
        generation.fail(error)

    def _unavailable(self) -> ApiError:
        return ApiError(503, f"the service is {self.state}", code=f"service_{self.state}", Retry_After="5")
