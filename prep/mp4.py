"""mp4 v1: proof that a clip has the promised form, and the byte range of each of its GOPs.

ISO/IEC 14496-12 (boxes) and 14496-15 (avcC, length-prefixed NAL units). The form lets a reader
feed a decoder straight from byte ranges, without opening a container.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_MATRIX_BT601 = (5, 6)  # ITU-T H.273: BT.470BG and SMPTE 170M are the same matrix
_LIMITED_RANGE = 1


class FormError(ValueError):
    """The bytes are not an mp4 of the promised form; the message says in what."""


@dataclass(frozen=True)
class GopIndex:
    """Where the groups of pictures of a clip are.

    Offsets are half-open byte positions from the start of the file, one more than there are GOPs.
    """

    codec_config: bytes
    gop_frames: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class ClipForm:
    """What the check found: the pictures and the GOPs."""

    num_frames: int
    width: int
    height: int
    gops: GopIndex


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, payload start, box end) of the boxes in `[start, end)`, containers opened."""
    position, end = start, len(data) if end is None else end
    while position + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if size == 1 and position + 16 <= end:
            (size,), header = struct.unpack_from(">Q", data, position + 8), 16
        stop = end if size == 0 else position + size
        if stop > end or stop < position + header:
            return
        yield kind, position + header, stop
        if kind in _CONTAINERS:
            yield from boxes(data, position + header, stop)
        position = stop


def is_encrypted(head: bytes) -> bool:
    """Whether the sample description of an mp4 says that its video is encrypted (`encv`)."""
    for kind, start, end in boxes(head):
        # stsd: version and flags, entry count, then entries of size and type
        if kind == b"stsd" and head[start + 12 : min(end, start + 16)] == b"encv":
            return True
    return False


def check_form(data: bytes, gop_frames: int) -> ClipForm:
    """Prove that `data` is mp4 v1 with keyframes every `gop_frames`; raise FormError if not."""
    _check_boxes(data)
    try:
        opened: Any = av.open(
            io.BytesIO(data), options={"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2"}
        )
        with opened as file:
            stream: Any = file.streams.video[0]
            context = stream.codec_context
            _check_codec(context)
            packets: list[Any] = [packet for packet in file.demux(stream) if packet.size]
            _check_packets(packets, data, gop_frames)
            config = bytes(context.extradata or b"")
            size = (context.width, context.height)
    except (av.FFmpegError, IndexError) as error:
        raise FormError(f"the container does not open: {error}") from error
    starts = [packet.pos for packet in packets[::gop_frames]]
    offsets = (*starts, packets[-1].pos + packets[-1].size)
    crcs = tuple(zlib.crc32(memoryview(data)[a:b]) for a, b in itertools.pairwise(offsets))
    gops = GopIndex(config, gop_frames, offsets, crcs)
    _check_decodes(data, gops, len(packets), size)
    return ClipForm(len(packets), *size, gops)


def _check_boxes(data: bytes) -> None:
    kinds = [kind for kind, _, _ in boxes(data)]
    if kinds.count(b"moov") != 1 or kinds.count(b"mdat") != 1:
        raise FormError("it must have one moov and one mdat box")
    if kinds.index(b"moov") > kinds.index(b"mdat"):
        raise FormError("moov must stand before mdat")
    if kinds.count(b"trak") != 1:
        raise FormError(f"it must have one track, not {kinds.count(b'trak')}")
    for forbidden in (b"edts", b"moof"):
        if forbidden in kinds:
            raise FormError(f"it must have no {forbidden.decode()} box")


def _check_codec(context: Any) -> None:
    if context.name != "h264" or context.pix_fmt != "yuv420p":
        raise FormError(f"it must be h264 in yuv420p, not {context.name} in {context.pix_fmt}")
    if context.colorspace not in _MATRIX_BT601 or context.color_range != _LIMITED_RANGE:
        raise FormError("it must be tagged BT.601, limited range")
    config = bytes(context.extradata or b"")
    if len(config) < 7 or config[0] != 1 or config[4] & 3 != 3:
        raise FormError("it must have an avcC with 4-byte lengths")


def _check_packets(packets: list[Any], data: bytes, gop_frames: int) -> None:
    """One NAL a packet, contiguous, in display order, keyframes where they are promised."""
    if not packets:
        raise FormError("it has no frames")
    position, step = packets[0].pos, packets[0].duration
    for number, packet in enumerate(packets):
        if packet.pos != position or packet.pts != packet.dts or packet.pts != number * step:
            raise FormError(f"frame {number} is reordered, late, or not contiguous")
        key = number % gop_frames == 0
        length, header = struct.unpack_from(">IB", data, position)
        if length + 4 != packet.size or header & 31 != (5 if key else 1):
            raise FormError(f"frame {number} is not exactly one {'IDR' if key else 'P'} slice")
        if bool(packet.is_keyframe) != key:
            raise FormError(f"frame {number} must {'' if key else 'not '}be a keyframe")
        position += packet.size


def _check_decodes(data: bytes, gops: GopIndex, num_frames: int, size: tuple[int, int]) -> None:
    """Decode the first GOP as a reader will: packets by byte offset into a bare context."""
    context = av.CodecContext.create("h264", "r")
    context.extradata = gops.codec_config
    context.thread_count = 1
    position, wanted = gops.offsets[0], min(gops.gop_frames, num_frames)
    for number in range(wanted):
        (length,) = struct.unpack_from(">I", data, position)
        frames = context.decode(av.Packet(data[position : position + 4 + length]))
        position += 4 + length
        if len(frames) != 1 or (frames[0].width, frames[0].height) != size:
            raise FormError(f"frame {number} does not decode to one picture of {size[0]}x{size[1]}")
