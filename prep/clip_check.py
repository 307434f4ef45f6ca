"""What a stored clip really is: every frame decoded and counted, its rate proven by its times.

A clip is opened exactly as a reader opens it, so that what is counted here is what is read there.
"""

from __future__ import annotations

import io
import itertools
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av

from prep.format import CONTAINER_OPTIONS, open_media
from prep.mp4 import FormError, GopIndex, check_form
from prep.outcome import Reason, RowFailure
from prep.probe import refuse_hdr, refuse_large, usable_decoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prep.format import ClipRecord

_MOST_FRAMES = 1 << 24
_MOST = 2**31 - 1  # of a rate's terms: the index has them as int32
_ERRORS = (av.FFmpegError, OSError, ValueError, EOFError, IndexError, struct.error)


@dataclass(frozen=True)
class StoredClip:
    """A clip as it is stored: all its frames decode to pictures of one size, at a constant rate."""

    num_frames: int
    fps: Fraction
    width: int
    height: int
    rotation_degrees: int
    sample_aspect: Fraction


def decode_clip(data: bytes, promised: Fraction | None = None) -> StoredClip:
    """Decode every frame of a clip; raise RowFailure where it is not what can be read exactly.

    The rate is `promised` where the time stamps are those of that rate, else one that they are of.
    """
    try:
        opened = open_media(io.BytesIO(data), CONTAINER_OPTIONS)
    except _ERRORS as error:
        raise RowFailure(Reason.NOT_A_VIDEO, _text(error)) from error
    with opened as file:
        stream = _stream(file)
        try:
            stamps, first = _frames(file, stream)
        except _ERRORS as error:
            raise RowFailure(Reason.DAMAGED, f"it does not decode: {_text(error)}") from error
        stated = (promised, stream.average_rate, stream.guessed_rate)
        claims = [Fraction(rate) for rate in stated if rate]
        fps = _rate(stamps, Fraction(stream.time_base or 1), claims)
        aspect = stream.sample_aspect_ratio
        return StoredClip(
            num_frames=len(stamps),
            fps=fps,
            width=first.width,
            height=first.height,
            rotation_degrees=int(first.rotation) % 360,
            sample_aspect=Fraction(aspect) if aspect else Fraction(1),
        )


def _stream(file: Any) -> Any:
    if not file.streams.video:
        raise RowFailure(Reason.NO_VIDEO_STREAM)
    stream = file.streams.video[0]  # the one that a reader takes
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise RowFailure(Reason.NO_VIDEO_STREAM, "its first video stream is a cover picture")
    usable_decoder(stream).thread_count = 1
    return stream


def _frames(file: Any, stream: Any) -> tuple[list[int | None], Any]:
    """Decode all frames; return their time stamps, in display order, and the first of them."""
    stamps: list[int | None] = []
    first: Any = None
    for frame in file.decode(stream):
        if first is None:
            first = frame
            refuse_hdr(frame)
        if frame.is_corrupt:
            raise RowFailure(Reason.DAMAGED, f"frame {len(stamps)} is corrupt")
        if (frame.width, frame.height) != (first.width, first.height):
            raise RowFailure(
                Reason.PICTURE_SIZE,
                f"frame {len(stamps)} is {frame.width}x{frame.height}, "
                f"the first {first.width}x{first.height}",
            )
        refuse_large(frame)
        if len(stamps) >= _MOST_FRAMES:
            raise RowFailure(Reason.PICTURE_SIZE, f"it has more than {_MOST_FRAMES:,} frames")
        stamps.append(frame.pts)
    if first is None:
        raise RowFailure(Reason.NO_FRAMES)
    return stamps, first


def _rate(stamps: list[int | None], tick: Fraction, claims: list[Fraction]) -> Fraction:
    """Return the constant rate of a clip; RowFailure where its frames have none."""
    usable = [rate for rate in claims if rate > 0 and max(rate.as_integer_ratio()) <= _MOST]
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps):
        raise RowFailure(Reason.VARIABLE_RATE, "frames without time stamps")
    if len(known) > 1 and known[-1] > known[0]:
        usable.append(Fraction(len(known) - 1, 1) / ((known[-1] - known[0]) * tick))
        usable.append(usable[-1].limit_denominator(1001))
    for rate in usable:
        if max(rate.as_integer_ratio()) <= _MOST and off_rate(known, tick, rate) is None:
            return rate
    if not usable:
        raise RowFailure(Reason.VARIABLE_RATE, "one frame, and no rate is stated")
    late = off_rate(known, tick, usable[0])
    raise RowFailure(Reason.VARIABLE_RATE, f"frame {late} is not where {_fps(usable[0])} put it")


def off_rate(stamps: list[int], tick: Fraction, rate: Fraction) -> int | None:
    """Return the first frame that is off a constant rate by more than a tick; None if none is.

    A tick is the unit in which the container states times (Matroska: 1 ms), so it is also how
    much a time can be rounded. At 30 fps and 1/1000 s: 0, 33, 67, 100, …
    """
    frame = 1 / rate
    for number, stamp in enumerate(stamps):
        if number and stamp <= stamps[number - 1]:
            return number
        difference = abs((stamp - stamps[0]) * tick - number * frame)
        if difference > tick or 2 * difference >= frame:
            return number
    return None


def find_gops(data: bytes, clip: StoredClip) -> GopIndex | None:
    """Return the groups of pictures of a clip that happens to have the form of mp4 v1."""
    try:
        opened = open_media(io.BytesIO(data), CONTAINER_OPTIONS)
        with opened as file:
            packets = file.demux(file.streams.video[0])
            keys = [bool(packet.is_keyframe) for packet in packets if packet.size]
    except _ERRORS:
        return None
    if not keys or not keys[0]:
        return None
    interval = keys.index(True, 1) if True in keys[1:] else len(keys)
    try:
        form = check_form(data, interval)
        _decode_gops(data, form.gops, form.num_frames, (form.width, form.height))
    except (FormError, *_ERRORS):
        return None
    agree = (form.num_frames, form.width, form.height) == (clip.num_frames, clip.width, clip.height)
    return form.gops if agree else None


def deep_faults(data: bytes, row: ClipRecord, gop_frames: int | None) -> Iterator[str]:
    """Yield what is wrong with a clip's pictures, measured against its row of the index.

    `gop_frames` is the keyframe interval that the dataset's profile promises, if it does.
    """
    promised = Fraction(row.fps_num, row.fps_den)
    try:
        clip = decode_clip(data, promised)
    except RowFailure as failure:
        detail = f" ({failure.detail})" if failure.detail else ""
        yield f"its video cannot be read exactly: {failure.reason}{detail}"
        return
    if clip.num_frames != row.num_frames:
        yield f"it has {clip.num_frames} frames, the index says {row.num_frames}"
    if (clip.width, clip.height) != (row.width, row.height):
        yield f"it is {clip.width}x{clip.height}, the index says {row.width}x{row.height}"
    if clip.fps != promised:
        yield f"it is at {_fps(clip.fps)}, the index says {_fps(promised)}"
    if row.gop_frames is None:
        return
    if gop_frames is not None and row.gop_frames != gop_frames:
        yield f"its keyframes come every {row.gop_frames} frames, the profile says {gop_frames}"
    try:
        form = check_form(data, row.gop_frames)
        _decode_gops(data, form.gops, form.num_frames, (form.width, form.height))
    except (FormError, *_ERRORS) as error:
        yield f"its groups of pictures are not as promised: {_text(error)}"
        return
    indexed = (row.codec_config, row.gop_offsets, row.gop_crc32)
    if (form.gops.codec_config, form.gops.offsets, form.gops.crc32) != indexed:
        yield "its groups of pictures are not where the index says"


def _decode_gops(data: bytes, gops: GopIndex, num_frames: int, size: tuple[int, int]) -> None:
    """Decode every group of pictures as a reader does: packets by byte offset, a bare context."""
    context = av.CodecContext.create("h264", "r")
    context.extradata = gops.codec_config
    context.thread_count = 1
    number = 0
    for start, end in itertools.pairwise(gops.offsets):
        position = start
        while position < end:
            (length,) = struct.unpack_from(">I", data, position)
            decoded = context.decode(av.Packet(data[position : position + 4 + length]))
            position += 4 + length
            if len(decoded) != 1 or (decoded[0].width, decoded[0].height) != size:
                raise FormError(f"frame {number} does not decode to one picture")
            if decoded[0].is_corrupt:
                raise FormError(f"frame {number} decodes to a corrupt picture")
            number += 1
        context.flush_buffers()
    if number != num_frames:
        raise FormError(f"{number} frames decode, not {num_frames}")


def _fps(rate: Fraction) -> str:
    return f"{float(rate):.6g} fps"


def _text(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
