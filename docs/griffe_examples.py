"""For the site: the section that our docstrings call `Example:` is the one that griffe knows as `Examples:`."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Shows examples as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
