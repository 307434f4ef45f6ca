"""Frame rates as exact fractions."""

from __future__ import annotations

from fractions import Fraction

from prep.errors import UsageError
from prep.format import exact_number

_MOST_RATE = 1_000_000


def parse_rate(value: float | str | Fraction) -> Fraction:
    """Read a frame rate: 15, 7.5, "30000/1001"; raise UsageError for anything else.

    The nearest fraction with a denominator of at most 100,000.
    """
    rate = (exact_number(value) or Fraction(0)).limit_denominator(100_000)
    if not 0 < rate <= _MOST_RATE:
        raise UsageError(
            f"fps ({value!r}) must be a number above 0, such as 15, 7.5 or 30000/1001, "
            f"at most {_MOST_RATE}"
        )
    return rate
