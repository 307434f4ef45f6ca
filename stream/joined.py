"""Several roots that look like one: rows counted through, keys told apart, shards by full name."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction
    from pathlib import Path

    from prep.storage import Storage
    from stream.index import ClipIndex, IndexedClip
    from stream.order import Int64
    from stream.reads import ClipReader, ClipRequest, PendingClip


@dataclass(frozen=True)
class IndexPart:
    """One root's rows of a joined index.

    number  of the root, counted from 0, also over roots that have no part
    prefix  what its shards' paths begin with in messages
    index   its rows
    labels  int64: which label each of its labels becomes; its last element, -1, is for none
    """

    number: int
    prefix: str
    index: ClipIndex
    labels: Int64


class JoinedIndex:
    """The indexes of several roots, one behind the other; for the methods see ClipIndex.

    Two roots can have one key for different videos, and even for equal ones each is a clip of its
    own. So a key is called `N/key` here, N being the root's number: everything that follows from a
    key (start frames, augmentation, what belongs to one video) is told apart by that. Shards are
    called by their full names.
    """

    def __init__(self, parts: list[IndexPart]) -> None:
        self.parts = parts
        self._firsts = [0, *accumulate(len(part.index) for part in parts)]

    def __len__(self) -> int:
        """Return the number of clips."""
        return self._firsts[-1]

    def place(self, row: int) -> tuple[int, int]:
        """Return which part holds a row, and as which row of its own."""
        part = bisect_right(self._firsts, row) - 1
        return part, row - self._firsts[part]

    @property
    def num_frames(self) -> Int64:
        """Frames of each clip, int64."""
        return np.concatenate([part.index.num_frames for part in self.parts])

    @property
    def video_bytes(self) -> Int64:
        """Bytes of each clip's video payload, int64."""
        return np.concatenate([part.index.video_bytes for part in self.parts])

    @property
    def sizes(self) -> tuple[Int64, Int64]:
        """Height and width of each clip in pixels, int64."""
        heights, widths = zip(*(part.index.sizes for part in self.parts), strict=True)
        return np.concatenate(heights), np.concatenate(widths)

    @property
    def labels(self) -> Int64:
        """Label index of each clip in the joined class list, int64; -1 where there is none."""
        return np.concatenate([part.labels[part.index.labels] for part in self.parts])

    def key(self, row: int) -> str:
        """Return `N/key` of a row."""
        part, own = self.place(row)
        return f"{self.parts[part].number}/{self.parts[part].index.key(own)}"

    def shard_paths(self) -> list[str]:
        """Return the shards that hold clips, by their full names."""
        return sorted(
            part.prefix + path for part in self.parts for path in part.index.shard_paths()
        )

    def rates(self) -> dict[Fraction, Int64]:
        """Return the stored frame rates and the rows that have each."""
        found: dict[Fraction, list[Int64]] = {}
        for part, first in zip(self.parts, self._firsts, strict=False):
            for rate, rows in part.index.rates().items():
                found.setdefault(rate, []).append(rows + first)
        return {rate: np.concatenate(rows) for rate, rows in found.items()}

    def clip(self, row: int) -> IndexedClip:
        """Return one row."""
        number, own = self.place(row)
        part = self.parts[number]
        clip = part.index.clip(own)
        return replace(
            clip,
            row=row,
            key=f"{part.number}/{clip.key}",
            shard=part.prefix + clip.shard,
            label=int(part.labels[clip.label]),
        )


@dataclass(frozen=True)
class ShardsByFullName:
    """A root's storage, to be read by the full names of its shards."""

    storage: Storage

    @property
    def local_root(self) -> Path | None:
        """The directory, or None when the root is in an object store."""
        return self.storage.local_root

    def read_range(self, path: str, start: int, end: int, *, etag: str | None = None) -> memoryview:
        """Return bytes `[start, end)` of a shard; see Storage.read_range."""
        return self.storage.read_range(self._own(path), start, end, etag=etag)

    def begin_range(
        self, path: str, start: int, end: int, *, etag: str | None = None
    ) -> Callable[[], memoryview]:
        """Ask for bytes `[start, end)` of a shard; see Storage.begin_range."""
        return self.storage.begin_range(self._own(path), start, end, etag=etag)

    def _own(self, path: str) -> str:
        return path.removeprefix(self.storage.where(""))


class JoinedReader:
    """Reads the clips of a joined index, each root through a reader of its own."""

    def __init__(self, index: JoinedIndex, readers: list[ClipReader]) -> None:
        self._index = index
        self._readers = readers

    def begin(self, requests: list[ClipRequest]) -> list[PendingClip]:
        """Send the requests of a batch; return its clips in order, to be waited for one by one."""
        places: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(self._index.place(request.clip.row)[0], []).append(place)
        pending: dict[int, Any] = {}
        for part, own in places.items():
            begun = self._readers[part].begin([requests[place] for place in own])
            pending.update(zip(own, begun, strict=True))
        return [pending[place] for place in range(len(requests))]
