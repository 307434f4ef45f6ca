"""Clips kept on a local disk, below a hard limit, shared by processes and by jobs.

    CACHE_DIR/kprep-clips-1/lock                    the lock, and in it the bytes in use
    CACHE_DIR/kprep-clips-1/ab/<hash>-<bytes>.clip  one clip's video payload

A file is named by its content, so that equal names in two buckets never mix, and a clip that two
datasets share is kept once. Everything else follows from four rules:

- Who adds or evicts holds an exclusive flock on `lock`; readers hold nothing. A reader that has
  opened a file keeps its bytes while it is evicted: POSIX removes the name only. Who cannot have
  the lock within a second adds nothing for the next half minute.
- Bytes are accounted before they are written, so that a process killed at any point leaves an
  account that is too high, never too low. The account is made anew from the directory whenever it
  says that the limit is reached; what a killed writer left under a temporary name goes then.
- Bytes are those that `du` counts: blocks of files and of directories.
- Only files whose names have this form, in this folder, are ever deleted.

Where a split is larger than the limit, a share of its clips is admitted, chosen by their hash: the
same in every process and epoch. To admit all would evict each clip before its next turn.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import struct
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prep.errors import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stream.index import IndexedClip
    from stream.order import Int64

ADMITTED_SHARE = 0.95
"""Of the clips that would fit, where not all do: they are chosen by hash, which is not exact."""

_FOLDER = "kprep-clips-1"
_CLIP_NAME = re.compile(r"[0-9a-f]{32}-[0-9]+\.clip")
_TEMPORARY_NAME = re.compile(r"\.[0-9]+\.tmp")
_SUBFOLDER_NAME = re.compile(r"[0-9a-f]{2}")
_BLOCK_BYTES = 4096
_NAME_BYTES = 128  # what an entry costs its directory, rounded up
_LEFT_AFTER_EVICTION = 0.95  # of the limit, so that the directory is not listed for every clip
_LOCK_SECONDS = 1.0
_AVOID_SECONDS = 30.0  # after the lock was not to be had, or nothing could be written
# Files open in a process, a quarter of what it may open; of more that are begun the bytes are read
# at once
_MAY_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_MOST_BEGUN = 256 if _MAY_OPEN == resource.RLIM_INFINITY else min(256, _MAY_OPEN // 4)
_OPENED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # waits for no named pipe
_TOUCH_SECONDS = 60.0  # a time of last use that is younger is left as it is
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ACCOUNT = struct.Struct("<8sQ")
_MAGIC = b"kprepcl1"


def parse_bytes(value: int | str) -> int:
    """Return a number of bytes: 5, "50GB", "1.5 TB", "64MiB"; UsageError for anything else."""
    found = re.fullmatch(
        r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE
    )
    if found is None or (found[3] and not found[2]):
        raise UsageError(
            f"cache_limit ({value!r}) must be bytes, such as 50000000000, '50GB' or '64MiB'"
        )
    unit = _UNITS[found[2].upper()]
    if found[3]:
        unit = 1024 ** "KMGT".index(found[2].upper()) * 1024
    return int(Fraction(found[1]) * unit)


def disk_space(sizes: Int64) -> int:
    """Return the disk space, in bytes, of a cache that holds clips of these sizes in bytes."""
    blocks = -(-sizes // _BLOCK_BYTES) * _BLOCK_BYTES
    folders = min(256, len(sizes)) + 1
    return int(blocks.sum()) + _NAME_BYTES * len(sizes) + _BLOCK_BYTES * (folders + 1)


class _Entry(NamedTuple):
    """A cached clip as an eviction sees it."""

    last_used: float
    path: str
    disk_bytes: int


class CachedClip:
    """A cached clip on its way: its file is open, and the disk was asked for its bytes.

    The file is closed when the bytes are read, or with this object.
    """

    _begun = 0

    def __init__(self, path: Path, spans: Sequence[tuple[int, int]]) -> None:
        """Open the file and let the kernel fetch ranges `[start, end)` of it; raises OSError."""
        self._descriptor: int | None = None
        self._descriptor = descriptor = os.open(path, _OPENED)
        CachedClip._begun += 1
        self._spans = spans
        self._parts: list[memoryview] | None = None
        status = os.fstat(descriptor)
        self.size_bytes = status.st_size
        if time.time() - status.st_mtime > _TOUCH_SECONDS:
            with contextlib.suppress(OSError):  # the file of another user
                os.utime(descriptor)
        if CachedClip._begun > _MOST_BEGUN:
            self.read()
        elif hasattr(os, "posix_fadvise"):  # not on macOS
            with contextlib.suppress(OSError):
                for start, end in spans:
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self) -> list[memoryview] | None:
        """Return the ranges, unchecked; None if the disk fails."""
        descriptor = self._descriptor
        if descriptor is not None:
            with contextlib.suppress(OSError):
                self._parts = [
                    memoryview(os.pread(descriptor, end - start, start))
                    for start, end in self._spans
                ]
            self._close()
        return self._parts

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
            CachedClip._begun -= 1

    def __del__(self) -> None:
        self._close()


@dataclass
class ClipCache:
    """A directory of whole clips; holds no open file, so it can be sent to any process.

    directory     where the folder of this cache is made; on a local disk
    limit_bytes   what all of it may occupy, directories included
    split_bytes   disk space for all clips that will be asked for, see `disk_space`; decides the
                  share of them that is admitted
    """

    directory: Path
    limit_bytes: int
    split_bytes: int = 0

    def __post_init__(self) -> None:
        """Make the folder; refuse places and limits that cannot serve."""
        resolved = self.directory.expanduser().resolve()
        if resolved.is_relative_to("/dev/shm"):  # noqa: S108 - refused, not used
            raise UsageError(
                f"cache_dir ({self.directory}) must be on a disk, not in shared memory"
            )
        if self.limit_bytes < 1:
            raise UsageError(f"cache_limit ({self.limit_bytes}) must be at least 1 byte")
        self.folder = resolved / _FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cache_dir ({self.directory}) cannot be made: {error.strerror}; choose another"
            ) from error
        share = 1.0
        if self.split_bytes > self.limit_bytes:
            share = ADMITTED_SHARE * self.limit_bytes / self.split_bytes
        self._admitted = int(share * 2**32)
        self._avoid_until = 0.0

    def admits(self, clip: IndexedClip) -> bool:
        """Whether this clip is one of those that the cache is for."""
        if len(clip.content_hash) != 16 or _disk_bytes(clip.video_bytes) > self.limit_bytes:
            return False
        return int.from_bytes(clip.content_hash[:4], "big") < self._admitted

    def takes(self, clip: IndexedClip) -> bool:
        """Whether it is worth while to read a clip whole: not where nothing could be stored."""
        return self.admits(clip) and time.monotonic() >= self._avoid_until

    def begin(self, clip: IndexedClip, spans: Sequence[tuple[int, int]]) -> CachedClip | None:
        """Ask the disk for ranges `[start, end)` of a clip's payload; None if it is not here."""
        try:
            cached = CachedClip(self._path(clip), spans)
        except OSError:
            return None
        if cached.size_bytes != clip.video_bytes:  # cut by a power failure: `put` would keep it
            self.drop(clip)
            return None
        return cached

    def drop(self, clip: IndexedClip) -> None:
        """Remove a clip whose cached bytes are damaged."""
        with contextlib.suppress(OSError):
            self._path(clip).unlink()

    def put(self, clip: IndexedClip, payload: memoryview) -> bool:
        """Keep a clip whose payload has been checked; return whether it is in the cache now.

        Never raises for the disk's sake: a full disk, a lost directory or a lock that is not to be
        had only mean that the clip is not kept.
        """
        path = self._path(clip)
        if time.monotonic() < self._avoid_until:
            return False
        try:
            with self._locked() as lock:
                if lock is None:
                    self._avoid_until = time.monotonic() + _AVOID_SECONDS
                    return False
                if path.exists():
                    return True
                return self._add(lock, path, payload)
        except OSError:  # such as a full disk: clips need not be read whole for it meanwhile
            self._avoid_until = time.monotonic() + _AVOID_SECONDS
            return False

    def _add(self, lock: int, path: Path, payload: memoryview) -> bool:
        needed = _disk_bytes(len(payload)) + _NAME_BYTES
        if not path.parent.exists():
            needed += _BLOCK_BYTES
        if needed > self.limit_bytes:  # evicting everything would not make room
            return False
        used = self._account(lock)
        if used is None or used + needed > self.limit_bytes:
            used = self._make_room(needed)
            if used + needed > self.limit_bytes:
                _write_account(lock, used)
                return False
        _write_account(lock, used + needed)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(payload)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return True

    def _path(self, clip: IndexedClip) -> Path:
        name = clip.content_hash.hex()
        return self.folder / name[:2] / f"{name}-{clip.video_bytes}.clip"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """Hold the exclusive lock; None when another process keeps it for long."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor if _lock(descriptor) else None
        finally:
            os.close(descriptor)  # and the lock with it

    def _account(self, lock: int) -> int | None:
        """Return the bytes in use according to the lock file; None where it does not say."""
        data = os.pread(lock, _ACCOUNT.size, 0)
        if len(data) != _ACCOUNT.size:
            return None
        magic, used = _ACCOUNT.unpack(data)
        return int(used) if magic == _MAGIC else None

    def _make_room(self, needed: int) -> int:
        """Count what is there; evict the clips unused for longest. Return the bytes in use."""
        used, entries = self._scan()
        if used + needed <= self.limit_bytes:
            return used
        goal = int(_LEFT_AFTER_EVICTION * self.limit_bytes) - needed
        for entry in sorted(entries):
            if used <= goal:
                break
            with contextlib.suppress(OSError):
                Path(entry.path).unlink()
                used -= entry.disk_bytes
        return used

    def _scan(self) -> tuple[int, list[_Entry]]:
        """Return the bytes in use and the clips; remove what killed writers left.

        Only a holder of the lock writes, so that every temporary file is a left-over.
        """
        used = _blocks(self.folder.stat()) + _BLOCK_BYTES  # the lock file, empty at first
        entries: list[_Entry] = []
        with os.scandir(self.folder) as folders:
            for folder in folders:
                used += _blocks(folder.stat(follow_symlinks=False)) if folder.name != "lock" else 0
                if folder.is_dir(follow_symlinks=False) and _SUBFOLDER_NAME.fullmatch(folder.name):
                    used += _scan_folder(folder.path, entries)
        return used, entries


def _scan_folder(folder: str, entries: list[_Entry]) -> int:
    """Append a subfolder's clips to `entries`; return the bytes of all its files."""
    used = 0
    with os.scandir(folder) as files:
        for file in files:
            status = file.stat(follow_symlinks=False)
            if _TEMPORARY_NAME.fullmatch(file.name):
                Path(file.path).unlink(missing_ok=True)
                continue
            used += _blocks(status)
            if _CLIP_NAME.fullmatch(file.name):
                entries.append(_Entry(status.st_mtime, file.path, _blocks(status)))
    return used


def _lock(descriptor: int) -> bool:
    """Take the lock, waiting a little; a holder that is stopped must not stop everybody."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        else:
            return True


def _write_account(lock: int, used: int) -> None:
    os.pwrite(lock, _ACCOUNT.pack(_MAGIC, max(0, used)), 0)


def _disk_bytes(size: int) -> int:
    """Return the bytes that a new file of `size` bytes occupies."""
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _blocks(status: os.stat_result) -> int:
    """Return the bytes that a file occupies, as du counts them, or would once it is written out."""
    return max(status.st_blocks * 512, _disk_bytes(status.st_size))
