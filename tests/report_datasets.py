"""Datasets for the tests of info and report: with everything to warn of, and one of 240,000 rows."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import run_kprep

from prep.demo_videos import random_motion, write_video
from prep.format import (
    FileEntry,
    Manifest,
    Shard,
    Split,
    index_schema,
    read_manifest,
    write_index,
)
from prep.ledger import SCHEMA
from prep.profile import PROFILES
from prep.storage import Storage

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = "<script>document.title='taken'</script>"
CLOSING = '</script><img src=x onerror="document.title=1">'
CLASSES = ("left", SCRIPT, CLOSING, "empty")


def odd_videos(folder: Path) -> None:
    """Three classes, two with names that want to be markup; ids in two splits, a file twice.

    train: 6 clips left, 2 SCRIPT, 1 CLOSING; val: 3 left, 1 SCRIPT.
    """
    rng = np.random.default_rng(5)
    videos = folder / "videos"
    videos.mkdir(parents=True)
    names = [f"video{number:06d}" for number in range(9)]
    for name in names:
        motion = replace(random_motion("left", rng), seconds=3.0, size=(160, 120))
        write_video(videos / f"{name}.mp4", motion, "libx264")
    copies = ("copy0000001", "copy0000002")  # one file under other names
    for name in copies:
        shutil.copyfile(videos / f"{names[5]}.mp4", videos / f"{name}.mp4")
    train = [
        (names[0], 0, 2, 0), (names[0], 1, 3, 0),  # overlap
        (names[1], 0, 2, 0), (names[2], 0, 3, 0), (names[5], 0, 2, 0), (copies[0], 0, 2, 0),
        (names[6], 0, 2, 1), (names[7], 0, 2, 1), (names[8], 0, 2, 2), ("missing0000", 0, 2, 1),
    ]  # fmt: skip
    val = [(names[0], 0, 3, 0), (names[3], 0, 9, 0), (names[6], 1, 3, 1), (copies[1], 0, 2, 0)]
    lines = ["label,youtube_id,time_start,time_end,split"]
    for split, rows in (("train", train), ("val", val)):
        for video, start, end, label in rows:
            quoted = CLASSES[label].replace('"', '""')
            lines.append(f'"{quoted}",{video},{start},{end},{split}')
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def odd_dataset(folder: Path) -> Path:
    """Convert them."""
    odd_videos(folder)
    for split in ("train", "val"):
        run_kprep("shard", folder / "videos", folder / "odd", "--split", split, "--annotations",
                  folder / "list.csv", "--class-list", folder / "classes.txt", "--profile", "small",
                  "--short-side", 64, "--clips-per-shard", 4)  # fmt: skip
    return folder / "odd"


def damage(root: Path, split: str, row: int) -> str:
    """Alter a byte of the video of a row of an index; return its key."""
    clip = pq.read_table(root / f"index/{split}.parquet").slice(row, 1).to_pylist()[0]
    shard = root / clip["shard"]
    data = bytearray(shard.read_bytes())
    data[clip["video_offset"] + clip["video_bytes"] // 2] ^= 0xFF
    shard.write_bytes(data)
    return str(clip["key"])


def large_index(num_clips: int, num_classes: int, clips_a_shard: int = 4000) -> pa.Table:
    """Return an index like that of Kinetics-400's train split, of videos that are nowhere."""
    rng = np.random.default_rng(0)
    number = np.arange(num_clips)
    keys = np.char.add(np.char.zfill(number.astype(str), 11), "_000010_000020")
    ids = np.char.zfill(number.astype(str), 11)
    shards = np.char.add(np.char.add("train/train-", np.char.zfill((number // clips_a_shard).astype(str), 6)), ".tar")  # fmt: skip
    gops = 10
    columns = {
        "key": pa.array(keys), "video_id": pa.array(ids),
        "shard": pa.array(shards).dictionary_encode(),
        "label": rng.integers(0, num_classes, num_clips, dtype=np.int32),
        "num_frames": np.full(num_clips, 150, np.int32),
        "fps_num": np.full(num_clips, 15, np.int32), "fps_den": np.ones(num_clips, np.int32),
        "width": rng.choice(np.array([128, 170, 228], np.int32), num_clips),
        "height": np.full(num_clips, 128, np.int32),
        "entry_offset": number * 51200, "entry_bytes": np.full(num_clips, 51200),
        "video_offset": number * 51200 + 1536,
        "video_bytes": rng.integers(20_000, 49_000, num_clips),
        "content_hash": pa.array([value.tobytes() for value in rng.integers(0, 2**62, (num_clips, 2))], pa.binary(16)),
        "crc32": rng.integers(0, 2**32, num_clips, dtype=np.uint32),
        "start_seconds": np.full(num_clips, 10.0), "end_seconds": np.full(num_clips, 20.0),
        "source": pa.array(np.full(num_clips, "cvdf")).dictionary_encode(),
        "short": rng.random(num_clips) < 0.01,
        "codec_config": pa.array([b"avcC"] * num_clips).dictionary_encode(),
        "gop_frames": np.full(num_clips, 16, np.int32),
        "gop_offsets": pa.ListArray.from_arrays(np.arange(num_clips + 1, dtype=np.int32) * gops, pa.array(np.tile(np.arange(gops), num_clips))),
        "gop_crc32": pa.ListArray.from_arrays(np.arange(num_clips + 1, dtype=np.int32) * gops, pa.array(np.zeros(num_clips * gops, np.uint32))),
    }  # fmt: skip
    schema = index_schema()
    return pa.table({field.name: columns[field.name] for field in schema}).cast(schema)


def large_dataset(root: Path, num_clips: int = 240_000, num_classes: int = 400) -> Path:
    """Write manifest, index and ledger of a dataset without tars; every fortieth row failed."""
    table = large_index(num_clips, num_classes)
    failed = num_clips // 40
    reasons = pa.array(["missing upstream", "too short"]).take(pa.array(np.arange(failed) % 2))
    rows = num_clips + failed
    none = pa.nulls(failed)
    ledger = pa.table({
        "row": np.arange(1, rows + 1),
        "key": pa.concat_arrays([table["key"].combine_chunks(), none.cast(pa.string())]),
        "video_id": pa.concat_arrays([table["video_id"].combine_chunks(), none.cast(pa.string())]),
        "start_seconds": np.full(rows, 10.0), "end_seconds": np.full(rows, 20.0),
        "label": pa.nulls(rows, pa.string()),
        "status": pa.concat_arrays([pa.array(np.full(num_clips, "ok")), pa.array(np.full(failed, "failed"))]),
        "reason": pa.concat_arrays([pa.nulls(num_clips, pa.string()), reasons]),
        "detail": pa.array(np.full(rows, "")),
        "source": pa.concat_arrays([pa.array(np.full(num_clips, "cvdf")), none.cast(pa.string())]),
        "seconds": np.full(rows, 10.0),
        "short": pa.concat_arrays([table["short"].combine_chunks(), none.cast(pa.bool_())]),
    }).cast(SCHEMA)  # fmt: skip
    (root / "index").mkdir(parents=True)
    (root / "ledger").mkdir()
    (root / "index/train.parquet").write_bytes(write_index([table]))
    pq.write_table(ledger, root / "ledger/train.parquet", compression="zstd")
    shards = sorted(set(table["shard"].unique().to_pylist()))
    files = {path: FileEntry(4000 * 51200, "0" * 64) for path in shards}
    for path in ("index/train.parquet", "ledger/train.parquet"):
        data = (root / path).read_bytes()
        files[path] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    split = Split("0" * 64, num_clips, rows, {"ok": num_clips, "failed": failed, "duplicate": 0, "pending": 0},
                  tuple(Shard(path, 4000) for path in shards))  # fmt: skip
    names = tuple(f"class {number}" for number in range(num_classes))
    manifest = Manifest(PROFILES["small"], names, {"train": split}, files)
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    read_manifest(Storage(str(root)))
    return root
