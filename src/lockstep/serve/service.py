"""The engine behind the HTTP face: started, watched, started again when a rank has died; and who waits for it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

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
# A request may be what its ranks die of: it is not kept for ever.
_MAX_LIVES = 3

State = Literal["starting", "ready", "restarting", "draining", "failed"]


class Generation:
    """One HTTP request's sequences: the engine's thread brings their tokens, the event loop takes them.

    Args:
        service: where it runs.
        requests: its sequences, by index.
    """

    def __init__(self, service: Service, requests: Sequence[NewRequest]) -> None:
        self.requests = requests
        self.num_open = len(requests)
        self.num_tokens = 0
        self.num_lives = 0
        self.began_s = self.last_token_s = time.monotonic()
        self.error: ApiError | None = None
        self.begun: set[int] = set()
        self._service = service
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts; a prompt with several choices counts once."""
        return sum({id(new.prompt_token_ids): len(new.prompt_token_ids) for new in self.requests}.values())

    async def steps(self) -> AsyncIterator[list[Piece]]:
        """Give what has come since the last time, as long as anything comes.

        Raises:
            ApiError: the request was lost.
        """
        while self.error is None:
            pieces, self._pieces = self._pieces, []
            if pieces:
                yield pieces
            elif not self.num_open:
                return
            else:
                await self._news.wait()
                self._news.clear()
        raise self.error

    def take(self, piece: Piece) -> None:
        """Take a token in; called in the event loop."""
        self._pieces.append(piece)
        self.num_tokens += 1
        self.begun.add(piece.index)
        self.num_open -= piece.finish_reason is not None
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End it; called in the event loop."""
        self.error, self.num_open = error, 0
        self._news.set()

    def on_token(self, entry: Entry, delta: TextDelta) -> None:
        """See `Listener`."""
        token, logprobs = entry.checker.token_ids[-1], entry.logprobs[-1] if entry.logprobs else None
        self._service.post(self, Piece(entry.index, token, delta.text, logprobs, delta.finish_reason))

    def on_error(self, error: Exception) -> None:
        """See `Listener`."""
        self._service.post(self, error)


class Service:
    """Keeps an engine running, and gives it requests.

    A rank that dies takes all ranks with it. They are started again; requests without a token yet are kept for them,
    the others fail. All methods but `post` belong to the event loop.

    Args:
        start_engine: starts the ranks; blocks until they are ready.
        metrics: counts.
        max_queue: most sequences that wait for their first token, >= 1.
        max_restarts: how often the ranks are started again without a request being finished in between.
    """

    def __init__(
        self, start_engine: Callable[[], Engine], metrics: ServiceMetrics, *, max_queue: int, max_restarts: int
    ) -> None:
        self.state: State = "starting"
        self.engine: Engine | None = None
        self.texts: TokenTexts
        self.metrics = metrics
        self.num_restarts = 0
        self.why = ""  # the ranks were lost last
        self.max_queue = max_queue
        self._start_engine = start_engine
        self._max_restarts = max_restarts
        self._failures = 0  # since a request was finished
        self._running: dict[Generation, None] = {}
        self._first_wait_s = 0.0
        self._events: deque[tuple[Generation, Piece | Exception]] = deque()
        self._wakes = False
        self._loop = asyncio.get_running_loop()
        # Of tokenizers one thread at a time may be used safely.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="lockstep-tokenize")

    async def run(self) -> None:
        """Keep an engine until the service drains.

        Raises:
            LockstepError: the engine could not be started, or died again and again.
        """
        while self.state != "draining":
            try:
                self.engine = await asyncio.to_thread(self._start_engine)
            except ConfigurationError:
                raise
            except (LockstepError, OSError) as error:
                self._lost(error)
                continue
            self.texts = TokenTexts(self.engine.tokenizer)
            if self.state != "draining":
                self.state = "ready"
            for generation in self._running:
                if generation.num_open and not generation.begun:
                    self.engine.submit(generation, generation.requests)
            while self.engine.error is None:
                await asyncio.sleep(_LOOK_S)
            if self.state != "draining":
                await asyncio.to_thread(self.engine.close)
                self._lost(self.engine.error)

    def _lost(self, error: Exception) -> None:
        self.why = str(error)
        self._failures += 1
        if self._failures > self._max_restarts:
            self.state = "failed"
            self.fail_all(self._unavailable())
            raise error
        self.num_restarts += 1
        if self.state != "draining":
            self.state = "restarting"
        text = "the ranks were lost: %s; starting all again (%d of %d without an answer)"
        logger.warning(text, error, self._failures, self._max_restarts)

    def health(self) -> dict[str, Any]:
        """Return how the service and each of its ranks is, as of now.

        `status` is `ready`, or `down` while nothing can be answered, with the reason in `why`.
        """
        engine = self.engine if self.state == "ready" else None
        ranks = engine.ranks() if engine is not None else []
        deadline_s = engine.options.deadline_s if engine is not None else 0.0
        bad = [r for r in ranks if r.state in ("stopped", "gone") or r.silent_s > deadline_s]
        why = "" if engine is not None else f"the service is {self.state}"
        if bad:
            why = "; ".join(f"rank {r.rank} is {r.state}, silent for {r.silent_s:.0f} s" for r in bad)
        elif engine is not None and engine.error is not None:
            why = str(engine.error)
        elif self.state in ("restarting", "failed"):
            why += f": {self.why}"
        shown = [{"rank": r.rank, "state": r.state, "silent_s": round(r.silent_s, 1)} for r in ranks]
        return {"status": "down" if why else "ready", "why": why, "ranks": shown, "restarts": self.num_restarts}

    @property
    def num_waiting(self) -> int:
        """Sequences without a token yet."""
        return sum(len(generation.requests) - len(generation.begun) for generation in self._running)

    @property
    def num_running(self) -> int:
        """Sequences that have begun and not ended."""
        return sum(generation.num_open for generation in self._running) - self.num_waiting

    async def prepare(self, make: Callable[[Engine], list[NewRequest]]) -> list[NewRequest]:
        """Tokenize and check a request beside the event loop."""
        if self.engine is None or self.state in ("draining", "failed"):
            raise self._unavailable()
        return await self._loop.run_in_executor(self._tokenizing, make, self.engine)

    def submit(self, requests: Sequence[NewRequest]) -> Generation:
        """Start a request.

        Raises:
            ApiError: 429 where the queue is full, 503 where nothing is taken in any more.
        """
        if self.engine is None or self.state in ("draining", "failed"):
            raise self._unavailable()
        waiting = self.num_waiting
        if waiting + len(requests) > self.max_queue:
            text = f"{waiting} sequences wait already, and at most {self.max_queue} may: try again later"
            after_s = min(60, max(1, math.ceil(self._first_wait_s)))
            raise ApiError(429, text, code="queue_full", Retry_After=str(after_s))
        generation = Generation(self, requests)
        self._running[generation] = None
        if self.state == "ready":
            self.engine.submit(generation, requests)
        return generation

    def leave(self, generation: Generation) -> None:
        """Let go of a request: it has ended, or nobody waits for it any more."""
        if self._running.pop(generation, False) is False or self.engine is None:
            return
        if generation.num_open:
            self.engine.abandon(generation)
            self.metrics.finished("abort", generation)
        else:
            self.engine.forget(generation)

    def post(self, generation: Generation, news: Piece | Exception) -> None:
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
            if generation not in self._running:
                continue
            if isinstance(news, Exception):
                self._take_loss(generation, news)
                continue
            if news.index not in generation.begun:
                self._first_wait_s = now_s - generation.began_s
                self.metrics.first_token(generation, self._first_wait_s)
            else:
                self.metrics.next_token(now_s - generation.last_token_s)
            generation.last_token_s = now_s
            generation.take(news)
            if news.finish_reason is not None:
                self._failures = 0
                self.metrics.finished(news.finish_reason, generation)

    def _take_loss(self, generation: Generation, error: Exception) -> None:
        generation.num_lives += 1
        if generation.begun or generation.num_lives >= _MAX_LIVES or self.state in ("draining", "failed"):
            text = f"the request was lost with the ranks that ran it ({error}); it may be sent again"
            generation.fail(ApiError(503, text, code="rank_failed", Retry_After="1"))
            self.metrics.finished("error", generation)

    def fail_all(self, error: ApiError) -> None:
        """End all that runs or waits."""
        for generation in self._running:
            generation.fail(error)

    async def drain(self, limit_s: float) -> None:
        """Take nothing in any more, and wait until all has ended, at most this long; end the rest, and the ranks."""
        could_run, self.state = self.state == "ready", "draining"
        until = time.monotonic() + limit_s
        while self._running and could_run and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.fail_all(self._unavailable())
        if self.engine is not None and could_run:
            await asyncio.to_thread(self.engine.close)

    def _unavailable(self) -> ApiError:
        return ApiError(503, f"the service is {self.state}", code=f"service_{self.state}", Retry_After="5")
