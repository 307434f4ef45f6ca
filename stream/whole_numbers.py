"""Whole numbers that a sequence of clips depends on, as users give them."""

from __future__ import annotations

import operator
from typing import Any

from prep.errors import UsageError

LEAST, MOST = -(2**63), 2**64 - 1  # of 64 bits, signed or not


def whole_number(name: str, value: Any, *, least: int = LEAST, most: int = MOST) -> int:
    """Return an integer of any kind, such as NumPy's or a tensor of one, as a plain int.

    Raises UsageError for what is none, as 1.0 and True, and for one out of its limits.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise UsageError(f"{name} ({value!r}) must be a whole number")
    # Python refuses to write out thousands of digits
    shown = found if found.bit_length() < 1024 else f"a number of {found.bit_length()} bits"
    if found < least:
        raise UsageError(f"{name} ({shown}) must be at least {least}")
    if found > most:
        raise UsageError(f"{name} ({shown}) must be at most {most}")
    return found
