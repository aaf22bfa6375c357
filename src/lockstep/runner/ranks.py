"""From options to an engine on this rank: join the group, load the model, make room for keys."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.dispatch.choose import check_dispatcher
from lockstep.engine.text import Detokenizer
from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import check_int
from lockstep.models.options import QUANTIZE_EXPERTS
from lockstep.runner.options import ModelOptions
from lockstep.workload import SchedulerConfig
from lockstep.workload.policies import LOAD_BALANCING

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(ModelOptions):
    """Options of an engine, in addition to `ModelOptions`; the same on every rank.

    Attributes:
        max_num_seqs: maximum requests per rank at a time, >= 1.
        max_num_batched_tokens: maximum rows per rank and step, >= 1.
        kv_capacity_tokens: tokens of KV cache per rank; None for as many as fit into memory.
        enable_prefix_caching: compute whole pages of shared prompt prefixes only once.
        max_prefill_delay_steps: steps that a prompt may wait for prompts of other ranks.
        load_balancing: which rank gets a request, one of `lockstep.workload.policies.LOAD_BALANCING`.
        start_timeout_s: longest wait for all ranks to have loaded the model, in seconds.
        graphs: run decoding as CUDA graphs where possible.

    Raises:
        ConfigurationError: invalid sizes or names.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_capacity_tokens: int | None = None
    enable_prefix_caching: bool = True
    max_prefill_delay_steps: int = 0
    load_balancing: str = "least-tokens"
    start_timeout_s: float = 600.0
    graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("data_parallel_size", "tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens"):
            check_int(name, getattr(self, name), 1)
        for name in ("max_model_len", "max_chunk_size", "kv_capacity_tokens"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("max_prefill_delay_steps", "num_redundant_experts", "survive", "restart_ranks"):
            check_int(name, getattr(self, name), 0)
        self.check_survive()
        for name, most in (("gpu_memory_utilization", 1.0), ("deadline_s", math.inf), ("start_timeout_s", math.inf)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= most or value == math.inf:
                limit = f"in (0, {most:g}]" if most < math.inf else "> 0"
                raise ConfigurationError(f"{name} must be a number {limit}, got {value!r:.80}")
        for name in ("graphs", "enable_prefix_caching"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False, got {getattr(self, name)!r:.80}")
        check_dispatcher(self.dispatcher)
        for name, names in (
            ("dtype", ("auto", *DTYPES)), ("load_balancing", LOAD_BALANCING), ("quantize_experts", QUANTIZE_EXPERTS),
        ):  # fmt: skip
            if getattr(self, name) not in names:
                raise ConfigurationError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r:.80}")
        self.scheduler()

    def scheduler(self) -> SchedulerConfig:
        """Return how requests become steps."""
        return SchedulerConfig(
            load_balancing=self.load_balancing,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_prefill_delay_steps=self.max_prefill_delay_steps,
            kv_capacity_tokens=self.kv_capacity_tokens,
            enable_prefix_caching=self.enable_prefix_caching,
        )


def open_store(port: int, timeout_s: float) -> Any:
    """Return the store of the process that has started this rank; it answers each question within `timeout_s`."""
    import datetime

    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s))


def join_group(store: Any, rank: int, num_ranks: int, timeout_s: float) -> None:
    """Join the ranks of this host that work together and share its cores and GPUs; wait `timeout_s` for any of them."""
    import torch

    from lockstep.coordination.groups import connect

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    connect(store, rank, num_ranks, timeout_s)


def leave_groups(model: Any) -> None:
    """Abandon all groups of a model whose other ranks may be gone."""
    from lockstep.coordination.groups import abandon_groups
    from lockstep.models.parallel import parallel_of

    if (parallel := parallel_of(model)) is not None:
        if parallel.is_open:
            parallel.layers.end_waits()
        parallel.close()
    abandon_groups()


def load_model(options: ModelOptions, *, count_expert_load: bool = False) -> Any:
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


def respreader_of(options: ModelOptions, store: Any, count_expert_load: bool) -> Any:
    """Return the `Respreader` of the model that `load_model` loads; `store` is that of the launcher."""
    from lockstep.models.options import ParallelOptions
    from lockstep.models.respread import Respreader

    over_ranks = ParallelOptions(**_over_ranks(options, count_expert_load))
    how_loaded = {"dtype": torch_dtype(options), "quantize_experts": options.quantize_experts}
    return Respreader(options.model, over_ranks, store, **how_loaded)


def _over_ranks(options: ModelOptions, count_expert_load: bool) -> dict[str, Any]:
    from lockstep.runner.checkpoint_checks import placement_of

    return {
        "max_chunk_size_per_rank": options.max_chunk_size,
        "dispatcher": options.dispatcher,
        "deadline_s": options.deadline_s,
        "placement": placement_of(options),
        "count_expert_load": count_expert_load,
    }


def torch_dtype(options: ModelOptions) -> Any:
    """Return the dtype that the options name, or `auto`."""
    import torch

    return options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)


def make_engine(model: Any, options: EngineOptions, engines: list[Any]) -> Any:
    """Open the groups of a model that `load_model` has loaded, and return its `engine_of_epoch`. Collective."""
    from lockstep.models.parallel import parallel_of

    if (parallel := parallel_of(model)) is not None:
        parallel.open()
    return engine_of_epoch(
        engines,
        model,
        options.scheduler(),
        max_model_len=options.max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        eos_token_ids=eos_token_ids(model),
        graphs=options.graphs,
    )


def engine_of_epoch(engines: list[Any], model: Any, config: SchedulerConfig, **settings: Any) -> Any:
    """Return the `RankEngine` of the epoch before if it can go on, else a new one; `engines` keeps it for the next."""
    from lockstep.engine.rank_engine import RankEngine
    from lockstep.models.parallel import parallel_of

    parallel = parallel_of(model)
    if engines and parallel is not None and parallel.goes_on:
        engines[0].go_on(parallel)
    else:
        engines.clear()  # before the next one needs its memory
        engines.append(RankEngine(model, config, **settings))
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
