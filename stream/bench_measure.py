"""What the benches measure with: processor time and memory of a process tree, medians, storages."""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.errors import StorageError
from prep.storage import ObjectInfo, Storage

if TYPE_CHECKING:
    from collections.abc import Callable

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def own_processes() -> set[int]:
    """Return this process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found, queue = {os.getpid()}, [os.getpid()]
    while queue:
        children = parents.get(queue.pop(), [])
        found.update(children)
        queue += children
    return found


def cpu_seconds(processes: set[int], *, ended: bool = False) -> float:
    """Return user and system time of live processes, in steps of a clock tick (10 ms).

    With `ended`, also that of their children that have ended and were waited for.
    """
    ticks = 0
    for pid in processes:
        with contextlib.suppress(OSError, ValueError):
            ticks += sum(int(value) for value in _stat(pid)[11 : 15 if ended else 13])
    return ticks / _TICKS_PER_SECOND


def pss_bytes(processes: set[int]) -> int:
    """Return the proportional set size: pages that processes share are counted once."""
    total = 0
    for pid in processes:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
            lines = [line.split() for line in text.splitlines()]
            total += sum(int(line[1]) * 1024 for line in lines if line[0] == "Pss:")
    return total


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name, which can hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()


@dataclass
class CountingStorage(Storage):
    """A storage that counts what this process reads from shards."""

    requests: int = field(default=0, init=False)
    bytes_read: int = field(default=0, init=False)

    def read_range(self, path: str, start: int, end: int, *, etag: str | None = None) -> memoryview:
        """Read as Storage does, and count."""
        body = super().read_range(path, start, end, etag=etag)
        self.requests += 1
        self.bytes_read += len(body)
        return body

    def begin_range(
        self, path: str, start: int, end: int, *, etag: str | None = None
    ) -> Callable[[], memoryview]:
        """Begin to read as Storage does, and count; of a local root when it is read."""
        if self.local_root is None:
            self.requests += 1
            self.bytes_read += end - start
        return super().begin_range(path, start, end, etag=etag)


@dataclass
class MemoryStorage(Storage):
    """Objects held in memory, once for all processes: the baseline that no disk or network slows.

    `requests` and `bytes_read` count this process's reads of ranges. The bytes stand in an
    anonymous memory file that workers map; it is gone with this process. Make one with `hold`.
    """

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    file: str = ""
    requests: int = field(default=0, init=False)
    bytes_read: int = field(default=0, init=False)
    _map: Any = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def hold(cls, source: Storage, paths: list[str]) -> MemoryStorage:
        """Copy objects of a root into memory."""
        descriptor = os.memfd_create("kprep-bench")  # kept open for as long as the process lives
        places, position = {}, 0
        with os.fdopen(os.dup(descriptor), "wb") as sink:
            for path in paths:
                data = source.read(path, source.info(path).size_bytes)
                sink.write(data)
                places[path] = (position, len(data))
                position += len(data)
        name = f"/proc/{os.getpid()}/fd/{descriptor}"
        # a directory that exists and holds none of the objects: local roots take the direct path
        return cls(tempfile.gettempdir(), places=places, file=name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping behind: another process makes its own."""
        kept = {"places": self.places, "file": self.file, "requests": 0, "bytes_read": 0}
        return {**super().__getstate__(), **kept, "_map": None}

    def release(self) -> None:
        """Free the memory in this process; the storage cannot be opened again."""
        os.close(int(self.file.rpartition("/")[2]))
        self._map = None

    def _view(self, path: str) -> memoryview:
        if path not in self.places:
            raise StorageError(f"{self.where(path)} does not exist") from FileNotFoundError(path)
        if self._map is None:
            with Path(self.file).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, size = self.places[path]
        return memoryview(self._map)[start : start + size]

    def info(self, path: str) -> ObjectInfo:
        """Return the size; there is no version."""
        return ObjectInfo(path, len(self._view(path)), None)

    def read(self, path: str, most: int = 0) -> bytes:  # noqa: ARG002 - it is in memory
        """Return a whole object."""
        return bytes(self._view(path))

    def read_range(
        self,
        path: str,
        start: int,
        end: int,
        *,
        etag: str | None = None,  # noqa: ARG002 - nothing replaces these objects
    ) -> memoryview:
        """Return bytes `[start, end)` of an object, not copied, and count."""
        self.requests += 1
        self.bytes_read += end - start
        return self._view(path)[start:end]

    def begin_range(
        self, path: str, start: int, end: int, *, etag: str | None = None
    ) -> Callable[[], memoryview]:
        """Return what gives bytes `[start, end)`, which need no waiting, and count."""
        view = self.read_range(path, start, end, etag=etag)
        return lambda: view
