"""What turns a dataset into another format: its clips in order, and copies under other names."""

from __future__ import annotations

import os
import tarfile
from typing import TYPE_CHECKING

from peers.task import shard_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def iter_clips(dataset: Path) -> Iterator[tuple[str, bytes]]:
    """Yield key and mp4 of every clip."""
    for name in shard_names(str(dataset)):
        with tarfile.open(dataset / name) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and member.name.endswith(".mp4"):
                    yield member.name.removesuffix(".mp4"), content.read()


def link_copies(folder: Path, name: str, number: int) -> str:
    """Return the name of a shard's copy; the first is the shard itself, others are hard links."""
    if number == 0:
        return name
    copy = f"{number:02d}-{name}"
    os.link(folder / name, folder / copy)
    return copy
