"""One rank of an engine: accepts requests, steps with all ranks, and sends tokens out."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lockstep.coordination.membership import EpochEnded
from lockstep.engine.rank_engine import RankEngine, TokenOutput
from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.stopping import StopChecker
from lockstep.engine.text import Detokenizer
from lockstep.errors import ConfigurationError, RankMismatchError
from lockstep.runner.mailbox import Mailbox

# After an agreement in which no rank had work, the next one comes after a pause that doubles up to the second figure.
# Where a rank can see that another one has begun an agreement, its pauses are longer: they end when one has, and only
# show that this rank lives.
_PAUSE_S = (0.0005, 0.02)
_WATCHED_PAUSE_S = 0.1
_SAY_S = 1.0  # maximum time between a rank's signs of life
_LOOK_S = 0.002  # how often a pause looks for such a rank: the most that an idle engine adds to a first token


def as_request(
    request_id: int, prompt_token_ids: Sequence[int], params: SamplingParams, generated: Sequence[int] = ()
) -> dict[str, Any]:
    """Return a request of an "add" message; `generated` are its tokens so far, if another rank has lost it."""
    about = {"prompt": list(prompt_token_ids), "generated": list(generated), "params": dataclasses.asdict(params)}
    return {"id": request_id, **about}


def run_rank(
    engine: RankEngine,
    mailbox: Mailbox,
    *,
    detokenizer: Detokenizer | None = None,
    after_step: Callable[[], None] | None = None,
    ends_epoch: Callable[[], bool] = lambda: False,
) -> None:
    """Serve requests until every rank has been told to stop and has none left. Every rank calls it.

    Where `ends_epoch` says so on any rank, all ranks raise `EpochEnded` after the same step, with all tokens sent.

    Ranks that share a data-parallel rank's requests get the same messages, but not at the same time: each says at every
    agreement how many have come, and acts on those that all of them have, once an agreement has shown that they are
    the same. A stop string is found here, so that it costs a request one overrun row, as a stop token does, however
    slow the router is; without a detokenizer it is left to the router.

    The mailbox brings `{"add": [as_request(...), ...]}`, whose requests begin in the same step, `{"abort": [ids]}`,
    `{"stop": True}` and, within one process, `{"fail": exception}`, which is raised once the other ranks know. It gets,
    at least every second, `{"tokens": [...], "state": [...], "rows": [...], "num_acted": n, "counts": {...}}`, whose
    state is that after its first n messages, and `{"refused": id, "why": text}`.
    """
    _RankLoop(engine, mailbox, detokenizer).run(after_step, ends_epoch)


class _RankLoop:
    def __init__(self, engine: RankEngine, mailbox: Mailbox, detokenizer: Detokenizer | None) -> None:
        self.engine = engine
        self.mailbox = mailbox
        self.detokenizer = detokenizer
        self.inbox: deque[tuple[dict[str, Any], int]] = deque()  # with the hash of all messages up to here
        self.num_received = 0
        self.num_acted = 0
        self.received_check = self.acted_check = 0
        self.num_acted_said = 0
        self.stopping = False
        self.checkers: dict[int, StopChecker] = {}  # of requests with stop strings
        self.counts: dict[str, Any] = {"steps": 0, "overrun_rows": 0, "preempted": 0, "agreement_s": 0.0}
        self.counts |= {"rows": [0] * len(engine.num_tokens_across_dp), "longest_rows": 0}
        self.said_at_s = 0.0

    def run(self, after_step: Callable[[], None] | None, ends_epoch: Callable[[], bool]) -> None:
        engine, pause_s = self.engine, _PAUSE_S[0]
        longest_s = _WATCHED_PAUSE_S if engine.can_watch else _PAUSE_S[1]
        while True:
            can_act = engine.num_messages_everywhere(self.num_received) > self.num_acted
            idle = not (engine.any_unfinished or engine.has_unfinished or can_act)
            # Otherwise the first steps of each size would wait for their graphs: 25 ms for 8 layers.
            captured = idle and not self.stopping and engine.capture_ahead()
            messages = self._pause(pause_s) if idle and not captured else self.mailbox.receive(0.0)
            pause_s = min(2 * pause_s, longest_s) if idle and not messages else _PAUSE_S[0]
            failure = next((message["fail"] for message in messages if "fail" in message), None)
            if failure is not None:
                engine.fail(failure)
                raise failure
            self._receive(messages)
            if not engine.shares_requests:
                self._act(self.num_received)
            num_acted = self.num_acted  # the step's state does not count what comes after it
            unfinished = not self.stopping or engine.has_unfinished
            ready = engine.num_messages_everywhere(self.num_received)
            said = {"num_messages": self.num_received, "messages_check": self._check_of(ready)}
            outputs = engine.step(unfinished=unfinished, ends_epoch=ends_epoch(), **said)
            if engine.epoch_ends:
                outputs += engine.drain()
            if not engine.messages_alike:
                self._differ()
            outputs = self._find_stops(outputs)
            if engine.shares_requests and not engine.all_stopped:
                self._act(ready)
            now_s = time.monotonic()
            has_acted = num_acted > self.num_acted_said
            if self._count_reports() or outputs or has_acted or now_s - self.said_at_s >= _SAY_S:
                self.said_at_s, self.num_acted_said = now_s, num_acted
                message = {"tokens": outputs, "num_acted": num_acted, "counts": dict(self.counts)}
                self.mailbox.send(message | {"state": engine.state, "rows": engine.num_tokens_across_dp})
            if after_step is not None:
                after_step()
            if engine.all_stopped:
                return
            if engine.epoch_ends:
                raise EpochEnded

    def _pause(self, pause_s: float) -> list[dict[str, Any]]:
        """Wait until a message comes, another rank begins an agreement, or the time is over."""
        until = time.monotonic() + pause_s
        while True:
            left_s = until - time.monotonic()
            look_s = min(left_s, _LOOK_S) if self.engine.can_watch else left_s
            messages = self.mailbox.receive(max(0.0, look_s))
            if messages or left_s <= look_s or self.engine.others_wait():
                return messages

    def _receive(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if self.engine.shares_requests:
                text = json.dumps(message, sort_keys=True).encode()
                self.received_check = zlib.crc32(text, self.received_check) & 0x7FFFFFFF
            self.inbox.append((message, self.received_check))
        self.num_received += len(messages)

    def _check_of(self, num_messages: int) -> int:
        """Return the hash of this rank's first messages, at least those acted on."""
        waiting = num_messages - self.num_acted
        return self.inbox[waiting - 1][1] if waiting else self.acted_check

    def _differ(self) -> NoReturn:
        assert self.engine.parallel is not None
        config = self.engine.parallel.config
        first = config.data_parallel_rank * config.tensor_parallel_size
        sharers = f"ranks {first} to {first + config.tensor_parallel_size - 1}"
        rule = "their scripts must call generate alike, from one thread each"
        error = RankMismatchError(f"{sharers} share their requests, but were given different ones: {rule}")
        self.engine.fail(error)
        raise error

    def _act(self, num_messages: int) -> None:
        """Act on those of the first messages that are not handled yet."""
        while self.num_acted < num_messages:
            message, self.acted_check = self.inbox.popleft()
            self.num_acted += 1
            if message.get("stop"):
                self.stopping = True
            elif "abort" in message:
                for request_id in message["abort"]:
                    self.checkers.pop(request_id, None)
                    self.engine.abort(request_id, missing_ok=True)
            else:
                for request in message["add"]:
                    self._add(request)

    def _add(self, request: dict[str, Any]) -> None:
        request_id = request["id"]
        try:
            params = SamplingParams(**request["params"])
            self.engine.add(request_id, request["prompt"], params, generated=request["generated"])
        except ConfigurationError as error:
            self.mailbox.send({"refused": request_id, "why": str(error)})
            return
        if params.stop_strings and self.detokenizer is not None:
            checker = self.checkers[request_id] = StopChecker(params, detokenizer=self.detokenizer)
            for token in request["generated"]:
                checker.push(token)

    def _find_stops(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        """End requests whose text a stop string has ended; their last token says so."""
        if not self.checkers:
            return outputs
        found = []
        for output in outputs:
            checker = self.checkers.get(output.request_id)
            reason = output.finish_reason
            if checker is not None:
                stopped = checker.push(output.token_id).finish_reason == "stop"
                if stopped and reason is None:
                    self.engine.abort(output.request_id)
                    reason = "stop"
                if reason is not None:
                    del self.checkers[output.request_id]
            found.append(output._replace(finish_reason=reason))
        return found

    def _count_reports(self) -> bool:
        """Add up the finished steps; return whether this rank had any work in them."""
        reports, self.engine.reports = self.engine.reports, []
        for report in reports:
            self.counts["steps"] += 1
            self.counts["overrun_rows"] += report.overrun_rows
            self.counts["preempted"] += len(report.schedule.preempted)
            self.counts["agreement_s"] += report.agreed_s - report.began_s
            self.counts["longest_rows"] += max(report.num_tokens_across_dp)
            rows = zip(self.counts["rows"], report.num_tokens_across_dp, strict=True)
            self.counts["rows"] = [before + new for before, new in rows]
        return any(report.overrun_rows or report.schedule.preempted for report in reports)
