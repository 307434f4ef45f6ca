"""Text of strangers as one line that a terminal or a page can show."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def plain(text: str) -> str:
    """Return `text` with a space for every character that is not shown.

    Line breaks and control characters (a terminal obeys those), marks that change the direction of
    writing, and halves of surrogate pairs, which cannot be encoded.
    """
    return "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)


def storable(text: str) -> str:
    """Return a stranger's text so that UTF-8 can hold it: bad bytes become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def short(text: str, most: int = 120) -> str:
    """Return a stranger's text for a message: one line of at most `most` characters."""
    line = plain(text)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def few(texts: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """Return the first few of many texts and how many more there are: `a, b, c and 7 more`."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return f"{between.join(texts[:most])}{more}"


def setting_text(value: Any) -> str:
    """Return a value of a split's settings as a person writes it: `left, up`, `keys member`."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {setting_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(setting_text(inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
