"""mp4 v1: proof that a clip has the promised form, and the byte range of each of its GOPs.

ISO/IEC 14496-12 (boxes) and 14496-15 (avcC, length-prefixed NAL units). The form lets a reader
feed a decoder straight from byte ranges, without opening a container.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl")
_MATRIX_BT601 = (5, 6)  # ITU-T H.273: BT.470BG and SMPTE 170M are the same matrix
_UNSPECIFIED_MATRIX = 2
_LIMITED_RANGE, _FULL_RANGE = 1, 2  # libavutil's numbers; 0 is unspecified
_MOST_DEPTH = 10  # of containers in each other, as libavformat has it; a track's tables are at 5
_MOST_BOXES = 10_000
_MOST_FRAMES = 1 << 20  # 19 hours at 15 fps; a table takes many times its bytes here
_ENTRY_BYTES = 86  # of a visual sample entry, before the boxes in it
_NAL = struct.Struct(">IB")  # length, and the byte that says what it is

_Places = dict[bytes, list[tuple[int, int]]]


class FormError(ValueError):
    """The bytes are not an mp4 of the promised form; the message says in what."""


class TimesError(FormError):
    """The frames do not come at a constant rate."""


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


@dataclass(frozen=True)
class _Description:
    """What the sample entry says: the avcC, the picture's size, and H.273 matrix and range.

    Range is libavutil's number, 0 where none is stated.
    """

    codec_config: bytes
    width: int
    height: int
    matrix: int
    range: int


def boxes(
    data: bytes, start: int = 0, end: int | None = None, depth: int = _MOST_DEPTH
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, payload start, box end) of the boxes in `[start, end)`.

    Containers are opened, `depth` of them in each other.
    """
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
        if kind in _CONTAINERS and depth:
            yield from boxes(data, position + header, stop, depth - 1)
        position = stop


def is_encrypted(head: bytes) -> bool:
    """Whether the sample description of an mp4 says that its video is encrypted (`encv`)."""
    for kind, start, end in boxes(head):
        # stsd: version and flags, entry count, then entries of size and type
        if kind == b"stsd" and head[start + 12 : min(end, start + 16)] == b"encv":
            return True
    return False


def check_form(data: bytes, gop_frames: int) -> ClipForm:
    """Prove that `data` is mp4 v1 with keyframes every `gop_frames`; raise FormError if not.

    The boxes are read here and the first GOP is decoded; libavformat would take as long again.
    """
    places = _check_boxes(data)
    try:
        _check_headers(data, places)
        described = _sample_description(data, places)
        sizes = _sample_sizes(data, places)
        _check_times(data, places, len(sizes))
        positions = _sample_positions(data, places, sizes)
        _check_slices(data, positions, gop_frames)
        _check_keyframes(data, places, len(sizes), gop_frames)
    except struct.error as error:
        raise FormError(f"a box or a frame of it is cut short: {error}") from error
    offsets = (*positions[:-1:gop_frames], positions[-1])
    crcs = tuple(zlib.crc32(memoryview(data)[a:b]) for a, b in itertools.pairwise(offsets))
    gops = GopIndex(described.codec_config, gop_frames, offsets, crcs)
    _check_decodes(data, gops, len(sizes), described)
    return ClipForm(len(sizes), described.width, described.height, gops)


def _check_boxes(data: bytes) -> _Places:
    """Return the places (payload start, box end) of the boxes of a file by their kinds."""
    places: _Places = {}
    for number, (kind, start, stop) in enumerate(boxes(data)):
        if number == _MOST_BOXES:
            raise FormError(f"it has more than {_MOST_BOXES:,} boxes")
        places.setdefault(kind, []).append((start, stop))
    kinds = list(places)  # in the order of their first
    if any(len(places.get(kind, ())) != 1 for kind in (b"moov", b"mdat")):
        raise FormError("it must have one moov and one mdat box")
    if kinds.index(b"moov") > kinds.index(b"mdat"):
        raise FormError("moov must stand before mdat")
    if len(places.get(b"trak", ())) != 1:
        raise FormError(f"it must have one track, not {len(places.get(b'trak', ()))}")
    for forbidden in (b"edts", b"moof", b"sbgp", b"stps"):  # the last two name keyframes too
        if forbidden in places:
            raise FormError(f"it must have no {forbidden.decode()} box")
    return places


def _check_headers(data: bytes, places: _Places) -> None:
    """Refuse what libavformat does not open, though nothing here needs it."""
    for kind in (b"mvhd", b"mdhd"):
        if _payload(data, places, kind)[:1] not in (b"\0", b"\1"):
            raise FormError(f"its {kind.decode()} box must be of version 0 or 1")
    box = _payload(data, places, b"dref")
    count, size = struct.unpack_from(">4xII", box)
    if count != 1 or not 12 <= size <= len(box) - 8:
        raise FormError("its dref box must have one entry")


def _payload(data: bytes, places: _Places, kind: bytes) -> bytes:
    found = places.get(kind, [])
    if len(found) != 1:
        raise FormError(f"its track must have one {kind.decode()} box, not {len(found)}")
    return data[slice(*found[0])]


def _check_count(count: int) -> None:
    if count > _MOST_FRAMES:
        raise FormError(f"a table of it has {count:,} rows, more than {_MOST_FRAMES:,}")


def _table(box: bytes, columns: str) -> list[tuple[int, ...]]:
    """Return the rows of a table that stands behind its version, flags and number of rows."""
    (count,) = struct.unpack_from(">I", box, 4)
    _check_count(count)
    size = struct.calcsize(f">{columns}")
    if len(box) < 8 + count * size:
        raise struct.error(f"a table of {count} rows in {len(box)} bytes")
    return list(struct.iter_unpack(f">{columns}", box[8 : 8 + count * size]))


def _sample_description(data: bytes, places: _Places) -> _Description:
    if not any(data[start + 8 : start + 12] == b"vide" for start, _ in places.get(b"hdlr", ())):
        raise FormError("its track must be of video")
    box = _payload(data, places, b"stsd")
    # version, flags and number of entries; size and coding of the first, and of its pictures
    count, size, coding, width, height = struct.unpack_from(">4xII4s24xHH", box)
    if coding != b"avc1" or count != 1:
        name = coding.decode("latin-1")
        shown = name if name.isascii() and name.isprintable() else repr(coding)[1:]
        raise FormError(f"it must be h264 in yuv420p, not {shown}")
    config, matrix, range_ = b"", _UNSPECIFIED_MATRIX, 0
    for kind, start, stop in boxes(box, 8 + _ENTRY_BYTES, 8 + size):
        if kind == b"avcC":
            config = box[start:stop]
        elif kind == b"colr" and box[start : start + 4] == b"nclx":
            matrix, full = struct.unpack_from(">8xHB", box, start)
            range_ = _FULL_RANGE if full >> 7 else _LIMITED_RANGE
    if len(config) < 7 or config[0] != 1 or config[4] & 3 != 3:
        raise FormError("it must have an avcC with 4-byte lengths")
    return _Description(config, width, height, matrix, range_)


def _sample_sizes(data: bytes, places: _Places) -> list[int]:
    box = _payload(data, places, b"stsz")
    same, count = struct.unpack_from(">4xII", box)
    if not count:
        raise FormError("it has no frames")
    _check_count(count)
    if same:
        if same * count > len(data):
            raise FormError("its frames are larger than the file")
        return [same] * count
    return [size for (size,) in _table(box[4:], "I")]


def _check_times(data: bytes, places: _Places, num_frames: int) -> None:
    """Every frame is shown when it is decoded, and all stand equally long; the last may differ."""
    rows = [row for row in _table(_payload(data, places, b"stts"), "II") if row[0]]
    lengths = {length for _, length in rows[:-1]} | {row[1] for row in rows[-1:] if row[0] > 1}
    if sum(count for count, _ in rows) != num_frames or len(lengths) > 1 or 0 in lengths:
        raise TimesError("a frame is late: its times are not those of a constant rate")
    if b"ctts" in places:
        for count, offset in _table(_payload(data, places, b"ctts"), "Ii"):
            if count and offset:
                raise FormError("its frames are reordered")


def _sample_positions(data: bytes, places: _Places, sizes: list[int]) -> list[int]:
    """Return where each frame begins, and where the last one ends: one behind the other."""
    wide = b"stco" not in places
    chunks = _table(_payload(data, places, b"co64" if wide else b"stco"), "Q" if wide else "I")
    runs = _table(_payload(data, places, b"stsc"), "III")
    firsts = [first for first, _, _ in runs] + [len(chunks) + 1]
    if (
        not chunks
        or firsts[0] != 1
        or firsts != sorted(set(firsts))
        or any(run[2] != 1 for run in runs)
    ):
        raise FormError("its chunks are not numbered from 1, or not of the one description")
    positions = list(itertools.accumulate(sizes, initial=chunks[0][0]))
    frame = 0
    for (first, many, _), following in zip(runs, firsts[1:], strict=True):
        for (offset,) in chunks[first - 1 : following - 1]:
            if frame >= len(sizes) or offset != positions[frame]:
                raise FormError(f"frame {frame} is not contiguous with the one before")
            frame += many
    if frame != len(sizes):
        raise FormError(f"{frame} frames have a place in the file, not {len(sizes)}")
    if positions[-1] > len(data):
        raise FormError("the last frame is cut short")
    return positions


def _check_slices(data: bytes, positions: list[int], gop_frames: int) -> None:
    """One NAL a frame: an IDR slice where a GOP begins, else a slice of another kind."""
    for number, (position, end) in enumerate(itertools.pairwise(positions)):
        key = number % gop_frames == 0
        length, header = _NAL.unpack_from(data, position)
        if position + 4 + length != end or header & 31 != (5 if key else 1):
            raise FormError(f"frame {number} is not exactly one {'IDR' if key else 'P'} slice")


def _check_keyframes(data: bytes, places: _Places, num_frames: int, gop_frames: int) -> None:
    keys = list(range(1, num_frames + 1))  # without a table, all are
    if b"stss" in places:
        keys = [number for (number,) in _table(_payload(data, places, b"stss"), "I")]
    if keys != list(range(1, num_frames + 1, gop_frames)):
        raise FormError(f"its keyframes must be every {gop_frames} frames, and no others")


def _check_decodes(data: bytes, gops: GopIndex, num_frames: int, described: _Description) -> None:
    """Decode the first GOP as a reader will: packets by byte offset into a bare context."""
    context: Any = av.CodecContext.create("h264", "r")
    context.extradata = gops.codec_config
    context.thread_count = 1
    # those of the coded video, where it states any, come before them
    context.colorspace, context.color_range = described.matrix, described.range
    position, size = gops.offsets[0], (described.width, described.height)
    for number in range(min(gops.gop_frames, num_frames)):
        (length,) = struct.unpack_from(">I", data, position)
        try:
            frames = context.decode(av.Packet(data[position : position + 4 + length]))
        except av.FFmpegError as error:
            raise FormError(f"frame {number} does not decode: {error.strerror}") from error
        position += 4 + length
        if len(frames) == 1 and number == 0:
            _check_picture(context)
        if len(frames) != 1 or (frames[0].width, frames[0].height) != size:
            raise FormError(f"frame {number} does not decode to one picture of {size[0]}x{size[1]}")


def _check_picture(context: Any) -> None:
    if context.pix_fmt != "yuv420p":
        raise FormError(f"it must be h264 in yuv420p, not in {context.pix_fmt}")
    if context.colorspace not in _MATRIX_BT601 or context.color_range != _LIMITED_RANGE:
        raise FormError("it must be tagged BT.601, limited range")
