"""Between callers and ranks: one thread, which alone touches the ledger."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Protocol

from lockstep.coordination.waits import INTERRUPTIBLE_S, join
from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.stopping import RequestOutput, TextDelta
from lockstep.errors import ConfigurationError, LockstepError, RankAbsentError
from lockstep.runner.engine_ranks import OwnRank, RankProcesses
from lockstep.runner.losses import Losses, patience_with
from lockstep.runner.options import EngineOptions
from lockstep.runner.processes import LOOK_S, rank_names
from lockstep.runner.rank_loop import as_request
from lockstep.runner.router import Entry, Router


@dataclass(frozen=True)
class NewRequest:
    """A request that was checked; `index` is its place among the prompts of a call."""

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams


class Listener(Protocol):
    """Receives events of requests, on the front's thread: return at once, and raise nothing."""

    def on_token(self, entry: Entry, delta: TextDelta) -> None:
        """A request has a new token; it has ended where `delta.finish_reason` is set."""

    def on_error(self, error: Exception) -> None:
        """All unfinished requests are lost."""


Call = tuple[Listener, Sequence[NewRequest]]
"""Requests, and who hears of them."""


@dataclass
class EngineStats:
    """An engine's figures since its start.

    Attributes:
        steps: steps in which any rank had rows.
        overrun_rows: of each data-parallel rank: rows of requests that had ended when the step ran.
        preempted: of each data-parallel rank: how often a request lost its pages and was computed again.
        dropped_tokens: tokens of requests that had ended, such as abandoned ones, before their rank knew.
        num_tokens_across_dp: rows of each data-parallel rank in the latest known step.
        unfinished_requests: requests that have not ended.
        rows: of each of the model's data-parallel ranks, all steps together.
        longest_rows: of the rank with the most in each step, all steps together.
        agreement_s: of each data-parallel rank: seconds from planning a step until all ranks had agreed on it.
        num_kv_tokens: of each data-parallel rank: see `SchedulerState`.
        epoch: how often ranks were lost or came back.
    """

    steps: int = 0
    overrun_rows: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    dropped_tokens: int = 0
    num_tokens_across_dp: list[int] = field(default_factory=list)
    unfinished_requests: int = 0
    rows: list[int] = field(default_factory=list)
    longest_rows: int = 0
    agreement_s: list[float] = field(default_factory=list)
    num_kv_tokens: list[int] = field(default_factory=list)
    epoch: int = 0

    @property
    def idle_share(self) -> float:
        """Share of the ranks' time lost to uneven work, counted in rows."""
        return 1 - sum(self.rows) / (len(self.rows) * self.longest_rows) if self.longest_rows else 0.0


class Front:
    """Takes requests from callers on any thread, passes them to ranks, and reports results to the callers.

    `make_router` makes the ledger from the ranks' `ready` messages. `error` is why no requests are accepted any
    more, `heard_at_s` the time of each process's last message.
    """

    def __init__(
        self, ranks: RankProcesses | OwnRank, make_router: Callable[[dict[str, Any]], Router], options: EngineOptions
    ) -> None:
        self.ranks = ranks
        self.error: Exception | None = None
        zeros = [0] * ranks.num_data_ranks
        self.stats = EngineStats(0, [*zeros], [*zeros], agreement_s=[0.0 for _ in zeros], num_kv_tokens=[*zeros])
        self._before = copy.deepcopy(self.stats)  # as of the beginning of the epoch, since when ranks count
        self.heard_at_s = [time.monotonic()] * ranks.num_processes
        self._make_router = make_router
        self._start_timeout_s = options.start_timeout_s
        self._events: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}  # of requests that have not ended
        # Of calls, until they are abandoned or forgotten: what ranks hear must not depend on which tokens have come to
        # this process, since ranks that share requests under torchrun have a front each.
        self._calls: dict[int, list[Entry]] = {}
        self._closed = ConfigurationError("this engine is closed")
        self._told, self._looks_at_s = False, 0.0
        # A loss is survived once all have started.
        self._losses = Losses(
            ranks.num_processes, False, patience_with(options.deadline_s), ranks.kill_one, ranks.store,
            ranks.start_again, options.restart_ranks,
        )  # fmt: skip
        self._about: dict[int, dict[str, Any]] = {}  # what each process said of itself when it was ready
        self._ready: futures.Future[dict[str, Any]] = futures.Future()
        self._ended = threading.Event()
        self._router: Router
        self._thread = threading.Thread(target=self._run, name="lockstep-engine", daemon=True)

    @property
    def members(self) -> tuple[int, ...]:
        """Processes that work; those that were lost do not."""
        return self._losses.membership.members

    @property
    def failure(self) -> Exception | None:
        """What has ended the ranks, if no caller has heard of it."""
        return None if self._told or self.error is self._closed else self.error

    def start(self) -> dict[str, Any]:
        """Start the ranks and wait until they are ready; return the first rank's report."""
        self._thread.start()
        try:
            while not self._ready.done():
                futures.wait([self._ready], INTERRUPTIBLE_S)
            return self._ready.result()
        except BaseException as error:
            self.kill(error)
            raise

    def submit(self, calls: Sequence[Call]) -> None:
        """Accept the requests of all calls; each rank hears of its share at once."""
        self._put("submit", calls, None)

    def abandon(self, listener: Listener) -> None:
        """End all requests of a listener; it is not called again. May be called from a finalizer."""
        self._put("abandon", listener, None)

    def forget(self, listener: Listener) -> None:
        """Drop a listener whose requests have all ended. May be called from a finalizer."""
        self._put("forget", listener, None)

    def close(self) -> None:
        """End all requests, let the ranks end, and wait for them. No requests are accepted afterwards."""
        self._put("close", None, None)
        try:
            join(self._thread)
        except BaseException as error:
            self.ranks.kill(error)
            raise

    def kill(self, error: BaseException | None) -> None:
        """End the ranks at once, or as soon as the other ranks know why."""
        self.ranks.kill(error)
        self._put("close", None, None)
        join(self._thread)

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        self.heard_at_s[rank] = time.monotonic()
        self._put("rank", rank, message)

    def _put(self, *event: Any) -> None:
        self._events.put(event)
        if self._ended.is_set():
            self._refuse_the_rest()

    def _run(self) -> None:
        try:
            self.ranks.start(self._hear)
            self._await_ready()
            self._router = self._make_router(self._about[0])
            self._losses.can_survive = self.ranks.can_survive
            self._ready.set_result(self._about[0])
            while self._take_event():
                pass
            self._lose(self._closed)
            if self._losses.membership.is_ending:
                self.ranks.kill()
            else:
                for rank in set(range(self.ranks.num_processes)).difference(self.members):
                    self.ranks.kill_one(rank)  # it may be loading
                self.ranks.stop()
        except BaseException as error:
            if not isinstance(error, LockstepError | OSError):
                text = f"the engine's thread failed: {type(error).__name__}: {error}"
                error = LockstepError(text).with_traceback(error.__traceback__)
            self._lose(error)
            self.ranks.kill()
            if not self._ready.done():
                self._ready.set_exception(error)
        self._ended.set()
        self._refuse_the_rest()

    def _take_event(self) -> bool:
        if time.monotonic() >= self._looks_at_s:  # also where callers do not leave the queue empty
            self._looks_at_s = time.monotonic() + 2 * LOOK_S
            if self._ready.done():
                self.ranks.check(self._losses.membership.is_ending)
            self._begin_epoch_if_due()
        try:
            kind, who, what = self._events.get(timeout=2 * LOOK_S)
        except queue.Empty:
            return True
        if kind == "rank":
            self._take_message(who, what)
        elif kind == "submit":
            self._submit(who)
        elif kind == "abandon":
            self._abandon(id(who))
        elif kind == "forget":
            self._calls.pop(id(who), None)
        return kind != "close"

    def _take_message(self, rank: int, message: dict[str, Any]) -> None:
        if not {"failed", "stopped", "back"}.isdisjoint(message):
            self._losses.take(rank, message)
            self._begin_epoch_if_due()
            return
        if "ready" in message:
            self._about.setdefault(rank, message["ready"])
        if not self._ready.done() or message["epoch"] != self._router.epoch:
            return
        if "refused" in message:  # what `RankEngine.add` checks was checked before, so that this is a fault of ours
            raise LockstepError(f"rank {rank} refused a request: {message['why']}")
        processes_each = self.ranks.num_processes // self.ranks.num_data_ranks
        if "tokens" not in message or rank % processes_each:
            return
        data_rank = rank // processes_each
        state, stats, counts = message["state"], self.stats, message["counts"]
        self._router.observe(data_rank, state, message["num_acted"])
        before = self._before
        if before.steps + counts["steps"] >= stats.steps:
            stats.steps = before.steps + counts["steps"]
            stats.longest_rows = before.longest_rows + counts["longest_rows"]
            rows = self._by_rank(counts["rows"])
            stats.rows = [older + new for older, new in zip(before.rows or [0] * len(rows), rows, strict=True)]
        for name in ("agreement_s", "overrun_rows", "preempted"):
            getattr(stats, name)[data_rank] = getattr(before, name)[data_rank] + counts[name]
        stats.num_kv_tokens[data_rank] = state.num_kv_tokens
        stats.num_tokens_across_dp = self._by_rank(message["rows"])
        for request_id, position, token, logprob, top, finish in message["tokens"]:
            taken = self._router.take(request_id, position, token, logprob, top, epoch=message["epoch"])
            if taken is None:
                stats.dropped_tokens += 1
                continue
            entry, delta = taken
            listener = self._listeners[request_id]
            if delta.finish_reason is not None:
                del self._listeners[request_id]
                stats.unfinished_requests = len(self._listeners)
                if finish is None:  # a rank that does not check stop strings
                    self._send(entry.rank, {"abort": [request_id]})
            listener.on_token(entry, delta)

    def _by_rank(self, rows: Sequence[int]) -> list[int]:
        """Return the rows of each of the model's data-parallel ranks, given those of members: lost ones have none."""
        if not self.ranks.can_survive:
            return list(rows)
        of_member = dict(zip(self.members, rows, strict=True))
        return [of_member.get(rank, 0) for rank in range(self.ranks.num_processes)]

    def _await_ready(self) -> None:
        ends, everyone = time.monotonic() + self._start_timeout_s, set(range(self.ranks.num_processes))
        while late := sorted(everyone - self._about.keys()):
            if time.monotonic() > ends:
                raise RankAbsentError(f"{rank_names(late)} not ready in {self._start_timeout_s:g} s", tuple(late))
            if not self._take_event():  # the caller was interrupted
                raise self._closed

    def _begin_epoch_if_due(self) -> None:
        """Give every unfinished request to the remaining ranks, if those may continue now."""
        members = self._losses.begin_epoch()
        if members is None:
            return
        self._router.begin_epoch(members)
        self.stats.num_kv_tokens = [0 for _ in self.stats.num_kv_tokens]  # a lost rank would never update its number
        self.stats.epoch, self._before = self._router.epoch, copy.deepcopy(self.stats)
        self._send_requests(self._router.entries.values())

    def _send_requests(self, entries: Iterable[Entry]) -> None:
        by_rank: dict[int, list[dict[str, Any]]] = {}
        for entry in entries:
            request = as_request(entry.request_id, entry.prompt_token_ids, entry.params, entry.checker.token_ids)
            by_rank.setdefault(entry.rank, []).append(request)
        for rank, requests in by_rank.items():
            self._send(rank, {"add": requests})

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        self.ranks.send(rank, message | {"epoch": self._router.epoch})
        self._router.sent(rank)

    def _submit(self, calls: Sequence[Call]) -> None:
        added = []
        for listener, requests in calls:
            entries = [self._router.add(new.prompt_token_ids, new.params, new.index) for new in requests]
            self._listeners |= {entry.request_id: listener for entry in entries}
            self._calls.setdefault(id(listener), []).extend(entries)
            added += entries
        self._send_requests(added)
        self.stats.unfinished_requests = len(self._listeners)

    def _abandon(self, call: int) -> None:
        ids_of: dict[int, list[int]] = {}
        for entry in self._calls.pop(call, []):
            ids_of.setdefault(entry.rank, []).append(entry.request_id)
            self._listeners.pop(entry.request_id, None)
            self._router.abort(entry.request_id)
        for rank, ids in ids_of.items():
            if rank in self._router.ranks:  # otherwise it was lost, after these requests had ended
                self._send(rank, {"abort": ids})
        self.stats.unfinished_requests = len(self._listeners)

    def _lose(self, error: Exception) -> None:
        """Accept nothing from now on, and tell all waiting callers."""
        self.error = error
        for listener in {id(one): one for one in self._listeners.values()}.values():
            listener.on_error(error)
            self._told = self._told or error is not self._closed
        if error is self._closed:
            for call in list(self._calls):
                self._abandon(call)
        self._listeners, self._calls = {}, {}
        self.stats.unfinished_requests = 0

    def _refuse_the_rest(self) -> None:
        """Report the error for requests submitted since."""
        while True:
            try:
                kind, calls, _ = self._events.get_nowait()
            except queue.Empty:
                return
            for listener, _ in calls if kind == "submit" else ():
                assert self.error is not None
                listener.on_error(self.error)


class Outputs(Iterator[RequestOutput]):
    """The outputs of one call, each when it is done. Ends the requests if the caller stops waiting."""

    def __init__(self, front: Front, requests: Sequence[NewRequest]) -> None:
        self._front = front
        self._inbox = _Inbox()  # the front refers only to the inbox, so this object ends when its caller drops it
        self._left = len(requests)
        if requests:
            front.submit([(self._inbox, requests)])

    def __iter__(self) -> Outputs:
        return self

    def __next__(self) -> RequestOutput:
        if not self._left:
            raise StopIteration
        while not self._inbox.arrived.acquire(timeout=INTERRUPTIBLE_S):
            pass
        output = self._inbox.received.popleft()
        if isinstance(output, Exception):
            self._left = 0
            raise output
        self._left -= 1
        if not self._left:
            self._front.forget(self._inbox)
        return output

    def close(self) -> None:
        """End the requests that have not ended; their rows are free within a few steps."""
        if self._left:
            self._left = 0
            self._front.abandon(self._inbox)

    def __del__(self) -> None:
        self.close()


class _Inbox:
    def __init__(self) -> None:
        self.received: deque[RequestOutput | Exception] = deque()
        self.arrived = threading.Semaphore(0)

    def on_token(self, entry: Entry, delta: TextDelta) -> None:
        if delta.finish_reason is not None:
            self._put(entry.output())

    def on_error(self, error: Exception) -> None:
        self._put(error)

    def _put(self, received: RequestOutput | Exception) -> None:
        self.received.append(received)
        self.arrived.release()
