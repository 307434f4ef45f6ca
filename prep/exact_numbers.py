"""Numbers that users write, such as frame rates, as exact fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

_MOST_CHARACTERS = 64
# Characters, so that a number is a float too: what 1e99999999 means takes hours, and not in Python
_MOST_EXPONENT = 2


def exact_number(value: Any) -> Fraction | None:
    """Return a number exactly as it is written: 0.1 is one tenth, "30000/1001" what it says.

    A float counts as it is printed. None for what is no number, or one of no reasonable length.
    """
    text = str(value)
    if len(text) > _MOST_CHARACTERS or len(text.lower().partition("e")[2]) > _MOST_EXPONENT:
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
