"""Which datasets a stream reads, and how often it draws from each: what users write, understood."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

from prep.errors import UsageError
from prep.format import exact_number

_MOST_WEIGHT = 1000
_WEIGHTED = re.compile(r"(?P<root>.+)@(?P<weight>\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


@dataclass(frozen=True)
class DataRoot:
    """A dataset with the draws of each of its clips in an epoch of training.

    root             a local directory, `s3://bucket/prefix`, `gs://…` or `https://…`
    weight           above 0: 2 draws every clip twice an epoch, 0.5 draws one half of them
    storage_options  of its object store's client; None takes those of the loader
    """

    root: str
    weight: Fraction = Fraction(1)
    storage_options: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Take the weight exactly as it is written: 0.1 is one tenth."""
        if not isinstance(self.root, str | Path):
            raise UsageError(f"root ({self.root!r}) must be a directory's path or an address")
        object.__setattr__(self, "root", str(self.root))
        object.__setattr__(self, "weight", _weight(self.weight, self.root))

    def options_or(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of its client, those given where it has none of its own.

        An empty mapping is one of its own: a public bucket beside one with an endpoint and keys.
        """
        return options if self.storage_options is None else self.storage_options

    @classmethod
    def parse(cls, text: str) -> DataRoot:
        """Read `ROOT` or `ROOT@WEIGHT`: a number behind the last "@" is always the weight.

        So a root whose own name ends in "@2" is written with a weight behind it, "clips@2@1".
        Raises UsageError for a weight of no use, and where such a name was meant by all signs.
        """
        found = _WEIGHTED.fullmatch(text)
        if found is None:
            return cls(text)
        root, weight = found["root"], found["weight"]
        if "://" not in text and _is_directory(text) and not _is_directory(root):
            raise UsageError(
                f"{text!r} means the dataset {root!r} with weight {weight}, which does not exist; "
                f"write {text + '@1'!r} for the directory of that name"
            )
        return cls(root, _weight(weight, root))


RootLike = str | Path | DataRoot
WeightedRootLike = RootLike | tuple[str | Path, float | str | Fraction]


def data_roots(given: RootLike | Sequence[WeightedRootLike]) -> list[DataRoot]:
    """Return what was given as a list: one root, or several with or without weights.

    Raises UsageError for something else, for no root, and for a root that stands there twice.
    """
    if isinstance(given, str | Path | DataRoot):
        return [_data_root(given)]
    as_given: object = given
    if not isinstance(as_given, Sequence) or isinstance(as_given, bytes):
        raise UsageError(f"root ({given!r}) must be one root or a list of roots")
    roots = [_data_root(one) for one in given]
    if not roots:
        raise UsageError("root is an empty list; name at least one dataset")
    places = [_place(one.root) for one in roots]
    for one, place in zip(roots, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"root {one.root} is named twice; name it once, with a weight")
    return roots


def check_patience(seconds: Any) -> None:
    """Raise UsageError for what is no time to wait for a store."""
    if not isinstance(seconds, Real) or not seconds >= 0:  # type: ignore[operator]
        raise UsageError(f"storage_patience_seconds ({seconds!r}) must be a number of at least 0")


def _place(root: str) -> str:
    """Return the same for all spellings of a root: a directory without links, `..` and the like."""
    if "://" in root:
        return root.rstrip("/")
    try:
        return str(Path(root).resolve())
    except (OSError, RuntimeError, ValueError):  # what cannot be one is said when it is opened
        return root.rstrip("/")


def _is_directory(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # such as a name that is too long
        return False


def _data_root(given: Any) -> DataRoot:
    if isinstance(given, DataRoot):
        return given
    if isinstance(given, str | Path):
        return DataRoot(str(given))
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], str | Path):
        return DataRoot(str(given[0]), given[1])
    raise UsageError(f"{given!r} must be a root or a pair of a root and its weight")


def _weight(given: Any, root: str) -> Fraction:
    weight = given if isinstance(given, Fraction) else exact_number(given) or Fraction(0)
    if not 0 < weight <= _MOST_WEIGHT:
        raise UsageError(
            f"weight ({given}) of {root} must be a number above 0, at most {_MOST_WEIGHT}; "
            "leave a dataset out that is not to be drawn from"
        )
    if math.log2(weight.denominator) > 64:
        raise UsageError(f"weight ({given}) of {root} must have at most 18 digits")
    return weight
