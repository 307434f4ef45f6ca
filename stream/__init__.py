"""Clips for training, streamed from shards on disk or in object storage, exactly reproducible."""

from stream.batch import ClipBatch
from stream.clip_stream import BatchAddress, ClipStream, StreamOptions
from stream.color import yuv420_to_rgb, yuv420_to_rgb_planes
from stream.loader import ClipLoader, clip_loader
from stream.state import StreamState

__all__ = [
    "BatchAddress",
    "ClipBatch",
    "ClipLoader",
    "ClipStream",
    "StreamOptions",
    "StreamState",
    "clip_loader",
    "yuv420_to_rgb",
    "yuv420_to_rgb_planes",
]
