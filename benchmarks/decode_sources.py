"""One random clip of frames from a raw source against the same from a shard: CPU time, one thread.

    pip install torchcodec    # and the libraries of FFmpeg
    python benchmarks/decode_sources.py VIDEOS [--frames 16] [--clips 64] [--rounds 7] [--json FILE]

VIDEOS is a tree of class folders; it is converted with profile `small` first. Beside the ways of
`kprep bench decode`:

- torchvision: what torchvision's VideoClips did until its video reading was removed (0.29): PyAV,
  seek in the source to the keyframe before, decode everything up to the last frame as RGB, take the
  frames at the wanted rate, resize to 128 x 171
- torchcodec, source: the frames played at the same times, one ffmpeg thread, resized likewise
- torchcodec, shard: the same frames of our clip, from bytes in memory, resized likewise

Sources are read from the page cache. The views are those of one epoch's order, jitter included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

import av  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from prep.storage import Storage  # noqa: E402
from stream.bench_decode import DecodeSample, bench_decode, decode_samples, table  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZE = (128, 171)  # of the seed's recipe
_FPS = 15


def resized(frames: torch.Tensor) -> torch.Tensor:
    """Resize uint8 (T, 3, H, W) as the recipe does: float, bilinear, no antialias."""
    return torch.nn.functional.interpolate(frames.float() / 255, size=_SIZE, mode="bilinear")


def torchvision_way(path: Path, start_seconds: float, seconds: float, count: int) -> torch.Tensor:
    """Return `count` frames at 15 fps from a moment of a source, float32 (T, 3, 128, 171)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        base = stream.time_base or Fraction(1, 1000)
        offset = stream.start_time or 0
        container.seek(offset + int(start_seconds / base), stream=stream)
        begin, end = start_seconds - 1e-3, start_seconds + seconds
        found, times = [], []
        for frame in container.decode(stream):
            moment = float((frame.pts - offset) * base)
            if moment > end:
                break
            if moment >= begin:
                found.append(frame.to_rgb().to_ndarray())
                times.append(moment)
    wanted = start_seconds + np.arange(count) / _FPS
    taken = np.clip(np.searchsorted(times, wanted + 1e-3) - 1, 0, len(found) - 1)
    video = torch.from_numpy(np.stack(found))
    return resized(video[taken].permute(0, 3, 1, 2))


def contenders(
    videos: Path, names: dict[str, str], samples: list[DecodeSample]
) -> dict[str, Callable[[], object]]:
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError as error:
        sys.exit(f"this benchmark needs torchcodec: pip install torchcodec ({error})")
    views = [
        (videos / names[sample.request.clip.key], int(sample.request.frames[0]) / _FPS, sample)
        for sample in samples
    ]
    count = len(samples[0].request.frames)
    seconds = (count - 1) / _FPS

    def torchvision() -> None:
        for path, start, _ in views:
            torchvision_way(path, start, seconds, count)

    def source() -> None:
        for path, start, _ in views:
            decoder: Any = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
            first = decoder.metadata.begin_stream_seconds or 0.0
            last = decoder.metadata.end_stream_seconds - 1e-3
            times = [max(first, min(start + number / _FPS, last)) for number in range(count)]
            resized(decoder.get_frames_played_at(times).data)

    def shard() -> None:
        for _, _, sample in views:
            decoder: Any = VideoDecoder(bytes(sample.whole.whole or b""), num_ffmpeg_threads=1,
                                        seek_mode="approximate")  # fmt: skip
            frames = decoder.get_frames_at([int(frame) for frame in sample.request.frames])
            resized(frames.data)

    return {"torchvision": torchvision, "torchcodec, source": source, "torchcodec, shard": shard}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", type=Path)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", default="small")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # CPU time is that of all threads
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "prep", "shard", asked.videos, f"{folder}/made",
                   "--split", "train", "--profile", asked.profile]  # fmt: skip
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
        index = pq.read_table(Path(folder, "made", "index", "train.parquet"))
        names = dict(zip(index["key"].to_pylist(), index["video_id"].to_pylist(), strict=True))
        samples = decode_samples(
            Storage(f"{folder}/made"), "train", frames=asked.frames, fps=Fraction(_FPS),
            clips=asked.clips,
        )  # fmt: skip
        others = contenders(asked.videos, names, samples)
        results = bench_decode(samples, rounds=asked.rounds, others=others)
    print(f"profile {asked.profile}, {asked.frames} frames at {_FPS} fps; "
          f"{os.cpu_count()} cores, {platform.machine()}\n")  # fmt: skip
    print("\n".join(table(results)))
    ratio = results["torchvision"].cpu_ms_per_clip.median / results["yuv420"].cpu_ms_per_clip.median
    print(f"\nthe torchvision way takes {ratio:.0f} times as long as planar YUV from the shard")
    if asked.json:
        found = {name: asdict(result) for name, result in results.items()}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
