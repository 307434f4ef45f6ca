"""What the trainer needs of a loader of clips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from prep.errors import DatasetError, UsageError
from stream.loader import ClipLoader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream.bad_clips import BadClipSummary
    from stream.batch import ClipBatch


class Loader(Protocol):
    """The part of `stream.clip_loader`'s result that the trainer uses.

    The state is JSON with `epoch` and `step`, the optimiser steps of that epoch that are done: the
    trainer puts in its own count, since it takes a step's batches before it trains on them.
    """

    @property
    def class_names(self) -> list[str]: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def num_clips(self) -> int: ...
    @property
    def num_videos(self) -> int: ...
    @property
    def num_left_out(self) -> int: ...
    @property
    def unscored(self) -> list[str]: ...

    def bad_clip_summary(self) -> BadClipSummary: ...
    def __iter__(self) -> Iterator[ClipBatch]: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fingerprint(loader: Loader | None) -> str:
    """Return what tells a loader's clips from those of other datasets and splits; "" if unknown."""
    return loader.stream.mixture.fingerprint if isinstance(loader, ClipLoader) else ""


def common_class_names(train_loader: Loader | None, val_loader: Loader | None) -> list[str]:
    """Return the names of the classes, which both loaders must agree on."""
    loaders = [loader for loader in (train_loader, val_loader) if loader is not None]
    if not loaders:
        raise UsageError("there is neither a training nor an evaluation split")
    names = list(loaders[0].class_names)
    if any(list(loader.class_names) != names for loader in loaders):
        raise UsageError("the training and the evaluation split have different class lists")
    if not names:
        raise DatasetError("the dataset's manifest lists no classes; convert it with labels")
    return names
