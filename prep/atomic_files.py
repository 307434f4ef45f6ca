"""Local files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO


def write_atomic(target: Path, data: bytes) -> None:
    """Write a local file under a temporary name, sync it, and rename it into place.

    What a killed writer leaves under its temporary name, `remove_leftovers` finds.
    """
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # never through a link of that name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(target.parent)


@contextlib.contextmanager
def text_output(path: Path) -> Iterator[TextIO]:
    """Open a file that a user named for output; it appears complete or not at all.

    A link, pipe or device at `path` stays what it is. Raises OSError.
    """
    stays = path.is_symlink() or (path.exists() and not path.is_file())
    target = path if stays else temporary_name(path)
    try:
        with target.open("w", newline="", encoding="utf-8") as file:
            yield file
        if target != path:
            target.replace(path)
    finally:
        if target != path:
            target.unlink(missing_ok=True)


def temporary_name(target: Path) -> Path:
    """Return a hidden name beside `target` that no other process uses."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file name can be one of `temporary_name`."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


def remove_leftovers(root: Path) -> None:
    """Remove what killed writers left below a root that nobody else writes to."""
    for path in root.rglob(".*.tmp"):
        if is_temporary(path.name):
            path.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Make a file's bytes, or the renames in a directory, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
