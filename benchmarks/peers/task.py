"""What one process of the benchmark is asked to do, and what a contender's loader gives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPLIT = "train"
FPS = 15

Epochs = Callable[[int], Iterator[Any]]
"""From the number of an epoch to its batches: ClipBatches, or lists of keys in a pass."""


@dataclass(frozen=True)
class Task:
    """One contender over one storage.

    place         "memory", "local", "near", "far" or "cache"; "pass" for an epoch without decoding
    dataset       the folder of the enlarged dataset, on this machine
    index         the index of the dataset that was enlarged: a mapped file of stream.index
    root          where the contender finds its own form of it: a folder, or s3://bucket/prefix
    endpoint      of the bucket
    cache         a folder for what the contender keeps on this machine
    views         clips a video
    together      whether a video's views come from one read
    """

    contender: str
    place: str
    dataset: str
    index: str
    root: str
    endpoint: str
    access_key: str
    secret_key: str
    cache: str
    batch: int
    workers: int
    prefetch: int
    frames: int
    views: int
    together: bool
    seconds: float
    seed: int

    @property
    def is_remote(self) -> bool:
        """Whether the clips are in a bucket."""
        return self.root.startswith("s3://")

    @property
    def decodes(self) -> bool:
        """Whether clips are decoded, which a pass that counts requests leaves out."""
        return self.place != "pass"

    def to_json(self) -> str:
        """Return what `of` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Task:
        """Read a task."""
        return cls(**json.loads(text))


def shard_names(dataset: str) -> list[str]:
    """Return the paths of the split's tars, relative to the dataset."""
    manifest = json.loads((Path(dataset) / "manifest.json").read_text())
    return [shard["path"] for shard in manifest["splits"][SPLIT]["shards"]]
