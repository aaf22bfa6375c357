"""One rank's queue, its pages of KV cache, and the steps formed from them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockstep.errors import ConfigurationError
from lockstep.workload.kv_pages import PAGE_SIZE, KVPages, PageKey, num_pages
from lockstep.workload.policies import SchedulerState
from lockstep.workload.request import Request, block_page_keys
from lockstep.workload.schedule import Schedule, SchedulerConfig, StepEntry


@dataclass(slots=True, eq=False)
class _Sequence:
    """An unfinished request. `num_tokens` and `num_left` change at preemptions only."""

    request: Request
    arrival: int  # the step before which it arrived
    page_keys: Sequence[PageKey]  # of the prompt's first pages
    num_tokens: int  # rows before it can generate (again): its prompt, and what it had generated when preempted
    num_left: int  # tokens to sample from there on, >= 1
    num_done: int = 0  # of these rows, those computed; up to date until it decodes
    ended: int = -1  # the step that computed the last of these rows; -1 while it does not decode

    @property
    def last_step(self) -> int:
        """The step that samples its last token, if it decodes until then."""
        return self.ended + self.num_left - 1

    def num_cached(self, step: int) -> int:
        """Tokens in the cache after `step`, the one planned last or, while it decodes, a later one."""
        return self.num_done if self.ended < 0 else self.num_tokens + step - self.ended

    @property
    def sharable(self) -> Sequence[PageKey]:
        """Keys of the pages that it may take over; at least one token is left to be computed, which gives logits."""
        return self.page_keys[: (self.num_tokens - 1) // PAGE_SIZE]


class RankScheduler:
    """One rank's queue, and the steps formed from it.

    Requests that generate go first, one token each; what is left of the token budget goes to prompts in order of
    arrival, the last of them cut where the budget ends. A prompt is admitted when the pages of all its tokens and of
    the first generated one are free. Where requests that generate need more, the one admitted last is preempted and
    goes to the front of the queue. So pages stay with requests that arrived first, and every step makes progress.

    A prompt begins behind the known pages of its beginning. A page that a step fills can be taken over from the next
    step on; one that nobody holds counts as free. A step in which requests only generate costs nothing.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._step = -1
        self._waiting: OrderedDict[int, _Sequence] = OrderedDict()
        self._partial: _Sequence | None = None  # the prompt that has begun and not ended: at most one
        self._decoding: dict[int, _Sequence] = {}  # in the order in which they were admitted
        # Step -> requests whose last token is sampled in it, in the order in which they began to generate.
        self._ends: defaultdict[int, list[int]] = defaultdict(list)
        # Sum of (num_tokens - ended) over those that decode: + step * their number = KV entries read in the step.
        self.decode_context_base = 0
        self._outstanding = 0
        self._kv_tokens = 0
        self.pages = KVPages(config.num_kv_pages)
        self._hits: list[tuple[int, int]] = []  # of the step that is being planned, as its pages that get full
        self._filled: list[Sequence[PageKey]] = []
        # How many pages the first prompt that waits can take over from others that hold them; for which prompt and
        # which version of the known pages that was worked out.
        self._last_num_held: tuple[_Sequence | None, int, int] = (None, -1, 0)
        self.num_preemptions = 0

    def __contains__(self, request_id: object) -> bool:
        """Whether a request is unfinished here: not all its tokens are planned, and it was not stopped."""
        begun = self._partial is not None and self._partial.request.request_id == request_id
        return begun or request_id in self._decoding or request_id in self._waiting

    @property
    def num_free_pages(self) -> int | None:
        """Pages of KV cache that no request holds after the step planned last; None for no limit."""
        return None if self._config.num_kv_pages is None else self.pages.num_free

    def add(self, request: Request, step: int, page_keys: Sequence[PageKey] | None = None) -> None:
        """Queue a request before `step` is planned; `page_keys` are of its first pages, None for its `block_ids`'."""
        if request.request_id in self:
            raise ConfigurationError(f"request {request.request_id} is already there and not finished")
        if step <= self._step:
            raise ConfigurationError(f"step must be above the last one, {self._step}, got {step}")
        self._config.check_fits((request,))
        if not self._config.enable_prefix_caching:
            page_keys = ()
        elif page_keys is None:
            page_keys = block_page_keys(request)
        page_keys = page_keys[: request.num_prompt_tokens // PAGE_SIZE]
        self._waiting[request.request_id] = _Sequence(
            request, step, page_keys, request.num_prompt_tokens, request.max_new_tokens
        )
        self._outstanding += request.num_computed_tokens
        self._kv_tokens += request.num_kv_tokens

    def next_step(self, step: int, run_prefills: bool = True, list_entries: bool = True) -> Schedule:
        """Plan a step, later than the last one, and mark it as done; without `run_prefills` all prompts are held.

        Callers that only count may skip steps, and with `list_entries=False` omit entries of requests that generate.
        """
        self.skip_to(step)
        preempted = []
        while self.pages.needed(step) > self.pages.num_free:
            preempted.append(self._preempt())
        self.pages.take(self.pages.needed(step))
        self._step = step
        num_decode = len(self._decoding)
        decode_context = self.decode_context_base + step * num_decode
        entries = []
        if list_entries:
            for request_id, sequence in self._decoding.items():
                start = sequence.num_cached(step) - 1
                entries.append(StepEntry(request_id, start, 1, False, True, step == sequence.last_step))
        self._outstanding -= num_decode
        num_prefill, prefill_context, held = 0, 0, False
        if not run_prefills:
            held = self._prompt_can_run(0)
        elif self._partial is not None or self._waiting:
            prompts = self._run_prefills(step, self._config.max_num_batched_tokens - num_decode)
            for entry in prompts:
                num_prefill += entry.num_tokens
                prefill_context += entry.num_tokens * (2 * entry.start + entry.num_tokens + 1) // 2
            self._outstanding -= num_prefill
            entries += prompts
        hits, filled, self._hits, self._filled = self._hits, self._filled, [], []
        forgotten = self.pages.take_forgotten()
        for keys in filled:
            self.pages.fill(keys)
        finished = tuple(self._ends.get(step, ()))
        for request_id in finished:
            self._kv_tokens -= self._decoding[request_id].request.num_kv_tokens
            self._evict(self._decoding[request_id])
        no_seat = self._partial is None and len(self._decoding) >= self._max_num_seqs
        kv_is_full = not no_seat and not self._prompt_can_run(self.pages.needed(step + 1))
        return Schedule(
            step,
            tuple(entries),
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            num_waiting=len(self._waiting),
            num_waiting_for_kv=len(self._waiting) if kv_is_full else 0,
            prefills_held=held,
            finished=finished,
            preempted=tuple(preempted),
            prefill_context_tokens=prefill_context,
            decode_context_tokens=decode_context,
            prefix_hits=tuple(hits),
            forgotten=forgotten,
        )

    def stop(self, request_ids: Iterable[int]) -> None:
        """End unfinished requests before their last token; rows of the step planned last stay planned."""
        for request_id in request_ids:
            if request_id not in self:
                raise ConfigurationError(f"request {request_id} is not an unfinished request of this rank")
            sequence = self._waiting.pop(request_id, None) or self._decoding.get(request_id) or self._partial
            assert sequence is not None
            self._outstanding -= sequence.request.num_computed_tokens - sequence.num_cached(self._step)
            self._kv_tokens -= sequence.request.num_kv_tokens
            self._evict(sequence)

    def state(self) -> SchedulerState:
        """Return what the other ranks need to know, valid after the step planned last."""
        wait = -1
        if self._prompt_can_run(self.pages.needed(self._step + 1)):
            wait = self._step + 1 - (self._partial or next(iter(self._waiting.values()))).arrival
        return SchedulerState(self._outstanding, self._kv_tokens, len(self._decoding), wait)

    def pages_change_at(self) -> int | None:
        """Return the next step in which pages run out, or after which the first prompt no longer fits; or None."""
        if self._config.num_kv_pages is None:
            return None
        pages, following = self.pages, self._step + 1
        if self._prompt_can_run(pages.needed(following)):
            at = pages.runs_out_at(following, pages.num_free - self._pages_for_prompt())
            return None if at is None else at - 1  # known to all ranks one step ahead
        return pages.runs_out_at(following, pages.num_free)

    def skip_to(self, step: int) -> None:
        """Mark all steps before `step` as done. Only steps in which requests just generate may be skipped."""
        first = self._step + 1
        if step < first:
            raise ConfigurationError(f"step must be above the last one, {self._step}, got {step}")
        if step == first:
            return
        if not self._ends.keys().isdisjoint(range(first, step)):
            raise ConfigurationError(f"step {min(self._ends)} may not be left out: a request ends in it")
        needed = self.pages.needed_between(first, step)
        if needed > self.pages.num_free:
            at = self.pages.runs_out_at(first, self.pages.num_free)
            raise ConfigurationError(f"step {at} may not be left out: the KV cache runs out of pages in it")
        self.pages.take(needed)
        self._outstanding -= (step - first) * len(self._decoding)
        self._step = step - 1

    def _run_prefills(self, step: int, left: int) -> list[StepEntry]:
        """Return the entries of prompts, which have `left` tokens of the budget."""
        entries, pages = [], self.pages
        while left > 0:
            if self._partial is None:
                if not self._prompt_can_run(0):
                    break
                _, self._partial = self._waiting.popitem(last=False)
                self._partial.num_done = self._take_over_prefix(self._partial)
            sequence, start = self._partial, self._partial.num_done
            room = (num_pages(start) + pages.num_free) * PAGE_SIZE - start
            num_tokens = min(left, sequence.num_tokens - start, room)
            if not num_tokens:
                break
            self.pages.take(num_pages(start + num_tokens) - num_pages(start))
            if keys := sequence.page_keys[start // PAGE_SIZE : (start + num_tokens) // PAGE_SIZE]:
                self._filled.append(keys)
            left -= num_tokens
            ends = start + num_tokens == sequence.num_tokens
            request_id = sequence.request.request_id
            entries.append(StepEntry(request_id, start, num_tokens, True, ends, ends and sequence.num_left == 1))
            sequence.num_done += num_tokens
            if ends:
                self._partial = None
                sequence.ended = step
                self._decoding[request_id] = sequence
                self._ends[sequence.last_step].append(request_id)
                self.decode_context_base += sequence.num_tokens - step
                pages.join(sequence.num_tokens, step)
        return entries

    def _take_over_prefix(self, sequence: _Sequence) -> int:
        """Make a new prompt hold the known pages of its beginning; return the number of their tokens."""
        sharable = sequence.sharable
        keys = sharable[: self.pages.num_known(sharable)]
        if not keys:
            return 0
        self.pages.hold(keys)
        num_tokens = len(keys) * PAGE_SIZE
        self._outstanding -= num_tokens
        self._hits.append((sequence.request.request_id, num_tokens))
        return num_tokens

    def _preempt(self) -> int:
        """Send the request admitted last back to the front of the queue; return its id."""
        sequence = self._partial or next(reversed(self._decoding.values()))
        num_lost = sequence.num_cached(self._step)
        self._evict(sequence)
        # The token generated last is not in the cache yet.
        num_generated = max(0, num_lost + 1 - sequence.num_tokens)
        sequence.num_tokens += num_generated
        sequence.num_left -= num_generated
        sequence.num_done, sequence.ended = 0, -1
        self._outstanding += num_lost
        self.num_preemptions += 1
        request_id = sequence.request.request_id
        self._waiting[request_id] = sequence
        self._waiting.move_to_end(request_id, last=False)
        return request_id

    def _evict(self, sequence: _Sequence) -> None:
        """End a request's prompt or generation, and free its pages, except those that other requests hold."""
        num_cached = sequence.num_cached(self._step)
        if sequence is self._partial:
            self._partial = None
        elif sequence.ended >= 0:
            del self._decoding[sequence.request.request_id]
            self.decode_context_base -= sequence.num_tokens - sequence.ended
            self.pages.leave(num_cached, self._step)
            self._ends[sequence.last_step].remove(sequence.request.request_id)
            if not self._ends[sequence.last_step]:
                del self._ends[sequence.last_step]
        self.pages.release(num_cached, sequence.page_keys[: num_cached // PAGE_SIZE])

    def _prompt_can_run(self, num_reserved: int) -> bool:
        """Whether the first prompt could have rows in a step in which `num_reserved` free pages are for decoding."""
        if self._partial is None and (not self._waiting or len(self._decoding) >= self._max_num_seqs):
            return False
        return self.pages.num_free - num_reserved >= self._pages_for_prompt()

    def _pages_for_prompt(self) -> int:
        """Free pages without which the first prompt has no rows in a step."""
        if self._partial is not None:
            return 0 if self._partial.num_done % PAGE_SIZE else 1
        sequence = next(iter(self._waiting.values()))
        version = self.pages.version
        if self._last_num_held[0] is not sequence or self._last_num_held[1] != version:
            self._last_num_held = sequence, version, self.pages.num_held(sequence.sharable)
        return num_pages(sequence.num_tokens + 1) - self._last_num_held[2]
