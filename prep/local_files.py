"""Local files as a store of objects: sizes, versions, ranges.

Read directly and not through the object store's client, whose threads cost twenty times the read
itself (measured on 20 kB: 0.35 ms of CPU against 0.015).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from prep.errors import DatasetError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BYTES = 1 << 30  # of a file that is read whole where nothing lists its size


# By the format of a mode, without links, which are followed
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NoPlainFileError(FileNotFoundError):
    """There is no file at a path, but something else; its text is what follows the path."""


def local_version(status: os.stat_result) -> str:
    """Return what changes when a file is replaced: the ETag that obstore gives it."""
    return f'"{status.st_ino:x}-{status.st_mtime_ns // 1000:x}-{status.st_size:x}"'


def local_info(path: str) -> tuple[int, str]:
    """Return size in bytes and version of a plain file; FileNotFoundError for anything else."""
    status = os.stat(path)  # noqa: PTH116 - a Path object costs more than the call
    _check_plain(status)
    return status.st_size, local_version(status)


def read_whole(path: str, most: int) -> bytes:
    """Return a plain file's bytes; DatasetError where there are more than `most`, or OSError."""
    file = _OpenFile(path)
    refuse_larger(path, file.size_bytes, most)
    return _read(file.descriptor, 0, file.size_bytes)


def refuse_larger(where: str, size: int, most: int) -> None:
    """Raise DatasetError for an object that is larger than any that would be read whole."""
    if size > most:
        raise DatasetError(
            f"{where} has {size} bytes, where {most} are the most that a reader of it expects; "
            "run `kprep verify`"
        )


class OpenFiles:
    """Files that ranges are read from, kept open: at most `most` of them.

    A file that was replaced is opened anew. What nobody reads any more is closed with this object.
    """

    def __init__(self, most: int = 128) -> None:
        self._most = most
        self._lock = Lock()
        self._files: dict[str, _OpenFile] = {}  # what was not used for longest stands first

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        """Leave the files behind: another process opens its own."""
        return OpenFiles, (self._most,)

    def read_ahead(self, path: str, start: int, end: int) -> None:
        """Let the kernel fetch bytes `[start, end)` while this process does something else.

        Nothing is waited for, and whatever is wrong with the file, the read itself says.
        """
        if not hasattr(os, "posix_fadvise"):  # as on macOS
            return
        with contextlib.suppress(OSError):
            descriptor = self._kept(path).descriptor
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self, path: str, start: int, end: int) -> tuple[bytes, int, str]:
        """Return bytes `[start, end)` of a file, fewer where it ends before; its size and version.

        Raises OSError.
        """
        status = os.stat(path)  # noqa: PTH116 - a Path object costs more than the call
        file = self._kept(path)
        if file.identity != _file_identity(status):
            file = self._reopened(path)
        try:
            data = _read(file.descriptor, start, end)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            file = self._reopened(path)  # replaced through another machine of a shared file system
            data = _read(file.descriptor, start, end)
        return data, file.size_bytes, file.version

    def _reopened(self, path: str) -> _OpenFile:
        with self._lock:
            self._files.pop(path, None)
        return self._kept(path)

    def _kept(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._files.pop(path, None) or self._opened(path)
            self._files[path] = file
            if len(self._files) > self._most:
                del self._files[next(iter(self._files))]
        return file

    def _opened(self, path: str) -> _OpenFile:
        try:
            return _OpenFile(path)
        except OSError as error:
            if error.errno != errno.EMFILE or not self._files:
                raise
            self._files.clear()  # there are better uses for the last descriptors
            return _OpenFile(path)


class _OpenFile:
    """A descriptor, closed when nobody holds this object, and the version of what is open."""

    __slots__ = ("descriptor", "identity", "size_bytes", "version")

    def __init__(self, path: str) -> None:
        # opening a device can do something, and a named pipe that somebody puts there meanwhile
        # would wait for a writer without O_NONBLOCK
        _check_plain(os.stat(path))  # noqa: PTH116
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.descriptor)
        _check_plain(status)
        self.identity, self.size_bytes = _file_identity(status), status.st_size
        self.version = local_version(status)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _read(descriptor: int, start: int, end: int) -> bytes:
    """Return bytes `[start, end)` of a file, fewer where it ends before."""
    data = os.pread(descriptor, end - start, start)
    while len(data) < end - start:
        more = os.pread(descriptor, end - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def _file_identity(status: os.stat_result) -> tuple[int, int, int]:
    """Return what `local_version` is made of."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def ends_early(where: str, size: int, start: int, end: int) -> StorageError:
    """Return the error for an object that is shorter than its index says."""
    return StorageError(
        f"{where} ends at byte {size}, but bytes {start} to {end} are indexed; run `kprep verify`"
    )


def files_left_out(root: Path) -> Iterator[tuple[str, str]]:
    """Yield what no listing of a local root has, though a path is there: (path, what it is).

    These are entries that are no plain files, which are not opened, and files whose names end
    like those of unfinished uploads of the store's client (`x.tar#1`). Links to folders are
    followed, so see first that none leads in circles.
    """
    for place, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(place, name)
            relative = path.relative_to(root).as_posix()
            try:
                kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
            except OSError:
                kind = "a link to nothing" if path.is_symlink() else None
            if kind is not None:
                yield relative, kind
            elif re.search(r"#\d+$", name):
                yield relative, "a file that no store lists"


def _check_plain(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise NoPlainFileError(f"is {kind}, not a file")
