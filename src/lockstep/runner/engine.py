"""`lockstep.Engine`: prompts in, outputs out, over ranks started by itself or by torchrun."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from lockstep.coordination.environment import environment_number
from lockstep.coordination.processes import ProcessState
from lockstep.engine.sampling_params import Limits, SamplingParams
from lockstep.errors import ConfigurationError
from lockstep.runner.engine_ranks import OwnRank, RankProcesses
from lockstep.runner.front import Call, EngineStats, Front, Listener, NewRequest, Outputs
from lockstep.runner.options import (
    EngineOptions,
    check_checkpoint,
    check_config,
    placement_of,
    refuse_survivors,
)
from lockstep.runner.ranks import describe, detokenizer_of, find_tokenizer
from lockstep.runner.router import Router

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankHealth:
    """One process of an engine.

    Attributes:
        rank: its number.
        state: what the operating system says of it.
        silent_s: seconds since its last message; a live rank sends one every second, unless a step takes longer.
        pid: of its process.
        lost: the other ranks continue without it.
    """

    rank: int
    state: ProcessState
    silent_s: float
    pid: int
    lost: bool


class Engine:
    """Generates text with a Mixture-of-Experts model over several ranks.

    By itself it starts its ranks on this host: processes that end with this one, however it ends. A script needs no
    `if __name__ == "__main__"`. Under torchrun each process is one of the ranks, and brings prompts of its own: any
    number of them, at any time, or none. Leaving the `with` block waits there until all ranks have left it.

    Ranks that share requests (`tensor_parallel_size` > 1 under torchrun) call `generate` alike.

    Args:
        model: a checkpoint's folder or Hub id.
        data_parallel_size: ranks with requests of their own, >= 1; 1 by default, under torchrun all there are.
        **options: see `EngineOptions` and `EngineOptions`.

    Attributes:
        options: of this engine.
        about: rank 0's report when all were ready: context, pages of the cache, kernels, dispatcher.
        tokenizer: the checkpoint's; None if it has none.

    Raises:
        ConfigurationError: invalid options or an unusable checkpoint.
        RankAbsentError: ranks that were not ready in time.
        PeerFailedError: a rank that failed, by number.

    Example:
        >>> from lockstep import Engine, SamplingParams  # doctest: +SKIP
        >>> with Engine("path/to/Qwen3-30B-A3B", data_parallel_size=4) as engine:  # doctest: +SKIP
        ...     for output in engine.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
        ...         print(output.text)
    """

    def __init__(self, model: str | os.PathLike[str], *, data_parallel_size: int | None = None, **options: Any) -> None:
        self._pid = os.getpid()
        self.options = _read_options(model, data_parallel_size, options)
        check_checkpoint(self.options.model)
        check_config(self.options.model)
        placement_of(self.options)
        self.tokenizer = find_tokenizer(self.options.model)
        started = started_ranks()
        ranks = RankProcesses(self.options) if started is None else OwnRank(self.options)
        self._first_rank = 0 if started is None else started[0] // self.options.tensor_parallel_size
        self._front = Front(ranks, self._make_router, self.options)
        self.about = self._front.start()
        self._limits = Limits(*(self.about[name] for name in Limits._fields))
        if self._first_rank == 0:
            logger.info(describe(self.about, self.options.world_size))

    @property
    def stats(self) -> EngineStats:
        """The engine's figures so far."""
        return self._front.stats

    def generate(
        self,
        prompts: Iterable[str | Sequence[int]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Outputs:
        """Generate for all prompts, and yield each output when it is done; `index` is its prompt's number.

        The requests start at once, beside those of other calls. Closing or dropping the iterator ends its
        remaining requests.

        Args:
            prompts: texts, or lists of token ids.
            sampling_params: for all of them, or one for each; None for the defaults.

        Returns:
            An iterator of `RequestOutput`, in the order in which requests end. It raises `LockstepError` if a rank
            failed; the engine is closed then.

        Raises:
            ConfigurationError: an invalid prompt or parameters, naming the prompt; before anything runs.
            LockstepError: the error that closed the engine.
        """
        self._check_usable()
        return Outputs(self._front, self.read_requests(prompts, sampling_params))

    def submit(self, listener: Listener, requests: Sequence[NewRequest]) -> None:
        """Start requests and report them to `listener`, token by token, until they end or it is abandoned.

        Args:
            listener: of these requests only; called from the engine's thread.
            requests: from `read_requests`.
        """
        self.submit_all([(listener, requests)])

    def submit_all(self, calls: Sequence[Call]) -> None:
        """Start the requests of several listeners, see `submit`. On each rank, all of them begin in the same step."""
        self._front.submit(calls)

    def abandon(self, listener: Listener) -> None:
        """End a listener's requests; their rows are free within a few steps. It is not called again."""
        self._front.abandon(listener)

    def forget(self, listener: Listener) -> None:
        """Drop a listener whose requests have all ended."""
        self._front.forget(listener)

    @property
    def error(self) -> Exception | None:
        """The error that closed the engine; None while it can be used."""
        return self._front.error

    def ranks(self) -> list[RankHealth]:
        """Return the current state of each of the engine's processes."""
        now_s, heard_at_s = time.monotonic(), self._front.heard_at_s
        found = zip(self._front.ranks.states(), heard_at_s, strict=True)
        lost = [rank not in self._front.members for rank in range(len(heard_at_s))]
        return [RankHealth(r, state, now_s - at_s, pid, lost[r]) for r, ((pid, state), at_s) in enumerate(found)]

    def close(self) -> None:
        """End all requests and ranks; closing twice does nothing. Under torchrun, waits until all ranks close.

        Raises:
            LockstepError: under torchrun, the error of another rank, unless `generate` has raised it.
        """
        if os.getpid() != self._pid:  # a fork of the engine's process
            return
        self._front.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if os.getpid() != self._pid:
            return
        if error is not None:
            self._front.kill(error)
            return
        self.close()
        if self._front.failure is not None:
            raise self._front.failure

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ConfigurationError(f"this engine belongs to process {self._pid}; a forked process cannot use it")
        if self._front.error is not None:
            raise self._front.error

    def _make_router(self, about: dict[str, Any]) -> Router:
        return Router(
            self._front.ranks.num_data_ranks,
            self.options.load_balancing,
            first_rank=self._first_rank,
            all_ranks=self.options.data_parallel_size,
            eos_token_ids=about["eos_token_ids"],
            detokenizer=detokenizer_of(self.tokenizer),
        )

    def read_requests(self, prompts: Any, sampling_params: Any) -> list[NewRequest]:
        """Check and tokenize the arguments of `generate`, before anything is sent."""
        if isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable):
            kind = "one string" if isinstance(prompts, str) else type(prompts).__name__
            raise ConfigurationError(f"prompts must be a list of texts or of lists of token ids, got {kind}")
        prompts = list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if isinstance(sampling_params, str | bytes | dict) or not isinstance(sampling_params, Iterable):
            kind = type(sampling_params).__name__
            raise ConfigurationError(f"sampling_params must be a SamplingParams or a list of them, got {kind}")
        sampling_params = list(sampling_params)
        if len(sampling_params) != len(prompts):
            raise ConfigurationError(f"{len(prompts)} prompts, but {len(sampling_params)} sampling_params")
        requests = []
        for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            if not isinstance(params, SamplingParams):
                kind = type(params).__name__
                raise ConfigurationError(f"sampling_params of prompt {index} must be a SamplingParams, got {kind}")
            ids = self.prompt_ids(index, prompt)
            self.check(index, ids, params)
            requests.append(NewRequest(index, ids, params))
        return requests

    def prompt_ids(self, index: int, prompt: Any) -> list[int]:
        """Return a prompt's token ids; `index` is its number in error messages."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigurationError(f"prompt {index} is a text, but {self.options.model} has no tokenizer")
            self.check_size(index, len(prompt))
            try:
                return list(self.tokenizer(prompt)["input_ids"])
            except (TypeError, ValueError):  # such as half a surrogate pair
                raise ConfigurationError(f"prompt {index} is not a valid text: {prompt!r:.80}") from None
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # an array or a tensor
        if not isinstance(ids, Sequence) or isinstance(ids, bytes | bytearray):
            got = f"{type(prompt).__name__} {prompt!r:.80}"
            raise ConfigurationError(f"prompt {index} must be a text or a list of token ids, got {got}")
        for token in ids:
            # An abstract class is slow to ask: a second for the token ids of the largest body that a server takes.
            if type(token) is not int and (not isinstance(token, Integral) or isinstance(token, bool)):
                raise ConfigurationError(f"prompt {index} must hold integers, got {token!r:.80}")
        return [int(token) for token in ids]

    def check_size(self, index: int, num_characters: int) -> None:
        """Refuse a text that is too long even in tokens as long as the longest, before the work of tokenizing it."""
        limit = self._limits.max_model_len
        if num_characters > limit and num_characters > limit * self._longest_token:
            most = f"more than the {limit * self._longest_token} that the context of {limit} tokens could hold"
            raise ConfigurationError(f"prompt {index} has {num_characters} characters, {most}")

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token, added ones included."""
        return max(map(len, self.tokenizer.get_vocab()))

    def check(self, index: int, ids: list[int], params: SamplingParams) -> None:
        """Refuse a prompt and parameters that cannot run together."""
        if params.stop_strings and self.tokenizer is None:
            raise ConfigurationError(f"prompt {index} has stop strings, but {self.options.model} has no tokenizer")
        self._limits.check(f"prompt {index}", ids, params)


def started_ranks() -> tuple[int, int] | None:
    """Return this process's rank and the number of ranks where torchrun, or the script, has started them; else None."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        world_size = environment_number("WORLD_SIZE", 1)
        return environment_number("RANK", 0, world_size - 1), world_size
    return None


def _read_options(model: Any, data_parallel_size: int | None, options: dict[str, Any]) -> EngineOptions:
    if not isinstance(model, str | os.PathLike):
        hint = "a model in memory runs by lockstep.RankEngine or inside lockstep.join"
        text = f"model must be a checkpoint's folder or Hub id, got {type(model).__name__}; {hint}"
        raise ConfigurationError(text)
    known = [name for name in EngineOptions.__dataclass_fields__ if name != "model"]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f": it has {', '.join(known)}"
            raise ConfigurationError(f"Engine has no option {name!r}{hint}")
    started, dp_size = started_ranks(), 1 if data_parallel_size is None else data_parallel_size
    if started is not None:
        refuse_survivors(survive=options.get("survive"), restart_ranks=options.get("restart_ranks"))
    read = EngineOptions(os.fspath(model), data_parallel_size=dp_size, **options)
    if started is None:
        return read
    world_size, tp_size = started[1], read.tensor_parallel_size
    if world_size % tp_size:
        raise ConfigurationError(f"tensor_parallel_size must divide the {world_size} ranks, got {tp_size}")
    if data_parallel_size not in (None, world_size // tp_size):
        there = f"torchrun has started {world_size} ranks, and tensor_parallel_size is {tp_size}"
        hint = f"leave it out, or set it to {world_size // tp_size}"
        raise ConfigurationError(f"data_parallel_size is {data_parallel_size}, but {there}: {hint}")
    return dataclasses.replace(read, data_parallel_size=world_size // tp_size)
