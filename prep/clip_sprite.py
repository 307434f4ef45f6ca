"""A clip as one small picture: some of its frames side by side, for a page that plays them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from prep.errors import BadClipError
from prep.format import CONTAINER_OPTIONS, open_media
from prep.format.layout import MAX_PIXELS

_BOX_PX = (192, 144)  # width and height that a frame fits into
_QUALITY = 65  # of WebP: 2 kB a frame, no difference that could be seen at this size
_SMALLEST_PX = 16
_MOST_FRAMES = 30_000  # decoded for one look: 20 minutes at 25 fps; few bytes can hold millions


@dataclass(frozen=True)
class Sprite:
    """A picture of `num_frames` frames of `width` x `height` pixels, from left to right."""

    data: bytes
    kind: str
    num_frames: int
    width: int
    height: int


def draw_sprite(video: bytes, num_frames: int, most: int) -> Sprite:
    """Decode a clip and put at most `most` of its frames, evenly spaced, side by side.

    Raises BadClipError when it does not decode to `num_frames` frames of a sane size, or has more
    of them than are decoded for a look.
    """
    if num_frames > _MOST_FRAMES:
        raise BadClipError(f"has {num_frames} frames, too many to be shown")
    wanted = np.unique(np.linspace(0, num_frames - 1, min(most, num_frames)).round().astype(int))
    tiles: list[npt.NDArray[np.uint8]] = []
    size: tuple[int, int] | None = None
    found = 0
    try:
        opened = open_media(io.BytesIO(video), CONTAINER_OPTIONS)
        with opened as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise BadClipError("does not decode (no decoder for its codec)")
            _check_size(context.width, context.height)  # before a picture of it is made
            context.thread_count = 1
            for frame in container.decode(stream):
                _check_size(frame.width, frame.height)
                if size is None:
                    size = _tile_size(frame.width, frame.height)
                if len(tiles) < len(wanted) and found == wanted[len(tiles)]:
                    width, height = size
                    tiles.append(frame.to_ndarray(format="rgb24", width=width, height=height))
                found += 1
                if found > num_frames:
                    break
    except (av.FFmpegError, ValueError, IndexError, MemoryError) as error:
        raise BadClipError(f"does not decode ({error})") from error
    if found != num_frames or size is None:
        more = "more" if found > num_frames else str(found)
        raise BadClipError(f"decodes to {more} frames, the index says {num_frames}")
    kind, data = encode_picture(np.concatenate(tiles, axis=1))
    return Sprite(data, kind, len(tiles), *size)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadClipError(f"is {width}x{height} pixels large")


def _tile_size(width: int, height: int) -> tuple[int, int]:
    scale = min(_BOX_PX[0] / width, _BOX_PX[1] / height)
    even = [max(_SMALLEST_PX, round(side * scale / 2) * 2) for side in (width, height)]
    return even[0], even[1]


def encode_picture(pixels: npt.NDArray[np.uint8]) -> tuple[str, bytes]:
    """Encode uint8 (height, width, 3) RGB; return (media type, bytes).

    WebP, or JPEG where this PyAV was built without it.
    """
    webp = "libwebp" in av.codecs_available
    context: Any = av.CodecContext.create("libwebp" if webp else "mjpeg", "w")
    context.height, context.width = pixels.shape[:2]
    context.time_base = Fraction(1)
    context.thread_count = 1
    if webp:
        context.pix_fmt, kind = "yuv420p", "image/webp"
        context.options = {"quality": str(_QUALITY)}
    else:
        context.pix_fmt, kind = "yuvj420p", "image/jpeg"
        context.qmin = context.qmax = 5
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=context.pix_fmt)
    packets = [*context.encode(frame), *context.encode(None)]
    return kind, b"".join(bytes(packet) for packet in packets)
