"""A shard read once, front to back: hashed on the way, and taken apart member by member.

Memory is a few windows, whatever the size of the shard.
"""

from __future__ import annotations

import hashlib
import tarfile
import unicodedata
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from prep.tar_stream import DAMAGED, NOT_AN_ARCHIVE, ArchiveError, TarStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.storage import ObjectInfo, Storage

BLOCK = 512
_WINDOW_BYTES = 8 << 20
_WINDOWS_AHEAD = 3  # over a network: the next ones arrive while one is hashed
_READ_BYTES = 1 << 20
_SPARSE = "GNU.sparse."
_MAX_MEMBERS = 1 << 20  # readers hold what they know of each until the shard is read
_MAX_NAME = 4096  # characters; more is no path on Linux
_LOCATING = ("size",)  # pax records that would say where the next header stands


class ShardBytes:
    """One version of an object, read from its beginning to its end; hashes what it reads."""

    def __init__(
        self, storage: Storage, info: ObjectInfo, report: Callable[[int], None] = lambda _: None
    ) -> None:
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False)  # wids asks for it
        self.size_bytes = info.size_bytes
        self.received = 0
        self.content_end = 0
        """One behind the last byte that is not zero."""
        self._storage, self._info, self._report = storage, info, report
        self._window = memoryview(b"")
        self._asked = 0
        self._coming: deque[Future[memoryview]] = deque()
        self._ahead = _WINDOWS_AHEAD if storage.local_root is None else 0
        self._threads = ThreadPoolExecutor(self._ahead) if self._ahead else None

    def read(self, size: int, /) -> bytes:
        """Return the next 1 to `size` bytes, or none at the end."""
        if not self._window:
            self._window = self._next_window()
        data = bytes(self._window[:size])
        self._window = self._window[size:]
        content = data.rstrip(b"\0")
        if content:
            self.content_end = self.received + len(content)
        self.received += len(data)
        return data

    def drain(self) -> None:
        """Read what is left, so that the hashes are those of the whole object."""
        while self.read(_READ_BYTES):
            pass
        self.close()

    def close(self) -> None:
        """End the requests that are on their way."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _next_window(self) -> memoryview:
        while self._asked < self.size_bytes and len(self._coming) <= self._ahead:
            start, end = self._asked, min(self._asked + _WINDOW_BYTES, self.size_bytes)
            self._asked = end
            if self._threads is None:
                return self._hashed(self._get(start, end))
            self._coming.append(self._threads.submit(self._get, start, end))
        if not self._coming:
            return memoryview(b"")
        return self._hashed(self._coming.popleft().result())

    def _get(self, start: int, end: int) -> memoryview:
        return self._storage.read_range(self._info.path, start, end, etag=self._info.etag)

    def _hashed(self, window: memoryview) -> memoryview:
        self.sha256.update(window)
        self.md5.update(window)
        self._report(len(window))
        return window


@dataclass(frozen=True)
class TarEntry:
    """A regular file of a shard; `read` gives its bytes until the next entry is asked for.

    `offset` is where its first header stands (an extended one, where it has any), `end` where the
    next header begins. All in bytes from the start of the shard.
    """

    name: str
    offset: int
    data_offset: int
    size: int
    _file: IO[bytes]

    @property
    def end(self) -> int:
        return self.data_offset + -(-self.size // BLOCK) * BLOCK

    def read(self) -> bytes:
        """Return the whole file; ArchiveError where the shard ends in it."""
        try:
            data = self._file.read()
        except tarfile.TarError as error:
            raise ArchiveError(DAMAGED, f"member {shown(self.name)} is cut: {error}") from error
        if len(data) != self.size:
            raise ArchiveError(DAMAGED, f"member {shown(self.name)} is cut")
        return data


def walk(body: ShardBytes) -> Iterator[TarEntry]:
    """Yield the regular files of an uncompressed tar.

    Folders are passed over. Whatever else could mean another thing to another reader is refused
    with an ArchiveError: links, devices, sparse files, names that leave the archive or are longer
    than a path can be, extended headers that move what follows, more than a million members, and
    bytes behind the end.
    """
    end = 0
    for number, (archive, info) in enumerate(TarStream(_Uncompressed(body)).infos()):
        _refuse_odd(info)
        if number >= _MAX_MEMBERS:
            raise ArchiveError(DAMAGED, f"it has over {_MAX_MEMBERS:,} members")
        end = info.offset_data
        file = archive.extractfile(info) if info.isreg() else None
        if file is not None:
            entry = TarEntry(info.name, info.offset, info.offset_data, info.size, file)
            yield entry
            end = entry.end
    body.drain()
    if body.content_end > end:
        raise ArchiveError(DAMAGED, f"bytes stand behind its end, at byte {body.content_end - 1}")


class _Uncompressed:
    """The same bytes; refuses gzip, in which nothing can be found by its offset."""

    def __init__(self, body: ShardBytes) -> None:
        self._body = body

    def read(self, size: int, /) -> bytes:
        first = not self._body.received
        data = self._body.read(size)
        if first and data.startswith(b"\x1f\x8b"):
            raise ArchiveError(NOT_AN_ARCHIVE, "it is compressed with gzip; store it uncompressed")
        return data


def _refuse_odd(info: tarfile.TarInfo) -> None:
    if len(info.name) > _MAX_NAME:
        raise ArchiveError(DAMAGED, f"a member has a name of {len(info.name):,} characters")
    name = shown(info.name)
    odd = [key for key in info.pax_headers if key in _LOCATING or key.startswith(_SPARSE)]
    if info.issparse() or odd:
        what = odd[0] if odd else "GNU sparse"
        raise ArchiveError(DAMAGED, f"member {name} is sparse or resized ({what})")
    if info.issym() or info.islnk():
        raise ArchiveError(DAMAGED, f"member {name} is a link")
    if not (info.isreg() or info.isdir()):
        raise ArchiveError(DAMAGED, f"member {name} is a device or of an unknown kind")
    parts = info.name.removeprefix("./").split("/")
    if info.isdir() and parts in ([""], ["."]):
        return  # what `tar cf x.tar .` writes first
    if not all(parts) or "." in parts or ".." in parts:
        raise ArchiveError(DAMAGED, f"member {name} has a name that leaves the archive")
    if not info.name.isprintable():
        control = any(unicodedata.category(char) == "Cc" for char in info.name)
        what = "a control character" if control else "a character that cannot be printed"
        raise ArchiveError(DAMAGED, f"member {name} has {what} in its name")


def shown(name: str) -> str:
    """Return a stranger's name for a message: ASCII, on one line, not too long."""
    text = name.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 120 else f"{text[:117]}..."
