"""What a source file really holds: where its frames begin and end, and how to read its pictures.

Container durations are not trusted; packets are walked (not decoded), and one frame is decoded.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
from av.sidedata.sidedata import Type as SideDataType

from prep.format import open_media
from prep.format.layout import MAX_PIXELS
from prep.mp4 import is_encrypted
from prep.outcome import Reason, RowFailure
from prep.packet_times import TICK_SECONDS, begins_of, cover, seek, seek_early, usual_seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Exact demuxer names. Playlists, concat scripts, image sequences and the like stay out: they make
# the demuxer open other files and addresses (FFmpeg's own name for a container can be a list).
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    "avi", "mpegts", "mpeg", "mpegvideo", "asf", "flv", "ogg", "gif", "ivf", "h264", "hevc",
    "m4v", "mjpeg", "mp3", "wav", "aac", "flac",
)  # fmt: skip
FORMAT_WHITELIST = ",".join(DEMUXERS)
_HDR_CURVES = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
_PLAYLISTS = (b"#extm3u", b"ffconcat", b"<?xml", b"<mpd", b"[playlist]", b"<html", b"<!doctype")
_LONGEST_MARK = max(map(len, _PLAYLISTS))


@dataclass(frozen=True)
class SourceFacts:
    """The video stream of a source, around one segment.

    Times are in seconds from the container's start; `first_seconds` to `end_seconds` is what the
    packets cover. `next_seconds` is when the first picture begins that does not begin before the
    segment. `declared_end_seconds` is what the container claims, where it claims anything.
    `sought_seconds` is where the demuxer has to be sent for the picture at the segment's start,
    where it would stop behind the keyframe that this picture needs; None where it does not.
    """

    stream_index: int
    width: int
    height: int
    rotation_degrees: int
    sample_aspect: Fraction
    matrix: int
    first_seconds: float
    end_seconds: float
    next_seconds: float
    frame_seconds: float
    declared_end_seconds: float | None
    sought_seconds: float | None = None


def probe(path: Path, start_seconds: float, end_seconds: float | None) -> SourceFacts:
    """Look at a file around `[start_seconds, end_seconds)`; raise RowFailure where it has none."""
    head = _read_head(path)
    try:
        file = open_media(str(path), _options(head))
    except (av.FFmpegError, ValueError, OSError) as error:
        raise _cannot_open(head, error) from error
    with file:
        stream = _video_stream(file)
        _refuse_bare(file.format.name, start_seconds)
        if head[4:8] in (b"ftyp", b"moov", b"styp") and is_encrypted(_read_moov(path, head)):
            raise RowFailure(Reason.ENCRYPTED)
        origin = Fraction(file.start_time or 0, av.time_base)
        sought, covered = cover(file, stream, origin, start_seconds, end_seconds)
        if covered.end <= start_seconds:
            raise RowFailure(Reason.OUTSIDE, f"the video ends at {covered.end:.3f} s")

        def go_back() -> None:
            if sought is None:
                seek(file, covered.first, origin)
            else:
                seek_early(file, sought, origin)

        go_back()
        picture = _first_picture(file, stream, go_back)
        declared = stream.duration and float(
            (stream.duration + (stream.start_time or 0)) * stream.time_base - origin
        )
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
        return SourceFacts(
            stream_index=stream.index,
            width=picture.width,
            height=picture.height,
            rotation_degrees=int(picture.rotation) % 360,
            sample_aspect=Fraction(aspect) if aspect else Fraction(1),
            matrix=int(picture.colorspace),
            first_seconds=covered.first,
            end_seconds=covered.end,
            next_seconds=covered.after,
            frame_seconds=usual_seconds(stream),
            declared_end_seconds=declared or None,
            sought_seconds=sought,
        )


def _options(head: bytes) -> dict[str, str]:
    """Return how to open a file: nothing in it may make the demuxer open another one.

    An mp4 says all that is needed of its streams in its boxes. libavformat would still decode
    pictures of it for what we take from the picture that we decode ourselves, and where it may
    not, read on for five seconds in search of one.
    """
    options = {"format_whitelist": FORMAT_WHITELIST, "protocol_whitelist": "file"}
    few = {"skip_frame": "all", "probesize": "32768"}
    return options | few if head[4:8] == b"ftyp" else options


def _refuse_bare(demuxer: str, start_seconds: float) -> None:
    """Raise RowFailure for a stream without a container: nothing says when its pictures are shown.

    ffmpeg counts the pictures of MPEG-2 from the beginning, but not behind a seek.
    """
    if demuxer in ("h264", "hevc") or (demuxer == "mpegvideo" and start_seconds > 0):
        text = f"a bare {demuxer} stream, without times; put it into an mp4 or mkv file"
        raise RowFailure(Reason.NOT_A_VIDEO, text)


def _read_head(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise RowFailure(Reason.UNSAFE_INPUT, "no regular file")
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except FileNotFoundError as error:
        raise RowFailure(Reason.MISSING, f"{path.name} is gone, or a link to nowhere") from error
    except OSError as error:
        raise RowFailure(Reason.STORAGE, f"{path.name}: {error.strerror}") from error
    if not head:
        raise RowFailure(Reason.EMPTY_FILE)
    return head


def _read_moov(path: Path, head: bytes) -> bytes:
    """Return the moov box of an mp4, which can stand at either end of the file."""
    with path.open("rb") as file:
        position, limit = 0, path.stat().st_size
        while position + 8 <= limit:
            file.seek(position)
            size = int.from_bytes(file.read(4), "big")
            kind = file.read(4)
            if size == 1:
                size = int.from_bytes(file.read(8), "big")
            if kind == b"moov" and size <= 64 << 20:
                file.seek(position)
                return file.read(size)
            if size < 8:
                break
            position += size
    return head


def _cannot_open(head: bytes, error: Exception) -> RowFailure:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:_LONGEST_MARK].lower().startswith(_PLAYLISTS):
        return RowFailure(Reason.UNSAFE_INPUT, "the file is a playlist, a script or a web page")
    if head[4:8] == b"ftyp":
        return RowFailure(Reason.TRUNCATED, "the mp4 has no complete moov box")
    if head.count(0) == len(head):
        return RowFailure(Reason.NOT_A_VIDEO, "the file holds only zero bytes")
    return RowFailure(Reason.NOT_A_VIDEO, str(getattr(error, "strerror", "") or ""))


def _video_stream(file: Any) -> Any:
    for stream in file.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            break
    else:
        raise RowFailure(Reason.NO_VIDEO_STREAM)
    context = usable_decoder(stream)
    context.thread_count = 1
    context.options = {"skip_loop_filter": "all"}  # of the one picture, only what it is is needed
    return stream


def usable_decoder(stream: Any) -> Any:
    """Return a stream's decoder; RowFailure where it has none, or pictures beyond the limit."""
    context = stream.codec_context
    if context is None:
        raise RowFailure(Reason.NOT_A_VIDEO, "no decoder for its codec")
    refuse_large(context)
    return context


def refuse_large(picture: Any) -> None:
    """Raise RowFailure where a picture, or what a decoder says of all, has too many pixels."""
    if picture.width * picture.height > MAX_PIXELS:
        text = f"{picture.width}x{picture.height}, more than {MAX_PIXELS:,} pixels"
        raise RowFailure(Reason.PICTURE_SIZE, text)


def refuse_hdr(picture: Any) -> None:
    """Raise RowFailure for a picture of high dynamic range."""
    curve = _HDR_CURVES.get(picture.color_trc)
    if curve is not None:
        raise RowFailure(Reason.HDR, f"transfer characteristic {curve}")


def plain_cut_seconds(
    path: Path, facts: SourceFacts, start_seconds: float, end_seconds: float
) -> float | None:
    """Return how long ffmpeg's plain cut of a segment is, by the times of the packets.

    It drops the picture that stands when the segment begins, takes the segment's length from the
    next one on, and has the last one stand until the one behind it begins. None where the file
    cannot be read.
    """
    length = end_seconds - start_seconds
    try:
        options = _options(_read_head(path))
        with open_media(str(path), options) as file:
            stream = _video_stream(file)
            origin = Fraction(file.start_time or 0, av.time_base)
            if start_seconds > 0:
                if facts.sought_seconds is None:
                    seek(file, start_seconds, origin)
                else:
                    seek_early(file, facts.sought_seconds, origin)
            begins, end = begins_of(file, stream, origin, start_seconds, length)
    except (av.FFmpegError, OSError, ValueError, RowFailure):
        return None
    taken = sorted(begin for begin in begins if begin >= start_seconds - TICK_SECONDS)
    if not taken:
        return 0.0
    behind = next((begin for begin in taken if begin >= taken[0] + length), end)
    return behind - taken[0]


def _first_picture(file: Any, stream: Any, go_back: Callable[[], None]) -> Any:
    try:
        picture = _key_picture(file, stream)
        if picture is None:
            stream.codec_context.flush_buffers()
            go_back()
            picture = next(file.decode(stream), None)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise RowFailure(Reason.DAMAGED, f"the first frame does not decode: {error}") from error
    if picture is None:
        raise RowFailure(Reason.DAMAGED, "no frame decodes")
    refuse_hdr(picture)
    refuse_large(picture)
    if min(picture.width, picture.height) < 2:
        raise RowFailure(Reason.PICTURE_SIZE, f"{picture.width}x{picture.height}")
    return picture


def is_turned(path: Path) -> bool:
    """Whether the pictures of a file are to be shown turned or mirrored, or that cannot be told."""
    try:
        with open_media(str(path), _options(_read_head(path))) as file:
            picture = next(file.decode(_video_stream(file)))
            return SideDataType.DISPLAYMATRIX in picture.side_data
    except (av.FFmpegError, OSError, ValueError, StopIteration, RowFailure):
        return True  # PyAV raises ValueError for kinds of side data that it does not know


def _key_picture(file: Any, stream: Any) -> Any:
    """Return the picture of the keyframe that comes next; None where that is not so simple.

    It is asked for by itself, as a decoder otherwise waits for the pictures that may be shown
    before it, and these cost as much again.
    """
    packet = next(file.demux(stream), None)
    if packet is None or not packet.is_keyframe:
        return None
    context = stream.codec_context
    return next(iter(packet.decode() or context.decode(None)), None)
