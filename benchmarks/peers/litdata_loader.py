"""litdata: chunks of 64 MB as `optimize` writes them, its shuffle, its loader.

Chunks of a bucket are downloaded whole into a cache folder and read from there.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from litdata import StreamingDataLoader, StreamingDataset, optimize
from litdata.streaming import downloader
from peers.whole_clips import WholeClips
from peers.writing import iter_clips, link_copies

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peers.task import Epochs, Task


def _as_is(sample: Any) -> Any:
    return sample


def prepare(source: Path, folder: Path, copies: int) -> None:
    """Write chunks, and list each several times."""
    clips = [{"key": key, "video": video} for key, video in iter_clips(source)]
    optimize(_as_is, clips, str(folder), chunk_bytes="64MB", num_workers=1, verbose=False)
    path = folder / "index.json"
    index = json.loads(path.read_text())
    chunks = [
        {**chunk, "filename": link_copies(folder, chunk["filename"], number)}
        for number in range(copies)
        for chunk in index["chunks"]
    ]
    path.write_text(json.dumps({**index, "chunks": chunks}))


def open_epochs(task: Task) -> Epochs:
    """Open the dataset and its loader."""
    clips = WholeClips(task)
    options: dict[str, Any] = {}
    if task.is_remote:
        # the client that it makes refuses http://, which only a benchmark needs
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # noqa: SLF001
        options["cache_dir"] = task.cache
        options["storage_options"] = {
            "endpoint_url": task.endpoint, "aws_access_key_id": task.access_key,
            "aws_secret_access_key": task.secret_key, "region_name": "us-east-1",
        }  # fmt: skip
    dataset = StreamingDataset(task.root, shuffle=True, seed=task.seed, **options)

    def collate(samples: list[dict[str, Any]]) -> Any:
        return clips.batch([(sample["key"], sample["video"]) for sample in samples])

    loader: Any = StreamingDataLoader(
        dataset, batch_size=task.batch // task.views, num_workers=task.workers,
        prefetch_factor=task.prefetch, persistent_workers=True, collate_fn=collate,
    )  # fmt: skip

    def epoch(_: int) -> Iterator[Any]:
        return iter(loader)

    return epoch
