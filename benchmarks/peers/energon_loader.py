"""Megatron-Energon: the dataset's own tars through `.nv-meta` and `.tar.idx`, shuffled.

Buffer and sequence length are those of its quick start; a bucket is read through NVIDIA's
multi-storage-client with a local cache, as its page on remote datasets recommends, but without its
look at the version of an object before each read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.energon import (
    Cooker,
    TaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from peers.connections import drop_at_fork
from peers.task import SPLIT
from peers.whole_clips import WholeClips

if TYPE_CHECKING:
    from collections.abc import Iterator

from peers.task import Epochs, Task


def prepare(source: Path, folder: Path, copies: int) -> None:
    """Do nothing: the dataset holds Energon's files already."""


def open_epochs(task: Task) -> Epochs:
    """Open the dataset and its loader."""
    clips = WholeClips(task)
    drop_at_fork()

    @stateless
    def cook(sample: Any) -> Any:
        return sample

    class Encoder(TaskEncoder):  # type: ignore[misc, type-arg]
        decoder = None  # raw bytes
        cookers = (Cooker(cook),)

        @stateless
        def batch(self, samples: list[Any]) -> Any:
            return clips.batch([(sample["__key__"], sample["mp4"]) for sample in samples])

    dataset = get_train_dataset(
        _profile(task) if task.is_remote else task.root,
        split_part=SPLIT,
        worker_config=WorkerConfig(
            rank=0, world_size=1, num_workers=task.workers, seed_offset=task.seed
        ),
        batch_size=task.batch // task.views,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
        repeat=task.decodes,
    )
    loader = get_loader(dataset, prefetch_factor=task.prefetch)

    def epoch(_: int) -> Iterator[Any]:
        return iter(loader)

    return epoch


def _profile(task: Task) -> str:
    """Write what multi-storage-client reads; return the root as it wants it."""
    bucket, _, prefix = task.root.removeprefix("s3://").partition("/")
    provider = {
        "type": "s3",
        "options": {
            "endpoint_url": task.endpoint, "base_path": bucket, "region_name": "us-east-1",
        },
    }  # fmt: skip
    keys = {"access_key": task.access_key, "secret_key": task.secret_key}
    folder = Path(task.cache)
    folder.mkdir(exist_ok=True)
    config = {
        "profiles": {
            "there": {
                "storage_provider": provider,
                "credentials_provider": {"type": "S3Credentials", "options": keys},
                "caching_enabled": True,
            }
        },
        "cache": {
            "size": "100G",
            "check_source_version": False,  # else a HEAD for every sample
            "eviction_policy": {"policy": "fifo", "refresh_interval": 3600},
            "location": str(folder / "objects"),
        },
    }
    path = folder / "msc.json"
    path.write_text(json.dumps(config))
    os.environ["MSC_CONFIG"] = str(path)
    return f"msc://there/{prefix}"
