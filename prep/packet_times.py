"""When the pictures of a source are shown and decode, by its packets: none is decoded here."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import av

from prep.outcome import Reason, RowFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

TICK_SECONDS = 1e-3  # Matroska's; a time can be as much before the one that was meant
_BEFORE_ZERO_SECONDS = 3 / 23  # ffmpeg goes back as far for B-frames, decoded before time 0


@dataclass(frozen=True)
class Covered:
    """What the packets behind a seek cover, in seconds, from the first keyframe on.

    `key` is when that keyframe is shown; None where there is none, and all packets count.
    """

    first: float
    end: float
    after: float
    key: float | None


def seek(file: Any, seconds: float, origin: Fraction) -> None:
    """Go to the last keyframe at or before `seconds`; some demuxers can only go to the start."""
    try:
        file.seek(int((Fraction(seconds) + origin) * av.time_base), backward=True)
    except (av.FFmpegError, OSError):
        try:
            file.seek(0)
        except (av.FFmpegError, OSError) as error:
            raise RowFailure(Reason.DAMAGED, "the file cannot be searched") from error


def seek_early(file: Any, sought_seconds: float, origin: Fraction) -> None:
    """Go to `SourceFacts.sought_seconds`, not further back than ffmpeg will."""
    seek(file, sought_seconds or -_BEFORE_ZERO_SECONDS, origin)


def cover(
    file: Any, stream: Any, origin: Fraction, start_seconds: float, end_seconds: float | None
) -> tuple[float | None, Covered]:
    """Find where to seek for the picture at the segment's start, and see what comes from there.

    Demuxers without an index (MPEG-TS, MPEG-PS) go to any packet, and mp4's goes by the times of
    decoding, which can be before those of showing: what comes first is then a later keyframe.
    """
    if start_seconds > 0:
        seek(file, start_seconds, origin)
    covered = _covered(file, stream, origin, start_seconds, end_seconds)
    latest = start_seconds + TICK_SECONDS
    sought, key, step = start_seconds, covered.key, 1.0  # most keyframes come within 8 s
    while sought > 0 and (key is None or key > latest):
        sought, step = max(0.0, round(start_seconds - step, 6)), 2 * step
        seek_early(file, sought, origin)
        key = _next_key(file, stream, origin, latest)
    if sought == start_seconds or key is None or (covered.key is not None and key >= covered.key):
        return None, covered
    seek_early(file, sought, origin)
    return sought, _covered(file, stream, origin, start_seconds, end_seconds)


def _stamp(packet: Any) -> int | None:
    """Return when a packet is shown, in ticks; None for one that holds no picture to count."""
    stamp: int | None = packet.pts if packet.pts is not None else packet.dts
    return None if not packet.size or packet.is_corrupt else stamp


def _counted(file: Any, stream: Any, start_seconds: float) -> Iterator[tuple[Any, int, bool]]:
    """Yield the packets that count, when each is shown, and whether those before do not count.

    These are all, until the first keyframe shows that what came before it does not decode.
    """
    # AVI knows no time of showing: that of B-frames is guessed, a frame late at the beginning
    in_turn = file.format.name == "avi" and start_seconds <= 0
    key: int | None = None
    for packet in file.demux(stream):
        stamp = packet.dts if in_turn and _stamp(packet) is not None else _stamp(packet)
        if stamp is None:
            continue
        anew = key is None and packet.is_keyframe
        if anew:
            key = stamp
        if key is None or stamp >= key:
            yield packet, stamp, anew


def _decoded(packet: Any, stamp: int) -> int:
    """Return when a packet is decoded, in ticks: none that follows is shown before."""
    dts: int | None = packet.dts
    return stamp if dts is None else dts


def _next_key(file: Any, stream: Any, origin: Fraction, latest: float) -> float | None:
    """Return when the next keyframe is shown; None where none is decoded before `latest`."""
    last = floor((Fraction(latest) + origin) / stream.time_base)
    try:
        for packet in file.demux(stream):
            stamp = _stamp(packet)
            if stamp is None:
                continue
            if packet.is_keyframe:
                return float(stamp * stream.time_base - origin)
            if _decoded(packet, stamp) > last:
                break
    except (av.FFmpegError, OSError, ValueError):
        pass
    return None


def usual_seconds(stream: Any) -> float:
    """Return how long a picture usually stands."""
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 0.04


def _covered(
    file: Any, stream: Any, origin: Fraction, start_seconds: float, end_seconds: float | None
) -> Covered:
    """Walk the packets until the segment ends.

    `after` is the first of those that do not begin before the segment, else the end.
    """
    tick = stream.time_base
    usual = Fraction(usual_seconds(stream)) / tick
    # where the times of decoding are not known, B-frames come late, never by more than a second
    last = None if end_seconds is None else floor((Fraction(end_seconds) + 1 + origin) / tick)
    starts = ceil((Fraction(start_seconds - TICK_SECONDS) + origin) / tick)
    key: int | None = None
    first: int | None = None
    after: int | None = None
    latest: int | None = None
    end: int | Fraction = 0
    try:
        for packet, stamp, anew in _counted(file, stream, start_seconds):
            if anew:
                key, first, after, latest = stamp, None, None, None
            first = stamp if first is None else min(first, stamp)
            # mp4 states how long until the next is decoded: true only of the one shown last
            if latest is None or stamp >= latest:
                latest, end = stamp, stamp + (packet.duration or usual)
            if stamp >= starts and (after is None or stamp < after):
                after = stamp
            if last is not None and _decoded(packet, stamp) > last:
                break
    except (av.FFmpegError, OSError, ValueError):
        pass  # the file ends or breaks here: what came before is what it holds
    if first is None:
        raise RowFailure(Reason.NO_FRAMES)

    def seconds(stamp: int | Fraction) -> float:
        return float(stamp * tick - origin)

    return Covered(
        max(seconds(first), 0.0),
        seconds(end),
        seconds(end if after is None else after),
        None if key is None else seconds(key),
    )


def begins_of(
    file: Any, stream: Any, origin: Fraction, start_seconds: float, length: float
) -> tuple[list[float], float]:
    """Return when pictures begin until a second behind a cut, and when the last one ends."""
    begins: list[float] = []
    end, first, latest = 0.0, None, None
    for packet, stamp, anew in _counted(file, stream, start_seconds):
        if anew:
            begins, first, latest = [], None, None
        begin = float(stamp * stream.time_base - origin)
        begins.append(begin)
        if latest is None or begin >= latest:
            latest = begin
            end = begin + float((packet.duration or 0) * stream.time_base)
        if begin >= start_seconds - TICK_SECONDS:
            first = begin if first is None else min(first, begin)
        decoded = float(_decoded(packet, stamp) * stream.time_base - origin)
        if first is not None and decoded > first + length + 1:
            break
    return begins, end
