"""What an unfinished `kprep index` writes, kept in the root until the manifest stands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.foreign_publish import is_companion
from prep.format.layout import WORK_NAME

if TYPE_CHECKING:
    from prep.storage import Storage

MARKER_PATH = f"{WORK_NAME}/index.json"


@dataclass(frozen=True)
class Begun:
    """The files that are kprep's to write, and whether README.md is one of them."""

    files: tuple[str, ...]
    card: bool
    gone: tuple[str, ...] = ()
    """Companions of splits and tars that are gone, to be removed once the manifest stands."""


def write_marker(storage: Storage, begun: Begun) -> None:
    """Say what is about to be written."""
    storage.write(MARKER_PATH, (json.dumps(asdict(begun)) + "\n").encode("ascii"))


def remove_marker(storage: Storage) -> None:
    """Forget it, as the manifest lists what was written and what is gone is removed."""
    storage.delete(MARKER_PATH)


def read_marker(storage: Storage) -> Begun | None:
    """Return what a killed run began; None where there is none, UsageError where it is not ours."""
    if not storage.exists(MARKER_PATH):
        return None
    try:
        values = json.loads(storage.read(MARKER_PATH))
        gone = tuple(path for path in map(str, values.get("gone", ())) if is_companion(path))
        return Begun(tuple(str(path) for path in values["files"]), values["card"] is True, gone)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{storage.where(MARKER_PATH)} is not kprep's; remove it, then run again"
        ) from error
