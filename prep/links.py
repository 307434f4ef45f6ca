"""Links inside a root, which could lead what is written anywhere, and listings nowhere."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from prep.errors import StorageError


def refuse_links_to(root: Path, path: str) -> None:
    """Raise StorageError when a folder on the way from a root to one of its files is a link.

    The root itself may be one. A dataset of somebody else can hold a link to any folder of this
    machine, and what is written or deleted through it is none of the dataset's.
    """
    for folder in [*Path(path).parents][-2::-1]:  # a/b/c.tar: a, a/b
        if (root / folder).is_symlink():
            raise StorageError(
                f"{root / folder} is a link, and kprep writes nothing through links inside a root; "
                "make it a folder, or make a link of the root itself"
            )


def refuse_links_in(folder: Path) -> None:
    """Raise StorageError when a folder is a link, or when one is anywhere in it."""
    links = [folder] if folder.is_symlink() else []
    for place, folders, files in os.walk(folder):
        links += [
            Path(place, name) for name in (*folders, *files) if Path(place, name).is_symlink()
        ]
    if links:
        raise StorageError(
            f"{min(links)} is a link, and {folder} is kprep's own to write to; remove the link"
        )


def refuse_endless_links(root: Path) -> None:
    """Raise StorageError when a link at or behind a root leads to itself or to a folder above it.

    What cannot be looked at is left to whoever lists the root.
    """
    holders = frozenset(_identity(folder) for folder in (root.resolve(), *root.resolve().parents))
    waiting = [(root, holders)] if root.is_dir() else []
    while waiting:
        place, above = waiting.pop()
        for entry in _entries(place):
            if entry.is_symlink():
                _refuse_endless(entry, above, holders)
            with contextlib.suppress(OSError):
                if entry.is_dir():
                    folder = Path(entry.path)
                    waiting.append((folder, above | {_identity(folder)}))


def _refuse_endless(
    link: os.DirEntry[str], above: frozenset[tuple[int, int]], holders: frozenset[tuple[int, int]]
) -> None:
    try:
        identity = _identity(Path(link.path))
    except OSError as error:
        if error.errno != errno.ELOOP:
            return
        identity = None
    if identity in holders:
        raise StorageError(
            f"{link.path} is a link to a folder that holds the dataset itself; remove the link"
        )
    if identity is None or identity in above:
        raise StorageError(f"{link.path} is a link that leads back to itself; remove the link")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
