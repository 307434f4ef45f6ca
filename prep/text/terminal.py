"""Lines of text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from prep.text.plain import plain

_COLUMNS = 80
MARGIN = 12
"""Where values begin that have names before them."""


def folded(text: str, first: str, later: str) -> list[str]:
    """Fold text between words, and inside a word that is longer than a line."""
    return textwrap.wrap(
        plain(text),
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def pair(name: str, value: str) -> list[str]:
    """Return a name and its value in two columns; nothing without a value."""
    return folded(value, f"  {name:<{MARGIN - 2}}", " " * MARGIN) if value else []
