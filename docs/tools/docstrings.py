"""Show the aligned lists of our docstrings as lists: `name  meaning`, continued lines indented."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"(\w+) {2,}(\S.*)")


class AlignedLists(griffe.Extension):
    """Turns each paragraph of at least two `name  meaning` lines into a Markdown list."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(_listed, paragraphs))


def _listed(paragraph: str) -> str:
    lines = paragraph.splitlines()
    items = [_ITEM.fullmatch(line) for line in lines]
    if sum(map(bool, items)) < 2 or not items[0]:
        return paragraph
    shown = []
    for line, item in zip(lines, items, strict=True):
        shown.append(f"- `{item[1]}`: {item[2]}" if item else f"    {line.strip()}")
    return "\n".join(shown)
