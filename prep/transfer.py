"""Moving one file from a root to another: in parts, hashed on the way, complete or not at all."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prep.atomic_files import sync_path
from prep.downloads import Tries
from prep.errors import DatasetError, KprepError, StorageError
from prep.storage import PART_BYTES
from prep.store_errors import listed_file, store_errors

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from prep.byte_progress import ByteProgress
    from prep.format import FileEntry
    from prep.storage import Storage

_AHEAD = 1  # parts of one file that are asked for before they are needed
_ATTEMPTS = (
    3  # the first may go on behind a damaged left-over; what arrives damaged is fetched again
)


class DamagedError(DatasetError):
    """A file of the source is not the one that its manifest describes."""


class StoppedCopyError(KprepError):
    """The copy was interrupted; what has arrived is kept."""


@dataclass
class Transfer:
    """Moves files from `source` to `destination`; used by many threads at once.

    `parts` is where unfinished files are kept for a destination on this machine. `readers` fetch
    the next parts of a file while the last one is stored.
    """

    source: Storage
    destination: Storage
    progress: ByteProgress
    stop: threading.Event
    parts: Path | None
    readers: ThreadPoolExecutor = field(repr=False)

    def copy(self, path: str, entry: FileEntry) -> None:
        """Make the destination's file `path` the one that `entry` describes.

        Raises DamagedError when the source's is another one, also when it is fetched again, and
        StorageError when either side cannot be reached within its patience.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            counted = _Counted(self.progress)
            try:
                if self.parts is None:
                    self._upload(path, entry, counted)
                else:
                    self._store(path, entry, self.parts, counted)
            except DamagedError:
                counted.take_back()
                if attempt == _ATTEMPTS:
                    raise
            except BaseException:
                counted.take_back()
                raise
            else:
                return

    def holds(self, path: str, entry: FileEntry) -> bool:
        """Whether the destination's file, which has the right size, has the right content too."""
        if not entry.bytes or self.destination.stated_sha256(path) == entry.sha256:
            return True
        digest = hashlib.sha256()
        for part in self._read(self.destination, path, 0, entry.bytes):
            digest.update(part)
        return digest.hexdigest() == entry.sha256

    # -- into a bucket ------------------------------------------------------------------------

    def _upload(self, path: str, entry: FileEntry, counted: _Counted) -> None:
        """Upload a file; the last part goes out only when the hash of all of them is right."""
        tries = Tries(self.destination.retry, self.destination.where(path))
        while True:
            parts = self._read(self.source, path, 0, entry.bytes)
            checked = _Checked(parts, self.source, path, entry, counted)
            try:
                self.destination.write_parts(path, checked.all(), entry.bytes, entry.sha256)
            except StorageError as error:
                if checked.failed or self.stop.is_set():
                    raise
                counted.take_back()
                tries.after(error)
            else:
                return

    # -- onto this machine --------------------------------------------------------------------

    def _store(self, path: str, entry: FileEntry, parts: Path, counted: _Counted) -> None:
        """Write a file beside its place, behind what an earlier run has left; then rename it."""
        name = hashlib.sha256(f"{path} {entry.sha256}".encode()).hexdigest()[:32]
        unfinished, digest = parts / f"{name}.part", hashlib.sha256()
        with store_errors(self.destination.where(path)):
            with unfinished.open("a+b") as file:
                had = _hash_existing(file, entry.bytes, digest)
                counted.skip(had)
                for part in self._read(self.source, path, had, entry.bytes):
                    file.write(part)
                    digest.update(part)
                    counted.add(len(part))
                if digest.hexdigest() != entry.sha256:
                    file.truncate(0)
                    raise _damaged(self.source, path)
                file.flush()
                os.fsync(file.fileno())
            target = self.destination.local_target(path)
            unfinished.replace(target)
            sync_path(target.parent)

    # -- reading ------------------------------------------------------------------------------

    def _read(self, storage: Storage, path: str, start: int, end: int) -> Iterator[memoryview]:
        """Return bytes `[start, end)` of one version of a file, which it ends with, in parts.

        The parts are fetched by other threads, so that an upload's own may wait for them.
        """
        with listed_file():
            info = storage.info(path)
        if info.size_bytes != end:
            raise DamagedError(
                f"{storage.where(path)} has {info.size_bytes} bytes, the manifest says {end}; run "
                f"`kprep verify {storage.root}`"
            )
        return self._parts(storage, path, range(start, end, PART_BYTES), info.etag)

    def _parts(
        self, storage: Storage, path: str, places: range, etag: str | None
    ) -> Iterator[memoryview]:
        """Yield the parts that begin at `places`, fetching a little ahead."""
        waiting: deque[Any] = deque()
        try:
            for at in places:
                until = min(at + PART_BYTES, places.stop)
                waiting.append(self.readers.submit(storage.read_range, path, at, until, etag=etag))
                if len(waiting) > _AHEAD:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for future in waiting:
                future.cancel()

    def _next(self, waiting: deque[Any]) -> memoryview:
        if self.stop.is_set():
            raise StoppedCopyError("interrupted")
        part: memoryview = waiting.popleft().result()
        return part


@dataclass
class _Checked:
    """The parts of a file for an upload; `failed` says that it was they that raised an error."""

    parts: Iterator[memoryview]
    source: Storage
    path: str
    entry: FileEntry
    counted: _Counted
    failed: bool = False

    def all(self) -> Iterator[memoryview]:
        try:
            yield from self._verified()
        except GeneratorExit:
            raise
        except BaseException:
            self.failed = True
            raise

    def _verified(self) -> Iterator[memoryview]:
        """Yield the parts, the last one only when the hash is right: else nothing appears."""
        digest, held = hashlib.sha256(), memoryview(b"")
        for part in self.parts:
            digest.update(part)
            if held:
                yield held
            held = part
            self.counted.add(len(part))
        if digest.hexdigest() != self.entry.sha256:
            raise _damaged(self.source, self.path)
        yield held


class _Counted:
    """What one file has added to the progress, so that it can be taken back."""

    def __init__(self, progress: ByteProgress) -> None:
        self._progress = progress
        self._added = self._skipped = 0

    def add(self, count: int) -> None:
        self._added += count
        self._progress.add(count)

    def skip(self, count: int) -> None:
        self._skipped += count
        self._progress.skip(count)

    def take_back(self) -> None:
        self._progress.add(-self._added)
        self._progress.skip(-self._skipped)
        self._added = self._skipped = 0


def _hash_existing(file: Any, most: int, digest: Any) -> int:
    """Hash what an unfinished file holds; return its length. One that is too long is emptied."""
    had = file.seek(0, os.SEEK_END)
    if had > most:
        file.truncate(0)
        return 0
    file.seek(0)
    while data := file.read(PART_BYTES):
        digest.update(data)
    return int(had)


def _damaged(source: Storage, path: str) -> DamagedError:
    return DamagedError(
        f"{source.where(path)} is damaged: its sha256 is not the one in the manifest; run "
        f"`kprep verify {source.root}`"
    )
