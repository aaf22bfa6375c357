"""One rank's loop: turn requests into steps, agree on each with all ranks, run it, and record it."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lockstep.coordination.membership import EpochEnded
from lockstep.engine.rank_engine import RankEngine, StepReport, TokenOutput
from lockstep.engine.sampling_params import SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.models.parallel import parallel_of
from lockstep.moe.placement import LOAD_FILE
from lockstep.runner.clock import RunClock
from lockstep.runner.launcher import RESTARTS_VARIABLE
from lockstep.runner.options import RunOptions
from lockstep.runner.parts import Notes, Parts, whole_steps
from lockstep.runner.ranks import Member, load_model, load_tokenizer, make_engine
from lockstep.steplog.record import StepLogRecord
from lockstep.workload import Arrivals, Request, load_trace, random_prompt_ids, synthetic_requests
from lockstep.workload.kv_pages import token_page_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a run, equal on all ranks except for `agreement_s`, this rank's wait for other ranks.

    `rows_done` are those of the workload that are planned, or not needed since their pages were known.
    """

    step: int
    rows_done: int
    rows_total: int
    num_tokens_across_dp: tuple[int, ...]
    agreement_s: float = 0.0


def load_requests(options: RunOptions, tokenizer: Any) -> list[Request]:
    """Read or make the workload; `tokenizer` counts the tokens of prompts given as text."""
    if options.workload == "synthetic":
        return synthetic_requests(None, options.workload_options, options.seed)
    count = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    return load_trace(options.workload, options.workload_options, count).requests


def prompt_ids(request: Request, tokenizer: Any, vocab_size: int, seed: int) -> list[int]:
    """Return a request's prompt as token ids: its text's, or made up from the seed where only the length is known."""
    if request.prompt is None:
        return random_prompt_ids(request, vocab_size, seed)
    ids: list[int] = tokenizer(request.prompt)["input_ids"]
    return ids[: request.num_prompt_tokens]


def check_requests(
    requests: Iterable[Request], model: str, config: Any, tokenizer: Any, seed: int, max_model_len: int | None = None
) -> None:
    """Raise where a request does not fit the model: longer than its context, or with tokens that it has no row for.

    `max_model_len` is the caller's own limit; None for the context that the model's `config` has.
    """
    text_config = config.get_text_config()
    limit = max_model_len or getattr(text_config, "max_position_embeddings", None)
    for request in requests:
        if limit is not None and request.num_kv_tokens > limit:
            sizes = f"{request.num_prompt_tokens} prompt tokens and {request.max_new_tokens} new ones"
            hint = "scale or cut the lengths with --length-scale or --max-prompt-tokens"
            text = f"request {request.request_id} has {sizes}, more than the model's context of {limit}: {hint}"
            raise ConfigurationError(text)
        if request.prompt is None:
            continue  # made up of ids that the model has
        largest = max(prompt_ids(request, tokenizer, text_config.vocab_size, seed), default=0)
        if largest >= text_config.vocab_size:
            raise ConfigurationError(
                f"the tokenizer of {model} is wider than its embedding: the prompt of request {request.request_id} has "
                f"token id {largest}, and the model's vocab_size is {text_config.vocab_size}"
            )


def _block_id(key: bytes) -> int:
    """Shorten a page's key to 52 bits, which every reader of JSON takes as a whole number."""
    return int.from_bytes(key[:7], "little") >> 4


def run_rank(
    options: RunOptions,
    on_progress: Callable[[Progress], None] | None = None,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
    member: Member | None = None,
) -> dict[str, Any]:
    """Run one rank to the end of the workload; every rank of the group calls it.

    When `member` begins another epoch, or all ranks have been started again, finished requests are kept, and the others
    go on from their tokens so far. The first member calls `on_ready` with `RankEngine.about`, and `on_progress` after
    each step; it merges all ranks' files (see `Parts`) and returns the run's `wall_s`, `generated_tokens`, `requests`
    and `engine`. The other ranks return nothing.
    """
    tokenizer = load_tokenizer(options.model)
    requests = load_requests(options, tokenizer)
    engines: list[RankEngine] = []

    def work(model: Any) -> dict[str, Any]:
        check_requests(requests, options.model, model.config, tokenizer, options.seed, options.max_model_len)
        engine = make_engine(model, options, engines)
        run = _Run(options, model, engine, tokenizer, requests, member)
        if on_ready is not None and run.place == 0:
            on_ready(run.engine.about())
        with closing(run.parts):
            started = time.perf_counter()
            run.loop(on_progress)
            wall_s = time.perf_counter() - started
        result = run.merge(wall_s)
        if engine.parallel is not None:
            engine.parallel.close()
        return result

    if member is not None:
        return member.work(work, count_expert_load=options.expert_load)
    return work(load_model(options, count_expert_load=options.expert_load))


class _Run:
    """The state of one rank's loop; `rank` is its number from the start, `place` that among the ranks that are left."""

    def __init__(
        self, options: RunOptions, model: Any, engine: RankEngine, tokenizer: Any, requests: list[Request],
        member: Member | None,
    ) -> None:  # fmt: skip
        self.options, self.tokenizer, self.member = options, tokenizer, member
        self.parallel = parallel = parallel_of(model)
        self.place = parallel.config.rank if parallel is not None else 0
        self.rank = self.place if member is None else member.rank
        self.dp_rank = parallel.config.data_parallel_rank if parallel is not None else 0
        self.writes_outputs = parallel is None or parallel.config.tensor_parallel_rank == 0
        self.engine = engine
        self.keep_logprobs = options.keep_logprobs and model.dtype != torch.float32
        self.vocab_size = model.config.get_text_config().vocab_size
        self.open_requests: dict[int, Notes] = {}
        lost = set() if member is None else set(range(options.world_size)).difference(member.members)
        self.parts = Parts(options.out, self.rank, {self.rank, *(lost if self.place == 0 else ())}, self._gather)
        start, self.first_step, self.started_s, self.last_done_s = 0, 0, 0.0, 0.0
        self.begun: dict[int, Notes] = {}
        if int(os.environ.get(RESTARTS_VARIABLE, "0")) or (member is not None and member.epoch):
            finished, self.begun, self.started_s = self.parts.unfinished()
            requests = [request for request in requests if request.request_id not in finished]
            logs = self.parts.step_logs()
            start = 1 + max(logs, default=0)
            earlier = whole_steps(logs, options.world_size)
            self.first_step = max((record["step"] for record in earlier), default=-1) + 1
            ended_s = max((record["start_s"] + record["duration_s"] for record in earlier), default=0.0)
            self.started_s = max(self.started_s, ended_s)  # even if the system clock was changed
            if self.place == 0:
                logger.warning("restart %d: %d requests finished, %d left", start, len(finished), len(requests))
        self.requests = {request.request_id: request for request in requests}
        left = self._left_of(requests)
        self.rows_total = sum(request.num_computed_tokens for request in left)
        num_ranks = parallel.config.data_parallel_size if parallel is not None else 1
        self.arrivals = Arrivals(left, self.engine.config, num_ranks, self.dp_rank)
        self.run_began = time.perf_counter()
        self.parts.open(start, self.started_s)

    def _left_of(self, requests: list[Request]) -> list[Request]:
        """Return what is left of each request. Those that had arrived come at once, and go on behind their tokens."""
        last_s = max((self.requests[request_id].arrival_s for request_id in self.begun), default=0.0)
        shift_s = last_s if self.options.clock == "steps" else 0.0  # virtual time restarts
        left = []
        for request in requests:
            done = len(self.begun[request.request_id].tokens) if request.request_id in self.begun else 0
            request = replace(request, arrival_s=max(0.0, request.arrival_s - shift_s))
            lengths = request.num_prompt_tokens + done, request.max_new_tokens - done
            left.append(replace(request, num_prompt_tokens=lengths[0], max_new_tokens=lengths[1]))
        return left

    def _run_s(self, moment: float) -> float:
        """Return the age of the run at a reading of `time.perf_counter`."""
        return self.started_s + moment - self.run_began

    def loop(self, on_progress: Callable[[Progress], None] | None) -> None:
        """Run all requests. By the wall clock they arrive when their time has come, and idle ranks wait for it."""
        engine, arrivals, now_s, elapsed_ms = self.engine, self.arrivals, None, 0
        clock = RunClock(self.started_s) if self.options.clock == "wall" else None
        while arrivals.left or engine.any_unfinished:
            if clock is not None:
                now_s = engine.elapsed_ms / 1000
            for request in arrivals.before_step(engine.states, now_s):
                arrived = time.perf_counter() if clock is None else clock.moment(request.arrival_s)
                self._add(request.request_id, self._run_s(arrived))
            if clock is not None:
                idle = not engine.any_unfinished and not engine.has_unfinished
                if arrivals.next_arrival_s is not None and idle and not engine.capture_ahead():
                    clock.wait_for(arrivals.next_arrival_s, self.options.deadline_s / 4)
                elapsed_ms = clock.elapsed_ms()
            ends_epoch = self.member is not None and self.member.was_asked_to_stop()
            self._take(engine.step(unfinished=True, elapsed_ms=elapsed_ms, ends_epoch=ends_epoch), on_progress)
            if engine.epoch_ends:
                self._take(engine.drain(), on_progress)
                raise EpochEnded
            if clock is not None:
                clock.catch_up(engine.elapsed_ms)
        self._take(engine.drain(), on_progress)

    def _add(self, request_id: int, arrived_s: float) -> None:
        request, notes = self.requests[request_id], self.begun.pop(request_id, None)
        if notes is None:
            notes = Notes(self.first_step + self.engine.step_number, arrived_s)
            if self.writes_outputs:
                self.parts.write_notes(request_id, notes)
        self.open_requests[request_id] = notes
        logprobs = 0 if self.keep_logprobs else None
        params = SamplingParams(max_tokens=request.max_new_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs)
        self.engine.add(request_id, self._prompt_ids(request), params, generated=notes.tokens)

    def _prompt_ids(self, request: Request) -> list[int]:
        return prompt_ids(request, self.tokenizer, self.vocab_size, self.options.seed)

    def _take(self, outputs: list[TokenOutput], on_progress: Callable[[Progress], None] | None) -> None:
        """Note what the step whose tokens have come was and gave, and write down requests that it finished."""
        reports, self.engine.reports = self.engine.reports, []
        for report in reports:
            step = self.first_step + report.schedule.step
            for entry in report.schedule.entries:
                notes = self.open_requests[entry.request_id]
                notes.first_step = step if notes.first_step is None else notes.first_step
            for request_id, num_tokens in report.schedule.prefix_hits:
                self.open_requests[request_id].num_cached_tokens += num_tokens
            for output in outputs:
                notes = self.open_requests[output.request_id]
                if notes.first_token_step is None:
                    notes.first_token_step, notes.first_token_s = step, self._run_s(report.done_s)
                    if self.writes_outputs:
                        self.parts.write_notes(output.request_id, notes)
                notes.tokens.append(output.token_id)
                notes.logprobs.append(output.logprob)
                if output.finish_reason is not None:
                    self._finish(output.request_id, step, self._run_s(report.done_s))
            if self.writes_outputs:  # after what has finished: what is whole need not go on
                self.parts.write_tokens([(o.request_id, o.position, o.token_id, o.logprob) for o in outputs])
            self._log(report, step)
            if on_progress is not None and self.place == 0:
                counts, waited = report.num_tokens_across_dp, report.agreed_s - report.began_s
                rows_left = sum(state.num_outstanding_tokens for state in self.engine.states)
                rows_done = self.rows_total - self.arrivals.num_tokens_left - rows_left
                on_progress(Progress(step + 1, rows_done, self.rows_total, counts, waited))

    def _finish(self, request_id: int, step: int, now_s: float) -> None:
        notes, request = self.open_requests.pop(request_id), self.requests[request_id]
        if not self.writes_outputs:
            return
        assert notes.first_step is not None and notes.first_token_step is not None
        tokens, block_ids = notes.tokens, list[int]()
        if self.engine.config.enable_prefix_caching:
            block_ids = [_block_id(key) for key in token_page_keys(self._prompt_ids(request))]
        line = {
            "request_id": request_id,
            "rank": self.rank,
            "arrival_s": request.arrival_s,
            "num_prompt_tokens": request.num_prompt_tokens,
            "max_new_tokens": request.max_new_tokens,
            "num_new_tokens": len(tokens),
            "num_cached_tokens": notes.num_cached_tokens,
            "block_ids": block_ids,  # of pages of 64 tokens: equal ones begin equal prompts
            "stopped_step": None,  # no request ends before its last token
            "tokens": tokens,
            "text": self.tokenizer.decode(tokens),
            "steps": [notes.first_step, step],
            "queue_steps": notes.first_step - notes.assigned_step,
            "ttft_steps": notes.first_token_step - notes.assigned_step + 1,
            "ttft_s": round(notes.first_token_s - notes.arrived_s, 6),
            "tpot_s": round((now_s - notes.first_token_s) / (len(tokens) - 1), 6) if len(tokens) > 1 else None,
        }
        if self.keep_logprobs:
            line["logprobs"] = [round(logprob, 6) for logprob in notes.logprobs if logprob is not None]
        self.parts.write_output(line)

    def _log(self, report: StepReport, step: int) -> None:
        """Write this rank's record."""
        schedule = report.schedule
        chunks = ChunkPlan(
            report.num_tokens_across_dp, self.options.tensor_parallel_size, self.options.max_chunk_size, self.place
        )
        # On a GPU a step is agreed while the one before it runs; it begins when that one ends.
        began = max(report.began_s, self.last_done_s)
        agreed = max(report.agreed_s, began)
        self.last_done_s = report.done_s
        self.parts.steps.write(
            StepLogRecord(
                step=step,
                rank=self.rank,
                real_rows=chunks.sp_rows[self.place],
                prefill_tokens=schedule.num_prefill_tokens,
                decode_tokens=schedule.num_decode_tokens,
                prefill_context_tokens=schedule.prefill_context_tokens,
                decode_context_tokens=schedule.decode_context_tokens,
                num_waiting=schedule.num_waiting,
                prefills_held=schedule.prefills_held,
                preempted=len(schedule.preempted),
                overrun_rows=report.overrun_rows,
                cached_tokens=schedule.num_cached_tokens,
                num_chunks=len(chunks),
                start_s=round(self._run_s(began), 6),
                duration_s=round(report.done_s - began, 6),
                agreement_s=round(agreed - began, 6),
                busy_s=round(max(0.0, report.done_s - agreed - report.waited_s), 6),
            )
        )

    def merge(self, wall_s: float) -> dict[str, Any]:
        """Bring all ranks' lines to the first rank, which writes them in order."""
        outputs, steps = self.parts.outputs(), whole_steps(self.parts.step_logs(), self.options.world_size)
        load = self.parallel.expert_load() if self.parallel is not None and self.options.expert_load else None
        if self.place != 0:
            return {}
        if load is not None:
            if self.first_step:
                text = "%s counts rows from step %d on: what had come to experts before went with the ranks"
                logger.warning(text, LOAD_FILE, self.first_step)
            load.write(Path(self.options.out, LOAD_FILE))
        outputs.sort(key=lambda output: output["request_id"])
        for name, lines in (("outputs.jsonl", outputs), ("steps.jsonl", steps)):
            # Written under another name first, so that readers see a complete file or none.
            unfinished = Path(self.options.out, f"{name}.part")
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            unfinished.replace(Path(self.options.out, name))
        return {
            "wall_s": self.started_s + wall_s,
            "requests": len(outputs),
            "generated_tokens": sum(output["num_new_tokens"] for output in outputs),
            "engine": self.engine.about(),
        }

    def _gather(self, own: list[Any]) -> list[Any]:
        """Every rank's entries; through the ranks' group, since several hosts need not share a disk."""
        if self.parallel is None:
            return own
        return [entry for entries in self.parallel.gather_json(own) for entry in entries]
