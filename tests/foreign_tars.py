"""Tars as other people write them: plain webdataset, in the layout of video2dataset."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset import TarWriter

from prep.demo_videos import Motion, draw_frame, random_motion

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = ("down", "left", "right", "up")
# what people have: B-frames and audio, other containers, other codecs
FORMS = (
    ("mp4", "libx264", {"bf": "3", "preset": "ultrafast", "x264-params": "b-adapt=0"}, True),
    ("mkv", "libx264", {"bf": "2", "preset": "ultrafast", "x264-params": "b-adapt=0"}, True),
    ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, False),
    ("avi", "mpeg4", {}, False),
    ("mov", "mpeg4", {}, True),
    ("mp4", "libx264", {"bf": "0", "preset": "ultrafast"}, False),
)


def encode(
    motion: Motion, form: str, codec: str, options: dict[str, str], *, audio: bool = False,
    stamps: list[int] | None = None, pix_fmt: str = "yuv420p", aspect: Fraction | None = None,
    change: Any = None,
) -> bytes:  # fmt: skip
    """Encode a motion; `stamps` gives each frame's time in 1/1000 s instead of a constant rate."""
    sink = io.BytesIO()
    with av.open(sink, "w", format={"mkv": "matroska"}.get(form, form)) as file:
        stream: Any = file.add_stream(codec, rate=motion.rate, options=options)
        stream.width, stream.height = motion.size
        stream.pix_fmt = pix_fmt
        if stamps is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        sound: Any = file.add_stream("aac", rate=16000) if audio else None
        count = len(stamps) if stamps is not None else round(motion.seconds * motion.rate)
        for number in range(count):
            picture = draw_frame(motion, float(number / motion.rate))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            _add_sound(file, sound, motion.seconds)
    data = sink.getvalue()
    return data if change is None else change(data)


def _add_sound(file: Any, stream: Any, seconds: float) -> None:
    silence = np.zeros((1, 1024), dtype=np.float32)
    for number in range(int(seconds * 16000) // 1024):
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, number * 1024
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def motion(rng: np.random.Generator, number: int, **changes: Any) -> Motion:
    """A motion of class number % 4; even sizes, rates from 15 on, 1.6 seconds."""
    import dataclasses

    values = {
        "seconds": 1.6,
        "rate": (Fraction(25), Fraction(30000, 1001), Fraction(30))[number % 3],
    }
    made = random_motion(CLASSES[number % 4], rng)
    return dataclasses.replace(made, **{**values, **changes})


def video2dataset_folder(
    folder: Path, *, num_shards: int, clips_a_shard: int, seed: int, first: int = 0
) -> Path:
    """Write what video2dataset writes: tars, a stats file and a table of every row beside each.

    The caption is the class; one sample of the first shard is the json-only entry that it leaves
    for a video that could not be had.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for shard in range(num_shards):
        rows = []
        # its own time as mtime, a float: an extended header before every member
        with TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as tar:
            for place in range(clips_a_shard):
                key = f"{shard:05d}{place:04d}"
                lost = (shard, place) == (0, 1)
                sample = {"__key__": key} if lost else {
                    "__key__": key, **_video(rng, number), "txt": CLASSES[number % 4].encode()
                }  # fmt: skip
                values = {
                    "url": f"https://example.org/{key}.mp4", "caption": CLASSES[number % 4], "key": key,
                    "status": "failed_to_download" if lost else "success", "error_message": None,
                }  # fmt: skip
                tar.write({**sample, "json": json.dumps(values).encode()})
                rows.append(values)
                number += 1
        stats = {"count": clips_a_shard, "successes": clips_a_shard, "start_time": 1.0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    return folder


def _video(rng: np.random.Generator, number: int) -> dict[str, bytes]:
    form, codec, options, audio = FORMS[number % len(FORMS)]
    return {form: encode(motion(rng, number), form, codec, options, audio=audio)}
