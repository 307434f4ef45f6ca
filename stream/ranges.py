"""Which bytes of which shards a batch of clips needs: arithmetic only.

The rules, per batch:

- a clip with a GOP index needs the GOPs that hold its frames; one without needs all its bytes;
- several views of one clip are planned together: where the union of their GOPs is more than 0.6
  of the clip, everything from the first to the last of them is one range, else each run of
  neighbouring GOPs is;
- a clip that a cache wants is one range, its whole payload;
- ranges of one shard that overlap or touch, or lie at most `gap` bytes apart, are one request,
  up to 8 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from stream.index import IndexedClip
    from stream.order import Int64

ONE_RANGE_SHARE = 0.6
"""Share of a clip above which several views of it are read as one range."""
REMOTE_GAP_BYTES = 4096
"""Gap that is read over to save a request to an object store; none on a local disk."""
_LONGEST_REQUEST = 8 << 20


@dataclass(frozen=True)
class ClipRequest:
    """Frames wanted of one clip, for one view or one after the other for several of them.

    Indices, int64, in any order; one can stand more than once.
    """

    clip: IndexedClip
    frames: Int64
    views: int = 1

    @cached_property
    def gops(self) -> list[int]:
        """The numbers of the GOPs that hold the wanted frames, ascending."""
        return sorted(dict.fromkeys((self.frames // self.clip.gop_frames).tolist()))

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """The same as half-open runs of neighbours."""
        return runs(self.gops)

    @cached_property
    def ranges(self) -> list[ByteRange]:
        """The ranges that this request needs by itself: one for each run of GOPs."""
        clip = self.clip
        if clip.codec_config is None:
            return [whole_range(clip)]
        return [run_range(clip, first, end) for first, end in self.runs]


def joined_views(requests: list[ClipRequest]) -> list[ClipRequest]:
    """Return one request for all neighbours that are views of one clip.

    So no picture is decoded twice for them.
    """
    groups = [list(group) for _, group in groupby(requests, lambda request: request.clip.row)]
    return [
        group[0]
        if len(group) == 1
        else ClipRequest(
            group[0].clip, np.concatenate([request.frames for request in group]), len(group)
        )
        for group in groups
    ]


class ByteRange(NamedTuple):
    """Bytes `[start, end)` of a shard."""

    shard: str
    start: int
    end: int

    def holds(self, other: ByteRange) -> bool:
        """Whether all bytes of `other` are in this range."""
        return self.shard == other.shard and self.start <= other.start and other.end <= self.end


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return half-open runs of neighbours: 2, 3, 7 gives (2, 4) and (7, 8)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def whole_range(clip: IndexedClip) -> ByteRange:
    """Return the range of a clip's video payload."""
    return ByteRange(clip.shard, clip.video_offset, clip.video_offset + clip.video_bytes)


def run_range(clip: IndexedClip, first: int, end: int) -> ByteRange:
    """Return the range of GOPs `[first, end)`."""
    return ByteRange(
        clip.shard,
        clip.video_offset + int(clip.gop_offsets[first]),
        clip.video_offset + int(clip.gop_offsets[end]),
    )


def batch_ranges(
    requests: Sequence[ClipRequest], *, whole: Collection[int] = (), gap: int = 0
) -> list[ByteRange]:
    """Return the ranges to read for a batch, in the order in which its clips need them.

    `whole` holds the index rows of clips that are wanted whole; see the module for the rules.
    """
    views: dict[int, list[ClipRequest]] = {}
    for request in requests:
        views.setdefault(request.clip.row, []).append(request)
    wanted: list[ByteRange] = []
    for row, group in views.items():
        wanted += [whole_range(group[0].clip)] if row in whole else _clip_ranges(group)
    return sorted(_merged(wanted, gap), key=lambda part: _first_use(part, wanted))


def _clip_ranges(views: list[ClipRequest]) -> list[ByteRange]:
    """Return the ranges that the views of one clip need together."""
    clip = views[0].clip
    if clip.codec_config is None or (len(views) == 1 and views[0].views == 1):
        return views[0].ranges
    gops = sorted({number for view in views for number in view.gops})
    parts = [run_range(clip, first, end) for first, end in runs(gops)]
    union = sum(part.end - part.start for part in parts)
    if sum(view.views for view in views) > 1 and union > ONE_RANGE_SHARE * clip.video_bytes:
        return [run_range(clip, gops[0], gops[-1] + 1)]
    return parts


def _merged(ranges: list[ByteRange], gap: int) -> list[ByteRange]:
    found: list[ByteRange] = []
    for part in sorted(ranges):
        last = found[-1] if found else None
        if (
            last is not None
            and last.shard == part.shard
            and part.start <= last.end + gap
            and (part.end - last.start <= _LONGEST_REQUEST or part.start < last.end)
        ):
            found[-1] = ByteRange(last.shard, last.start, max(last.end, part.end))
        else:
            found.append(part)
    return found


def _first_use(merged: ByteRange, wanted: list[ByteRange]) -> int:
    return next(place for place, part in enumerate(wanted) if merged.holds(part))
