"""From a batch of clips and the frames wanted of them to checked bytes.

Requests of a batch are in flight together; the caller decodes the first clips while the others
arrive.
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prep.errors import BadClipError
from stream.ranges import (
    REMOTE_GAP_BYTES,
    ByteRange,
    ClipRequest,
    batch_ranges,
    whole_range,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stream.cache import CachedClip, ClipCache
    from stream.index import IndexedClip

    _Body = Callable[[], memoryview]

__all__ = ["ClipBytes", "ClipReader", "ClipRequest", "PendingClip"]


class ShardStorage(Protocol):
    """What a reader needs of prep.storage.Storage."""

    @property
    def local_root(self) -> Path | None: ...
    def read_range(
        self, path: str, start: int, end: int, *, etag: str | None = None
    ) -> memoryview: ...
    def begin_range(
        self, path: str, start: int, end: int, *, etag: str | None = None
    ) -> Callable[[], memoryview]: ...


@dataclass(frozen=True)
class ClipBytes:
    """Checked bytes of one clip: GOPs by number, or the whole file where it has no GOP index."""

    gops: dict[int, memoryview]
    whole: memoryview | None = None


class PendingClip:
    """Bytes of one request of a batch, on their way: out of the cache, or got by `fetch`."""

    def __init__(self, request: ClipRequest, reader: ClipReader) -> None:
        self.request = request
        self._reader = reader
        self.cached: CachedClip | None = None
        self.fetch: Callable[[], list[memoryview]] | None = None

    def get(self) -> ClipBytes:
        """Wait for the bytes and return them, every one checked against its crc32.

        What fails is read once more, from the storage itself. Raises BadClipError, with shard, key
        and offset, when it fails again; StorageError when the bytes cannot be had.
        """
        if self.cached is not None:
            found = self._reader.checked(self.request, self.cached)
            if found is not None:
                return found
            return self._reader.begin([self.request], past_cache=True)[0].get()
        if self.fetch is None:
            return self.fresh()
        try:
            return _split(self.request, self.fetch())
        except BadClipError:
            return self.fresh()

    def fresh(self) -> ClipBytes:
        """Read again, past every cache of ours, and check; raises as `get`."""
        return _split(self.request, self._reader.fresh_parts(self.request))


class ClipReader:
    """Reads clips of one dataset root.

    `versions` holds the ETag of every shard as pinned when reading began: an object replaced since
    then is an error, not a bad clip. `cache` keeps whole clips on a local disk.
    """

    def __init__(
        self,
        storage: ShardStorage,
        versions: dict[str, str | None],
        cache: ClipCache | None = None,
    ) -> None:
        self.storage = storage
        self.versions = versions
        self.cache = cache

    def begin(self, requests: list[ClipRequest], *, past_cache: bool = False) -> list[PendingClip]:
        """Send the requests of a batch; return its clips in order, to be waited for one by one.

        What is in the cache is taken from there, unless `past_cache`.
        """
        pending = [PendingClip(request, self) for request in requests]
        missing = [clip for clip in pending if past_cache or not self._from_cache(clip)]
        wanted = [clip.request for clip in missing]
        whole = {clip.row for clip in (request.clip for request in wanted) if self._keeps(clip)}
        gap = 0 if self.storage.local_root is not None else REMOTE_GAP_BYTES
        ranges = batch_ranges(wanted, whole=whole, gap=gap)
        bodies = {part: self._body(part) for part in ranges}
        for clip in missing:
            clip.fetch = self._parts(clip.request, bodies, store=clip.request.clip.row in whole)
        return pending

    def fresh_parts(self, request: ClipRequest) -> list[memoryview]:
        """Read what one request needs from the storage itself; unchecked."""
        return [self._get(part) for part in request.ranges]

    def _body(self, part: ByteRange) -> _Body:
        """Ask for a range; return what gives its bytes when they are needed."""
        etag = self.versions.get(part.shard)
        return self.storage.begin_range(part.shard, part.start, part.end, etag=etag)

    def _get(self, part: ByteRange) -> memoryview:
        etag = self.versions.get(part.shard)
        return self.storage.read_range(part.shard, part.start, part.end, etag=etag)

    def _parts(
        self,
        request: ClipRequest,
        bodies: dict[ByteRange, Callable[[], memoryview]],
        *,
        store: bool,
    ) -> Callable[[], list[memoryview]]:
        """Return what cuts a request's parts out of the bodies, and keeps the clip if it shall."""

        def cut(part: ByteRange) -> memoryview:
            body = bodies.get(part)
            if body is not None:  # as where no two clips of the batch are neighbours
                return body()
            around = next(body for body in bodies if body.holds(part))
            return bodies[around]()[part.start - around.start : part.end - around.start]

        def parts() -> list[memoryview]:
            if store and self.cache is not None:
                payload = cut(whole_range(request.clip))
                if zlib.crc32(payload) == request.clip.crc32:
                    self.cache.put(request.clip, payload)
            return [cut(part) for part in request.ranges]

        return parts

    def _keeps(self, clip: IndexedClip) -> bool:
        return self.cache is not None and self.cache.takes(clip)

    def _from_cache(self, pending: PendingClip) -> bool:
        """Ask the disk for a clip if it is in the cache."""
        clip = pending.request.clip
        if self.cache is None or not self.cache.admits(clip):
            return False
        base = clip.video_offset
        spans = [(part.start - base, part.end - base) for part in pending.request.ranges]
        pending.cached = self.cache.begin(clip, spans)
        return pending.cached is not None

    def checked(self, request: ClipRequest, cached: CachedClip) -> ClipBytes | None:
        """Return what a cached clip holds; None for a damaged or unreadable file, which goes."""
        parts = cached.read()
        if parts is not None:
            with contextlib.suppress(BadClipError):
                return _split(request, parts)
        if self.cache is not None:
            self.cache.drop(request.clip)
        return None


def _split(request: ClipRequest, parts: list[memoryview]) -> ClipBytes:
    """Cut what was read into GOPs and check each; raise BadClipError at the first that differs."""
    clip = request.clip
    if clip.codec_config is None:
        _check(clip, parts[0], clip.crc32, 0)
        return ClipBytes({}, parts[0])
    offsets, crc32 = clip.gop_offsets.tolist(), clip.gop_crc32.tolist()
    gops = {}
    for (first, end), body in zip(request.runs, parts, strict=True):
        base = offsets[first]
        for number in range(first, end):
            start = offsets[number]
            data = body[start - base : offsets[number + 1] - base]
            _check(clip, data, crc32[number], start)
            gops[number] = data
    return ClipBytes(gops)


def _check(clip: IndexedClip, data: memoryview, crc32: int, start: int) -> None:
    if zlib.crc32(data) != crc32:
        raise BadClipError(
            f"{clip.shard}: clip {clip.key} is damaged at byte {clip.video_offset + start} "
            "(its crc32 differs from the index); run `kprep verify`"
        )
