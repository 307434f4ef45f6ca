"""Which videos two lists share: Kinetics-400's val sits largely inside Kinetics-700's train."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.segment import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prep.annotation_rows import Listing

MAX_EXAMPLES = 10
_FILE = re.compile(r"(?:.*/)?([A-Za-z0-9_-]{11})(?:_(\d{6})_(\d{6}))?\.[^./]*", re.DOTALL)
_COUNTER = re.compile(r".*[_-]\d{5,}|\d{11}", re.DOTALL)  # clip_000001 is no id


@dataclass(frozen=True)
class ListCounts:
    """One list's side: rows, distinct ids, rows whose id the other list has, rows not readable."""

    rows: int
    ids: int
    rows_shared: int
    bad_rows: int


@dataclass(frozen=True)
class SharedVideo:
    """A video that both lists have, with its segments there: `val 36-46 s abseiling`."""

    video_id: str
    in_a: tuple[str, ...]
    in_b: tuple[str, ...]


@dataclass(frozen=True)
class OverlapReport:
    """What two lists share. `same_segments` counts segments of the same video, start and end.

    `shared_ids` is sorted; `examples` are its first ten.
    """

    a: ListCounts
    b: ListCounts
    shared_ids: tuple[str, ...]
    same_segments: int
    examples: tuple[SharedVideo, ...]


@dataclass(frozen=True)
class _Shared:
    """The rows of one list whose ids the other has: how many, their segments, some to show."""

    rows: int
    segments: frozenset[tuple[str, float, float | None]]
    shown: dict[str, tuple[str, ...]]


def overlap(a: Listing, b: Listing) -> OverlapReport:
    """Return which videos two lists share, by id; each list is read twice.

    Open the lists with split "*" to compare all their rows. A file that is called `<id>.*` or
    `<id>_<start:06d>_<end:06d>.*` after a YouTube id is of that video. Memory holds the distinct
    ids. Raises UsageError for a list without a row that can be read: that it shares nothing says
    nothing.
    """
    ids_a, rows_a, bad_a = _ids(a)
    ids_b, rows_b, bad_b = _ids(b)
    shared = ids_a & ids_b
    examples = sorted(shared)[:MAX_EXAMPLES]
    of_a, of_b = _shared(a, shared, examples), _shared(b, shared, examples)
    return OverlapReport(
        a=ListCounts(rows_a, len(ids_a), of_a.rows, bad_a),
        b=ListCounts(rows_b, len(ids_b), of_b.rows, bad_b),
        shared_ids=tuple(sorted(shared)),
        same_segments=len(of_a.segments & of_b.segments),
        examples=tuple(SharedVideo(name, of_a.shown[name], of_b.shown[name]) for name in examples),
    )


def _ids(listing: Listing) -> tuple[set[str], int, int]:
    ids, rows, bad, first = set(), 0, 0, ""
    for item in listing:
        rows += 1
        if isinstance(item, Segment):
            ids.add(_video(item)[0])
        else:
            bad += 1
            first = first or item.detail
    if not rows:
        what, way = ("video", "; see that it is mounted") if listing.path.is_dir() else ("row", "")
        raise UsageError(f"{listing.path} holds no {what}, so there is nothing to compare{way}")
    if bad == rows:
        raise UsageError(
            f"none of the {rows} rows of {listing.path} can be read, so there is nothing to "
            f"compare ({first}); give an annotation list, a folder of videos, or the table that "
            "`kprep info --csv` writes"
        )
    return ids, rows, bad


def _video(segment: Segment) -> tuple[str, float, float | None]:
    """Return id, start and end of a segment, or what the name of a file says of them."""
    named = named_video(segment.path) if segment.path is not None else None
    return named or (segment.video_id, segment.start_seconds, segment.end_seconds)


def named_video(path: str) -> tuple[str, float, float | None] | None:
    """Return id, start and end of the YouTube video that a file is named after; None for others.

    The end is None where the name has no times.
    """
    named = _FILE.fullmatch(path)
    if named and named[2]:
        return named[1], float(named[2]), float(named[3])
    return (named[1], 0.0, None) if named and not _COUNTER.fullmatch(named[1]) else None


def _shared(listing: Listing, shared: set[str], examples: list[str]) -> _Shared:
    rows, segments = 0, set()
    shown: dict[str, tuple[str, ...]] = dict.fromkeys(examples, ())
    for segment in _segments(listing):
        video = _video(segment)
        if video[0] not in shared:
            continue
        rows += 1
        segments.add(video)
        if video[0] in shown:
            shown[video[0]] += (_text(segment),)
    return _Shared(rows, frozenset(segments), shown)


def _segments(listing: Listing) -> Iterator[Segment]:
    return (item for item in listing if isinstance(item, Segment))


def _text(segment: Segment) -> str:
    if segment.path is not None:
        return segment.path
    end = segment.end_seconds
    words = (
        "" if segment.split == "*" else segment.split,
        "whole" if end is None else f"{segment.start_seconds:g}-{end:g} s",
        segment.label or "",
    )
    return " ".join(word for word in words if word)
