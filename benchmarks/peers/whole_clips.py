"""The decoding that all peers share: from whole mp4 files to a batch of planar frames.

It is kprep's own: only the groups of pictures that hold the wanted frames are decoded, in a decoder
context that is kept, straight into the batch's shared memory. Where they stand in the mp4 says
kprep's index, which a peer's worker opens beside the clips; so no peer pays for parsing an mp4.
What kprep does besides, checking every byte against its crc32, is left out here.
"""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from peers.task import FPS, Task

from stream.batch import ClipBatch
from stream.batch_memory import fresh_room
from stream.color import frame_bytes
from stream.decode import ClipDecoder
from stream.index import ClipIndex
from stream.reads import ClipBytes
from stream.sampling import frame_offsets

if TYPE_CHECKING:
    from stream.index import IndexedClip
    from stream.order import Int64

Sample = tuple[str, bytes]


class WholeClips:
    """Makes batches of (key, mp4) pairs: `views` clips of each, at random starts."""

    def __init__(self, task: Task) -> None:
        """Map the index. No object store is opened: its client would not survive a fork."""
        self._index = ClipIndex(Path(task.index))
        self._rows = {self._index.key(row): row for row in range(len(self._index))}
        self._offsets = {
            int(row): frame_offsets(task.frames, Fraction(FPS), rate)
            for rate, rows in self._index.rates().items()
            for row in rows
        }
        self._num_frames = self._index.num_frames
        self._frames = task.frames
        self._views = task.views
        self._decodes = task.decodes
        self._decoder: ClipDecoder | None = None

    def batch(self, samples: list[Sample]) -> ClipBatch | list[str]:
        """Decode a batch, without clips that are too short; only its keys in a pass."""
        samples = [sample for sample in samples if self._valid_starts(self._rows[sample[0]]) > 0]
        if not self._decodes:
            return [key for key, _ in samples]
        clips = [self._index.clip(self._rows[key]) for key, _ in samples]
        starts = [self._starts(clip) for clip in clips]
        sizes = [(clip.height, clip.width) for clip in clips for _ in range(self._views)]
        longest = max((frame_bytes(*size) for size in sizes), default=0)
        video = fresh_room((len(sizes), self._frames, longest))
        parts = video.view(len(samples), self._views * self._frames, longest).numpy()
        for (_, payload), clip, wanted, out in zip(samples, clips, starts, parts, strict=True):
            self._decode(clip, payload, wanted, out)
        return ClipBatch(
            video=video,
            size=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
            label=torch.tensor([clip.label for clip in clips for _ in range(self._views)]).long(),
            key=[clip.key for clip in clips for _ in range(self._views)],
            start_frame=torch.tensor([start for some in starts for start in some]).long(),
            view=torch.arange(self._views).repeat(len(samples)),
            layout="yuv420",
        )

    def _starts(self, clip: IndexedClip) -> list[int]:
        valid = self._valid_starts(clip.row)
        if valid >= self._views:
            return random.sample(range(valid), self._views)
        return [random.randrange(valid) for _ in range(self._views)]  # noqa: S311

    def _valid_starts(self, row: int) -> int:
        return int(self._num_frames[row]) - int(self._offsets[row][-1])

    def _decode(
        self, clip: IndexedClip, payload: bytes, starts: list[int], out: np.ndarray
    ) -> None:
        if self._decoder is None:  # after the fork
            self._decoder = ClipDecoder()
        offsets = self._offsets[clip.row]
        frames: Int64 = np.concatenate([start + offsets for start in starts])
        used = frame_bytes(clip.height, clip.width)
        self._decoder.decode(clip, gops_of(clip, payload, frames), frames, out[:, :used])
        out[:, used:] = 0


def gops_of(clip: IndexedClip, payload: bytes, frames: Int64) -> ClipBytes:
    """Cut the groups of pictures that hold some frames out of a whole mp4."""
    whole = memoryview(payload)
    numbers = sorted(dict.fromkeys((frames // clip.gop_frames).tolist()))
    ends = clip.gop_offsets
    return ClipBytes({gop: whole[int(ends[gop]) : int(ends[gop + 1])] for gop in numbers}, whole)
