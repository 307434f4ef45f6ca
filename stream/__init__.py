"""Clips for training, streamed from shards on disk or in object storage, exactly reproducible."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream.batch import ClipBatch
    from stream.clip_stream import ClipStream
    from stream.color import yuv420_to_rgb, yuv420_to_rgb_planes
    from stream.loader import ClipLoader, clip_loader
    from stream.options import BatchAddress, StreamOptions
    from stream.roots import DataRoot
    from stream.state import StreamState
    from stream.stored_clips import StoredClip, StoredClips

__all__ = [
    "BatchAddress",
    "ClipBatch",
    "ClipLoader",
    "ClipStream",
    "DataRoot",
    "StoredClip",
    "StoredClips",
    "StreamOptions",
    "StreamState",
    "clip_loader",
    "yuv420_to_rgb",
    "yuv420_to_rgb_planes",
]

_HOMES = {
    "BatchAddress": "stream.options",
    "ClipBatch": "stream.batch",
    "ClipLoader": "stream.loader",
    "ClipStream": "stream.clip_stream",
    "DataRoot": "stream.roots",
    "StoredClip": "stream.stored_clips",
    "StoredClips": "stream.stored_clips",
    "StreamOptions": "stream.options",
    "StreamState": "stream.state",
    "clip_loader": "stream.loader",
    "yuv420_to_rgb": "stream.color",
    "yuv420_to_rgb_planes": "stream.color",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: planning needs the order and not torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        text = f"stream.{name} needs torch and torchvision; pip install 'kprep[train]'"
        raise ModuleNotFoundError(text, name="torch") from error
