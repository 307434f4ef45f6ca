"""webdataset: the dataset's own tars, in the pipeline that its documentation recommends.

Shards and samples are shuffled (a buffer of 1,000 raw samples a worker), batches are made in the
workers, and WebLoader hands them on as they are. A bucket is read over HTTP through curl, as
webdataset does for such addresses: it knows no s3://.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import webdataset
from peers.task import shard_names
from peers.whole_clips import WholeClips

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peers.task import Epochs, Task


def prepare(source: Path, folder: Path, copies: int) -> None:
    """Do nothing: the dataset's tars are read as they are."""


def open_epochs(task: Task) -> Epochs:
    """Build the pipeline."""
    clips = WholeClips(task)
    base = task.root
    if task.is_remote:
        base = f"{task.endpoint}/{task.root.removeprefix('s3://')}"
    if task.cache:
        Path(task.cache).mkdir(exist_ok=True)
    dataset = (
        webdataset.WebDataset(
            [f"{base}/{name}" for name in shard_names(task.dataset)],
            shardshuffle=100,
            cache_dir=task.cache or None,
            select_files=lambda name: name.endswith(".mp4"),
            seed=task.seed,
        )
        .shuffle(1000)
        .to_tuple("__key__", "mp4")
        .batched(task.batch // task.views, collation_fn=clips.batch)
    )
    loader: Any = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=task.workers, persistent_workers=True,
        prefetch_factor=task.prefetch,
    )  # fmt: skip

    def epoch(_: int) -> Iterator[Any]:
        return iter(loader)

    return epoch
