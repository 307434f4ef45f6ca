"""mosaicml-streaming: MDS shards of the default 64 MB, its shuffle, its loader.

Shards of a bucket are downloaded whole into a local folder and read from there.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from peers.connections import drop_at_fork
from peers.whole_clips import WholeClips
from peers.writing import iter_clips, link_copies
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peers.task import Epochs, Task


def prepare(source: Path, folder: Path, copies: int) -> None:
    """Write MDS shards, and list each several times."""
    columns = {"key": "str", "video": "bytes"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for key, video in iter_clips(source):
            writer.write({"key": key, "video": video})
    path = folder / "index.json"
    index = json.loads(path.read_text())
    shards = []
    for number in range(copies):
        for shard in index["shards"]:
            raw = shard["raw_data"]
            name = link_copies(folder, raw["basename"], number)
            shards.append({**shard, "raw_data": {**raw, "basename": name}})
    path.write_text(json.dumps({**index, "shards": shards}))


def open_epochs(task: Task) -> Epochs:
    """Open the dataset and its loader."""
    os.environ |= {
        "S3_ENDPOINT_URL": task.endpoint, "AWS_ACCESS_KEY_ID": task.access_key,
        "AWS_SECRET_ACCESS_KEY": task.secret_key, "AWS_REGION": "us-east-1",
    }  # fmt: skip
    clean_stale_shared_memory()  # of a process that was killed
    clips = WholeClips(task)
    drop_at_fork()
    videos = task.batch // task.views
    where = {"remote": task.root, "local": task.cache} if task.is_remote else {"local": task.root}
    dataset = StreamingDataset(
        **where, shuffle=True, shuffle_seed=task.seed, batch_size=videos, validate_hash=None
    )

    def collate(samples: list[dict[str, Any]]) -> Any:
        batch = clips.batch([(sample["key"], sample["video"]) for sample in samples])
        return {"batch": batch}  # the loader counts samples in dictionaries and tuples alone

    loader: Any = StreamingDataLoader(
        dataset, batch_size=videos, num_workers=task.workers, prefetch_factor=task.prefetch,
        persistent_workers=True, collate_fn=collate,
    )  # fmt: skip

    def epoch(_: int) -> Iterator[Any]:
        return (found["batch"] for found in loader)

    return epoch
