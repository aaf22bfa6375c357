"""Text on a terminal as it is meant: names and contents of files are shown, never obeyed."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

_LEAST_WIDTH = 40


def plain(text: str, keep: str = "\n") -> str:
    """Return text with escapes for terminal controls, marks of reading direction and lone surrogates."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in keep and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else letter
        for letter in text
    )


class Terminal(Console):
    """A console that takes every string literally: no markup, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        file = sys.stderr if stderr else sys.stdout
        super().__init__(file=file, markup=False, emoji=False, highlight=False, **options)
        self.width = max(self.width, _LEAST_WIDTH)  # COLUMNS=0 would leave nothing of a table

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as it is printed, in a table too."""
        return super().render_str(plain(text), **options)


@contextmanager
def progress(
    console: Console, what: str, total: float | None, line_every_s: float = 5.0
) -> Iterator[Callable[..., None]]:
    """Show progress while the block runs: a bar on a terminal, elsewhere a line now and then."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), "{task.percentage:>5.1f} %", "{task.fields[now]}")
    texts = (TextColumn(each, markup=False) if isinstance(each, str) else each for each in columns)
    with Progress(*texts, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, now="")
        last_line = time.monotonic()

        def show(done: float, total: float | None = total, now: str = "") -> None:
            nonlocal last_line
            bar.update(task, completed=done, total=total, now=now)
            if not console.is_terminal and time.monotonic() - last_line > line_every_s:
                last_line = time.monotonic()
                percent = int(1000 * done / (total or 1)) / 10  # the last steps have few rows: they are no 100 %
                line = f"{what}: {percent} % of all rows done{'; ' * bool(now)}{now}"
                console.print(line, style="dim", soft_wrap=True)

        yield show
