"""How fast a dataset decodes, beside the floor: libavcodec's decode calls and nothing else."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from prep.errors import UsageError
from stream.bench_measure import Spread
from stream.color import frame_bytes, write_rgb
from stream.decode import ClipDecoder
from stream.order import EpochOrder
from stream.plan_reads import view_request
from stream.plan_splits import StoredSplit
from stream.reads import ClipBytes
from stream.sampling import frame_offsets

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction

    from prep.storage import Storage
    from stream.decode import UInt8
    from stream.reads import ClipRequest

CONTENDERS = ("floor", "yuv420", "rgb", "container")


@dataclass(frozen=True)
class DecodeResult:
    """CPU milliseconds a clip, in one thread, and how often that is the floor, round by round."""

    cpu_ms_per_clip: Spread
    over_floor: Spread


@dataclass(frozen=True)
class DecodeSample:
    """A view with its bytes in memory, as GOPs and whole, and room for its pixels."""

    request: ClipRequest
    gops: ClipBytes
    whole: ClipBytes
    out: UInt8


def decode_samples(
    storage: Storage, name: str, *, frames: int, fps: Fraction, clips: int
) -> list[DecodeSample]:
    """Return the first views of an epoch's order, without those that have no GOP index.

    At most `clips`, fewer where the split has not so many. UsageError when there is none.
    """
    split = StoredSplit(storage, name)
    offsets = {rate: frame_offsets(frames, fps, rate) for rate in split.rates()}
    num_clips, _, _ = split.place({rate: int(found[-1]) + 1 for rate, found in offsets.items()})
    if not num_clips:
        raise UsageError(f"no clip of split {name} has {frames} frames at {float(fps):g} fps")
    order = EpochOrder(split.fingerprint, num_clips, seed=0, epoch=0)
    found = []
    for clip in order(np.arange(min(clips, num_clips)))[0]:
        request = view_request(split, order, int(clip), 0, offsets)
        if request.clip.codec_config is not None:
            found.append(_sample(storage, request))
    if not found:
        raise UsageError(f"no clip of split {name} has a GOP index; there is no floor to show")
    return found


def bench_decode(
    samples: list[DecodeSample],
    *,
    rounds: int = 7,
    others: dict[str, Callable[[], object]] | None = None,
) -> dict[str, DecodeResult]:
    """Decode the same views in four ways, in turn, `rounds` times.

    - floor: libavcodec's decode calls for exactly the packets from the keyframe to the last frame
      wanted, in a kept context; no pixel is copied and nothing is compared
    - yuv420: what the loader does, to planar YUV
    - rgb: the same, converted to RGB on the CPU
    - container: the clip opened as an mp4 and decoded from its beginning, to planar YUV

    `others` are further contenders by name: each call decodes all of the views once.
    """
    contenders: dict[str, Callable[[], object]] = {
        "floor": Floor(samples).run,
        "yuv420": decoding(samples),
        "rgb": decoding(samples, rgb=True),
        "container": decoding(samples, whole=True),
    }
    contenders |= others or {}
    times = _rounds(contenders, rounds)
    return {
        name: DecodeResult(
            Spread.of([value * 1000 / len(samples) for value in times[name]]),
            Spread.of(
                [value / floor for value, floor in zip(times[name], times["floor"], strict=True)]
            ),
        )
        for name in contenders
    }


def _rounds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    for run in contenders.values():
        run()  # contexts are opened and pages touched once
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            begun = time.process_time()
            contenders[name]()
            times[name].append(time.process_time() - begun)
    return times


def _sample(storage: Storage, request: ClipRequest) -> DecodeSample:
    clip = request.clip
    begin = clip.video_offset
    body = storage.read_range(clip.shard, begin, begin + clip.video_bytes)
    gops = {
        number: body[int(clip.gop_offsets[number]) : int(clip.gop_offsets[number + 1])]
        for number in request.gops
    }
    size = frame_bytes(clip.height, clip.width)
    out = np.empty((len(request.frames), size), dtype=np.uint8)
    return DecodeSample(request, ClipBytes(gops), ClipBytes({}, body), out)


class Floor:
    """The decode calls alone, in kept contexts: packets are made before, and no pixel is copied."""

    def __init__(self, samples: list[DecodeSample]) -> None:
        self._contexts: dict[bytes, Any] = {}
        self._work: list[tuple[Any, list[Any]]] = []
        for sample in samples:
            config = sample.request.clip.codec_config or b""
            if config not in self._contexts:
                context = av.CodecContext.create("h264", "r")
                context.extradata = config
                context.thread_count = 1
                self._contexts[config] = context
            self._work.append((self._contexts[config], _packets(sample)))

    def run(self) -> None:
        for context, packets in self._work:
            for packet in packets:
                context.decode(packet)
            context.flush_buffers()


def _packets(sample: DecodeSample) -> list[Any]:
    """Return one packet a frame, from each needed GOP's keyframe to the last frame wanted of it."""
    clip, frames = sample.request.clip, sample.request.frames
    found: list[Any] = []
    for gop, payload in sample.gops.gops.items():
        first, position = gop * clip.gop_frames, 0
        inside = frames[(frames >= first) & (frames < first + clip.gop_frames)]
        for _ in range(int(inside.max()) - first + 1):
            (length,) = struct.unpack_from(">I", payload, position)
            packet: Any = payload[position : position + 4 + length]
            found.append(av.Packet(packet))
            position += 4 + length
    return found


def decoding(
    samples: list[DecodeSample], *, whole: bool = False, rgb: bool = False
) -> Callable[[], object]:
    """Return a call that decodes all samples: as the loader does, from whole files, or to RGB."""
    decoder = ClipDecoder()

    def run() -> None:
        for sample in samples:
            clip, frames = sample.request.clip, sample.request.frames
            if whole:
                clip = replace(clip, codec_config=None)
            decoder.decode(clip, sample.whole if whole else sample.gops, frames, sample.out)
            if rgb:
                shape = (len(frames), clip.height, clip.width, 3)
                write_rgb(sample.out, np.empty(shape, dtype=np.uint8))

    return run


def table(results: dict[str, DecodeResult]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| way | CPU ms a clip (low to high) | x floor |", "|---|---|---|"]
    for name, one in results.items():
        spent = one.cpu_ms_per_clip
        lines.append(
            f"| {name} | {spent.median:.2f} ({spent.low:.2f} to {spent.high:.2f}) "
            f"| {one.over_floor.median:.2f} |"
        )
    return lines
