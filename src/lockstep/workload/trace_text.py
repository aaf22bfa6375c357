"""A trace's text: numbered lines of a plain or packed file, and the cells of a table, within limits."""

from __future__ import annotations

import csv
import gzip
import stat
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.errors import ConfigurationError

_OTHER_FILES = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip (an Excel workbook is one)",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True)
class ReadLimits:
    """What no trace exceeds. A file that does was made to fill a memory, or is something else."""

    line_bytes: int = 16 * 2**20  # of one line
    cell_lines: int = 1000  # of one quoted cell
    rows: int = 10_000_000  # requests
    # Gzip data may unpack to the first and, times its size, the second together. Text packs to a tenth or a twentieth.
    unpacked_bytes: int = 64 * 2**20
    unpacked_ratio: int = 200


class LineError(ValueError):
    """What is wrong with one line."""


def numbered_lines(path: Path, limits: ReadLimits) -> Iterator[tuple[int, str | LineError]]:
    """Yield `(line number, text)`; a line that cannot be decoded, or an archive that breaks off, yields its error."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        # Every rank reads the workload for itself, and so does the comparison: what can be read once is no workload.
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
                error.filename = str(path)  # of a read the system does not say where
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


def table_rows(
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
