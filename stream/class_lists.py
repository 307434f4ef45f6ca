"""One class list over several datasets: joined by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stream.order import Int64


def join_class_lists(lists: Sequence[Sequence[str]]) -> tuple[list[str], list[Int64]]:
    """Return the list of all classes, and for each dataset which label each of its labels becomes.

    Lists that are the same stay as they are. Else the first dataset's classes come first, in their
    order, then those of the second that are new, and so on. Classes are the same where their names
    are, letter by letter: Kinetics has "passing American football" and "passing american football".

    Each int64 array has one more element, -1, which is where label -1 (none) finds itself.
    """
    names = list(dict.fromkeys(name for one in lists for name in one))
    place = {name: number for number, name in enumerate(names)}
    return names, [np.array([*(place[name] for name in one), -1], dtype=np.int64) for one in lists]
