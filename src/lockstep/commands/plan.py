"""`lockstep plan`: a step's sizes in DPMetadata, and the layer's chunk plan."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lockstep.errors import ConfigurationError
from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.sizes import abridged, chunk_sizes, shown, sp_sizes

MOST_CHUNKS = 10_000
"""Maximum chunks to write out; more suggest a mistyped size."""
MOST_RANKS = 100_000
"""Maximum ranks to write out, the same as for simulations."""


def parse_tokens(text: str) -> list[int]:
    """Return comma-separated token counts; a `ConfigurationError` names the rank of an entry that is no integer."""
    counts = []
    for rank, entry in enumerate(text.split(",")):
        try:
            counts.append(int(entry))
        except ValueError:
            raise ConfigurationError(
                f"tokens must be integers separated by commas, got {shown(entry, 60)} on DP rank {rank}"
            ) from None
    return counts


def plan_document(
    counts: Sequence[int], sequence_parallel_size: int = 1, max_chunk_size_per_rank: int | None = None
) -> dict[str, Any]:
    """Return the sizes and the chunk plan of one step as a document of lists and plain integers."""
    if len(counts) * max(1, sequence_parallel_size) > MOST_RANKS:
        raise ConfigurationError(
            f"sequence_parallel_size {sequence_parallel_size} of {len(counts)} DP ranks must make <= {MOST_RANKS} ranks"
        )
    plan = ChunkPlan(counts, sequence_parallel_size, max_chunk_size_per_rank)
    limit = plan.max_chunk_size_per_rank
    if len(plan) > MOST_CHUNKS:
        raise ConfigurationError(
            f"max_chunk_size_per_rank {limit} must be large enough for {MOST_CHUNKS} chunks, got {len(plan)} chunks"
        )
    padded = sp_sizes(plan.num_tokens_across_dp, plan.sequence_parallel_size)
    shown = [list(chunk_sizes(padded, limit, chunk.index)) for chunk in plan]
    chunks = []
    for chunk in plan:
        starts = [min(chunk.index * limit, rows) for rows in plan.sp_rows]
        spans = [[start, start + size] for start, size in zip(starts, chunk.sizes, strict=True)]
        chunks.append({"chunk_idx": chunk.index, "real_rows": list(chunk.sizes), "spans": spans})
    sent = sum(map(sum, shown))
    without_dummies = sum(sum(chunk_sizes(padded, limit, chunk.index, min_rows=0)) for chunk in plan)
    real = sum(plan.num_tokens_across_dp)
    return {
        "num_tokens_across_dp": list(plan.num_tokens_across_dp),
        "sequence_parallel_size": plan.sequence_parallel_size,
        "max_chunk_size_per_rank": limit,
        "sp_local_sizes": padded,
        "cu_tokens_across_sp": list(accumulate(padded)),
        "chunked_sizes": shown,
        "sp_spans": [list(plan.sp_span(rank)) for rank in range(len(plan.sp_rows))],
        "chunks": chunks,
        "real_rows": real,
        "dummy_rows": sent - without_dummies,
        "padding_rows": without_dummies - real,
    }


def print_plan(document: dict[str, Any], most_ranks: int = 64) -> None:
    """Print a `plan_document` as a table of at most `most_ranks` ranks."""
    from rich import box
    from rich.table import Table

    from lockstep.report.terminal import Terminal

    sp, limit = document["sequence_parallel_size"], document["max_chunk_size_per_rank"]
    chunks = document["chunks"]
    ranks = len(document["sp_local_sizes"])
    console = Terminal(soft_wrap=True)
    # Show as many chunks as fit beside the other four columns, each as wide as the longest span.
    longest = max((len(f"{stop}..{stop}") for chunk in chunks for _, stop in chunk["spans"]), default=1)
    most_chunks = max(1, (console.width - 45) // (max(longest, len("chunk 00")) + 3))
    lists = {f"{name}({sp})": document[name] for name in ("sp_local_sizes", "cu_tokens_across_sp")}
    for chunk_idx, sizes in enumerate(document["chunked_sizes"][:most_chunks]):
        lists[f"chunked_sizes({sp}, {limit}, {chunk_idx})"] = sizes
    width = max(map(len, lists))
    for name, sizes in lists.items():
        console.print(f"{name:<{width}}  {abridged(sizes)}")

    table = Table(box=box.SIMPLE_HEAD, title="Real rows of each rank, chunk by chunk", title_justify="left")
    for heading in ("rank", "DP rank", "tokens", "takes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for chunk in chunks[:most_chunks]:
        table.add_column(f"chunk {chunk['chunk_idx']}", justify="right", no_wrap=True)
    for rank in range(min(ranks, most_ranks)):
        cells = [str(rank), str(rank // sp), str(document["num_tokens_across_dp"][rank // sp])]
        spans = [document["sp_spans"][rank], *(chunk["spans"][rank] for chunk in chunks[:most_chunks])]
        cells += [f"{start}..{stop}" if stop > start else "-" for start, stop in spans]
        table.add_row(*cells)
    console.print(table)
    beyond = (("ranks", ranks - most_ranks), ("chunks", len(chunks) - most_chunks))
    if left_out := [f"{number} more {what}" for what, number in beyond if number > 0]:
        console.print(f"{' and '.join(left_out)} not shown; --json shows all")
    real, dummy, padding = (document[f"{kind}_rows"] for kind in ("real", "dummy", "padding"))
    console.print(
        f"{len(chunks)} chunk{'s' * (len(chunks) != 1)} of at most {limit} rows per rank: {real} real rows; callers "
        f"that need a row on every rank add {dummy} dummy and {padding} padding rows"
    )
