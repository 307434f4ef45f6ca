"""Which clips of a split are in its order, and at which frames they begin: arithmetic alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stream.sampling import evaluation_start, frame_offsets, num_starts, training_starts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from fractions import Fraction

    from stream.index import IndexedClip
    from stream.options import StreamOptions
    from stream.order import Int64


class PlacedClips:
    """The clips of a split, by their rows in the index.

    Args:
        options: of the stream.
        rates: the rows of each stored frame rate, none of which is below `options.fps`.
        num_frames: of each row.
    """

    def __init__(
        self, options: StreamOptions, rates: Mapping[Fraction, Int64], num_frames: Int64
    ) -> None:
        self._options = options
        self._offsets: list[Int64] = []
        self._rate_of = np.zeros(len(num_frames), dtype=np.int64)
        starts = np.zeros(len(num_frames), dtype=np.int64)
        for number, (rate, rows) in enumerate(rates.items()):
            offsets = frame_offsets(options.frames, options.fps, rate)
            self._offsets.append(offsets)
            self._rate_of[rows] = number
            starts[rows] = num_starts(num_frames[rows], int(offsets[-1]) + 1)
        is_padded = options.short == "pad"
        self.starts: Int64 = np.maximum(starts, 1) if is_padded else starts
        """How many valid start frames each row has."""
        self.rows: Int64 = np.flatnonzero(self.starts)
        """Rows of the clips in the order, ascending."""
        self.left_out: Int64 = np.flatnonzero(self.starts == 0)
        """Rows of the clips that are too short to be in it."""

    def start_frames(self, epoch: int, clips: list[IndexedClip], views: list[int]) -> list[int]:
        """Return the start frame of a view of each of several clips."""
        options, starts = self._options, self.starts[[clip.row for clip in clips]].tolist()
        if options.mode == "train":
            return training_starts(options.seed, epoch, [one.key for one in clips], views, starts)
        return [
            evaluation_start(view, options.clips_per_video, count, options.placement)
            for view, count in zip(views, starts, strict=True)
        ]

    def frames(self, clip: IndexedClip, start: int) -> Int64:
        """Return the frame indices of a clip; past the end the last frame repeats (short="pad")."""
        frames = start + self._offsets[int(self._rate_of[clip.row])]
        return np.minimum(frames, clip.num_frames - 1)
