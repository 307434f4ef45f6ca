"""Datasets for tests of copying and merging: small real ones, and large ones of noise."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from typing import TYPE_CHECKING

import numpy as np
import obstore
from conftest import run_kprep

from prep.demo_videos import random_motion, write_video
from prep.format import FileEntry, Manifest, Shard, Split, index_path, ledger_path, shard_path
from prep.profile import PROFILES

if TYPE_CHECKING:
    from pathlib import Path

    from s3_server import S3Server

CLASSES = ("down", "left", "up")


def draw(folder: Path, names: dict[str, int], *, seed: int, broken: int = 0) -> Path:
    """Draw videos: `names` says how many of each class; the first `broken` of each are no videos."""
    rng = np.random.default_rng(seed)
    for label, count in names.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            target = folder / label / f"{label}{seed}-{number}.mp4"
            motion = dataclasses.replace(
                random_motion("left", rng), size=(64, 48), seconds=1.2, rate=15
            )
            if number < broken:
                target.write_bytes(b"no video at all")
            else:
                write_video(target, motion, "libx264")
    return folder


def convert(videos: Path, root: Path, split: str, *more: object) -> Path:
    """Convert class folders into one split, 5 clips a shard."""
    run_kprep("shard", videos, root, "--split", split, "--profile", "small", "--short-side", 32,
              "--clips-per-shard", 5, "--workers", 1, *more)  # fmt: skip
    return root


def noise_dataset(root: Path, *, shards: int = 3, shard_bytes: int = 20 << 20, seed: int = 0,
                  split: str = "train") -> Path:  # fmt: skip
    """A manifest and files of noise that agree: enough for a copy, which opens no tar."""
    rng, files = random.Random(seed), {}
    paths = [shard_path(split, number) for number in range(shards)]
    sizes = {path: shard_bytes + number for number, path in enumerate(paths)}
    sizes |= {f"{path}.idx": 80 for path in paths}
    sizes |= {index_path(split): 5000, ledger_path(split): 4000, f"wids-{split}.json": 300}
    sizes |= {"README.md": 200, "classes.txt": 0, ".nv-meta/split.yaml": 30}
    for path, size in sizes.items():
        data = (rng.randbytes(min(size, 1 << 20) + 7) * (size // (1 << 20) + 1))[:size]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
        files[path] = FileEntry(size, hashlib.sha256(data).hexdigest())
    described = tuple(Shard(path, 10) for path in paths)
    print_ = hashlib.sha256(str(seed).encode()).hexdigest()
    made = Split(print_, 10 * shards, 10 * shards, {"ok": 10 * shards}, described)
    manifest = Manifest(PROFILES["small"], (), {split: made}, files)
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    return root


def files_of(root: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def objects_of(server: S3Server, prefix: str) -> dict[str, str]:
    """sha256 of every object below a prefix, by path."""
    store = server.store(prefix)
    return {
        str(meta["path"]): hashlib.sha256(
            bytes(obstore.get(store, meta["path"]).bytes())
        ).hexdigest()
        for page in obstore.list(store)
        for meta in page
    }


def flip(path: Path, at: int = 1000) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def plain(text: str) -> str:
    """Output without line breaks, so that a sentence is found wherever it was wrapped."""
    return re.sub(r"\s+", " ", text)
