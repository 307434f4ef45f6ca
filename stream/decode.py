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
from prep.format import CONTAINER_OPTIONS, open_media

if TYPE_CHECKING:
    from stream.index import IndexedClip
    from stream.order import Int64
    from stream.reads import ClipBytes, PendingClip

UInt8 = npt.NDArray[np.uint8]
_KEPT_CONTEXTS = 32
_LENGTH = struct.Struct(">I").unpack_from


class ClipDecoder:
    """Decodes clips; keeps one H.264 context for each codec configuration it has met lately.

    Contexts are keyed by the exact avcC: one that is fed another size's packets returns frames of
    the old size without an error.
    """

    def __init__(self) -> None:
        self._contexts: OrderedDict[bytes, Any] = OrderedDict()

    def decode_request(self, pending: PendingClip, out: UInt8) -> None:
        """Write the frames that a request asked for into `out`, see `decode`.

        What does not decode is read once more, past every cache. Raises BadClipError, and
        StorageError when the bytes cannot be had.
        """
        request, data = pending.request, pending.get()
        try:
            self.decode(request.clip, data, request.frames, out)
        except BadClipError:
            self.decode(request.clip, pending.fresh(), request.frames, out)

    def decode(self, clip: IndexedClip, data: ClipBytes, frames: Int64, out: UInt8) -> None:
        """Write the wanted frames into `out`.

        Args:
            clip: the row of the index.
            data: its checked bytes.
            frames: frame indices, int64 (T,), in any order; one can stand more than once.
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
        context, pictures = self._context(config), _Pictures(clip, out)
        places: dict[int, dict[int, list[int]]] = {}
        for place, frame in enumerate(frames.tolist()):
            gop, number = divmod(frame, clip.gop_frames)
            places.setdefault(gop, {}).setdefault(number, []).append(place)
        try:
            for gop, payload in data.gops.items():
                packets = _packets(clip, gop, bytes(payload))
                _decode_gop(clip, context, packets, places[gop], pictures)
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
        last, pictures = int(frames.max()), _Pictures(clip, out)
        with open_media(io.BytesIO(data.whole), CONTAINER_OPTIONS) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                for place in np.flatnonzero(frames == number):
                    pictures.put(int(place), _planar(frame))
                if number == last:
                    return
        raise _bad(clip, f"has no frame {last}")


def _packets(clip: IndexedClip, gop: int, payload: bytes) -> list[bytes]:
    """Cut a GOP into its packets: one NAL unit with its length prefix is one frame.

    Bytes rather than views of them: libavcodec takes them faster.

    Raises BadClipError when they are not as many as the index says: its checksum can be right and
    the index's count wrong, and frames would then be others than named.
    """
    expected = min(clip.gop_frames, clip.num_frames - gop * clip.gop_frames)
    packets: list[bytes] = []
    position, size, length_at = 0, len(payload), _LENGTH
    while position < size:
        (length,) = length_at(payload, position)
        end = position + 4 + length
        if length == 0 or end > size:
            raise _bad(clip, f"has a broken frame {len(packets)} in GOP {gop}")
        packets.append(payload[position:end])
        position = end
    if len(packets) != expected:
        raise _bad(clip, f"holds {len(packets)} frames in GOP {gop}, the index says {expected}")
    return packets


def _decode_gop(
    clip: IndexedClip,
    context: Any,
    packets: list[bytes],
    wanted: dict[int, list[int]],
    pictures: _Pictures,
) -> None:
    """Decode a GOP up to the last wanted frame."""
    decode, packet_of, places_of, put = context.decode, av.Packet, wanted.get, pictures.put
    for number, packet in enumerate(packets[: max(wanted) + 1]):
        decoded = decode(packet_of(packet))
        if len(decoded) != 1:
            raise _bad(clip, f"gives {len(decoded)} pictures for one packet")
        for place in places_of(number, ()):
            put(place, decoded[0])


def _planar(frame: Any) -> Any:
    """Return a frame of a foreign clip as the format has them: 4:2:0, BT.601, limited range."""
    return frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
    )


class _Pictures:
    """The frames of one clip in the caller's array: each one's planes behind one another."""

    def __init__(self, clip: IndexedClip, out: UInt8) -> None:
        """Divide `out`, uint8 (T, height * width * 3 // 2), into its planes."""
        self._clip = clip
        self._height, self._width = height, width = clip.height, clip.width
        luma, chroma = height * width, height * width // 4
        whole, half = (height, width), (height // 2, width // 2)
        self._planes = (
            (out[:, :luma].reshape(-1, *whole), whole),
            (out[:, luma : luma + chroma].reshape(-1, *half), half),
            (out[:, luma + chroma :].reshape(-1, *half), half),
        )

    def put(self, place: int, frame: Any) -> None:
        """Copy a frame, without the padding of its rows."""
        if (
            frame.height != self._height
            or frame.width != self._width
            or frame.format.name != "yuv420p"
            or frame.is_corrupt
        ):
            self._refuse(frame)
        for (target, shape), plane in zip(self._planes, frame.planes, strict=True):
            target[place] = np.ndarray(shape, np.uint8, plane, 0, (plane.line_size, 1))

    def _refuse(self, frame: Any) -> None:
        clip = self._clip
        found = f"{frame.width}x{frame.height} {frame.format.name}"
        promised = f"{clip.width}x{clip.height} yuv420p"
        if found != promised:
            raise _bad(clip, f"decodes to {found}, the index says {promised}")
        raise _bad(clip, "decodes to a corrupt picture")


def _bad(clip: IndexedClip, what: str) -> BadClipError:
    return BadClipError(f"{clip.shard}: clip {clip.key} {what}; run `kprep verify`")


def check_even(height: int, width: int, key: str) -> None:
    """Refuse a size that 4:2:0 cannot have."""
    if height % 2 or width % 2:
        raise DatasetError(f"clip {key} is {width}x{height}; only even sizes can be streamed")
