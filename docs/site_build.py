"""What `make docs` adds to MkDocs: examples of docstrings as code, links that leave the pages as plain names."""

import posixpath
import re
from typing import Any

import griffe

LINK = re.compile(r"\[([^\[\]]+)\]\(((?:\.\./)+[^)\s]+)\)")


class Examples(griffe.Extension):
    """Our docstrings call a section `Example:` that griffe knows as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Show a link to a file of the repository, such as `examples/`, as its text: the site has no address for it yet."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def plain(found: re.Match[str]) -> str:
        leaves = not posixpath.normpath(posixpath.join(folder, found[2])).startswith("docs/")
        return found[1] if leaves else found[0]

    return LINK.sub(plain, markdown)
