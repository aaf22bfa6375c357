"""The step log: one record per step and rank, written by the real run and by the simulator alike.

A real run writes JSON lines, one record a line, so that whatever was written before an interruption can be read. The
simulator, with millions of records, writes the same fields as columns of a Parquet file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class StepLogRecord:
    """What one rank did in one step.

    Rows are counted once per step, although every MoE layer sends them: layers of one step do not differ in that.

    Attributes:
        step: number of the step, from 0.
        rank: expert-parallel rank, from 0.
        real_rows: rows of requests that this rank took into the experts; 0 for an idle rank.
        dummy_rows: rows sent only so that the rank took part.
        padding_rows: rows added to make shapes equal.
        prefill_tokens: tokens of prompts, of this rank's data-parallel rank.
        decode_tokens: tokens of requests that generate, of this rank's data-parallel rank.
        prefill_context_tokens: KV entries that its prompts' tokens attend to, summed over these tokens.
        decode_context_tokens: the same of the tokens that generate.
        num_waiting: requests left in the queue after the step was formed.
        prefills_held: prompts that could have run were held, so that prompts of several ranks run together.
        preempted: requests of its data-parallel rank that lost their KV cache before the step, to be computed again.
        overrun_rows: rows of its data-parallel rank whose token is dropped: their request had ended by a stop token, a
            stop string or an abort, after the step was planned.
        num_chunks: chunks of the step, equal on all ranks; 0 where no rank had rows.
        start_s: when the step began on this rank, in seconds after the run's first step began.
        duration_s: how long it took there, from this rank's start to the start of its next step.
        agreement_s: of that, the wait for all ranks' records.
        busy_s: of that, this rank's own work; the rest it stood idle. None where it was not measured.
    """

    step: int
    rank: int
    real_rows: int
    dummy_rows: int = 0
    padding_rows: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_context_tokens: int = 0
    decode_context_tokens: int = 0
    num_waiting: int = 0
    prefills_held: bool = False
    preempted: int = 0
    overrun_rows: int = 0
    num_chunks: int = 1
    start_s: float = 0.0
    duration_s: float = 0.0
    agreement_s: float = 0.0
    busy_s: float | None = None


FIELDS = tuple(item.name for item in fields(StepLogRecord))
_OPTIONAL = tuple(item.name for item in fields(StepLogRecord) if item.default is None)


class StepLogWriter:
    """Writes records as JSON lines; each line is in the file as soon as `write` returns.

    Use it as a context manager, or call `close`.

    Args:
        path: the file; its folder must exist, the file must not.

    Raises:
        FileExistsError: if the file exists.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("x", encoding="utf-8", buffering=1)  # noqa: SIM115 - close() does

    def write(self, record: StepLogRecord) -> None:
        """Append one record."""
        self._file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> StepLogWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class StepLog:
    """A step log that was read.

    Attributes:
        records: in order of step, then rank.
        torn: whether a file ended in the middle of a line, which was left out: its writer was interrupted.
    """

    records: list[StepLogRecord]
    torn: bool = False

    @property
    def num_ranks(self) -> int:
        """Ranks that appear in it."""
        return len({record.rank for record in self.records})


def read_step_log(*paths: str | Path) -> StepLog:
    """Read step logs written as JSON lines, or as Parquet, of one run: one file of all ranks, or one of each.

    Args:
        *paths: the files.

    Raises:
        ConfigurationError: for a line that is not a record, naming file and line; a torn last line is not an error.
        OSError: if a file cannot be opened.
    """
    records: list[StepLogRecord] = []
    torn = False
    for path in paths:
        if _is_parquet(path):
            try:
                records.extend(_parquet_records(path))
            except (ValueError, TypeError, OSError, RuntimeError) as error:  # PyArrow raises any of them
                first = str(error).strip().split("\n", 1)[0]
                raise ConfigurationError(f"{path} is not a step log in Parquet: {first}") from None
            continue
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    records.append(_record(json.loads(line)))
                except (ValueError, TypeError, RecursionError) as error:
                    # Only the last line can lack its end: its writer was interrupted there.
                    if not line.endswith(b"\n"):
                        torn = True
                    else:
                        raise ConfigurationError(
                            f"{path}: line {number} is not a step record ({error}); "
                            f"expected a JSON object with {FIELDS}"
                        ) from None
    records.sort(key=lambda record: (record.step, record.rank))
    return StepLog(records, torn)


def by_step(records: Iterable[StepLogRecord]) -> Iterator[list[StepLogRecord]]:
    """Yield each step's records together, given records in order of step."""
    group: list[StepLogRecord] = []
    for record in records:
        if group and record.step != group[0].step:
            yield group
            group = []
        group.append(record)
    if group:
        yield group


def summarize(records: Sequence[StepLogRecord]) -> dict[str, Any]:
    """Return a run's totals.

    Args:
        records: in order of step, then rank, every rank in every step.

    Returns:
        `ranks`, `steps`, `real_tokens` (rows of requests, all ranks), `dummy_rows`, `padding_rows`, `prefill_tokens`,
        `decode_tokens`, `preempted` and `overrun_rows` (as recorded: tensor-parallel ranks of one group repeat each
        other's), and `duration_s` (from the first step's start to the last one's end).
    """
    return {
        "ranks": len({record.rank for record in records}),
        "steps": len({record.step for record in records}),
        "real_tokens": sum(record.real_rows for record in records),
        "dummy_rows": sum(record.dummy_rows for record in records),
        "padding_rows": sum(record.padding_rows for record in records),
        "prefill_tokens": sum(record.prefill_tokens for record in records),
        "decode_tokens": sum(record.decode_tokens for record in records),
        "preempted": sum(record.preempted for record in records),
        "overrun_rows": sum(record.overrun_rows for record in records),
        "duration_s": max((record.start_s + record.duration_s for record in records), default=0.0),
    }


class StepColumns:
    """Writes the same records column by column to a Parquet file; memory does not grow with the run.

    Use it as a context manager, or call `close`. Needs PyArrow.

    Args:
        path: the file, replaced where it exists.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._schema = pyarrow.schema([(name, _arrow_type(name)) for name in FIELDS])
        # PyArrow takes some names for addresses, and no name that is not UTF-8.
        self._file = Path(path).open("wb")  # noqa: SIM115 - close() does
        self._writer = pyarrow.parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def write(self, columns: dict[str, Any]) -> None:
        """Append records as columns of equal length (arrays or lists); fields left out have their default, or 0."""
        import pyarrow

        length = len(columns["step"])
        arrays = []
        for field in self._schema:
            values = columns.get(field.name)
            if values is None:
                values = pyarrow.nulls(length, field.type) if field.name in _OPTIONAL else [0] * length
            arrays.append(pyarrow.array(values).cast(field.type))
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """Finish the file; closing twice is allowed."""
        self._writer.close()
        self._file.close()

    def __enter__(self) -> StepColumns:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _arrow_type(name: str) -> Any:
    import pyarrow

    if name == "prefills_held":
        return pyarrow.bool_()
    return pyarrow.float64() if name.endswith("_s") else pyarrow.int64()


def _is_parquet(path: str | Path) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet_records(path: str | Path) -> Iterator[StepLogRecord]:
    import pyarrow.parquet

    with Path(path).open("rb") as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield _record(row)


def _record(row: Any) -> StepLogRecord:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    for item in fields(StepLogRecord):
        if item.default is MISSING and item.name not in row:
            raise ValueError(f"{item.name} is missing")
    # Fields of a later version are left out, so that its logs can be read; missing ones have their default.
    record = StepLogRecord(**{name: row[name] for name in FIELDS if name in row})
    for name in FIELDS:
        value = getattr(record, name)
        if value is None and name in _OPTIONAL:
            continue
        kind = int | float if name.endswith("_s") else int
        if not isinstance(value, kind) or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r:.60}")
    return record
