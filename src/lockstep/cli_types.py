"""Types of command-line options: parsers that check a value before anything large is imported, and shared options.

A parser raises `typer.BadParameter`; Typer adds the name of the option.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer

_MOST = 2**31 - 1
_Made = TypeVar("_Made")


def whole(low: int, high: int = _MOST) -> Callable[[Any], int]:
    """Make a parser for an integer in `low..high`, by default up to the largest 32-bit integer."""

    def parse(text: Any) -> int:
        try:
            number = int(text)
        except ValueError:  # also more than 4,300 digits
            raise typer.BadParameter(f"must be an integer{wanted}, got {_short(text)}") from None
        if not low <= number <= high:
            limit = f" <= {high}" if high == _MOST and number > high else wanted
            raise typer.BadParameter(f"must be{limit}, got {_short(text)}")
        return number

    wanted = f" >= {low}" if high == _MOST else f" in {low}..{high}"
    return parse


def real(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], float]:
    """Make a parser for a finite number in `low..high`; `above` excludes `low` itself."""

    def parse(text: Any) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (low <= number <= high) or math.isinf(number) or (above and number == low):
            wanted = f" > {low:g}" if above else f" >= {low:g}" if math.isinf(high) else f" in {low:g}..{high:g}"
            raise typer.BadParameter(f"must be a number{wanted}, got {_short(text)}")
        return number

    return parse


def several(parse_one: Callable[[str], Any], none: str = "") -> Callable[[Any], list[Any]]:
    """Make a parser for comma-separated values without duplicates; the word `none` stands for None."""

    def parse(text: Any) -> list[Any]:
        if isinstance(text, list):  # already parsed: a default
            return text
        values = [None if none and part.strip() == none else parse_one(part.strip()) for part in str(text).split(",")]
        return list(dict.fromkeys(values))

    return parse


def one_of(*names: str) -> Callable[[Any], str]:
    """Make a parser for one of several names."""

    def parse(text: Any) -> str:
        if text not in names:
            raise typer.BadParameter(f"must be one of {', '.join(names)}, got {_short(text)}")
        return str(text)

    return parse


def seconds(text: Any) -> float:
    """Read a duration such as `2s`, `500ms` or `2` (seconds), > 0."""
    if isinstance(text, float):
        return text
    number, unit = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        value = float(number) * unit
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"must be a time > 0 such as 2s or 500ms, got {_short(text)}")
    return value


def device(text: Any) -> str:
    """Read `cpu`, `cuda` or `cuda:1`."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", str(text), re.ASCII):
        raise typer.BadParameter(f"must be cpu, cuda or cuda:N, got {_short(text)}")
    return str(text)


def _short(text: Any) -> str:
    shown = str(text)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return shown if re.fullmatch(r"[-+.\w]*\d[-+.\w]*", shown, re.ASCII) else repr(shown)


# The library's names, repeated here so that help pages need not import torch. A test compares the two.
Dispatcher = Literal["allgather", "alltoall", "auto", "nvlink"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadBalancing = Literal["round-robin", "least-tokens", "least-kv-cache"]
Clock = Literal["steps", "wall"]
LogRequests = Literal["off", "sizes", "prompts"]
LOAD_BALANCING = get_args(LoadBalancing)
ROW_SHAPES = ("ragged", "dummy", "equal")
MOST_RANKS = 100_000


def option(help: str, *names: str, parser: Callable[[Any], Any] | None = None, metavar: str | None = None) -> Any:
    """Declare an option, named after its parameter unless `names` are given."""
    return typer.Option(*names, help=help, parser=parser, metavar=metavar)


# Kinds of options, each declared by its help text: `count("Requests per run.")`.
count = partial(option, parser=whole(1), metavar="N")
steps = partial(option, parser=whole(0), metavar="N")
seed_of = partial(option, parser=whole(0, 2**32 - 1), metavar="N")
scale = partial(option, parser=real(0, above=True), metavar="X")
limit = partial(option, parser=seconds, metavar="2s|500ms")
share = partial(option, metavar="0..1")


def numbers(help: str, low: int = 1, high: int = _MOST, none: str = "") -> Any:
    """Declare an option of comma-separated integers, `none` among them where it is given."""
    return option(help, parser=several(whole(low, high), none), metavar=f"N|{none},..." if none else "N,...")


def choices(help: str, names: Sequence[str]) -> Any:
    """Declare an option of comma-separated names."""
    return option(help, parser=several(one_of(*names)), metavar="|".join(names))


# Options that several commands share. Parameters carry the library's names, so that `fill` finds them.
Workload = Annotated[str, option("Request trace (Azure CSV, Mooncake or prompts JSONL; gzip too), or `synthetic`.")]
NumRequests = Annotated[int | None, count("Use only the first N requests.", "--requests")]
RateScale = Annotated[float, option("Multiply the arrival rate by this factor.", parser=real(1e-9, 1e9), metavar="X")]
LengthScale = Annotated[float, scale("Multiply the lengths by this factor.")]
MaxPromptTokens = Annotated[int | None, count("Cut longer prompts to N tokens.")]
MaxNewTokens = Annotated[int | None, count("Cut longer outputs to N tokens.")]
MaxMalformedShare = Annotated[
    float,
    share("Maximum share of malformed lines; a single malformed line is always skipped.", parser=real(0, 1)),
]
MaxNumSeqs = Annotated[int, count("Maximum requests in progress per rank.")]
KvCapacityTokens = Annotated[
    int | None, count("Tokens of KV cache per rank (whole pages of 64); prompts that do not fit wait.")
]
PrefixCaching = Annotated[
    bool,
    option("Share KV cache pages between prompts that begin alike.", "--prefix-caching/--no-prefix-caching"),
]
Model = Annotated[str, option("Checkpoint folder or Hub id, or `tiny`: a small model with random weights.")]
DataParallelSize = Annotated[int, count("Data-parallel ranks; each runs its own requests.")]
TensorParallelSize = Annotated[int, count("Tensor-parallel ranks per data-parallel rank.")]
MaxChunkSize = Annotated[int | None, count("Maximum rows per rank and MoE chunk.")]
DispatcherName = Annotated[Dispatcher, option("Backend that brings tokens to their experts; `auto`: the fastest.")]
MaxNumBatchedTokens = Annotated[int, count("Maximum tokens per rank and step.")]
MaxModelLen = Annotated[int | None, count("Maximum tokens per request; by default the model's context length.")]
GpuMemoryUtilization = Annotated[
    float,
    option(
        "Share of each GPU's memory to use, for weights, KV cache and everything else.",
        parser=real(0, 1, above=True),
        metavar="0..1",
    ),
]
MaxPrefillDelaySteps = Annotated[int, steps("Maximum steps that a prompt waits for prompts of other ranks.")]
WeightsDType = Annotated[DType, option("Data type of the weights; `auto`: the checkpoint's.")]
QuantizeExperts = Annotated[
    Literal["auto", "fp8", "none"],
    option("Hold routed experts in fp8; `auto`: those of block-fp8 checkpoints, if the GPU's kernels read fp8."),
]
Device = Annotated[
    str | None,
    option("Device to run on; by default a GPU if there is one.", parser=device, metavar="cpu|cuda|cuda:N"),
]
ExpertPlacement = Annotated[
    str | None,
    option("Place experts by the load that a run with --expert-load recorded: its folder or file.", metavar="FILE"),
]
NumRedundantExperts = Annotated[int, steps("Spare slots per layer, over all ranks, for replicas of hot experts.")]
Survive = Annotated[
    int,
    steps(
        "Reserve expert slots for N lost ranks. The other ranks go on after any loss; without reserved slots, their KV "
        "cache shrinks. Refused with tensor parallelism and under torchrun, where all ranks restart."
    ),
]
RestartRanks = Annotated[
    int,
    steps(
        "Restart each lost rank up to N times; it rejoins the others, which go on. Refused where --survive is, and on "
        "GPUs with dispatcher auto or nvlink."
    ),
]
Deadline = Annotated[float, scale("Longest wait for any rank, in seconds.", "--deadline")]
Balancing = Annotated[LoadBalancing, option("How requests are assigned to ranks.")]
port = partial(option, parser=whole(0, 65535), metavar="N")  # not PORT: Typer 0.27 takes that for the name
Overwrite = Annotated[bool, option("Replace an earlier result in the output folder.", "--overwrite")]
AsJson = Annotated[bool, option("Print one JSON document instead of the table.", "--json")]


def fill(kind: Callable[..., _Made], given: Mapping[str, Any], **others: Any) -> _Made:
    """Make a dataclass of the parameters in `given` that are named like its fields, and of `others`."""
    named = {name: given[name] for name in inspect.signature(kind).parameters if name in given}
    return kind(**(named | others))
