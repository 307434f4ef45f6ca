"""From a clip and the frames wanted of it to checked bytes: only the GOPs that hold them."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prep.errors import BadClipError, KprepError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prep.storage import Storage
    from stream.index import IndexedClip
    from stream.order import Int64

_PARALLEL_READS = 16


@dataclass(frozen=True)
class ClipRequest:
    """Frames wanted of one clip: ascending indices, int64, repeats allowed."""

    clip: IndexedClip
    frames: Int64


@dataclass(frozen=True)
class ClipBytes:
    """Checked bytes of one clip: GOPs by number, or the whole file where it has no GOP index."""

    gops: dict[int, memoryview]
    whole: memoryview | None = None


@dataclass(frozen=True)
class _Range:
    """Bytes `[start, end)` of a shard."""

    shard: str
    start: int
    end: int


def needed_gops(request: ClipRequest) -> list[int]:
    """Return the numbers of the GOPs that hold the wanted frames, ascending."""
    return [int(number) for number in np.unique(request.frames // request.clip.gop_frames)]


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return half-open runs of neighbours: 2, 3, 7 gives (2, 4) and (7, 8)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


class ClipReader:
    """Reads clips of one dataset root.

    `versions` holds the ETag of every shard as pinned when reading began: an object replaced since
    then is an error, not a bad clip.
    """

    def __init__(self, storage: Storage, versions: dict[str, str | None]) -> None:
        self.storage = storage
        self.versions = versions
        self._threads: ThreadPoolExecutor | None = None

    def read(self, requests: list[ClipRequest]) -> list[ClipBytes]:
        """Return the bytes of each request, every one checked against its crc32.

        What fails its checksum is read once more. Raises BadClipError, with shard, key and offset,
        when it fails again; StorageError when the bytes cannot be had.
        """
        plans = [_ranges(request) for request in requests]
        bodies = iter(self._fetch([part for plan in plans for part in plan]))
        found = []
        for request, plan in zip(requests, plans, strict=True):
            parts = [next(bodies) for _ in plan]
            found.append(self._checked(request, plan, parts))
        return found

    def _fetch(self, ranges: list[_Range]) -> Iterable[memoryview]:
        if self.storage.local_root is not None:  # the page cache answers faster than a thread does
            return map(self._get, ranges)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_PARALLEL_READS, "kprep-read")
        return self._threads.map(self._get, ranges)

    def _get(self, part: _Range) -> memoryview:
        etag = self.versions.get(part.shard)
        return self.storage.read_range(part.shard, part.start, part.end, etag=etag)

    def _checked(
        self, request: ClipRequest, plan: list[_Range], parts: list[memoryview]
    ) -> ClipBytes:
        try:
            return _split(request, parts)
        except BadClipError:
            return _split(request, [self._get(part) for part in plan])


def _ranges(request: ClipRequest) -> list[_Range]:
    clip = request.clip
    if clip.codec_config is None:
        return [_Range(clip.shard, clip.video_offset, clip.video_offset + clip.video_bytes)]
    return [
        _Range(
            clip.shard,
            clip.video_offset + int(clip.gop_offsets[first]),
            clip.video_offset + int(clip.gop_offsets[end]),
        )
        for first, end in runs(needed_gops(request))
    ]


def _split(request: ClipRequest, parts: list[memoryview]) -> ClipBytes:
    """Cut what was read into GOPs and check each; raise BadClipError at the first that differs."""
    clip = request.clip
    if clip.codec_config is None:
        _check(clip, parts[0], clip.crc32, 0)
        return ClipBytes({}, parts[0])
    gops = {}
    for (first, end), body in zip(runs(needed_gops(request)), parts, strict=True):
        base = int(clip.gop_offsets[first])
        for number in range(first, end):
            start = int(clip.gop_offsets[number])
            data = body[start - base : int(clip.gop_offsets[number + 1]) - base]
            _check(clip, data, int(clip.gop_crc32[number]), start)
            gops[number] = data
    return ClipBytes(gops)


def _check(clip: IndexedClip, data: memoryview, crc32: int, start: int) -> None:
    if zlib.crc32(data) != crc32:
        raise BadClipError(
            f"{clip.shard}: clip {clip.key} is damaged at byte {clip.video_offset + start} "
            "(its crc32 differs from the index); run `kprep verify`"
        )


def pin_versions(storage: Storage, shards: dict[str, int]) -> dict[str, str | None]:
    """Return the ETag of every shard; raise KprepError when one has another size than listed.

    Sizes are those of the manifest, in bytes.
    """
    with ThreadPoolExecutor(_PARALLEL_READS, "kprep-pin") as threads:
        infos = list(threads.map(storage.info, shards))
    for info in infos:
        if info.size_bytes != shards[info.path]:
            raise KprepError(
                f"{storage.where(info.path)} has {info.size_bytes} bytes, the manifest says "
                f"{shards[info.path]}; run `kprep verify`"
            )
    return {info.path: info.etag for info in infos}
