"""The CVDF mirror as a source: archives are read as a stream, and only pending clips are stored.

What is on disk at any time is one file for each offer that the consumer still holds. Names from
archives are used for looking rows up and in messages, never in a path.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prep.atomic_files import write_atomic
from prep.cvdf_layout import (
    DEFAULT_BASE,
    ArchiveList,
    address,
    check_base,
    parse_archive_list,
    split_layout,
)
from prep.errors import StorageError
from prep.fetch_errors import (
    CircuitOpenError,
    FetchError,
    StoppedError,
)
from prep.outcome import Reason
from prep.source import Candidate, Offer
from prep.tar_stream import (
    BROKEN,
    EMPTY,
    MAX_MEMBER_BYTES,
    NOT_AN_ARCHIVE,
    TRUNCATED,
    ArchiveError,
    Member,
    TarStream,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from prep.http_client import HttpClient, ResumableBody
    from prep.journal import Row
    from prep.source import PendingRows

SOURCE_NAME = "cvdf"
EMPTY_FILE = "empty file"
UNKNOWN = "segment in no list"
NOT_WANTED = "not pending"
NO_CLIP_NAME = "not named like a clip"
REPEATED = "again in another place, while the first was in work"

_CLIP_NAME = re.compile(r"([A-Za-z0-9_-]{11}_[0-9]{6}_[0-9]{6})\.(?:mp4|mkv|webm)", re.IGNORECASE)
_INCOMING = re.compile(r"incoming-[0-9]{9}\.video")
_MAX_LIST_BYTES = 256 << 20  # the longest official list has some 40 MB
_COPY_BYTES = 1 << 20
_EXAMPLES = 20
_TRIES = 2


@dataclass(frozen=True)
class ArchiveFault:
    """An archive that could not be read, or not to its end, or held nothing.

    `archive` is its path on the mirror; empty for what concerns all that come after. `retryable`:
    another run may find it readable, so rows without a clip are not yet missing.
    """

    archive: str
    reason: str
    detail: str
    retryable: bool


@dataclass
class Tally:
    """How often something was met, and the first few names."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(printable(name))


@dataclass(frozen=True)
class FetchedList:
    """An official list as it was fetched."""

    path: Path
    url: str
    sha256: str


@dataclass
class _Archive:
    """An archive in work, over all tries, until its last clip is released."""

    path: str
    tries: int = 0
    held: int = 0
    read: bool = False
    """As far as it goes."""
    fault: str = ""
    finished: bool = False


class CvdfSource:
    """One split of one version of Kinetics on the CVDF mirror, or on a mirror with its layout.

    `findings` and `tallies` say after a pass what was wrong and what was left out,
    `clips_of_broken` how many clips come from each archive that was not whole. A failed archive
    is tried once more behind all others. `patience` failures in a row end the pass, since then it
    is the network and not the archives; so does an archive of repairs that cannot be read for now,
    because which of two files becomes a row's clip must not depend on the weather.
    """

    name = SOURCE_NAME

    def __init__(
        self,
        version: str,
        split: str,
        work: Path,
        client: HttpClient,
        *,
        base: str = DEFAULT_BASE,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        patience: int = 8,
    ) -> None:
        self.layout = split_layout(version, split)
        self.base = check_base(base)
        self.client = client
        self.findings: list[ArchiveFault] = []
        self.tallies: dict[str, Tally] = {}
        self.clips_of_broken: dict[str, int] = {}
        self._folder = work / f"cvdf-{version}-{split}"
        self._max_member_bytes = max_member_bytes
        self._patience = patience
        self._list_bytes: bytes | None = None
        self._numbers = itertools.count()
        self._held: set[str] = set()

    # -- lists --------------------------------------------------------------------------------

    def fetch_lists(self, directory: Path) -> tuple[FetchedList, FetchedList]:
        """Fetch the official annotation list and the list of archives; return both."""
        annotations = self._list(self.layout.annotations)
        name = f"{self.layout.version}-{self.layout.split}"
        suffix = self.layout.annotations.rpartition(".")[2]
        return (
            self._keep(directory / f"{name}.{suffix}", self.layout.annotations, annotations),
            self._keep(
                directory / f"{name}-archives.txt", self.layout.archive_list, self._archive_list()
            ),
        )

    def archives(self) -> list[str]:
        """Return the paths of all archives in the order of reading; no archive is opened."""
        found = self._parsed_list()
        return [*self.layout.read_first, *found.archives]

    def archive_sizes(self) -> Iterator[tuple[str, int | None]]:
        """Yield every archive's path and bytes, as HEAD tells; None where it tells nothing."""
        for path in self.archives():
            try:
                yield path, self.client.size(address(self.base, path))
            except (StoppedError, CircuitOpenError):
                raise
            except FetchError:
                yield path, None

    def _parsed_list(self) -> ArchiveList:
        text = self._archive_list().decode("utf-8-sig", "surrogateescape")
        found = parse_archive_list(text, self.layout)
        if not found.archives:
            raise FetchError(
                Reason.MISSING_UPSTREAM,
                f"{address(self.base, self.layout.archive_list)} names no archive like "
                f"{self.layout.archives}; check the mirror's base address",
            )
        return found

    def _archive_list(self) -> bytes:
        if self._list_bytes is None:
            self._list_bytes = self._list(self.layout.archive_list)
        return self._list_bytes

    def _list(self, path: str) -> bytes:
        url = address(self.base, path)
        data = self.client.get_bytes(url, _MAX_LIST_BYTES)
        if not data.strip() or data.lstrip().startswith((b"<", b"\x1f\x8b")):
            raise FetchError(
                Reason.MISSING_UPSTREAM,
                f"{url} is no list: it begins with {data[:40]!r}; check the base",
            )
        return data

    def _keep(self, target: Path, path: str, data: bytes) -> FetchedList:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, data)
        return FetchedList(target, address(self.base, path), hashlib.sha256(data).hexdigest())

    # -- clips --------------------------------------------------------------------------------

    def offers(self, pending: PendingRows) -> Iterator[Offer]:
        """Yield an offer for every pending row that an archive has a file for.

        An archive is opened while rows wait, and where clips were taken from it in an earlier run
        that did not come to its end; one that is open is read to its end, where its checksum is.
        Each is judged when nothing of it is left to do. Where a segment comes again while its first
        file is in work (the repairs of Kinetics-400, say), `pending.settle` is called; if the first
        file is still held then, the second is left out and counted, and its archive is read again
        in the next run.
        """
        self.findings, self.tallies = [], {}
        self._clear_folder()
        todo = self._unread(pending)
        failures = 0
        while todo:
            archive = todo.popleft()
            if not pending.waiting() and archive.path not in pending.unread():
                continue
            error = yield from self._read(archive, pending)
            failures = failures + 1 if error else 0
            if error is not None:
                if not self._goes_on(archive, error, failures, todo):
                    return
                if isinstance(error, CircuitOpenError) and todo:
                    self.client.wait_for_circuit()

    def _unread(self, pending: PendingRows) -> deque[_Archive]:
        """Return the archives that are not done, in the order of reading."""
        try:
            found = self._parsed_list()
        except FetchError as error:  # no row is missing because of it
            self._find(self.layout.archive_list, error.reason, error.detail, retryable=True)
            raise
        for line in found.refused:
            self._find(printable(line), "not of the known layout", self.layout.archive_list)
        paths = (*self.layout.read_first, *found.archives)
        return deque(_Archive(path) for path in paths if not pending.archive_done(path))

    def _goes_on(
        self,
        archive: _Archive,
        error: FetchError | ArchiveError,
        failures: int,
        todo: deque[_Archive],
    ) -> bool:
        """Put a failed archive behind the others, or down as failed; return whether to go on."""
        first = archive.path in self.layout.read_first
        again = archive.tries < _TRIES
        ends = failures >= self._patience or (first and not again)
        if ends or not again:
            self._find(archive.path, error.reason, error.detail, retryable=True)
        elif first:
            todo.appendleft(archive)
        else:
            todo.append(archive)
        if ends and todo:
            detail = f"{len(todo)} more archives were not read to their end"
            self._find("", Reason.NETWORK, detail, retryable=True)
        return not ends

    def _read(
        self, archive: _Archive, pending: PendingRows
    ) -> Generator[Offer, None, FetchError | ArchiveError | None]:
        """Offer the wanted members of one archive; return an error that may pass with time."""
        archive.tries += 1
        try:
            with self.client.open_stream(address(self.base, archive.path)) as body:
                yield from self._members(archive, body, pending)
        except ArchiveError as error:
            return error
        except FetchError as error:
            if isinstance(error, StoppedError):
                raise
            if error.retryable:
                return error
            self._find(archive.path, error.reason, error.detail)
        self._settle(archive, pending)
        return None

    def _members(
        self, archive: _Archive, body: ResumableBody, pending: PendingRows
    ) -> Generator[Offer, None, None]:
        stream = TarStream(body, max_member_bytes=self._max_member_bytes)
        finished = True
        try:
            for member in stream:
                row, kind = _wanted(member, pending, self._held)
                if row is not None:
                    yield self._offer(archive, member, row, pending)
                else:
                    self._leave(kind, f"{archive.path}: {member.name}")
                    finished = finished and kind != REPEATED
        except ArchiveError as error:
            if error.reason == NOT_AN_ARCHIVE or (
                error.reason == TRUNCATED and body.size_bytes is None
            ):  # a proxy's page, or a body that no length proves to be whole
                raise
            self._find(archive.path, error.reason, error.detail)
            finished = error.reason == EMPTY
            archive.fault = f"a {error.reason}" if error.reason in BROKEN else ""
        finally:
            self._count_skipped(archive, stream)
        archive.read, archive.finished = True, finished

    def _offer(self, archive: _Archive, member: Member, row: Row, pending: PendingRows) -> Offer:
        segment = row.segment
        if segment is None or segment.end_seconds is None:
            raise ValueError(f"row {row.row} is pending without a segment that ends")
        stem = member.name.rpartition(".")[0]
        path = self._store(member)
        archive.held += 1
        self._held.add(stem)
        released = False

        def release() -> None:
            nonlocal released
            if released:
                return
            released = True
            path.unlink(missing_ok=True)
            self._held.discard(stem)
            archive.held -= 1
            self._settle(archive, pending)

        seconds = segment.end_seconds - segment.start_seconds
        found = [Candidate(path, SOURCE_NAME, 0.0, seconds)]
        return Offer(row, found, release, archive=archive.path)

    def _settle(self, archive: _Archive, pending: PendingRows) -> None:
        """Have an archive judged when nothing of it is left to do, and booked if it was whole."""
        if archive.held or not archive.read:
            return
        count = pending.judge(archive.path, archive.fault)
        if archive.fault and count:
            known = self.clips_of_broken.get(archive.path, 0)
            self.clips_of_broken[archive.path] = known + count
        if archive.finished:
            pending.mark_done(archive.path)

    def _store(self, member: Member) -> Path:
        """Write a member to a file with a name of our own; nothing stays of one that is cut off."""
        path = self._folder / f"incoming-{next(self._numbers):09d}.video"
        try:
            with path.open("xb") as file:
                while data := member.read(_COPY_BYTES):
                    file.write(data)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageError(f"{path.parent} cannot be written: {error.strerror}") from error
            raise
        return path

    def _clear_folder(self) -> None:
        """Remove what a run that was killed has left; only names of ours."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if _INCOMING.fullmatch(path.name):
                path.unlink()

    # -- what is reported ---------------------------------------------------------------------

    def _find(self, archive: str, reason: str, detail: str, *, retryable: bool = False) -> None:
        self.findings.append(ArchiveFault(archive, reason, detail, retryable))

    def _leave(self, kind: str, name: str) -> None:
        self.tallies.setdefault(kind, Tally()).add(name)

    def _count_skipped(self, archive: _Archive, stream: TarStream) -> None:
        for kind, count in stream.skipped.items():
            tally = self.tallies.setdefault(kind, Tally())
            tally.add(archive.path)
            tally.count += count - 1


def _wanted(member: Member, pending: PendingRows, held: set[str]) -> tuple[Row | None, str]:
    """Return the row that waits for a member, or None and why there is none."""
    named = _CLIP_NAME.fullmatch(member.name)
    if named is None:
        return None, NO_CLIP_NAME
    stem = named[1]
    if stem in held:
        pending.settle()
    if stem in held:
        return None, REPEATED
    row = pending.by_cut_name(stem)
    if row is None:
        return None, NOT_WANTED if pending.known(stem) else UNKNOWN
    return (row, "") if member.size_bytes else (None, EMPTY_FILE)


def printable(text: str) -> str:
    """Return a stranger's text so that it can be shown: ASCII, no controls, of limited length."""
    return ascii(text)[1:-1][:300]
