"""The step log's files: JSON lines of a real run, columns of Parquet of the simulator.

A real run writes one record a line, so that whatever was written before an interruption can be read. The simulator,
with millions of records, writes the same fields as columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import ConfigurationError
from lockstep.steplog.record import FIELDS, OPTIONAL_FIELDS, StepLogRecord

if TYPE_CHECKING:
    import numpy as np

_MOST_PARQUET_ROWS = 200_000_000


class StepLogWriter:
    """Writes records as JSON lines; each line is in the file as soon as `write` returns.

    Use it as a context manager, or call `close`.
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
    """Read step logs written as JSON lines, or as Parquet, of one run: one file of all ranks, or one of each."""
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


class StepColumns:
    """Writes the same records column by column to a Parquet file; memory does not grow with the run.

    Use it as a context manager, or call `close`. Needs PyArrow.
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
                values = pyarrow.nulls(length, field.type) if field.name in OPTIONAL_FIELDS else [0] * length
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


def read_parquet_columns(path: str | Path, needed: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read columns of numbers from a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with Path(path).open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names, num_rows = file.schema_arrow.names, file.metadata.num_rows
            for name in needed:
                if names.count(name) != 1:
                    raise ConfigurationError(f"{path} has {names.count(name)} columns {name}, and must have one")
            if num_rows > _MOST_PARQUET_ROWS:
                raise ConfigurationError(f"{path} has {num_rows:,} rows, more than {_MOST_PARQUET_ROWS:,}")
            chosen = [name for name in dict.fromkeys((*needed, *wanted)) if names.count(name) == 1]
            for name in chosen:
                kind = file.schema_arrow.field(name).type
                if not (
                    pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)
                ):
                    raise ConfigurationError(f"{path}: column {name} holds {kind}, and must hold numbers")
            table = file.read(columns=chosen)
        columns = {name: table.column(name).to_numpy() for name in chosen}
    except pyarrow.ArrowException as error:
        first = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigurationError(f"{path} is no Parquet file that can be read: {first}") from None
    for name in needed:
        if columns[name].dtype.kind == "f" and name in ("step", "rank", "real_rows"):
            raise ConfigurationError(f"{path}: column {name} has fractions or gaps, and must hold integers")
    for name, values in columns.items():
        if len(values) and values.dtype.kind in "iu" and values.min() < 0:
            raise ConfigurationError(f"{path}: column {name} has {values.min()}, and must be >= 0")
    return columns


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
        if value is None and name in OPTIONAL_FIELDS:
            continue
        kind = int | float if name.endswith("_s") else int
        if not isinstance(value, kind) or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r:.60}")
    return record
