"""kprep's own loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enlarged import original_key
from peers.task import FPS, SPLIT

from stream import clip_loader
from stream.bench import memory_baseline
from stream.decode import ClipDecoder
from stream.loader import ClipLoader
from stream.workers import fork_server_context

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peers.task import Epochs, Task

    from stream.batch import ClipBatch


def prepare(source: Path, folder: Path, copies: int) -> None:
    """Do nothing: the dataset is read as it is."""


class _NoDecoder(ClipDecoder):
    """Leaves the pixels as they are."""

    def decode(self, *_: Any) -> None:
        """Do nothing."""


def open_epochs(task: Task) -> Epochs:
    """Open the loader; the first batch starts its workers."""
    loader = _in_memory(task) if task.place == "memory" else _loader(task)
    if not task.decodes:
        loader.stream._decoder = _NoDecoder()  # noqa: SLF001

    def epoch(number: int) -> Iterator[ClipBatch | list[str]]:
        loader.set_epoch(number)
        for batch in loader:
            yield batch if task.decodes else [original_key(key) for key in batch.key]

    return epoch


def _loader(task: Task) -> ClipLoader:
    options: dict[str, Any] = {}
    if task.is_remote:
        options["storage_options"] = {
            "endpoint": task.endpoint, "access_key_id": task.access_key,
            "secret_access_key": task.secret_key, "region": "us-east-1",
            "virtual_hosted_style_request": False,
        }  # fmt: skip
    if task.cache:
        options |= {"cache_dir": task.cache, "cache_limit": "100GB"}
    return clip_loader(
        task.root, split=SPLIT, batch_size=task.batch, frames=task.frames, fps=FPS, seed=task.seed,
        clips_per_video=task.views, grouping="together" if task.together else "spread",
        num_workers=task.workers if task.decodes else 0, prefetch_batches=task.prefetch,
        layout="yuv420", **options,
    )  # fmt: skip


def _in_memory(task: Task) -> ClipLoader:
    """Open the baseline: the same loader, its storage held in memory."""
    from fractions import Fraction

    from prep.storage import Storage
    from stream.clip_stream import ClipStream
    from stream.options import StreamOptions

    fork_server_context()
    storage = memory_baseline(Storage(task.root), SPLIT)
    if storage is None:
        raise SystemExit(f"{task.root} is too large for a baseline in memory")
    options = StreamOptions(SPLIT, frames=task.frames, fps=Fraction(FPS), seed=task.seed,
                            clips_per_video=task.views, layout="yuv420")  # fmt: skip
    stream = ClipStream(storage, options, batch_size=task.batch)
    return ClipLoader(stream, num_workers=task.workers, prefetch_batches=task.prefetch)
