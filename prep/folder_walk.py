"""Which files a folder of videos holds, and which links to folders are followed to find them."""

from __future__ import annotations

import os
import stat
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.text.plain import few, short

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass
class FolderFiles:
    """What stands in a folder; all paths are relative to the source that it lies in."""

    paths: list[str] = field(default_factory=list)
    """The files that are not hidden, sorted."""
    dead_links: set[str] = field(default_factory=set)
    """Those of them that are links and lead nowhere."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Folders that are listed elsewhere or hold the source: where met, and what it really is."""


def walk(source: Path, inside: str = "", places: Sequence[str] = ("",)) -> FolderFiles:
    """Return the files below `source`/`inside` ("" or a folder with a slash behind it).

    `places` are the folders of the source that are listed in their own right. What really lies in
    one of them keeps that place: links to it, or to a folder that holds a place, are not followed.
    Other links are, as datasets are often made of them: after all real folders, and each folder
    once. Raises UsageError for a folder that cannot be read: its clips would be lost in silence.
    """
    return _Walk(source, places).run(inside)


def note_on_left_out(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """Return a note that names folders which a walk has left out, none where there are none."""
    if not left_out:
        return []
    named = few([f"{short(path)} (to {short(target)})" for path, target in left_out])
    what = "are listed elsewhere or hold the source"
    return [f"{len(left_out)} folders behind links were left out, as they {what}: {named}"]


class _Walk:
    def __init__(self, source: Path, places: Sequence[str]) -> None:
        self._source, self._real_source = source, source.resolve()
        real = [(source / place).resolve() for place in places]
        self._places = {_identity(place) for place in real}
        self._holders = {_identity(folder) for place in real for folder in place.parents}
        self._seen: set[tuple[int, int]] = set()
        self._found = FolderFiles()

    def run(self, inside: str) -> FolderFiles:
        links = deque(self._real_folders(inside))
        while links:
            link = links.popleft()
            # Only now: what is real in a folder that was met in between goes before links to it
            if self._is_listed_elsewhere(self._target(link)):
                self._leave_out(link)
            else:
                links += self._real_folders(f"{link}/")
        self._found.paths.sort()
        self._found.left_out.sort()
        return self._found

    def _real_folders(self, inside: str) -> list[str]:
        """List the files of a folder and the real folders in it; return the links to folders."""
        links, folders = [], [inside]
        while folders:
            inside = folders.pop()
            try:
                identity = _identity(self._source / inside)
                entries = sorted(os.scandir(self._source / inside), key=lambda entry: entry.name)
            except OSError as error:
                raise _unreadable(error) from error
            if identity in self._seen:  # a real folder that a link led to before
                self._leave_out(inside.rstrip("/"))
                continue
            self._seen.add(identity)
            below = []
            for entry in entries:
                path = f"{inside}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if not self._is_folder(entry, path):
                    self._found.paths.append(path)
                elif entry.is_symlink():
                    links.append(path)
                else:
                    below.append(f"{path}/")
            folders += reversed(below)
        return links

    def _is_folder(self, entry: os.DirEntry[str], path: str) -> bool:
        if not entry.is_symlink():
            return entry.is_dir()
        try:
            return stat.S_ISDIR(entry.stat().st_mode)
        except OSError:  # it leads nowhere, or in circles
            self._found.dead_links.add(path)
            return False

    def _is_listed_elsewhere(self, target: Path) -> bool:
        """Whether a real folder lies in a place, holds one, or has been listed.

        What is hidden in a place is not listed there: links are the only way to it.
        """
        identity = _identity(target)
        if identity in self._seen or identity in self._holders:
            return True
        for folder in (target, *target.parents):
            if _identity(folder) in self._places:
                return True
            if folder.name.startswith("."):
                return False
        return False

    def _leave_out(self, path: str) -> None:
        target = self._target(path)
        inside = target != self._real_source and target.is_relative_to(self._real_source)
        name = target.relative_to(self._real_source) if inside else target
        self._found.left_out.append((path, str(name)))

    def _target(self, path: str) -> Path:
        try:
            return (self._source / path).resolve(strict=True)
        except OSError as error:
            raise _unreadable(error) from error


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise _unreadable(error) from error
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> UsageError:
    return UsageError(f"folder {error.filename} cannot be read: {error.strerror}")
