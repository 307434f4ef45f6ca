"""Text of strangers as one line that a terminal or a page can show."""

from __future__ import annotations

import unicodedata


def plain(text: str) -> str:
    """Return `text` with a space for every character that is not shown.

    Line breaks and control characters (a terminal obeys those), marks that change the direction of
    writing, and halves of surrogate pairs, which cannot be encoded.
    """
    return "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
