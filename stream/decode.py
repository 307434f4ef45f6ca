"""From checked bytes to pixels: one thread, only the frames that are needed.

The fast path feeds length-prefixed NAL units straight to a decoder context that is kept; the
container path opens the file. Both write planar YUV 4:2:0 into the caller's array.
"""

from __future__ import annotations

import io
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from prep.errors import BadClipError, DatasetError

if TYPE_CHECKING:
    from stream.index import IndexedClip
    from stream.order import Int64
    from stream.reads import ClipBytes

UInt8 = npt.NDArray[np.uint8]
_KEPT_CONTEXTS = 32
_CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "none",
}


class ClipDecoder:
    """Decodes clips; keeps one H.264 context for each codec configuration it has met lately.

    Contexts are keyed by the exact avcC: one that is fed another size's packets returns frames of
    the old size without an error.
    """

    def __init__(self) -> None:
        self._contexts: OrderedDict[bytes, Any] = OrderedDict()

    def decode(self, clip: IndexedClip, data: ClipBytes, frames: Int64, out: UInt8) -> None:
        """Write the wanted frames into `out`.

        Args:
            clip: the row of the index.
            data: its checked bytes.
            frames: ascending frame indices, int64 (T,); an index can stand more than once.
            out: uint8 (T, height * width * 3 // 2): each frame's Y, U and V plane.

        Raises:
            BadClipError: the bytes do not decode to the frames and size that the index promises.
        """
        try:
            if clip.codec_config is None:
                self._decode_container(clip, data, frames, out)
            else:
                self._decode_gops(clip, clip.codec_config, data, frames, out)
        except (av.FFmpegError, struct.error, ValueError, EOFError, IndexError) as error:
            raise _bad(clip, f"does not decode ({error})") from error

    def _decode_gops(
        self, clip: IndexedClip, config: bytes, data: ClipBytes, frames: Int64, out: UInt8
    ) -> None:
        context = self._context(config)
        try:
            for gop, payload in data.gops.items():
                first = gop * clip.gop_frames
                _check_frames(clip, gop, payload)
                inside = np.flatnonzero((frames >= first) & (frames < first + clip.gop_frames))
                wanted: dict[int, list[int]] = {}
                for place in inside:
                    wanted.setdefault(int(frames[place]) - first, []).append(int(place))
                _decode_gop(clip, context, payload, wanted, out)
        except BaseException:
            del self._contexts[config]  # its state is unknown
            raise
        context.flush_buffers()

    def _context(self, config: bytes) -> Any:
        context = self._contexts.pop(config, None)
        if context is None:
            context = av.CodecContext.create("h264", "r")
            context.extradata = config
            context.thread_count = 1
        self._contexts[config] = context
        if len(self._contexts) > _KEPT_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    def _decode_container(
        self, clip: IndexedClip, data: ClipBytes, frames: Int64, out: UInt8
    ) -> None:
        """Decode from the beginning and count: exact for any codec and any order of packets."""
        if data.whole is None:
            raise _bad(clip, "was not read whole")
        last = int(frames[-1])
        with av.open(io.BytesIO(data.whole), options=_CONTAINER_OPTIONS) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):  # type: ignore[union-attr]
                for place in np.flatnonzero(frames == number):
                    _copy(clip, _planar(frame), out[place])
                if number == last:
                    return
        raise _bad(clip, f"has no frame {last}")


def _check_frames(clip: IndexedClip, gop: int, payload: memoryview) -> None:
    """Raise BadClipError when a GOP does not hold as many frames as the index says.

    Its checksum can be right and the index's count wrong; frames would then be others than named.
    """
    expected = min(clip.gop_frames, clip.num_frames - gop * clip.gop_frames)
    position = found = 0
    while position < len(payload):
        position += 4 + int(struct.unpack_from(">I", payload, position)[0])
        found += 1
    if found != expected:
        raise _bad(clip, f"holds {found} frames in GOP {gop}, the index says {expected}")


def _decode_gop(
    clip: IndexedClip,
    context: Any,
    payload: memoryview,
    wanted: dict[int, list[int]],
    out: UInt8,
) -> None:
    """Decode a GOP up to the last wanted frame; one NAL unit is one frame."""
    position, last = 0, max(wanted)
    for number in range(last + 1):
        (length,) = struct.unpack_from(">I", payload, position)
        packet = payload[position : position + 4 + length]
        if length == 0 or len(packet) != 4 + length:
            raise _bad(clip, f"has no frame {number} in a GOP")
        decoded = context.decode(av.Packet(packet))  # type: ignore[arg-type]
        position += 4 + length
        if len(decoded) != 1:
            raise _bad(clip, f"gives {len(decoded)} pictures for one packet")
        for place in wanted.get(number, ()):
            _copy(clip, decoded[0], out[place])


def _planar(frame: Any) -> Any:
    """Return a frame of a foreign clip as the format has them: 4:2:0, BT.601, limited range."""
    return frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
    )


def _copy(clip: IndexedClip, frame: Any, target: UInt8) -> None:
    """Copy the three planes, without their padding, behind one another."""
    height, width = clip.height, clip.width
    if (frame.height, frame.width) != (height, width) or frame.format.name != "yuv420p":
        raise _bad(
            clip,
            f"decodes to {frame.width}x{frame.height} {frame.format.name}, "
            f"the index says {width}x{height} yuv420p",
        )
    if frame.is_corrupt:
        raise _bad(clip, "decodes to a corrupt picture")
    position = 0
    for plane, rows, columns in zip(
        frame.planes,
        (height, height // 2, height // 2),
        (width, width // 2, width // 2),
        strict=True,
    ):
        pixels = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        size = rows * columns
        target[position : position + size].reshape(rows, columns)[:] = pixels[:rows, :columns]
        position += size


def _bad(clip: IndexedClip, what: str) -> BadClipError:
    return BadClipError(f"{clip.shard}: clip {clip.key} {what}; run `kprep verify`")


def check_even(height: int, width: int, key: str) -> None:
    """Refuse a size that 4:2:0 cannot have."""
    if height % 2 or width % 2:
        raise DatasetError(f"clip {key} is {width}x{height}; only even sizes can be streamed")
