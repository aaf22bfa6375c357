"""The ledger of requests and their ranks. It is not a rank, and needs neither torch nor a clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.stopping import RequestOutput, StopChecker, TextDelta, TokenLogprobs
from lockstep.engine.text import Detokenizer
from lockstep.errors import ConfigurationError
from lockstep.workload.policies import LoadBalancer, SchedulerState
from lockstep.workload.request import Request


@dataclass
class Entry:
    """One request in the ledger: `index` is its place among the prompts of a call, `checker` follows its tokens."""

    index: int
    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    rank: int
    checker: StopChecker
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def output(self) -> RequestOutput:
        """Return the output of an ended request."""
        assert self.checker.finish_reason is not None
        return RequestOutput(
            index=self.index,
            request_id=self.request_id,
            text=self.checker.text,
            token_ids=tuple(self.checker.token_ids),
            rank=self.rank,
            finish_reason=self.checker.finish_reason,
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            stop_reason=self.checker.stop_reason,
        )


@dataclass
class _Load:
    """What a rank has to do: by its last state, and by messages that it had not acted on then."""

    state: SchedulerState = field(default_factory=SchedulerState)
    num_sent: int = 0
    coming: deque[tuple[int, int, int]] = field(default_factory=deque)  # number of the message, tokens, KV tokens

    def change(self, num_tokens: int, num_kv_tokens: int) -> None:
        """Note what the next message will change."""
        self.coming.append((self.num_sent + 1, num_tokens, num_kv_tokens))

    def expected(self) -> SchedulerState:
        """Return the state after all messages."""
        num_tokens = self.state.num_outstanding_tokens + sum(tokens for _, tokens, _ in self.coming)
        num_kv_tokens = self.state.num_kv_tokens + sum(kv_tokens for *_, kv_tokens in self.coming)
        return self.state._replace(num_outstanding_tokens=max(0, num_tokens), num_kv_tokens=max(0, num_kv_tokens))


class Router:
    """Chooses a rank for each request, and follows every request to its end.

    Args:
        num_ranks: data-parallel ranks, >= 1.
        load_balancing: one of `lockstep.workload.policies.LOAD_BALANCING`.
        first_rank: number of the first of these ranks, where other ranks have routers of their own.
        all_ranks: data-parallel ranks of all routers together; None for `num_ranks`. No two requests of theirs have the
            same number, which is also the seed of a request that names none.
        eos_token_ids: tokens that end a request.
        detokenizer: turns tokens into text; None for token ids only.

    Attributes:
        entries: requests that have not ended, by number.
        epoch: of the ranks that it gives requests to; tokens of earlier ones change nothing.
    """

    def __init__(
        self,
        num_ranks: int,
        load_balancing: str,
        *,
        first_rank: int = 0,
        all_ranks: int | None = None,
        eos_token_ids: Sequence[int] = (),
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self.entries: dict[int, Entry] = {}
        self.epoch, self._first_rank = 0, first_rank
        self._load_balancing = load_balancing
        self._set_ranks(range(first_rank, first_rank + num_ranks))
        self._eos_token_ids = tuple(eos_token_ids)
        self._detokenizer = detokenizer
        self._next_id = first_rank
        self._id_step = all_ranks // num_ranks if all_ranks is not None else 1

    @property
    def ranks(self) -> Collection[int]:
        """The ranks that get requests."""
        return self._loads.keys()

    def add(self, prompt_token_ids: Sequence[int], params: SamplingParams, index: int = 0) -> Entry:
        """Take a request in and choose its rank; `index` is its place among the prompts of a call."""
        checker = StopChecker(params, eos_token_ids=self._eos_token_ids, detokenizer=self._detokenizer)
        entry = Entry(index, self._next_id, list(prompt_token_ids), params, 0, checker)
        self._choose_rank(entry)
        self.entries[entry.request_id] = entry
        self._next_id += self._id_step
        return entry

    def begin_epoch(self, ranks: Sequence[int]) -> None:
        """Continue with new ranks, which have no requests yet: assign every unfinished request to one of them."""
        self.epoch += 1
        self._set_ranks(ranks)
        for entry in self.entries.values():
            self._choose_rank(entry)

    def observe(self, rank: int, state: SchedulerState, num_acted: int) -> None:
        """Record a rank's state after its first `num_acted` messages of the epoch; ranks count from `first_rank`."""
        load = self._loads[self._first_rank + rank]
        load.state = state
        while load.coming and load.coming[0][0] <= num_acted:
            load.coming.popleft()

    def sent(self, rank: int) -> None:
        """Count a message to a rank, which brings everything that was added or aborted there since the last one."""
        self._loads[rank].num_sent += 1

    def take(
        self, request_id: int, position: int, token_id: int,
        logprob: float | None = None, top_logprobs: Sequence[tuple[int, float]] | None = None, *, epoch: int = 0,
    ) -> tuple[Entry, TextDelta] | None:  # fmt: skip
        """Add a token; return its request, which leaves the ledger with its last token, and the text it adds.

        None for a token that changes nothing: it is there already, its request has ended, or its epoch has. A token
        that leaves a gap, which no rank sends, raises `ConfigurationError`.
        """
        entry = self.entries.get(request_id)
        if entry is None or epoch != self.epoch or position < len(entry.checker.token_ids):
            return None
        if position > len(entry.checker.token_ids):
            after = f"after {len(entry.checker.token_ids)} tokens"
            raise ConfigurationError(f"rank {entry.rank} sent token {position} of request {request_id} {after}")
        delta = entry.checker.push(token_id)
        if logprob is not None:
            entry.logprobs.append(TokenLogprobs(logprob, tuple((int(t), float(p)) for t, p in top_logprobs or ())))
        if delta.finish_reason is not None:
            del self.entries[request_id]
        return entry, delta

    def abort(self, request_id: int) -> Entry | None:
        """End a request now; None if it has ended."""
        entry = self.entries.pop(request_id, None)
        if entry is not None:
            entry.checker.abort()
            done, request = len(entry.checker.token_ids), _as_request(entry)
            # Its prompt has been computed once it has a token.
            left = request.max_new_tokens if done else request.num_computed_tokens
            self._loads[entry.rank].change(-left, -request.num_kv_tokens)
        return entry

    def _set_ranks(self, ranks: Sequence[int]) -> None:
        self._balancer = LoadBalancer(self._load_balancing, len(ranks))
        self._loads = {rank: _Load() for rank in ranks}

    def _choose_rank(self, entry: Entry) -> None:
        request, ranks = _as_request(entry), list(self.ranks)
        (place,) = self._balancer.assign([request], [load.expected() for load in self._loads.values()])
        entry.rank = ranks[place]
        self._loads[entry.rank].change(request.num_computed_tokens, request.num_kv_tokens)


def _as_request(entry: Entry) -> Request:
    """Return what is left of a request, as the rank sees it that gets it now."""
    done = len(entry.checker.token_ids)
    return Request(entry.request_id, 0.0, len(entry.prompt_token_ids) + done, entry.params.max_tokens - done)
