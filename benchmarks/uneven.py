"""The uneven cases that benchmarks measure, for any number of ranks, as tuples with an entry per rank."""


def filled(first: tuple[int, ...], ranks: int, rest: int) -> tuple[int, ...]:
    """Return the first `ranks` entries of `first`, with `rest` for the ranks beyond."""
    return (first + (rest,) * ranks)[:ranks]


def token_counts(ranks: int) -> list[tuple[int, ...]]:
    """Return tokens per rank for dispatch and combine: one long rank, a medium one, and ranks that have none."""
    full = (4096, 512, 64, 64, 8, 1, 0, 0), (256, 1, 17, 130, 64, 8, 1, 0), (512, 0, 3, 0, 0, 1, 0, 0)
    return [filled(counts, ranks, 0) for counts in full]


def batches(ranks: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return requests per rank and prompt tokens of each rank's requests, for whole models and engines.

    The cases of 4 and of 8 ranks come in the same order, so that an index names the same case.
    """
    short, one_each = (64,) * ranks, (1,) * ranks
    if ranks == 2:
        return [
            (one_each, short), ((64, 8), short), ((64, 64), short), ((256, 256), short), ((16, 1), (1024, 1024)),
            ((64, 0), short), (one_each, (4096, 512)),
        ]  # fmt: skip
    return [
        (one_each, short),
        (filled((64, 8, 1), ranks, 0), short),
        (filled((64, 8), ranks, 1), short),
        ((64,) * ranks, short),
        (filled((256, 64, 8, 1, 1, 1), ranks, 0), short),
        (filled((16, 1, 1), ranks, 0), (1024,) * ranks),
        (one_each, filled((4096, 512), ranks, 64)),
    ]
