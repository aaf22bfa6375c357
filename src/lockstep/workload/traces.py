"""Request traces from files: Azure CSV, Mooncake JSON lines, prompts as JSON lines; plain or gzip.

The format is recognised from the content, never from the name. Malformed lines are counted, named and skipped; a file
with too large a share of them is refused.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigurationError
from lockstep.metadata.sizes import check_int, shown
from lockstep.workload.request import Request, read_block_ids

_OTHER_FILES = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip (an Excel workbook is one)",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_LENGTH_LIMIT = 2**31
_NUM_NAMED_LINES = 20
_DELIMITERS = (",", ";", "\t", "|")
_MOONCAKE_BLOCK_SIZE = 512  # tokens per `hash_ids` entry, which names a block and all blocks before it
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_EXPECTED = {
    "azure-csv": "TIMESTAMP,ContextTokens,GeneratedTokens: a date with time and two integers >= 1",
    "mooncake-jsonl": 'a JSON object with "timestamp" (ms, >= 0), "input_length" and "output_length" (integers >= 1) '
    'and, if wanted, "hash_ids" (a list of integers >= 0)',
    "prompts-jsonl": 'a JSON object with "prompt" (text, not empty), "max_new_tokens" (integer >= 1) and, if wanted, '
    '"arrival_s" (seconds, >= 0)',
}
_EXPECTED_ANY = "one of: " + "; ".join(_EXPECTED.values())


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
            if (value := getattr(self, name)) is not None:
                check_int(name, value, 1)
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
class ReadLimits:
    """Limits that no real trace exceeds. A file beyond them was made to exhaust memory, or is no trace."""

    line_bytes: int = 16 * 2**20  # of one line
    cell_lines: int = 1000  # of one quoted cell
    rows: int = 10_000_000  # requests
    # Gzip data may unpack to the first and, times its size, the second together. Text packs to a tenth or a twentieth.
    unpacked_bytes: int = 64 * 2**20
    unpacked_ratio: int = 200


class LineError(Exception):
    """What is wrong with one line."""


@dataclass(frozen=True)
class Trace:
    """A workload read from a file."""

    source: str  # the path as given
    format: str  # `azure-csv`, `mooncake-jsonl`, `prompts-jsonl` or `synthetic`
    requests: list[Request]  # in order of arrival, the first at 0 s
    num_malformed: int = 0  # lines left out
    malformed: Sequence[str] = ()  # the first 20 of them, each with its number and what was expected

    @property
    def left_out(self) -> str:
        """What was left out, in a sentence that names the first three lines; empty where nothing was."""
        if not self.num_malformed:
            return ""
        lines = "1 malformed line" if self.num_malformed == 1 else f"{self.num_malformed:,} malformed lines"
        return f"{self.source}: left out {lines}: {'; '.join(self.malformed[:3])}"


def load_trace(
    path: str | Path, options: WorkloadOptions | None = None, count_tokens: Callable[[str], int] | None = None,
    limits: ReadLimits | None = None,
) -> Trace:  # fmt: skip
    """Read a request trace, sorted by arrival (ties keep the file's order), the first request at 0 s.

    `count_tokens` gives the length of a prompt given as text, by default its UTF-8 bytes, as a byte tokenizer does.
    """
    source, options, limits = str(path), options or WorkloadOptions(), limits or ReadLimits()
    count_tokens = count_tokens or (lambda text: len(text.encode("utf-8", "surrogatepass")))
    kind, found, malformed, num_malformed = "", [], [], 0
    # Some traces hold prompts, so a cell may be as long as a line. The limit is global to the process: restore it.
    cell_limit = csv.field_size_limit(limits.line_bytes)
    try:
        for number, kind, row in _rows(Path(path), limits):
            try:
                found.append(_request(kind, row, options, count_tokens))
            except LineError as error:
                num_malformed += 1
                if num_malformed <= _NUM_NAMED_LINES:
                    malformed.append(f"line {number}: {error}; expected {_EXPECTED.get(kind, _EXPECTED_ANY)}")
            if len(found) > limits.rows:
                most = f"{limits.rows:,} requests, the most that are read"
                raise ConfigurationError(f"{source} has more than {most}: num_requests takes the first N")
            if len(found) == options.num_requests:
                break
    finally:
        csv.field_size_limit(cell_limit)
    named = "; ".join(malformed[:3])
    if not found:
        why = named or f"the file has no rows; expected {_EXPECTED_ANY}"
        raise ConfigurationError(f"{source}: no request could be read: {why}")
    num_lines = len(found) + num_malformed
    if num_malformed > max(1, int(options.max_malformed_share * num_lines)):
        bad = f"{num_malformed} of {num_lines} lines are malformed"
        share = f"the share max_malformed_share={options.max_malformed_share}"
        raise ConfigurationError(f"{source}: {bad}, more than {share}: {named}")
    # The sort is stable: rows with equal timestamps keep the file's order.
    found.sort(key=lambda request: request[0])
    requests = [
        Request(index, (arrival - found[0][0]) / options.rate_scale, *others)
        for index, (arrival, *others) in enumerate(found)
    ]
    return Trace(source, kind, requests, num_malformed, malformed)


def _numbered_lines(path: Path, limits: ReadLimits) -> Iterator[tuple[int, str | LineError]]:
    """Yield `(line number, text)`; a line that cannot be decoded, or an archive that breaks off, yields its error."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        # Every rank reads the workload, and the check of outputs reads it again: a pipe can be read only once.
        raise ConfigurationError(f"{path} is a pipe or a device: a workload is read several times, from a file")
    with path.open("rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        for magic, what in _OTHER_FILES.items():
            if start.startswith(magic):
                raise ConfigurationError(f"{path} is {what}; a workload is UTF-8 text, plain or packed with gzip")
        stream = gzip.GzipFile(fileobj=raw) if start.startswith(b"\x1f\x8b") else raw
        most_bytes = limits.unpacked_bytes + limits.unpacked_ratio * status.st_size
        number = num_bytes = 0
        while True:
            try:
                line = stream.readline(limits.line_bytes)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield number + 1, LineError(f"the gzip data ends or breaks here ({error})")
                return
            except OSError as error:
                error.filename = str(path)  # which the system does not name when a read fails
                raise
            if not line:
                return
            num_bytes += len(line)
            if num_bytes > most_bytes:
                limit = f"{most_bytes:,} bytes, over {limits.unpacked_ratio} times its size"
                raise ConfigurationError(f"{path} unpacks to more than {limit}: no trace does")
            if len(line) == limits.line_bytes and not line.endswith(b"\n"):
                limit = f"{limits.line_bytes} bytes, the most that a line of a trace may have"
                raise ConfigurationError(f"{path}: line {number + 1} is longer than {limit}")
            for part in line.splitlines(keepends=True):  # at a carriage return alone as well
                number += 1
                try:
                    yield number, part.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield number, LineError(f"not UTF-8 ({error.reason} at byte {error.start})")


def _table_rows(
    lines: Iterator[tuple[int, str | LineError]], number: int, line: str, delimiter: str, limits: ReadLimits
) -> Iterator[tuple[int, list[str] | LineError]]:
    """Yield `(line number, cells)` of CSV with the header `line`, and `lines` after it.

    A quote that is never closed would swallow all rows after it. So a row over several lines that is not well-formed is
    malformed in its first line alone, and reading goes on with the next.
    """
    ahead: deque[tuple[int, str | LineError]] = deque([(number, line)])
    taken: list[tuple[int, str | LineError]] = []

    def texts() -> Iterator[str]:
        num_chars = 0
        while item := ahead.popleft() if ahead else next(lines, None):
            num_chars = num_chars * bool(taken) + len(str(item[1]))
            taken.append(item)
            if isinstance(item[1], LineError):
                raise item[1] if len(taken) == 1 else LineError("a quote is not closed before a line that is no text")
            if len(taken) > limits.cell_lines or num_chars > limits.line_bytes:
                raise LineError(f"a quote is not closed within {limits.cell_lines} lines")
            yield item[1]

    while True:  # with a new reader after each malformed row
        try:
            taken.clear()
            for row in csv.reader(texts(), delimiter=delimiter, skipinitialspace=True, strict=True):
                cells = [cell.strip() for cell in row]
                if any(cells):
                    yield taken[0][0], cells
                taken.clear()
            return
        except (csv.Error, LineError) as error:
            yield taken[0][0], error if isinstance(error, LineError) else LineError(f"not CSV ({error})")
            ahead.extendleft(reversed(taken[1:]))


def _rows(path: Path, limits: ReadLimits) -> Iterator[tuple[int, str, dict[str, object] | LineError]]:
    """Yield each row's line number and format, and its values by name or what is wrong with it."""
    lines = _numbered_lines(path, limits)
    kind = ""
    for number, line in lines:
        if isinstance(line, LineError):
            yield number, kind, line
        elif line.strip():
            try:
                if not kind:
                    kind, delimiter = _recognise(line)
                    if delimiter:
                        rows = _table_rows(lines, number, line, delimiter, limits)
                        yield from _azure_rows(path, rows, has_commas=delimiter == ",")
                        return
                row: dict[str, object] | LineError = _json_object(line)
            except LineError as error:
                row = error
            yield number, kind, row


def _azure_rows(
    path: Path, rows: Iterator[tuple[int, list[str] | LineError]], has_commas: bool
) -> Iterator[tuple[int, str, dict[str, object] | LineError]]:
    columns: dict[str, int] = {}
    num_columns = 0
    for number, cells in rows:
        if isinstance(cells, LineError):
            yield number, "azure-csv", cells
        elif set(_AZURE_COLUMNS) <= set(cells):
            # Concatenated files repeat the header, maybe with its columns in another order.
            if twice := next((name for name in _AZURE_COLUMNS if cells.count(name) > 1), None):
                raise ConfigurationError(f"{path}: the header names {twice} {cells.count(twice)} times")
            columns, num_columns = {name: cells.index(name) for name in _AZURE_COLUMNS}, len(cells)
        elif len(cells) < num_columns or any(cells[num_columns:]):
            yield number, "azure-csv", LineError(f"{len(cells)} columns, and {num_columns} in the header")
        else:
            # Commas group digits only in comma-separated tables; other tables may have decimal commas.
            row: dict[str, object] = {name: _integer(cells[place], has_commas) for name, place in columns.items()}
            yield number, "azure-csv", row


def _request(
    kind: str, row: dict[str, object] | LineError, options: WorkloadOptions, count_tokens: Callable[[str], int]
) -> tuple[Any, ...]:
    """Return the arrival by the file's own clock, and the other arguments of `Request`."""
    if isinstance(row, LineError):
        raise row
    if kind == "azure-csv":
        arrival = _timestamp(row["TIMESTAMP"])
        lengths = [_length(row[name], name) for name in _AZURE_COLUMNS[1:]]
        return arrival, *options.lengths(*lengths)
    if kind == "mooncake-jsonl":
        arrival = _seconds(row.get("timestamp"), "timestamp") / 1000
        lengths = [_length(row.get(name), name) for name in ("input_length", "output_length")]
        block_ids = read_block_ids("hash_ids", row.get("hash_ids"), LineError)
        return arrival, *options.lengths(*lengths), None, block_ids, _MOONCAKE_BLOCK_SIZE * options.length_scale
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise LineError(f'"prompt" is {shown(prompt, 60)}')
    if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise LineError('"prompt" has half of a surrogate pair, which no tokenizer takes')
    num_prompt = count_tokens(prompt)
    if num_prompt < 1:
        raise LineError(f'"prompt" has {num_prompt} tokens')
    num_new = _length(row.get("max_new_tokens"), "max_new_tokens")
    arrival = _seconds(row.get("arrival_s", 0), "arrival_s")
    return arrival, *options.lengths(num_prompt, num_new, scaled=False), prompt


def _recognise(line: str) -> tuple[str, str]:
    """Return the format and, for a table, its delimiter."""
    if line.lstrip().startswith("{"):
        keys = _json_object(line).keys()
        if "prompt" in keys:
            return "prompts-jsonl", ""
        if "input_length" in keys or "output_length" in keys:
            return "mooncake-jsonl", ""
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
        except csv.Error:
            continue
        if set(_AZURE_COLUMNS) <= {cell.strip() for cell in cells}:
            return "azure-csv", delimiter
    raise LineError(f"{shown(line.strip(), 60)} fits no known format")


def _json_object(line: str) -> dict[str, object]:
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # no JSON, or an integer of thousands of digits
        raise LineError(f"not JSON ({shown(str(error), 60)})") from None
    if not isinstance(row, dict):
        raise LineError(f"{shown(row, 60)} is not an object")
    return row


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise LineError("a key appears twice in one object")
    return row


def _timestamp(value: object) -> float:
    text = str(value)
    try:
        # Python also reads dates of digits alone, and would take some milliseconds since 1970 for the year 1700.
        if not re.match(r"\d{4}-\d\d-\d\d[T ]", text, re.ASCII):
            raise ValueError
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise LineError(f"TIMESTAMP is {shown(value, 60)}") from None
    # Times without a zone are UTC, independent of this machine's zone.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _integer(text: str, grouped: bool) -> object:
    """Return a cell as an integer where it is one: `1374`, `1374.0` (as pandas writes it), or `"1,374"` if grouped."""
    if grouped and re.fullmatch(r"\d{1,3}(,\d{3})+", text, re.ASCII):
        text = text.replace(",", "")
    # Longer numbers exceed the limit anyway, and Python refuses integers of thousands of digits.
    return int(text.removesuffix(".0")) if re.fullmatch(r"\d{1,12}(\.0)?", text, re.ASCII) else text


def _length(value: object, name: str) -> int:
    # JSON also has booleans and fractions, which are no lengths; a whole number may be written as 3.0.
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(number) is not int or not 1 <= number < _LENGTH_LIMIT:
        raise LineError(f"{name} is {shown(value, 60)}")
    return number


def _seconds(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise LineError(f"{name} is {shown(value, 60)}")
    return float(value)
