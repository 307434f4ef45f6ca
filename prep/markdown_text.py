"""Text of strangers in Markdown: it shows as it is and never becomes markup."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prep.text.plain import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST = 200


def inline(text: str) -> str:
    r"""Return `text` as one line of Markdown that reads like it: `a|b` becomes `a\|b`.

    Control characters and those that change the direction of writing become spaces, `<`, `>` and
    `&` entities, and every other ASCII punctuation that can mean something gets a backslash, which
    CommonMark allows for all of it; so neither HTML, links, tables nor autolinks can begin. Points
    between digits stay as they are, for versions.
    """
    short = " ".join(plain(text).split())
    if len(short) > _LONGEST:
        short = short[:_LONGEST] + "…"
    entities = short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([!\"#$%()*+/:=?@\[\\\]^_`{|}~]|(?<!\d)\.|\.(?!\d))", r"\\\1", entities)


def table(head: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    """Return a Markdown table; columns whose cells are all numbers stand to the right."""
    numeric = [
        bool(rows) and all(isinstance(row[column], int) for row in rows)
        for column in range(len(head))
    ]
    lines = [head, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
