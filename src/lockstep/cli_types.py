"""What an option of the command line may hold, checked while the line is read: before anything large is imported.

A parser raises `typer.BadParameter`, and Typer adds the name of the option that was typed.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args

import typer

_MOST = 2**31 - 1


def whole(low: int, high: int = _MOST) -> Callable[[Any], int]:
    """Make a parser of an integer in `low..high`; by default, up to the largest that arrays of 32 bits take."""

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
    """Make a parser of a finite number in `low..high`; with `above`, of one above `low`."""

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
    """Make a parser of values with commas between them, each once; the word `none` among them is None."""

    def parse(text: Any) -> list[Any]:
        if isinstance(text, list):  # already parsed: a default
            return text
        values = [None if none and part.strip() == none else parse_one(part.strip()) for part in str(text).split(",")]
        return list(dict.fromkeys(values))

    return parse


def one_of(*names: str) -> Callable[[Any], str]:
    """Make a parser of one of some names."""

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


# The names that the library knows, written out: a help page does not wait for torch. A test holds the two together.
Dispatcher = Literal["allgather", "alltoall", "auto", "nvlink"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadBalancing = Literal["round-robin", "least-tokens", "least-kv-cache"]
Clock = Literal["steps", "wall"]
LogRequests = Literal["off", "sizes", "prompts"]
LOAD_BALANCING = get_args(LoadBalancing)
ROW_SHAPES = ("ragged", "dummy", "equal")
MOST_RANKS = 100_000


def option(help: str, *names: str, parser: Callable[[Any], Any] | None = None, metavar: str | None = None) -> Any:
    """Declare an option; its name is the parameter's where none is given."""
    return typer.Option(*names, help=help, parser=parser, metavar=metavar)


# Options of one kind, declared by their help alone: `count("Requests of those runs.")`.
count = partial(option, parser=whole(1), metavar="N")
steps = partial(option, parser=whole(0), metavar="N")
seed_of = partial(option, parser=whole(0, 2**32 - 1), metavar="N")
scale = partial(option, parser=real(0, above=True), metavar="X")
limit = partial(option, parser=seconds, metavar="2s|500ms")
share = partial(option, metavar="0..1")


def numbers(help: str, low: int = 1, high: int = _MOST, none: str = "") -> Any:
    """Declare an option that takes several integers with commas, or the word `none`."""
    return option(help, parser=several(whole(low, high), none), metavar=f"N|{none},..." if none else "N,...")


def choices(help: str, names: Sequence[str]) -> Any:
    """Declare an option that takes several of some names with commas."""
    return option(help, parser=several(one_of(*names)), metavar="|".join(names))


# Options that several commands have.
Workload = Annotated[str, option("Request trace (Azure CSV, Mooncake or prompts JSONL; gzip too), or `synthetic`.")]
Requests = Annotated[int | None, count("Use only the first N requests.")]
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
    option("Share KV cache pages of prompts that begin alike.", "--prefix-caching/--no-prefix-caching"),
]
Model = Annotated[str, option("Checkpoint folder or Hub id, or `tiny`: a small model made on the spot.")]
DataParallelSize = Annotated[int, count("Ranks with requests of their own.")]
TensorParallelSize = Annotated[int, count("Ranks that share one data-parallel rank's requests.")]
MaxChunkSize = Annotated[int | None, count("Maximum rows per rank and MoE chunk.")]
DispatcherName = Annotated[Dispatcher, option("How tokens reach their experts.")]
MaxNumBatchedTokens = Annotated[int, count("Maximum tokens per rank and step.")]
MaxModelLen = Annotated[int | None, count("Maximum tokens per request; by default the model's context.")]
GpuMemoryUtilization = Annotated[
    float,
    option(
        "Share of a GPU's memory for weights, KV cache and the rest together.",
        parser=real(0, 1, above=True),
        metavar="0..1",
    ),
]
MaxPrefillDelaySteps = Annotated[int, steps("Maximum steps that a prompt waits for prompts of other ranks.")]
WeightsDType = Annotated[DType, option("Type of the weights; `auto`: the checkpoint's.")]
Device = Annotated[
    str | None,
    option("Where the model runs; by default on a GPU if there is one.", parser=device, metavar="cpu|cuda|cuda:N"),
]
ExpertPlacement = Annotated[
    str | None,
    option("Place experts by the load of a run with --expert-load: its folder or file.", metavar="FILE"),
]
NumRedundantExperts = Annotated[int, steps("Spare slots in each layer, over all ranks, for replicas of hot experts.")]
Survive = Annotated[int, steps("Reserve expert slots for N lost ranks; losing more shrinks the KV cache.")]
Deadline = Annotated[float, scale("Longest wait for any rank, in seconds.")]
Balancing = Annotated[LoadBalancing, option("Which rank gets a request.")]
Overwrite = Annotated[bool, option("Replace an earlier result in that folder.", "--overwrite")]
AsJson = Annotated[bool, option("Print one JSON document instead of the table.", "--json")]
