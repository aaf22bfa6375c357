"""The engine behind the HTTP server: started, watched, restarted after a loss, and the requests that wait for it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from lockstep.engine.stopping import TextDelta
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.runner.engine import Engine
from lockstep.runner.front import NewRequest
from lockstep.runner.ranks import detokenizer_of
from lockstep.runner.router import Entry
from lockstep.serve.answers import Piece, Stream
from lockstep.serve.errors import ApiError, as_api_error
from lockstep.serve.metrics import ServiceMetrics
from lockstep.serve.options import ServeOptions
from lockstep.serve.schema import ChatRequest, CompletionRequest, new_requests

logger = logging.getLogger(__name__)

Tell = Callable[[Piece | ApiError], None]  # takes a token, or the error that ends the request
Question = Literal["health", "metrics", "max_model_len"]

_LOOK_S = 0.2
_DEAD = ("stopped", "gone")
_ENDING = ("draining", "failed")  # states that a service never leaves
_MAX_LIVES = 3  # a request may be the cause of the losses: it is not kept for ever


class Generation:
    """One HTTP request's sequences: the engine's thread brings their tokens, the event loop passes them to `tell`."""

    preparing: asyncio.Future[list[NewRequest]]  # tokenizing of `asked`, which gives `requests`

    def __init__(
        self,
        service: Service,
        asked: CompletionRequest | ChatRequest,
        num_sequences: int,
        answer_id: str,
        tell: Tell,
        tell_size: Callable[[int], None],
    ) -> None:
        self.arrived_s = time.monotonic()
        self.asked: CompletionRequest | ChatRequest | None = asked
        self.answer_id, self.tell, self.tell_size = answer_id, tell, tell_size
        self.requests: list[NewRequest] = []
        self.num_prompt_tokens = 0
        self.num_sequences = self.num_open = num_sequences
        self.num_lives = 0
        self.last_token_s: dict[int, float] = {}  # of each sequence that has begun
        self._service = service

    def on_token(self, entry: Entry, delta: TextDelta) -> None:
        """See `Listener`."""
        tokens = None
        if entry.logprobs:
            drawn = (entry.checker.token_ids[-1], entry.logprobs[-1].logprob)
            tokens = [self._service.token(*one) for one in (drawn, *entry.logprobs[-1].top)]
        self._service.post(self, Piece(entry.index, delta.text, tokens, delta.finish_reason, delta.offset))

    def on_error(self, error: Exception) -> None:
        """See `Listener`."""
        self._service.post(self, error)


class Service:
    """Keeps an engine running and gives it requests. Threads other than the event loop's call only `post` and `token`.

    If an engine fails, all ranks are restarted, at most `max_restarts` times without a finished sequence in between.
    Requests without a token are kept for the new ranks; the others fail. At most `max_queue` sequences wait, from their
    arrival to their first token. `start_engine` blocks until the ranks are ready. A request waits up to `gather_s` for
    others that are being tokenized.
    """

    gather_s = 0.003

    def __init__(self, start_engine: Callable[[], Engine], options: ServeOptions) -> None:
        self.state: Literal["starting", "ready", "restarting", "draining", "failed"] = "starting"
        self.engine: Engine | None = None
        self.num_restarts = 0
        self.num_waiting = 0  # sequences without a token, those that are being tokenized included
        self._start_engine, self._options = start_engine, options
        self._failures, self._why = 0, ""
        self._running: set[Generation] = set()  # until their answers are sent
        self._first_wait_s = 0.0
        self._events: deque[tuple[Generation, Piece | Exception]] = deque()
        self._wakes = False
        self._loop = asyncio.get_running_loop()
        self._tokenizing = ThreadPoolExecutor(1, "lockstep-tokenize")  # a tokenizer is safe in one thread at a time
        self._num_preparing = 0
        self._gathered: list[Generation] = []  # not given to the ranks yet
        self._gathers_until: asyncio.TimerHandle | None = None
        self.metrics = ServiceMetrics(options.model, self)

    async def run(self) -> None:
        """Keep an engine running until the service drains; raise an error that no restart can mend."""
        while self.state not in _ENDING:
            try:
                self.engine = engine = await _in_thread(self._start_engine)
            except Exception as error:
                if self.state in _ENDING:
                    return
                if isinstance(error, ConfigurationError) or not isinstance(error, LockstepError | OSError):
                    self.give_up(error)  # the next start would raise it too
                    raise
                self._lost(error)
                continue
            self._detokenizer = detokenizer_of(engine.tokenizer)
            self.state = "ready" if self.state not in _ENDING else self.state
            kept = (one for one in self._running if one.requests and not one.last_token_s)
            self._gathered = sorted(kept, key=lambda one: one.arrived_s)
            self._submit_gathered()
            while engine.error is None:
                await asyncio.sleep(_LOOK_S)
            if self.state not in _ENDING:
                await asyncio.to_thread(engine.close)  # no news of it comes afterwards
                self._lost(engine.error)

    def _lost(self, error: Exception) -> None:
        self._why, self._failures = str(error), self._failures + 1
        if self._failures > self._options.max_restarts:
            self.give_up(error)
            raise error
        self.num_restarts += 1
        self.state = "restarting" if self.state not in _ENDING else self.state
        logger.warning("all ranks are started again (%d of %d): %s", self._failures, self._options.max_restarts, error)

    def give_up(self, error: Exception) -> None:
        """Refuse new requests and fail all others, after an error that no restart can mend."""
        self.state, self._why = "failed", str(error)
        self._fail_all()

    def health(self) -> dict[str, Any]:
        """Return the present state: `ready`, `degraded` (ranks were lost), or `down` (requests cannot be answered)."""
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
    def num_running(self) -> int:
        """Sequences that have begun and not ended."""
        return sum(one.num_open for one in self._running) - self.num_waiting

    async def ask(self, what: Question) -> Any:
        """Answer a question of an HTTP process by a JSON value."""
        if what == "health":
            return self.health()
        if what == "metrics":
            return self.metrics.text()
        return self.engine.about["max_model_len"] if self.engine is not None else None

    def start(self, asked: CompletionRequest | ChatRequest, body: bytes, num_sequences: int, answer_id: str) -> Stream:
        """Start a request, read from `body`; the reader of its stream must call `Stream.leave` afterwards."""
        stream = Stream(num_sequences, 0)
        tell_size = partial(setattr, stream, "num_prompt_tokens")
        stream.leave = partial(self.leave, self.admit(asked, num_sequences, answer_id, stream.take, tell_size))
        return stream

    def admit(
        self,
        asked: CompletionRequest | ChatRequest,
        num_sequences: int,
        answer_id: str,
        tell: Tell,
        tell_size: Callable[[int], None],
    ) -> Generation:
        """Let a request wait for the tokenizer and the ranks; `tell_size` takes its number of prompt tokens.

        Raise 400 if it can never wait, 429 if the queue is full, 503 if the service cannot take it.
        """
        engine, most = self._usable(), self._options.max_queue
        if num_sequences > most:
            text = f"n * prompts must be <= {most}, the limit of waiting sequences (--max-queue), got {num_sequences}"
            raise ApiError(400, text, "prompt" if asked.n is None else "n")
        if self.num_waiting + num_sequences > most:
            text = f"{self.num_waiting} sequences wait already, and at most {most} may: try again later"
            after_s = min(60, max(1, math.ceil(self._first_wait_s)))
            raise ApiError(429, text, code="queue_full", Retry_After=str(after_s))
        generation = Generation(self, asked, num_sequences, answer_id, tell, tell_size)
        self._running.add(generation)
        self.num_waiting += num_sequences
        self._num_preparing += 1
        generation.preparing = self._loop.run_in_executor(self._tokenizing, _prepare, generation, engine)
        generation.preparing.add_done_callback(partial(self._prepared, generation))
        return generation

    def _prepared(self, generation: Generation, preparing: asyncio.Future[list[NewRequest]]) -> None:
        """Take a request from the tokenizer: for the ranks, or as refused."""
        self._num_preparing -= 1
        generation.asked = None
        try:
            requests = preparing.result()
        except asyncio.CancelledError:  # its client has gone
            pass
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a request could not be started")
            self.num_waiting -= generation.num_open
            generation.num_open = 0
            generation.tell(as_api_error(error))
        else:
            generation.requests, generation.num_prompt_tokens = requests, _count_prompt_tokens(requests)
            generation.tell_size(generation.num_prompt_tokens)
            self._log(generation)
            if self.state in ("ready", "draining"):
                self._gathered.append(generation)
                if self._gathers_until is None:
                    self._gathers_until = self._loop.call_later(self.gather_s, self._submit_gathered)
        if not self._num_preparing:
            self._submit_gathered()

    def _log(self, one: Generation) -> None:
        if self._options.log_requests != "off":
            first = one.requests[0]
            prompt = f": {first.prompt_token_ids}" if self._options.log_requests == "prompts" else ""
            sizes = (one.answer_id, one.num_sequences, one.num_prompt_tokens, first.params.max_tokens)
            logger.info("%s: %d sequences, %d prompt tokens, at most %d new ones%s", *sizes, prompt)

    def _submit_gathered(self) -> None:
        """Give the ranks all requests that came together: prompts that begin in the same step share its cost."""
        gathered, self._gathered = self._gathered, []
        if self._gathers_until is not None:
            self._gathers_until.cancel()
            self._gathers_until = None
        calls = [(one, one.requests) for one in gathered if one.num_open]
        if calls and self.engine is not None:
            self.engine.submit_all(calls)

    def leave(self, generation: Generation) -> None:
        """Release a request that has ended, or whose client has gone."""
        self._running.remove(generation)
        assert self.engine is not None  # since the request was accepted
        if generation.num_open:
            self.engine.abandon(generation)
            self._end(generation, "abort")
        else:
            self.engine.forget(generation)

    def token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """Return a token's entry in log probabilities, named by its text, or by byte codes without one."""
        assert self.engine is not None
        content = self._detokenizer.token_bytes(token_id) if self._detokenizer is not None else b""
        if not content and self.engine.tokenizer is not None:  # a special one
            content = str(self.engine.tokenizer.convert_ids_to_tokens(token_id) or "").encode()
        try:
            name = content.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
        # JSON has no infinity; OpenAI's stand-in is -9999.
        return {"token": name, "logprob": max(logprob, -9999.0), "bytes": list(content)}

    def refused(self, status: int) -> None:
        """Count an answer with an error."""
        self.metrics.refused(status)

    async def drain(self, limit_s: float) -> Counter[str]:
        """Refuse new requests, wait until all others have ended, at most this long, and fail the rest.

        Return how many sequences ended meanwhile, by reason as in `vllm:request_success`.
        """
        could_run, self.state = self.state == "ready", "draining"
        before = self.metrics.num_ended.copy()
        until = time.monotonic() + limit_s
        while self._running and could_run and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self._fail_all()
        return self.metrics.num_ended - before

    def post(self, generation: Generation, news: Piece | Exception) -> None:
        """Pass news from the engine's thread to the event loop, which is woken once per batch."""
        self._events.append((generation, news))
        if not self._wakes:
            self._wakes = True
            self._loop.call_soon_threadsafe(self._take_events)

    def _take_events(self) -> None:
        self._wakes = False  # reset first: news that comes after the last look must wake the loop again
        now_s = time.monotonic()
        while self._events:
            generation, news = self._events.popleft()
            if not generation.num_open:  # failed or abandoned meanwhile
                continue
            if isinstance(news, Exception):
                self._take_loss(generation, news)
                continue
            if news.sequence not in generation.last_token_s:
                self._first_wait_s = now_s - generation.arrived_s
                self.num_waiting -= 1
            self.metrics.token(generation, news.sequence, now_s)
            generation.last_token_s[news.sequence] = now_s
            generation.tell(news)
            if news.finish_reason is not None:
                generation.num_open -= 1
                self._failures = 0
                self.metrics.finished(generation, news.finish_reason, 1, now_s)

    def _take_loss(self, generation: Generation, error: Exception) -> None:
        generation.num_lives += 1
        if generation.last_token_s or generation.num_lives >= _MAX_LIVES or self.state in _ENDING:
            text = f"the request was lost with the ranks that ran it ({error}); it may be sent again"
            self._fail(generation, ApiError(503, text, code="rank_failed", Retry_After="1"))

    def _usable(self) -> Engine:
        if self.engine is None or self.state in _ENDING:
            raise self._unavailable()
        return self.engine

    def _fail_all(self) -> None:
        for generation in self._running:
            if generation.num_open:
                assert self.engine is not None  # since the request was accepted
                self._fail(generation, self._unavailable())
                self.engine.abandon(generation)

    def _fail(self, generation: Generation, error: ApiError) -> None:
        self._end(generation, "error")
        generation.tell(error)

    def _end(self, generation: Generation, reason: str) -> None:
        """Count out the sequences of a request that have not ended by themselves."""
        self.metrics.finished(generation, reason, generation.num_open, time.monotonic())
        self.num_waiting -= generation.num_sequences - len(generation.last_token_s)
        generation.num_open = 0
        generation.preparing.cancel()  # no effect once it has ended
        generation.asked = None  # the tokenizer's queue refers to the request until its turn

    def _unavailable(self) -> ApiError:
        return ApiError(503, f"the service is {self.state}", code=f"service_{self.state}", Retry_After="5")


def _prepare(generation: Generation, engine: Engine) -> list[NewRequest]:
    """Tokenize and check a request, on the tokenizing thread."""
    asked = generation.asked
    return [] if asked is None else new_requests(asked, engine)  # None if its client goes away at this moment


def _count_prompt_tokens(requests: list[NewRequest]) -> int:
    """Return the tokens of all prompts; one with several choices counts once."""
    return sum({id(ids): len(ids) for ids in (new.prompt_token_ids for new in requests)}.values())


async def _in_thread(start: Callable[[], Engine]) -> Engine:
    """Like `asyncio.to_thread`, but the process can end before the thread does: a start may take minutes."""
    future: Future[Engine] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # it cannot be cancelled any more
        try:
            future.set_result(start())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="lockstep-start", daemon=True).start()
    return await asyncio.wrap_future(future)
