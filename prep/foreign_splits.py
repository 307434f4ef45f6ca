"""Which tars of a folder or bucket are which split."""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.format import check_new_split_name, is_shard_path
from prep.shard_bytes import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

_USUAL = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")


def find_tars(paths: Iterable[str]) -> list[str]:
    """Return the tars among the paths, hidden ones left out; UsageError for a name that misleads.

    Their names go into YAML, JSON and globs that other readers interpret.
    """
    tars = [path for path in paths if path.lower().endswith(".tar")]
    tars = [path for path in tars if not any(part.startswith(".") for part in path.split("/"))]
    for path in tars:
        if not is_shard_path(path):
            raise UsageError(
                f"shard name {shown(path)} must be of A-Z, a-z, 0-9, '.', '_', '=', '-' and end in "
                ".tar, as other readers take the rest for patterns; rename the file"
            )
    return tars


def assign_splits(tars: list[str], wanted: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the tars of each split, in the order of their paths.

    `wanted` holds NAME (all tars) or NAME=GLOB (matched against paths below the root, first match
    wins; the others are left out). Without it, names say: `val/00000.tar` and `val-00000.tar` are
    of split val, and what has no name is of split train.
    """
    rules = [_rule(text) for text in wanted]
    splits: dict[str, list[str]] = {}
    for path in sorted(tars):
        if rules:
            name = next((name for name, glob in rules if fnmatch.fnmatchcase(path, glob)), None)
        else:
            name = _named(path)
        if name is not None:
            splits.setdefault(name, []).append(path)
    for name, glob in rules:
        if name not in splits:
            raise UsageError(f"--split {name}={glob} matches no tar (there is {shown(tars[0])})")
    return splits


def _rule(text: str) -> tuple[str, str]:
    name, _, glob = text.partition("=")
    return check_new_split_name(name), glob or "*"


def _named(path: str) -> str:
    folder, _, file = path.rpartition("/")
    first = folder.partition("/")[0]
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9_]*?)[-_.]*(?:[0-9][A-Za-z0-9_.=-]*)?\.tar", file)
    prefix = match[1] if match else ""
    for name in (first, prefix):
        if name in _USUAL:
            return name
    name = first or prefix or "train"
    try:
        return check_new_split_name(name)
    except UsageError as error:
        raise UsageError(
            f"{path}: {error}; say which tars are a split with --split NAME=GLOB"
        ) from error
