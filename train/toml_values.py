"""Values of a TOML file: checked against a type, written back, and names offered for others."""

from __future__ import annotations

import difflib
import math
from numbers import Real
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin

from prep.errors import UsageError


def nearest(name: str, known: list[str]) -> str:
    """Return a clause that offers the known name nearest to `name`, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def check_known(name: str, known: list[str], what: str, where: str) -> None:
    """Raise UsageError, with the nearest one, for a name that is none of the known."""
    if name not in known:
        raise UsageError(f"{name!r} in {where} is no {what}; {nearest(name, known)}")


def typed(value: Any, hint: Any, key: str, where: str) -> Any:
    """Return the value as the field's type, one of those that TOML knows.

    Real numbers of any kind serve as floats, lists as tuples, paths as text, and what NumPy and
    torch hold as what it is in Python. Raises UsageError, naming `key` and `where`, for a value of
    another type.
    """
    if hasattr(value, "tolist"):  # a scalar's is a number
        value = value.tolist()
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        many = kinds[-1] is Ellipsis
        if isinstance(value, list | tuple) and (many or len(value) == len(kinds)):
            return tuple(typed(part, kinds[0], key, where) for part in value)
        wanted = f"a list of {'' if many else f'{len(kinds)} '}{kinds[0].__name__}"
        raise UsageError(f"{key} in {where} must be {wanted}, not {value!r}")
    if get_origin(hint) is Literal:
        # by type, too: 3.0 and true are equal to choices that they are none of
        if not any(type(value) is type(choice) and value == choice for choice in get_args(hint)):
            choices = " or ".join(map(repr, get_args(hint)))
            raise UsageError(f"{key} in {where} must be {choices}, not {value!r}")
        return value
    if hint is float and not isinstance(value, bool) and isinstance(value, Real):
        value = _float(value)
    if hint is str and isinstance(value, PurePath):
        value = str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UsageError(f"{key} in {where} must be of type {hint.__name__}, not {value!r}")
    return int(value) if hint is int else value  # no subclass of it, as enumerations are


def _float(value: Real) -> float:
    """Return the number as a float; infinity where there is none so large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def toml_value(value: Any) -> str:
    """Write a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(part) for part in value)}]"
    if isinstance(value, str):
        return _toml_string(value)
    return repr(value)


def _toml_string(value: str) -> str:
    """Quote as a TOML basic string; control characters (U+0000 to U+001F, U+007F) are escaped."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped) + '"'
