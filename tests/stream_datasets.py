"""A dataset of clips of three sizes, and helpers to look at what a loader yields."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import run_kprep

from prep.demo_videos import random_motion, write_video

if TYPE_CHECKING:
    from pathlib import Path

SIZES = ((160, 120), (120, 160), (192, 108))


def make_dataset(folder: Path, count: int = 24) -> Path:
    """Convert `count` videos of three sizes and 1.6 to 3 seconds; one, of 15 frames, is too short for 16 frames."""
    rng = np.random.default_rng(11)
    for number in range(count):
        seconds = 1.0 if number == 7 else 1.6 + 1.4 * (number % 5) / 4
        motion = dataclasses.replace(
            random_motion(("left", "up")[number % 2], rng),
            size=SIZES[number % 3], seconds=seconds, rate=Fraction(30),
        )  # fmt: skip
        target = folder / "videos" / ("left", "up")[number % 2] / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, motion, "libx264")
    run_kprep("shard", folder / "videos", folder / "root", "--split", "train", "--profile", "small",
              "--clips-per-shard", 7)  # fmt: skip
    return folder / "root"


def without_gop_index(root: Path) -> None:
    """Take the GOP columns out of the index, so that clips are read whole and opened as containers."""
    path = root / "index/train.parquet"
    table = pq.read_table(path)
    for name in ("codec_config", "gop_frames", "gop_offsets", "gop_crc32"):
        at = table.column_names.index(name)
        field = table.schema.field(at)
        kind = pa.binary() if name == "codec_config" else field.type
        table = table.set_column(at, name, pa.nulls(table.num_rows, kind))
    pq.write_table(table, path)
    relist(root, "index/train.parquet")


def relist(root: Path, path: str) -> None:
    """Make the manifest agree with a changed file."""
    manifest = json.loads((root / "manifest.json").read_text())
    data = (root / path).read_bytes()
    manifest["files"][path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(manifest))


def sequence(loader) -> list[tuple[str, int, int, str]]:
    """Iterate; return (key, view, start frame, hash of the pixels) of every clip."""
    found = []
    for batch in loader:
        for number, key in enumerate(batch.key):
            height, width = batch.size[number].tolist()
            video = batch.video[number]
            pixels = (
                video[:, :height, :width]
                if batch.layout == "rgb"
                else video[:, : height * width * 3 // 2]
            )
            digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:12]
            found.append((key, int(batch.view[number]), int(batch.start_frame[number]), digest))
    return found


def make_other_dataset(folder: Path, count: int = 12) -> Path:
    """Convert videos at 30 fps and 96 pixels, of classes Left, down and left, into splits train and val.

    The keys of left/0 and left/6 are those of make_dataset's videos of these names, of other content.
    """
    rng = np.random.default_rng(12)
    for split, number in [*(("train", n) for n in range(count)), *(("val", n) for n in range(4))]:
        name = ("left", "Left", "down")[number % 3]
        motion = dataclasses.replace(
            random_motion(name.lower(), rng), size=(128, 96), seconds=1.5 + number % 2 / 2,
            rate=Fraction(30),
        )  # fmt: skip
        target = folder / "videos" / split / name / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, motion, "libx264")
    for split in ("train", "val"):
        run_kprep("shard", folder / "videos" / split, folder / "root", "--split", split, "--fps", 30,
                  "--profile", "small", "--short-side", 96, "--class-list", class_list(folder, "Left", "down", "left"),
                  "--clips-per-shard", 5)  # fmt: skip
    return folder / "root"


def class_list(folder: Path, *names: str) -> Path:
    """Write a file of class names in label order."""
    path = folder / "classes.txt"
    path.write_text("\n".join(names) + "\n")
    return path
