"""The files of a tar that arrives as a stream: gzip or plain, whatever its name says.

Nothing is extracted: a member is a base name, a size and something to read from. The base name is
for looking things up; it must never become part of a path.

The standard library's tarfile takes a header that is damaged or cut off for the end of the archive.
Here only the block of zeros that every tar ends with is an end; everything else is an ArchiveError,
raised after the members before it were yielded.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from prep.errors import KprepError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_MEMBER_BYTES = 2 << 30  # a 10-second clip has some 2 MB; the longest are far below this
_MAX_HEADER_BYTES = 1 << 20  # of an extended header; tarfile reads it into memory
_MAX_GLOBAL_BYTES = 16 << 10  # in all; tarfile keeps them and copies them to every member
_MAX_DIGITS = 100  # side by side in an extended header: older tarfiles take the square of it
_LENGTH_DIGITS = 9  # of a record's length, more than a header can have
_BLOCK = tarfile.BLOCKSIZE
_READ_BYTES = 1 << 16
_MOST_ENDS = 3
_REST_BYTES = 1 << 20  # tars are padded with zeros, to 10 KiB as a rule
_COMPRESSIONS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}

EMPTY = "empty archive"
TRUNCATED = "truncated archive"
DAMAGED = "damaged archive"
NOT_AN_ARCHIVE = "not an archive"
BROKEN = (TRUNCATED, DAMAGED)  # what it holds beyond some point cannot be had


class ArchiveError(KprepError):
    """An archive cannot be read, or not to its end. `reason` is one of this module's four."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Body(Protocol):
    """Bytes that are read once, from beginning to end."""

    def read(self, size: int, /) -> bytes:
        """Return the next 1 to `size` bytes, or none at the end."""
        ...


@dataclass(frozen=True)
class Member:
    """A regular file of an archive; it can be read until the next member is asked for."""

    name: str
    size_bytes: int
    _file: IO[bytes]

    def read(self, size: int) -> bytes:
        """Return the next 1 to `size` bytes, or none at its end; ArchiveError where it is cut."""
        try:
            return self._file.read(size)
        except tarfile.TarError as error:
            raise _damage(error) from error


class TarStream:
    """Iterates once over the regular files of a tar.

    `skipped` counts what else was in it, by reason. Links are not followed, devices not made, and
    no member is larger than `max_member_bytes`.
    """

    def __init__(self, body: Body, *, max_member_bytes: int = MAX_MEMBER_BYTES) -> None:
        self.skipped: Counter[str] = Counter()
        self._max_member_bytes = max_member_bytes
        self._body = body

    def __iter__(self) -> Iterator[Member]:
        """Yield the members; ArchiveError when the archive is not whole."""
        for archive, info in self.infos():
            yield from self._member(archive, info)

    def infos(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Yield what stands in the archive, of any kind; ArchiveError when it is not whole.

        Whoever uses this decides what to make of links, devices and names.
        """
        content = _opened(self._body)
        stream: Any = content  # typeshed wants writing and seeking, of which "r|" does neither
        # a class of its own for each archive, because tarfile makes headers by class methods
        header: type[_Header] = type("Header", (_Header,), {})
        try:
            with _Archive.open(
                fileobj=stream, mode="r|", bufsize=_READ_BYTES, tarinfo=header
            ) as archive:
                empty = True
                while (info := archive.next()) is not None:
                    empty = False
                    archive.members.clear()  # type: ignore[attr-defined]  # they would stay in memory
                    yield archive, info
        except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
            raise _damage(error) from error
        if not header.ended:
            raise ArchiveError(DAMAGED, "a header inside cannot be read")
        content.finish()
        if empty:
            raise ArchiveError(EMPTY, "a tar without a member")

    def _member(self, archive: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[Member]:
        name = info.name.rpartition("/")[2]
        reason = self._reason_to_skip(info, name)
        if reason:
            self.skipped[reason] += 1
            return
        file = archive.extractfile(info)
        if file is None:
            self.skipped["special file"] += 1
            return
        yield Member(name, info.size, file)

    def _reason_to_skip(self, info: tarfile.TarInfo, name: str) -> str:
        if info.isdir():
            return "folder"
        if info.issym() or info.islnk():
            return "link"
        if not info.isreg() or info.issparse():
            return "special file"
        if name.startswith("._"):
            return "AppleDouble file"
        if not name.strip("."):
            return "no name"
        return "too large" if info.size > self._max_member_bytes else ""


class _Header(tarfile.TarInfo):
    """A member's header that knows whether the archive's end was seen, and refuses what is odd."""

    ended = False
    records_bytes = 0
    """Of the extended header whose records come next."""
    global_bytes = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the header in a block; ArchiveError where tarfile would see the end."""
        if len(buf) == _BLOCK and buf.count(0) == _BLOCK:
            cls.ended = True
            return super().frombuf(buf, encoding, errors)  # raises what tells tarfile to stop
        if len(buf) < _BLOCK:
            raise ArchiveError(TRUNCATED, "it ends without the blocks of zeros that end a tar")
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.TarError as error:
            raise ArchiveError(DAMAGED, f"a header inside cannot be read: {error}") from error
        if info.size < 0:
            raise ArchiveError(DAMAGED, "a member has a negative size")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX):
            if info.size > _MAX_HEADER_BYTES:
                raise ArchiveError(DAMAGED, f"an extended header claims {info.size:,} bytes")
            cls.records_bytes = info.size if info.type in _PAX else 0
            cls.global_bytes += info.size if info.type == tarfile.XGLTYPE else 0
            if cls.global_bytes > _MAX_GLOBAL_BYTES:
                raise ArchiveError(
                    DAMAGED, f"its global headers have over {_MAX_GLOBAL_BYTES:,} bytes"
                )
        elif info.type == tarfile.GNUTYPE_SPARSE:
            raise ArchiveError(DAMAGED, "an old GNU sparse file, which is not supported")
        return info


_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class _Archive(tarfile.TarFile):
    """Gets the records of an extended header only after they were checked."""

    def __init__(self, name: Any, mode: Any, fileobj: Any, **options: Any) -> None:
        super().__init__(name, mode, _CheckedRecords(fileobj, options["tarinfo"]), **options)


class _CheckedRecords:
    """tarfile's stream, of which the first read behind an extended header is its records."""

    def __init__(self, stream: Any, header: type[_Header]) -> None:
        self._stream = stream
        self._header = header

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        if self._header.records_bytes:
            _check_records(data[: self._header.records_bytes])
            self._header.records_bytes = 0
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _check_records(data: bytes) -> None:
    """Raise ArchiveError unless `data` is records `LENGTH KEY=VALUE\\n` and then zeros (POSIX pax).

    From others tarfile makes keys as long as the rest of the header, one for every few bytes. The
    map of a sparse file, which it reads into memory, can be as long as the archive.
    """
    start = 0
    while start < len(data) and data[start]:
        length, space, _ = data[start : start + _LENGTH_DIGITS + 1].partition(b" ")
        end = start + int(length) if space and length.isdigit() else 0
        whole = start < end <= len(data) and data[end - 1] == ord("\n")
        if not whole or data.find(b"=", start, end) < 0:
            raise ArchiveError(DAMAGED, "an extended header is no list of records")
        if data.startswith(b"GNU.sparse.", start + len(length) + 1):
            raise ArchiveError(DAMAGED, "a sparse file, which is not supported")
        start = end
    if any(len(digits) > _MAX_DIGITS for digits in re.findall(rb"[0-9]+", data)):
        raise ArchiveError(
            DAMAGED, f"an extended header has over {_MAX_DIGITS} digits side by side"
        )


class _Content:
    """The bytes of a tar as tarfile wants them, from a plain body."""

    def __init__(self, head: bytes, body: Body) -> None:
        self._head = head
        self._body = body
        self._ends = 0

    def read(self, size: int) -> bytes:
        """Return the next 1 to `size` bytes, or none at the end; ArchiveError far beyond it.

        tarfile passes over a member in steps, which for one that claims 2^88 bytes would go on for
        ever behind the end.
        """
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        data = self._body.read(size)
        self._ends += not data
        if self._ends > _MOST_ENDS:
            raise ArchiveError(TRUNCATED, "it ends inside a member")
        return data

    def finish(self) -> None:
        """Read what stands behind the end of the tar, so that a checksum there is compared."""
        left = _REST_BYTES
        while left > 0 and (data := self.read(min(left, _READ_BYTES))):
            left -= len(data)


class _Inflated:
    """The bytes inside a gzip body, one or more gzip members after each other (RFC 1952)."""

    def __init__(self, raw: _Content) -> None:
        self._raw = raw
        self._inflate = zlib.decompressobj(wbits=31)
        self._input = b""
        self._ended = False

    def read(self, size: int, /) -> bytes:
        """Return the next 1 to `size` bytes, or none at the end; never more, whatever the ratio."""
        while not self._ended:
            data = self._input or self._raw.read(_READ_BYTES)
            if not data:
                raise ArchiveError(TRUNCATED, "its gzip data end too early")
            try:
                out = self._inflate.decompress(data, size)
            except zlib.error as error:
                raise ArchiveError(DAMAGED, f"its gzip data: {error}") from error
            self._input = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._next_part(self._inflate.unused_data)
            if out:
                return out
        return b""

    def _next_part(self, rest: bytes) -> None:
        """Go on with the next gzip member; anything else that follows is padding."""
        rest = rest or self._raw.read(_READ_BYTES)
        if len(rest) == 1:
            rest += self._raw.read(_READ_BYTES)
        self._ended = not rest.startswith(b"\x1f\x8b")
        if not self._ended:
            self._inflate, self._input = zlib.decompressobj(wbits=31), rest


def _opened(body: Body) -> _Content:
    """Return the tar inside a body; ArchiveError where there is none."""
    head = _first_bytes(body)
    if not head:
        raise ArchiveError(EMPTY, "it has no bytes")
    content = _Content(head, body)
    if head.startswith(b"\x1f\x8b"):
        inflated = _Inflated(content)
        head = _first_bytes(inflated)
        if not head:
            raise ArchiveError(EMPTY, "a gzip file of nothing")
        content = _Content(head, inflated)
    for magic, name in _COMPRESSIONS.items():
        if head.startswith(magic):
            raise ArchiveError(NOT_AN_ARCHIVE, f"{name} is not supported; make it a tar or .tar.gz")
    if head.count(0) < _BLOCK:  # else a tar that ends before its first member
        _check_header(head)
    return content


def _check_header(head: bytes) -> None:
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError as error:
        raise ArchiveError(NOT_AN_ARCHIVE, f"it begins with {head[:40]!r}") from error


def _first_bytes(body: Body) -> bytes:
    """Return the first block, or all there is."""
    head = b""
    while len(head) < _BLOCK and (data := body.read(_BLOCK - len(head))):
        head += data
    return head


def _damage(error: Exception) -> ArchiveError:
    truncated = isinstance(error, tarfile.ReadError) and "unexpected end" in str(error)
    return ArchiveError(TRUNCATED if truncated else DAMAGED, str(error) or type(error).__name__)
