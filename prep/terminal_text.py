"""Lines of text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from prep.plain_text import plain

_COLUMNS = 80


def folded(text: str, first: str, later: str) -> list[str]:
    """Fold text between words, and inside a word that is longer than a line."""
    return textwrap.wrap(
        plain(text),
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
    ) or [first.rstrip()]
