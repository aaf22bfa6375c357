"""Request traces from files: Azure CSV, Mooncake JSON lines, prompts as JSON lines; plain or gzip.

The format is recognised from the content, never from the name. A malformed line is counted and named (file, line, what
was expected) and the rows around it are kept. A file is refused if more than a share of its lines is malformed, if a
line is longer than any trace has, or if it grows beyond a limit when it is unpacked.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lockstep.errors import ConfigurationError
from lockstep.workload.request import Request
from lockstep.workload.trace_text import LineError, ReadLimits, numbered_lines, short, table_rows

_LENGTH_LIMIT = 2**31
_NUM_NAMED_LINES = 20
_DELIMITERS = (",", ";", "\t", "|")
_MOONCAKE_BLOCK_SIZE = 512
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_Row = str | dict[str, object]
_EXPECTED = {
    "azure-csv": "TIMESTAMP,ContextTokens,GeneratedTokens: a date with time and two integers >= 1",
    "mooncake-jsonl": 'a JSON object with "timestamp" (ms, >= 0), "input_length" and "output_length" (integers >= 1) '
    'and, if wanted, "hash_ids" (a list of integers >= 0)',
    "prompts-jsonl": 'a JSON object with "prompt" (text, not empty), "max_new_tokens" (integer >= 1) and, if wanted, '
    '"arrival_s" (seconds, >= 0)',
}


@dataclass(frozen=True)
class WorkloadOptions:
    """How a workload is read and scaled."""

    rate_scale: float = 1.0  # multiplies the arrival rate, 1e-9..1e9
    # Multiplies the lengths of a trace, > 0. Prompts given as text, and what they ask for, keep theirs.
    length_scale: float = 1.0
    max_prompt_tokens: int | None = None  # longer prompts are cut to this, >= 1
    max_new_tokens: int | None = None  # longer outputs are cut to this, >= 1
    num_requests: int | None = None  # only the first N rows of the file, >= 1
    # A file with a larger share of malformed lines is refused, 0..1. A single malformed line is always forgiven.
    max_malformed_share: float = 0.01

    def __post_init__(self) -> None:
        if not 1e-9 <= self.rate_scale <= 1e9:
            raise ConfigurationError(f"rate_scale must be in 1e-9..1e9, got {self.rate_scale}")
        if not (self.length_scale > 0 and math.isfinite(self.length_scale)):
            raise ConfigurationError(f"length_scale must be a number > 0, got {self.length_scale}")
        for name in ("max_prompt_tokens", "max_new_tokens", "num_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be >= 1, got {value}")
        if not 0 <= self.max_malformed_share <= 1:
            raise ConfigurationError(f"max_malformed_share must be in 0..1, got {self.max_malformed_share}")

    def lengths(self, num_prompt_tokens: int, max_new_tokens: int, *, scaled: bool = True) -> tuple[int, int]:
        """Return a request's lengths, scaled and cut: `(prompt tokens, new tokens)`, each in 1..2**31 - 1, or raise."""
        scale = self.length_scale if scaled else 1.0
        prompt = min(num_prompt_tokens * scale, self.max_prompt_tokens or math.inf)
        output = min(max_new_tokens * scale, self.max_new_tokens or math.inf)
        if not max(prompt, output) < _LENGTH_LIMIT - 1:
            raise ConfigurationError(
                f"length_scale={self.length_scale:g} makes a request of {max(prompt, output):.4g} tokens, "
                f"more than {_LENGTH_LIMIT - 1}"
            )
        return max(1, round(prompt)), max(1, round(output))


@dataclass(frozen=True)
class MalformedLine:
    """A line that could not be read: its number from 1, what was wrong, and what was expected."""

    line: int
    problem: str
    expected: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}; expected {self.expected}"


@dataclass(frozen=True)
class Trace:
    """A workload read from a file."""

    source: str  # the path as given
    format: str  # `azure-csv`, `mooncake-jsonl`, `prompts-jsonl` or `synthetic`
    requests: list[Request]  # in order of arrival, the first at 0 s
    num_malformed: int = 0  # lines left out
    malformed: list[MalformedLine] = field(default_factory=list)  # the first 20 of them

    @property
    def left_out(self) -> str:
        """What was left out, in a sentence that names the first three lines; empty where nothing was."""
        if not self.num_malformed:
            return ""
        lines = "1 malformed line" if self.num_malformed == 1 else f"{self.num_malformed:,} malformed lines"
        return f"{self.source}: left out {lines}: {'; '.join(map(str, self.malformed[:3]))}"


def load_trace(
    path: str | Path,
    options: WorkloadOptions | None = None,
    count_tokens: Callable[[str], int] | None = None,
    limits: ReadLimits | None = None,
) -> Trace:
    """Read a request trace: Azure CSV, Mooncake JSON lines or prompts as JSON lines; plain or gzip.

    Args:
        path: of the file.
        options: scaling, limits, and the share of malformed lines at which the file is refused.
        count_tokens: the length in tokens of a prompt given as text; without it, its UTF-8 bytes are counted (which is
            what a byte tokenizer gives).
        limits: of files, for tests; what no trace exceeds by default.

    Returns:
        The trace, sorted by arrival (ties keep the file's order), the first request at 0 s.

    Raises:
        ConfigurationError: for a file that is no trace, exceeds the limits, or has too many malformed lines; names the
            file, the first such lines and what was expected.
    """
    options = options or WorkloadOptions()
    count_tokens = count_tokens or (lambda text: len(text.encode("utf-8", "surrogatepass")))
    limits = limits or ReadLimits()
    reader = _Reader(str(path), options, count_tokens, limits)
    # A cell may be as long as a line: prompts stand in some traces. The limit is the process's own, so it is put back.
    cell_limit = csv.field_size_limit(limits.line_bytes)
    try:
        reader.read(numbered_lines(Path(path), limits))
    finally:
        csv.field_size_limit(cell_limit)
    return reader.finish()


class _Reader:
    """Recognises the format at the first line that has one, then turns lines into requests."""

    def __init__(
        self, source: str, options: WorkloadOptions, count_tokens: Callable[[str], int], limits: ReadLimits
    ) -> None:
        self._source = source
        self._options = options
        self._count_tokens = count_tokens
        self._limits = limits
        self._format: str | None = None
        self._rows: list[tuple[float, int, int, str | None, tuple[int, ...]]] = []
        self._malformed: list[MalformedLine] = []
        self._num_malformed = 0

    def read(self, lines: Iterator[tuple[int, str | LineError]]) -> None:
        """Take lines until there are no more, or enough rows."""
        for number, row in self._parsed(lines):
            try:
                if isinstance(row, LineError):
                    raise row
                self._rows.append(self._request(_json_object(row) if isinstance(row, str) else row))
            except LineError as error:
                self._leave_out(number, error)
            if self._enough():
                return

    def _parsed(self, lines: Iterator[tuple[int, str | LineError]]) -> Iterator[tuple[int, _Row | LineError]]:
        """Yield rows: lines of JSON as they are, those of a table as cells by the columns' names."""
        for number, line in lines:
            if isinstance(line, str) and not line.strip():
                continue
            if isinstance(line, str) and self._format is None:
                try:
                    self._format, delimiter = _recognise(line, self._limits)
                except LineError as error:
                    yield number, error
                    continue
                if delimiter:
                    rows = table_rows(lines, number, line, delimiter, self._limits)
                    yield from self._table(rows, grouped=delimiter == ",")
                    return
            yield number, line

    def _table(
        self, rows: Iterator[tuple[int, list[str] | LineError]], grouped: bool
    ) -> Iterator[tuple[int, _Row | LineError]]:
        columns: dict[str, int] = {}
        num_columns = 0
        for number, cells in rows:
            if isinstance(cells, LineError):
                yield number, cells
            elif set(_AZURE_COLUMNS) <= set(cells):
                # A header may come again, where files were put together, and its columns in another order.
                for name in _AZURE_COLUMNS:
                    if cells.count(name) > 1:
                        raise ConfigurationError(f"{self._source}: the header names {name} {cells.count(name)} times")
                columns, num_columns = {name: cells.index(name) for name in _AZURE_COLUMNS}, len(cells)
            elif len(cells) < num_columns or any(cells[num_columns:]):
                yield number, LineError(f"{len(cells)} columns, and {num_columns} in the header")
            else:
                yield number, {name: _integer(cells[place], grouped) for name, place in columns.items()}

    def _leave_out(self, number: int, error: LineError) -> None:
        self._num_malformed += 1
        if len(self._malformed) < _NUM_NAMED_LINES:
            expected = _EXPECTED[self._format] if self._format else "one of: " + "; ".join(_EXPECTED.values())
            self._malformed.append(MalformedLine(number, str(error), expected))

    def _enough(self) -> bool:
        if len(self._rows) > self._limits.rows:
            raise ConfigurationError(
                f"{self._source} has more than {self._limits.rows:,} requests, the most that are read: "
                "num_requests takes the first N"
            )
        limit = self._options.num_requests
        return limit is not None and len(self._rows) >= limit

    def finish(self) -> Trace:
        """Check the share of malformed lines and return the trace."""
        named = "; ".join(str(line) for line in self._malformed[:3])
        if self._format is None or not self._rows:
            why = named or f"the file has no rows; expected one of: {'; '.join(_EXPECTED.values())}"
            raise ConfigurationError(f"{self._source}: no request could be read: {why}")
        num_lines = len(self._rows) + self._num_malformed
        if self._num_malformed > max(1, int(self._options.max_malformed_share * num_lines)):
            raise ConfigurationError(
                f"{self._source}: {self._num_malformed} of {num_lines} lines are malformed, more than the share "
                f"max_malformed_share={self._options.max_malformed_share}: {named}"
            )
        # A sort by arrival alone is stable: rows with one timestamp keep the file's order.
        rows = sorted(self._rows, key=lambda row: row[0])
        first = rows[0][0]
        size = _MOONCAKE_BLOCK_SIZE * self._options.length_scale
        requests = [
            Request(index, (arrival - first) / self._options.rate_scale, num_prompt, num_new, prompt, block_ids, size)
            for index, (arrival, num_prompt, num_new, prompt, block_ids) in enumerate(rows)
        ]
        return Trace(self._source, self._format, requests, self._num_malformed, self._malformed)

    def _request(self, row: dict[str, object]) -> tuple[float, int, int, str | None, tuple[int, ...]]:
        if self._format == "azure-csv":
            arrival = _timestamp(row["TIMESTAMP"])
            lengths = [_length(row[name], name) for name in _AZURE_COLUMNS[1:]]
            return (arrival, *self._options.lengths(*lengths), None, ())
        if self._format == "mooncake-jsonl":
            arrival = _seconds(row.get("timestamp"), "timestamp") / 1000
            lengths = [_length(row.get(name), name) for name in ("input_length", "output_length")]
            return (arrival, *self._options.lengths(*lengths), None, _block_ids(row.get("hash_ids")))
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise LineError(f'"prompt" is {short(prompt)}')
        if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise LineError('"prompt" has half of a surrogate pair, which no tokenizer takes')
        num_prompt = self._count_tokens(prompt)
        if num_prompt < 1:
            raise LineError(f'"prompt" has {num_prompt} tokens')
        num_new = _length(row.get("max_new_tokens"), "max_new_tokens")
        arrival = _seconds(row.get("arrival_s", 0), "arrival_s")
        return (arrival, *self._options.lengths(num_prompt, num_new, scaled=False), prompt, ())


def _recognise(line: str, limits: ReadLimits) -> tuple[str, str]:
    """Return the format, and what separates the columns of a table."""
    if line.lstrip().startswith("{"):
        keys = _json_object(line).keys()
        if "prompt" in keys:
            return "prompts-jsonl", ""
        if "input_length" in keys or "output_length" in keys:
            return "mooncake-jsonl", ""
    for delimiter in _DELIMITERS:
        try:
            (cells,) = (cells for _, cells in table_rows(iter(()), 1, line, delimiter, limits))
        except ValueError:
            continue
        if not isinstance(cells, LineError) and set(_AZURE_COLUMNS) <= set(cells):
            return "azure-csv", delimiter
    raise LineError(f"{short(line.strip())} fits no known format")


def _json_object(line: str) -> dict[str, object]:
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys)
    except LineError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, or an integer of thousands of digits
        raise LineError(f"not JSON ({short(str(error))})") from None
    if not isinstance(row, dict):
        raise LineError(f"{short(row)} is not an object")
    return row


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise LineError("a key stands twice in one object")
    return row


def _timestamp(value: object) -> float:
    text = str(value)
    try:
        # Python also reads dates of digits alone, and so would take some milliseconds since 1970 for the year 1700.
        if not re.match(r"\d{4}-\d\d-\d\d[T ]", text, re.ASCII):
            raise ValueError
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise LineError(f"TIMESTAMP is {short(value)}") from None
    # A time without a zone is read as UTC, so that the result does not depend on this machine's zone.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _integer(text: str, grouped: bool) -> object:
    """Return a cell as an integer where it is one: `1374`, `1374.0` (as pandas writes them), or `"1,374"`.

    A comma groups digits only where commas separate cells: other tables may have decimal commas.
    """
    if grouped and re.fullmatch(r"\d{1,3}(,\d{3})+", text, re.ASCII):
        text = text.replace(",", "")
    # More than ten digits are beyond the limit anyway, and thousands of them no integer to Python.
    return int(text.removesuffix(".0")) if re.fullmatch(r"\d{1,12}(\.0)?", text, re.ASCII) else text


def _length(value: object, name: str) -> int:
    # JSON has booleans and fractions; neither a boolean nor 3.7 tokens is a length. A whole number may be written 3.0.
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < _LENGTH_LIMIT:
        raise LineError(f"{name} is {short(value)}")
    return number


def _block_ids(value: object) -> tuple[int, ...]:
    """Return names of blocks of 512 tokens: equal ones stand for equal tokens, those of all blocks before included."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise LineError(f"hash_ids is {short(value)}")
    for block_id in value:
        if isinstance(block_id, bool) or not isinstance(block_id, int) or not 0 <= block_id < 2**63:
            raise LineError(f"hash_ids has {short(block_id)}")
    return tuple(value)


def _seconds(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise LineError(f"{name} is {short(value)}")
    return float(value)
