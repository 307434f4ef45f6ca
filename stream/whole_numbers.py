"""Whole numbers that a sequence of clips depends on, as users give them."""

from __future__ import annotations

import operator
from typing import Any

from prep.errors import UsageError


def whole_number(
    name: str, value: Any, *, least: int | None = None, most: int | None = None
) -> int:
    """Return an integer of any kind, such as NumPy's or a tensor of one, as a plain int.

    Raises UsageError for what is none, as 1.0 and True, and for one out of its limits.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise UsageError(f"{name} ({value!r}) must be a whole number")
    if least is not None and found < least:
        raise UsageError(f"{name} ({found}) must be at least {least}")
    if most is not None and found > most:
        raise UsageError(f"{name} ({found}) must be at most {most}")
    return found
