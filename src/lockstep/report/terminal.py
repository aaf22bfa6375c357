"""Text on a terminal as it is meant: names and contents of files are shown, never obeyed."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text


def plain(text: str, keep: str = "\n") -> str:
    r"""Return text with what steers a terminal, turns the reading direction or is half a character written as escapes.

    Args:
        text: from a file, a path or an option.
        keep: control characters that stay.

    Example:
        >>> plain("a\x1b[31m")
        'a\\x1b[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in keep and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else letter
        for letter in text
    )


class Terminal(Console):
    """A console that takes every string literally: no markup, no emoji codes, no control characters.

    Use `style=`, or a `Text`, for what is to be coloured.

    Args:
        stderr: write to stderr rather than stdout.
        **options: see `rich.console.Console`.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        file = sys.stderr if stderr else sys.stdout
        super().__init__(file=file, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as it is printed, in a table too."""
        return super().render_str(plain(text), **options)
