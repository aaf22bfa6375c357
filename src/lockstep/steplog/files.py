"""The step log's files: JSON lines of a real run, readable after any interruption; Parquet columns of the simulator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, fields
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import ConfigurationError
from lockstep.json_reading import json_lines
from lockstep.steplog.record import FIELDS, OPTIONAL_FIELDS, StepLogRecord

if TYPE_CHECKING:
    import numpy as np

NEEDED_FIELDS = ("step", "rank", "real_rows")
"""Fields without which there is no record."""


class StepLogWriter(AbstractContextManager["StepLogWriter"]):
    """Writes records as JSON lines into a new file; each line is in the file as soon as `write` returns."""

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("x", encoding="utf-8", buffering=1)  # noqa: SIM115 - close() does

    def write(self, record: StepLogRecord) -> None:
        """Append one record."""
        self._file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._file.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_step_log(path: str | Path) -> list[StepLogRecord]:
    """Read a run's JSON lines, in order of step, then rank."""
    records = json_lines(Path(path), "a step record", _record)
    return sorted(records, key=lambda record: (record.step, record.rank))


def read_step_columns(path: str | Path, most: int | None = None) -> list[StepLogRecord]:
    """Return the first records that `StepColumns` has written, by default all."""
    import pyarrow.parquet

    with Path(path).open("rb") as file:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        return [StepLogRecord(**row) for row in islice(rows, most)]


class StepColumns(AbstractContextManager["StepColumns"]):
    """Writes the same records column by column to a Parquet file, replacing it; memory does not grow with the run."""

    def __init__(self, path: str | Path) -> None:
        import pyarrow
        import pyarrow.parquet

        types = {"prefills_held": pyarrow.bool_()}
        types |= {name: pyarrow.float64() for name in FIELDS if name.endswith("_s")}
        self._schema = pyarrow.schema([(name, types.get(name, pyarrow.int64())) for name in FIELDS])
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

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_parquet_columns(
    path: str | Path, needed: Sequence[str], wanted: Sequence[str] = (), most_rows: int = 200_000_000
) -> dict[str, np.ndarray]:
    """Read columns of numbers from a Parquet file: those that it must have, and the wanted ones that it has."""
    import pyarrow
    import pyarrow.parquet

    kinds = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
    try:
        with Path(path).open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names, num_rows = file.schema_arrow.names, file.metadata.num_rows
            for name in needed:
                if names.count(name) != 1:
                    raise ConfigurationError(f"{path} has {names.count(name)} columns {name}, and must have one")
            if num_rows > most_rows:  # a few bytes of Parquet may stand for any number of equal rows
                raise ConfigurationError(f"{path} has {num_rows:,} rows, more than {most_rows:,}")
            chosen = [name for name in dict.fromkeys((*needed, *wanted)) if names.count(name) == 1]
            for name in chosen:
                kind = file.schema_arrow.field(name).type
                if not any(is_kind(kind) for is_kind in kinds):
                    raise ConfigurationError(f"{path}: column {name} holds {kind}, and must hold numbers")
            table = file.read(columns=chosen)
        columns = {name: table.column(name).to_numpy() for name in chosen}
    except pyarrow.ArrowException as error:
        first = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigurationError(f"{path} is no Parquet file that can be read: {first}") from None
    for name, values in columns.items():
        if name in NEEDED_FIELDS and values.dtype.kind == "f":
            raise ConfigurationError(f"{path}: column {name} has fractions or gaps, and must hold integers")
        if len(values) and values.dtype.kind in "iu" and values.min() < 0:
            raise ConfigurationError(f"{path}: column {name} has {values.min()}, and must be >= 0")
    return columns


def _record(row: dict[str, Any]) -> StepLogRecord:
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
