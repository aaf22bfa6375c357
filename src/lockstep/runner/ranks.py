"""One rank of this host: it joins the group, loads the model, makes its engine, and goes from epoch to epoch."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lockstep.coordination.groups import abandon_groups, connect
from lockstep.coordination.meeting import Whereabouts
from lockstep.coordination.membership import EpochEnded, asked_to_stop, await_members
from lockstep.coordination.waits import within
from lockstep.engine.text import Detokenizer
from lockstep.errors import ConfigurationError, LockstepError, PeerFailedError, RankAbsentError
from lockstep.moe.survivors import placement_of_epoch, widened
from lockstep.runner.losses import WHEREABOUTS, failure_of
from lockstep.runner.options import EngineOptions, placement_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Whoever decides may have to wait for a rank's deadline, and once more for one that does not say that it has stopped.
_DECISION_DEADLINES, _DECISION_S = 3, 30.0
_LEAVE_S = 10.0
_ASK_S = 0.1  # how often the first member looks whether it was asked to stop


class Member:
    """This rank, in one epoch after another: `members` are those of the present `epoch`, by their first numbers.

    `port` is that of the launcher's store, and `say` tells the launcher something. A rank that comes back (`returns`)
    is given the first epoch that it may enter.
    """

    def __init__(
        self, rank: int, options: EngineOptions, port: int, start_timeout_s: float,
        say: Callable[[dict[str, Any]], None], first_epoch: int = 0,
    ) -> None:  # fmt: skip
        self.rank, self.epoch, self.returns = rank, 0, first_epoch > 0
        self.members: tuple[int, ...] = tuple(range(options.world_size))
        self._options, self._port, self._start_timeout_s, self._say = options, port, start_timeout_s, say
        self._first_epoch = first_epoch
        self._epochs: list[tuple[int, ...]] = []  # members of each but the first
        self._store = open_store(port, start_timeout_s)
        self._asked_at_s = 0.0

    def work(self, serve: Callable[[Any], T], *, count_expert_load: bool = False) -> T:
        """Return what `serve` returns, given the model; it is called anew in each epoch. Collective."""
        options, model = self._options, None
        survives = options.can_survive
        respreader = respreader_of(options, self._store, count_expert_load) if survives else None
        if self.returns and respreader is not None:
            model = respreader.load_alone(self.rank, options.world_size, options.device)
            self._whereabouts().enter("back")  # the launcher must not take it for its earlier process
            self._say({"back": True})
            while self.epoch < self._first_epoch or self.rank not in self.members:
                self._await_epoch()
        while True:
            began_s = time.monotonic()
            try:
                if options.world_size > 1:
                    self._join()
                joined_s = time.monotonic()
                if model is None:
                    model = load_model(options, count_expert_load=count_expert_load)
                if respreader is not None and (self.epoch or options.survive):
                    first = widened(respreader.first_placement(model, options.world_size), options.survive)
                    with self._whereabouts().working(f"spreading the experts of epoch {self.epoch}"):
                        respreader.spread(model, placement_of_epoch(first, self._epochs), self.members)
                if self.epoch and self.rank == self.members[0]:
                    took_s = joined_s - began_s, time.monotonic() - joined_s
                    logger.warning("met in %.2f s, experts there in %.2f s: epoch %d begins", *took_s, self.epoch)
                return serve(model)
            except EpochEnded:
                self._say({"stopped": self.epoch})
            except (RankAbsentError, PeerFailedError) as error:
                if respreader is None or model is None:
                    raise
                self._say(failure_of(self.rank, error) | {"epoch": self.epoch})
            self._await_epoch()
            if self.rank not in self.members:
                text = f"rank {self.rank} is no member of epoch {self.epoch}: it was given up"
                raise RankAbsentError(text, (self.rank,))
            try:
                within(functools.partial(leave_groups, model), _LEAVE_S)
            except TimeoutError as error:  # as a GPU might that still waits for a rank that is gone
                raise LockstepError(f"rank {self.rank} could not leave the groups of epoch {self.epoch - 1}") from error

    def was_asked_to_stop(self) -> bool:
        """Return whether this epoch is to end, since a lost rank is back; called before each step."""
        if not self._options.restart_ranks or self.rank != self.members[0] or time.monotonic() < self._asked_at_s:
            return False
        self._asked_at_s = time.monotonic() + _ASK_S
        return asked_to_stop(self._store, self.epoch)

    def _await_epoch(self) -> None:
        wait_s = _DECISION_DEADLINES * self._options.deadline_s + _DECISION_S
        self.epoch += 1
        self.members = await_members(self._store, self.rank, self.epoch, wait_s)
        self._epochs.append(self.members)

    def _whereabouts(self) -> Whereabouts:
        return Whereabouts(dist.PrefixStore(WHEREABOUTS, self._store), self.rank)

    def _join(self) -> None:
        limit_s = self._options.deadline_s if self.epoch else self._start_timeout_s
        store = dist.PrefixStore(f"epoch/{self.epoch}", open_store(self._port, limit_s))
        join_group(store, self.members.index(self.rank), len(self.members), limit_s)


def open_store(port: int, timeout_s: float) -> Any:
    """Return the store of the process that has started this rank; it answers each question within `timeout_s`."""
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s))


def join_group(store: Any, rank: int, num_ranks: int, timeout_s: float) -> None:
    """Join the ranks of this host that work together and share its cores and GPUs; wait `timeout_s` for any of them."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    connect(store, rank, num_ranks, timeout_s)


def leave_groups(model: Any) -> None:
    """Abandon all groups of a model whose other ranks may be gone."""
    from lockstep.models.parallel import parallel_of

    if (parallel := parallel_of(model)) is not None:
        if parallel.is_open:
            parallel.layers.end_waits()
        parallel.close()
    abandon_groups()


def load_model(options: EngineOptions, *, count_expert_load: bool = False) -> Any:
    """Load the model on this rank. Collective."""
    from lockstep.models.huggingface import from_pretrained

    return from_pretrained(
        options.model,
        tensor_parallel_size=options.tensor_parallel_size,
        dtype=torch_dtype(options),
        quantize_experts=options.quantize_experts,
        device=options.device,
        **_over_ranks(options, count_expert_load),
    )


def respreader_of(options: EngineOptions, store: Any, count_expert_load: bool) -> Any:
    """Return the `Respreader` of the model that `load_model` loads; `store` is that of the launcher."""
    from lockstep.models.options import ParallelOptions
    from lockstep.models.respread import Respreader

    over_ranks = ParallelOptions(**_over_ranks(options, count_expert_load))
    how_loaded = {"dtype": torch_dtype(options), "quantize_experts": options.quantize_experts}
    return Respreader(options.model, over_ranks, store, **how_loaded)


def _over_ranks(options: EngineOptions, count_expert_load: bool) -> dict[str, Any]:
    return {
        "max_chunk_size_per_rank": options.max_chunk_size,
        "dispatcher": options.dispatcher,
        "deadline_s": options.deadline_s,
        "placement": placement_of(options),
        "count_expert_load": count_expert_load,
    }


def torch_dtype(options: EngineOptions) -> Any:
    """Return the dtype that the options name, or `auto`."""
    return options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)


def make_engine(model: Any, options: EngineOptions, engines: list[Any]) -> Any:
    """Open the groups of a model and return its `RankEngine`: that of the epoch before, in `engines`, if it can go on.

    Collective.
    """
    from lockstep.engine.rank_engine import RankEngine
    from lockstep.models.parallel import parallel_of

    parallel = parallel_of(model)
    if parallel is not None:
        parallel.open()
    if engines and parallel is not None and parallel.goes_on:
        engines[0].go_on(parallel)
    else:
        engines.clear()  # before the next one needs its memory
        engines.append(
            RankEngine(
                model,
                options.scheduler,
                max_model_len=options.max_model_len,
                gpu_memory_utilization=options.gpu_memory_utilization,
                eos_token_ids=eos_token_ids(model),
                graphs=options.graphs,
            )
        )
    return engines[0]


def load_tokenizer(model: str) -> Any:
    """Return a checkpoint's tokenizer; raise `ConfigurationError` where it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        usable = len(tokenizer("a")["input_ids"]) > 0  # without its files, Transformers makes an empty one
    except Exception as error:  # the tokenizers package raises plain `Exception`
        first = str(error).strip().split("\n", 1)[0][:200]
        text = f"the checkpoint {model} has no tokenizer that Transformers can read: {first}"
        raise ConfigurationError(text) from None
    if not usable:
        raise ConfigurationError(f"the checkpoint {model} has no tokenizer: tokenizer.json and the like are missing")
    return tokenizer


def find_tokenizer(model: str) -> Any:
    """Return a checkpoint's tokenizer; None where it has none that can be used, so that prompts must be token ids."""
    with contextlib.suppress(ConfigurationError):
        return load_tokenizer(model)
    return None


def detokenizer_of(tokenizer: Any) -> Detokenizer | None:
    """Return what turns a tokenizer's tokens into text; None without a tokenizer."""
    return Detokenizer(tokenizer) if tokenizer is not None else None


def describe(about: Mapping[str, Any], world_size: int) -> str:
    """Summarize an engine's choices and their reasons in one line, from `RankEngine.about`.

    Example:
        >>> about = {"dispatcher": "auto", "dispatcher_note": "allgather, alltoall; not nvlink: it needs GPUs",
        ...          "dtype": "float32", "device": "cpu", "attention_name": "SDPA", "layers": "Transformers'",
        ...          "graphs": False, "graphs_note": "they need a GPU", "kv_capacity_tokens": None}
        >>> describe(about, 2)  # doctest: +NORMALIZE_WHITESPACE
        "2 ranks on cpu, float32; dispatcher auto (allgather, alltoall; not nvlink: it needs GPUs); layers:
        Transformers'; attention: SDPA; no CUDA graphs (they need a GPU); KV cache: grows as needed"
    """
    note, capacity = about["dispatcher_note"], about["kv_capacity_tokens"]
    device = about["device"].partition(":")[0]  # each rank has its own
    parts = [f"{world_size} rank{'s' * (world_size > 1)} on {device}, {about['dtype']}"]
    if about["dispatcher"] is not None:
        parts.append(f"dispatcher {about['dispatcher']}" + (f" ({note})" if note else ""))
    parts += [f"layers: {about['layers']}", f"attention: {about['attention_name']}"]
    parts.append("CUDA graphs" if about["graphs"] else f"no CUDA graphs ({about['graphs_note']})")
    parts.append("KV cache: " + ("grows as needed" if capacity is None else f"{capacity:,} tokens per rank"))
    return "; ".join(parts)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a model's output, as its generation config says."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    return () if eos is None else (int(eos),) if isinstance(eos, int) else tuple(int(token) for token in eos)
