"""One rank of an engine: takes requests in, steps with all ranks, hands tokens out."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lockstep.engine.rank_engine import RankEngine
from lockstep.engine.sampling_params import SamplingParams
from lockstep.errors import ConfigurationError

IDLE_S = 0.002  # how long an idle rank waits for a message between two agreements


class Mailbox(Protocol):
    """Where a rank's messages come from and go to. Messages are plain dicts that JSON can carry."""

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return what has come; if nothing has, wait at most this long for something."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""


def add_message(request_id: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> dict[str, Any]:
    """Return the message that brings a request."""
    return {"add": request_id, "prompt": list(prompt_token_ids), "params": dataclasses.asdict(params)}


def run_rank(engine: RankEngine, mailbox: Mailbox, after_step: Callable[[], None] | None = None) -> None:
    """Serve requests until every rank has been told to stop and has none left. Every rank calls it.

    Ranks that share a data-parallel rank's requests get the same messages, but not at the same time: each says at every
    agreement how many have come, and acts on those that all of them had at the agreement before.

    Args:
        engine: of this rank.
        mailbox: brings `{"add": id, "prompt": [...], "params": {...}}`, `{"abort": id}` and `{"stop": true}`; gets
            `{"tokens": [...], "state": [...], "rows": [...], "taken_in": [...]}` and `{"refused": id, "why": text}`.
        after_step: called after every step.

    Raises:
        LockstepError: see `RankEngine.step`.
    """
    inbox: deque[dict[str, Any]] = deque()
    num_received = num_done = 0
    stopping, idle = False, True
    while True:
        messages = mailbox.receive(IDLE_S if idle and not stopping else 0.0)
        inbox.extend(messages)
        num_received += len(messages)
        taken_in = []
        ready = engine.num_messages_everywhere(num_received)
        while inbox and num_done < ready:
            message = inbox.popleft()
            num_done += 1
            if message.get("stop"):
                stopping = True
            elif "abort" in message:
                engine.abort(message["abort"], missing_ok=True)
            else:
                taken_in.append(message["add"])
                try:
                    engine.add(message["add"], message["prompt"], SamplingParams(**message["params"]))
                except ConfigurationError as error:
                    mailbox.send({"refused": message["add"], "why": str(error)})
        outputs = engine.step(unfinished=not stopping or engine.has_unfinished, num_messages=num_received)
        idle = not engine.any_unfinished and not engine.has_unfinished
        if outputs or taken_in:
            mailbox.send(
                {
                    "tokens": [list(output) for output in outputs],
                    "state": list(engine.state),
                    "rows": list(engine.num_tokens_across_dp),
                    "taken_in": taken_in,
                }
            )
        if after_step is not None:
            after_step()
        if engine.all_stopped:
            return
