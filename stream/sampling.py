"""Which frames of a stored clip make a training or evaluation clip: pure index arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from prep.errors import UsageError
from stream.order import Int64, permuted

if TYPE_CHECKING:
    from fractions import Fraction

Placement = Literal["even", "middle", "torchvision"]

MOST_FRAMES = 100_000
"""Of one clip: nearly two hours at 15 frames a second."""


def frame_offsets(frames: int, fps: Fraction, stored_fps: Fraction) -> Int64:
    """Return the offsets of a clip's frames from its start: `floor(i * stored_fps / fps)`.

    At 7.5 out of 15 fps, 4 frames stand at 0, 2, 4, 6. Raises UsageError when `fps` is above the
    stored rate: frames that are not there cannot be sampled.
    """
    if fps > stored_fps:
        raise UsageError(too_slow(fps, stored_fps, all_clips=True))
    ratio = stored_fps / fps
    return np.array([int(index * ratio) for index in range(frames)], dtype=np.int64)


def too_slow(fps: Fraction, stored_fps: Fraction, *, all_clips: bool) -> str:
    """Return what is said of clips that were stored at fewer frames a second than asked for."""
    fewer = "" if all_clips else f", leave such clips out (`kprep subset --min-fps {fps}`)"
    return (
        f"fps ({float(fps):g}) must be at most the stored {float(stored_fps):g}; "
        f"lower it{fewer}, or convert the videos again at a higher rate"
    )


def num_starts(num_frames: Int64, span: int) -> Int64:
    """Return how many start frames are valid for clips of each length; 0 for too short ones.

    `span` counts from the first to the last frame, both included. 150 frames have 135 starts for
    16 neighbouring frames: 0..134.
    """
    return np.maximum(num_frames - span + 1, 0)


def training_start(seed: int, epoch: int, key: str, view: int, starts: int) -> int:
    """Return a start frame, uniform over [0, starts), by (seed, epoch, key, view) alone.

    The views of one video have distinct starts while there are enough; with fewer starts than views
    they repeat, view v taking what view `v % starts` has. (torchvision's RandomClipSampler gives
    fewer clips there.)
    """
    return training_starts(seed, epoch, [key], [view], [starts])[0]


def training_starts(
    seed: int, epoch: int, keys: list[str], views: list[int], starts: list[int]
) -> list[int]:
    """Return a start frame of each of several clips, as `training_start` has it."""
    domains = [
        (count, ("start", seed, epoch, key)) for count, key in zip(starts, keys, strict=True)
    ]
    places = [view % count for view, count in zip(views, starts, strict=True)]
    return permuted(domains, places)


def evaluation_start(view: int, clips: int, starts: int, placement: Placement = "even") -> int:
    """Return the start frame of one of `clips` evenly spaced evaluation clips.

    "even": the first and last clip touch the video's ends; a single clip stands in the middle.
    "middle": the valid starts are cut into `clips` equal parts, and each clip stands in the middle
    of one. "torchvision" is its UniformClipSampler: the floor of linspace, a single clip at the
    beginning.
    """
    if placement == "middle" or (placement == "even" and clips == 1):
        return (2 * view + 1) * (starts - 1) // (2 * clips)
    return view * (starts - 1) // max(clips - 1, 1)
