"""The random draws of augmentation: a function of (seed, epoch, key, view), and of nothing else.

No generator is advanced, so the draws are the same on any number of ranks, in any batch, and after
a resume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Draws:
    """What one clip undergoes; all its frames alike."""

    flip: bool
    """Mirror the resized frames left to right, before the crop."""
    top: int
    """First row of the crop, in pixels of the resized (and flipped) frame."""
    left: int
    """First column of the crop, likewise."""


def draw(
    seed: int,
    epoch: int,
    key: str,
    view: int,
    *,
    flip: float,
    resize: tuple[int, int],
    crop: tuple[int, int],
) -> Draws:
    """Draw the flip and the crop of one clip.

    Args:
        seed: of the run.
        epoch: counted from 0.
        key: of the sample.
        view: which of the video's clips this is.
        flip: probability of a horizontal flip, in [0, 1].
        resize: height and width of the frames before the crop, in pixels.
        crop: height and width of the crop, in pixels; at most `resize`.

    Returns:
        Draws with `top` uniform over the `resize[0] - crop[0] + 1` places, `left` likewise.
    """
    first, second, third = _words(seed, epoch, key, view)
    return Draws(
        flip=first < flip * 2**64,
        top=_below(second, resize[0] - crop[0] + 1),
        left=_below(third, resize[1] - crop[1] + 1),
    )


def _words(seed: int, epoch: int, key: str, view: int) -> tuple[int, int, int]:
    """Return three independent uniform 64-bit integers."""
    # integers hold no separator, and the key comes last: no two clips share a message
    message = f"{seed}/{epoch}/{view}/{key}".encode()
    digest = hashlib.blake2b(message, digest_size=24, person=b"kprep augment v1").digest()
    return (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:16], "little"),
        int.from_bytes(digest[16:], "little"),
    )


def _below(word: int, count: int) -> int:
    """Map a 64-bit integer to `[0, count)`; each result is off uniform by less than 2^-50."""
    return word * count >> 64
