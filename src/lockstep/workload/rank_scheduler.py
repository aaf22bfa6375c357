"""One rank's queue, its pages of KV cache, and the steps formed from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from lockstep.errors import ConfigurationError
from lockstep.workload.kv_pages import PAGE_SIZE, KVPages, PageKey, num_pages
from lockstep.workload.policies import SchedulerState
from lockstep.workload.prefix_pages import PrefixPages
from lockstep.workload.request import Request, block_page_keys
from lockstep.workload.schedule import Schedule, SchedulerConfig, StepEntry


class _Sequence:
    """An unfinished request. `num_tokens` and `num_left` change at preemptions only.

    Attributes:
        request: the request.
        arrival: the step in which it arrived.
        num_tokens: rows to compute before it can generate (again): its prompt, and what it had generated before it was
            preempted.
        num_left: tokens to sample from there on, >= 1.
        ended: the step that computed the last of these rows; meaningful while it decodes.
        page_keys: of the prompt's first pages.
    """

    __slots__ = ("arrival", "ended", "num_left", "num_tokens", "page_keys", "request")

    def __init__(self, request: Request, arrival: int, page_keys: Sequence[PageKey]) -> None:
        self.request = request
        self.arrival = arrival
        self.page_keys = page_keys
        self.num_tokens = request.num_prompt_tokens
        self.num_left = request.max_new_tokens
        self.ended = -1

    @property
    def last_step(self) -> int:
        """The step that samples its last token, if it decodes until then."""
        return self.ended + self.num_left - 1

    def num_cached(self, step: int) -> int:
        """Tokens in the cache after `step`, while it decodes."""
        return self.num_tokens + step - self.ended

    def filled(self, start: int, stop: int) -> Sequence[PageKey]:
        """Keys of the pages that are full once the tokens `start..stop-1` are in the cache, and were not before."""
        return self.page_keys[start // PAGE_SIZE : stop // PAGE_SIZE]

    @property
    def sharable(self) -> Sequence[PageKey]:
        """Keys of the pages that it may take over; at least one token is left to be computed, which gives logits."""
        return self.page_keys[: (self.num_tokens - 1) // PAGE_SIZE]


class RankScheduler:
    """One rank's queue, and the steps formed from it.

    Requests join and leave between steps (continuous batching). Requests that generate go first, one token each; what
    is left of the token budget goes to prompts in order of arrival, the last of them cut where the budget ends.

    With a limited KV cache, an entry of a step holds the pages of its `start + num_tokens` tokens, no more. A prompt is
    admitted when the pages of all its tokens and of the first generated one are free. Where requests that generate need
    more pages than are free, the request admitted last is preempted: it gives its pages back and goes to the front of
    the queue. So the requests that hold pages are always those that arrived first, the first of them is never
    preempted, and every step with unfinished requests gets somewhere.

    With `enable_prefix_caching`, a prompt begins behind the pages of its beginning that are known, and holds them as
    their other holders do. A page that a prompt fills in one step can be taken over from the next step on: by then the
    step that fills it has been issued. A page that nobody holds counts as free: it is used when no other is left.

    Nothing is kept per step: a step in which no prompt runs, no request ends and no page is missing costs nothing,
    however many requests generate.

    Args:
        config: budget and limits.

    Attributes:
        num_preemptions: how often a request has been preempted so far.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._step = -1
        self._waiting: OrderedDict[int, _Sequence] = OrderedDict()
        self._partial: _Sequence | None = None  # the prompt that has begun and not ended: at most one
        self._partial_done = 0
        self._decoding: dict[int, _Sequence] = {}  # in the order in which they were admitted
        self._ends: dict[int, list[int]] = {}  # step -> requests whose last token is sampled in it
        self._num_decoding = 0  # requests that generate in the step to come
        self._context_base = 0  # sum of (num_tokens - ended) over these: + step * num_decoding = KV entries they read
        self._outstanding = 0
        self._kv_tokens = 0
        self._pages = None if config.num_kv_pages is None else KVPages(config.num_kv_pages)
        self._prefixes = PrefixPages(keeps_unheld=self._pages is not None)
        self._hits: list[tuple[int, int]] = []  # of the step that is being planned, as its pages that get full
        self._filled: list[Sequence[PageKey]] = []
        # The prompt and the version of the known pages for which `_num_held` was worked out last, and what came out.
        self._last_num_held: tuple[_Sequence | None, int, int] = (None, -1, 0)
        self.num_preemptions = 0

    def __contains__(self, request_id: object) -> bool:
        """Whether a request is unfinished here: not all its tokens are planned, and it was not stopped."""
        partial = self._partial
        return (
            request_id in self._decoding
            or request_id in self._waiting
            or (partial is not None and partial.request.request_id == request_id)
        )

    @property
    def num_free_pages(self) -> int | None:
        """Pages of KV cache that no request holds after the step planned last; None for no limit."""
        return None if self._pages is None else self._pages.num_free

    def add(self, request: Request, step: int, page_keys: Sequence[PageKey] | None = None) -> None:
        """Put a request at the end of the queue before `step` is planned; it may run from that step on.

        Args:
            request: its id must not be in use; its `arrival_s` is not read.
            step: number of the step to be planned next.
            page_keys: of whole pages of its prompt, from the first on; None takes those of its `block_ids`. Without
                `enable_prefix_caching`, they are not used.

        Raises:
            ConfigurationError: for an id in use, a step that was planned already, or a request that can never fit into
                the KV cache.
        """
        if request.request_id in self:
            raise ConfigurationError(f"request {request.request_id} is already there and not finished")
        if step <= self._step:
            raise ConfigurationError(f"step must be above the last one, {self._step}, got {step}")
        if self._pages is not None:
            self._config.check_fits((request,))
        if not self._config.enable_prefix_caching:
            page_keys = ()
        elif page_keys is None:
            page_keys = block_page_keys(request)
        sequence = _Sequence(request, step, page_keys[: request.num_prompt_tokens // PAGE_SIZE])
        self._waiting[request.request_id] = sequence
        self._outstanding += request.num_computed_tokens
        self._kv_tokens += request.num_kv_tokens

    def next_step(self, step: int, run_prefills: bool = True, list_entries: bool = True) -> Schedule:
        """Plan a step and take it as done.

        Args:
            step: its number, above the last one's. A caller that only counts may leave out steps, see `skip_to`.
            run_prefills: the answer of `prefills_run`; False holds all prompts.
            list_entries: False leaves out the entries that generate, for callers that only count.
        """
        self.skip_to(step)
        preempted = () if self._pages is None else self._take_decode_pages(step)
        self._step = step
        num_decode, decode_context = self._num_decoding, self._context_base + step * self._num_decoding
        entries = self._decode_entries(step) if list_entries else []
        self._outstanding -= num_decode
        num_prefill, prefill_context, held = 0, 0, False
        if not run_prefills:
            held = self._prompt_can_run(0)
        elif self._partial is not None or self._waiting:
            num_prefill, prefill_context = self._run_prefills(
                step, self._config.max_num_batched_tokens - num_decode, entries
            )
            self._outstanding -= num_prefill
        hits, filled, self._hits, self._filled = self._hits, self._filled, [], []
        forgotten = self._prefixes.take_forgotten()
        for keys in filled:
            self._free(self._prefixes.fill(keys))
        finished = tuple(self._ends.pop(step, ()))
        for request_id in finished:
            self._leave(self._decoding.pop(request_id))
        return Schedule(
            step,
            tuple(entries),
            num_prefill,
            num_decode,
            len(self._waiting),
            0 if self._pages is None else self._num_waiting_for_kv(self._pages),
            held,
            finished,
            preempted,
            prefill_context,
            decode_context,
            tuple(hits),
            forgotten,
        )

    def stop(self, request_ids: Iterable[int]) -> None:
        """Let requests end before their last token: by a stop token, a stop string, or because they were aborted.

        Call it between two steps; the rows of the step planned last stay planned. It does not matter whether a request
        waits, has begun, generates, or was preempted. Requests that reach `max_new_tokens` leave by themselves, in the
        step that samples their last token: `request_id in scheduler` tells.

        Args:
            request_ids: of unfinished requests of this rank.

        Raises:
            ConfigurationError: if an id is not one of these. Those before it have been stopped.
        """
        for request_id in request_ids:
            if request_id in self._decoding:
                sequence = self._decoding.pop(request_id)
                self._outstanding -= sequence.last_step - self._step
                self._forget_end(sequence)
                self._leave(sequence)
            elif request_id in self._waiting:
                sequence = self._waiting.pop(request_id)
                self._outstanding -= sequence.request.num_computed_tokens
                self._kv_tokens -= sequence.request.num_kv_tokens
            elif self._partial is not None and self._partial.request.request_id == request_id:
                sequence, num_done = self._drop_partial()
                self._outstanding -= sequence.request.num_computed_tokens - num_done
                self._kv_tokens -= sequence.request.num_kv_tokens
            else:
                raise ConfigurationError(f"request {request_id} is not an unfinished request of this rank")

    def state(self) -> SchedulerState:
        """Return what the other ranks need to know, as of after the step planned last."""
        arrival = self._first_arrival()
        wait = -1 if arrival < 0 else self._step + 1 - arrival
        return SchedulerState(self._outstanding, self._kv_tokens, self._num_decoding, wait)

    def counts(self) -> tuple[int, int, bool, int]:
        """Return what a simulation needs to carry on without visiting this rank.

        Returns:
            `num_decoding` of the coming step; the part of its `decode_context_tokens` that does not grow with the step;
            whether there is a queue or a prompt that has begun; the arrival step of the first prompt that could run,
            or -1.
        """
        has_prompts = self._partial is not None or bool(self._waiting)
        return self._num_decoding, self._context_base, has_prompts, self._first_arrival() if has_prompts else -1

    def pages_change_at(self) -> int | None:
        """Return the next step that a simulation must visit for the sake of pages, while the rank only generates.

        That is the step in which pages run out, or the one after which the first prompt could run no more. None where
        neither will happen.
        """
        pages = self._pages
        if pages is None:
            return None
        following = self._step + 1
        if self._prompt_can_run(pages.needed(following)):
            at = pages.runs_out_at(following, pages.num_free - self._pages_for_prompt())
            return None if at is None else at - 1  # known to all ranks one step ahead
        return pages.runs_out_at(following, pages.num_free)

    def skip_to(self, step: int) -> None:
        """Take all steps before `step` as done.

        Steps may be left out in which this rank does nothing but generate: no request ends in them, pages do not run
        out, and prompts are held or there are none.

        Raises:
            ConfigurationError: if `step` is not above the last one planned, or more than that happens before it.
        """
        first = self._step + 1
        if step < first:
            raise ConfigurationError(f"step must be above the last one, {self._step}, got {step}")
        if step == first:
            return
        if not self._ends.keys().isdisjoint(range(first, step)):
            raise ConfigurationError(f"step {min(self._ends)} may not be left out: a request ends in it")
        if self._pages is not None:
            needed = self._pages.needed_between(first, step)
            if needed > self._pages.num_free:
                at = self._pages.runs_out_at(first, self._pages.num_free)
                raise ConfigurationError(f"step {at} may not be left out: the KV cache runs out of pages in it")
            self._take(needed)
        self._outstanding -= (step - first) * self._num_decoding
        self._step = step - 1

    def _decode_entries(self, step: int) -> list[StepEntry]:
        entries = []
        for request_id, sequence in self._decoding.items():
            start = sequence.num_cached(step) - 1
            entries.append(StepEntry(request_id, start, 1, False, True, step == sequence.last_step))
        return entries

    def _run_prefills(self, step: int, budget: int, entries: list[StepEntry]) -> tuple[int, int]:
        """Append the prompts' entries to `entries`; return their rows, and the KV entries that these attend to."""
        left, context, pages = budget, 0, self._pages
        while left > 0:
            if self._partial is None:
                if not self._prompt_can_run(0):
                    break
                _, self._partial = self._waiting.popitem(last=False)
                self._partial_done = self._take_over_prefix(self._partial)
            sequence, start = self._partial, self._partial_done
            num_tokens = min(left, sequence.num_tokens - start)
            if pages is not None:
                num_tokens = min(num_tokens, (num_pages(start) + pages.num_free) * PAGE_SIZE - start)
                if not num_tokens:
                    break
                self._take(num_pages(start + num_tokens) - num_pages(start))
            if keys := sequence.filled(start, start + num_tokens):
                self._filled.append(keys)
            left -= num_tokens
            context += num_tokens * (2 * start + num_tokens + 1) // 2
            ends = start + num_tokens == sequence.num_tokens
            request_id = sequence.request.request_id
            entries.append(StepEntry(request_id, start, num_tokens, True, ends, ends and sequence.num_left == 1))
            if not ends:
                self._partial_done += num_tokens
                continue
            self._partial = None
            sequence.ended = step
            self._decoding[request_id] = sequence
            self._ends.setdefault(sequence.last_step, []).append(request_id)
            self._num_decoding += 1
            self._context_base += sequence.num_tokens - step
            if pages is not None:
                pages.join(sequence.num_tokens, step)
        return budget - left, context

    def _take_over_prefix(self, sequence: _Sequence) -> int:
        """Let a prompt that begins hold the known pages of its beginning; return their tokens."""
        sharable = sequence.sharable
        keys = sharable[: self._prefixes.num_known(sharable)]
        if not keys:
            return 0
        unheld = self._prefixes.hold(keys)
        if self._pages is not None:
            self._pages.take(unheld)
        num_tokens = len(keys) * PAGE_SIZE
        self._outstanding -= num_tokens
        self._hits.append((sequence.request.request_id, num_tokens))
        return num_tokens

    def _take(self, count: int) -> None:
        """Use up free pages; known ones that nobody holds are forgotten where no others are left."""
        assert self._pages is not None
        self._pages.take(count)
        self._prefixes.forget_oldest(self._pages.num_free)

    def _free(self, count: int) -> None:
        if self._pages is not None:
            self._pages.free(count)

    def _release(self, sequence: _Sequence, num_cached: int) -> None:
        """Give the pages of a request with `num_cached` tokens in the cache back, as far as nobody else holds them."""
        keys = sequence.page_keys[: num_cached // PAGE_SIZE]
        self._free(num_pages(num_cached) - len(keys) + self._prefixes.let_go(keys))

    def _take_decode_pages(self, step: int) -> tuple[int, ...]:
        """Give the requests that generate the pages of `step`; return whom that preempts."""
        pages = self._pages
        assert pages is not None
        preempted = []
        while pages.needed(step) > pages.num_free:
            preempted.append(self._preempt())
        self._take(pages.needed(step))
        return tuple(preempted)

    def _preempt(self) -> int:
        """Send the request admitted last back to the front of the queue; return its id."""
        if self._partial is not None:
            sequence, num_lost = self._drop_partial()
        else:
            _, sequence = self._decoding.popitem()
            self._forget_end(sequence)
            self._drop(sequence)
            num_lost = sequence.num_cached(self._step)
            num_generated = num_lost + 1 - sequence.num_tokens  # the last of them is not in the cache yet
            sequence.num_tokens += num_generated
            sequence.num_left -= num_generated
        self._outstanding += num_lost
        self.num_preemptions += 1
        request_id = sequence.request.request_id
        self._waiting[request_id] = sequence
        self._waiting.move_to_end(request_id, last=False)
        return request_id

    def _first_arrival(self) -> int:
        """The arrival step of the first prompt that could run in the next step; -1 if none could."""
        if not self._prompt_can_run(0 if self._pages is None else self._pages.needed(self._step + 1)):
            return -1
        return (self._partial or next(iter(self._waiting.values()))).arrival

    def _prompt_can_run(self, num_reserved: int) -> bool:
        """Whether the first prompt could have rows in a step in which `num_reserved` free pages are for decoding."""
        if self._partial is None and (not self._waiting or self._num_decoding >= self._max_num_seqs):
            return False
        return self._pages is None or self._pages.num_free - num_reserved >= self._pages_for_prompt()

    def _pages_for_prompt(self) -> int:
        """Free pages without which the first prompt has no rows in a step."""
        if self._partial is not None:
            return 0 if self._partial_done % PAGE_SIZE else 1
        sequence = next(iter(self._waiting.values()))
        return num_pages(sequence.num_tokens + 1) - self._num_held(sequence)

    def _num_held(self, sequence: _Sequence) -> int:
        """How many pages a prompt that waits can take over from requests that hold them."""
        version = self._prefixes.version
        if self._last_num_held[0] is not sequence or self._last_num_held[1] != version:
            self._last_num_held = sequence, version, self._prefixes.num_held(sequence.sharable)
        return self._last_num_held[2]

    def _num_waiting_for_kv(self, pages: KVPages) -> int:
        if not self._waiting:
            return 0
        if self._partial is None and self._num_decoding >= self._max_num_seqs:
            return 0  # for a seat as well
        return 0 if self._prompt_can_run(pages.needed(self._step + 1)) else len(self._waiting)

    def _drop_partial(self) -> tuple[_Sequence, int]:
        """Free the pages of the prompt that has begun; return it, and how many of its rows were computed."""
        sequence, num_done = self._partial, self._partial_done
        assert sequence is not None
        self._partial, self._partial_done = None, 0
        self._release(sequence, num_done)
        return sequence, num_done

    def _forget_end(self, sequence: _Sequence) -> None:
        ending = self._ends[sequence.last_step]
        ending.remove(sequence.request.request_id)
        if not ending:
            del self._ends[sequence.last_step]

    def _leave(self, sequence: _Sequence) -> None:
        self._drop(sequence)
        self._kv_tokens -= sequence.request.num_kv_tokens

    def _drop(self, sequence: _Sequence) -> None:
        """Let a request generate no more, and free its pages."""
        self._num_decoding -= 1
        self._context_base -= sequence.num_tokens - sequence.ended
        num_cached = sequence.num_cached(self._step)
        if self._pages is not None:
            self._pages.leave(num_cached, self._step)
        self._release(sequence, num_cached)
