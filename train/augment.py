"""What a training clip undergoes: flip, crop, box and RandAugment, drawn by `train.clip_random`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from train.rand_augment import Operation, draw_operations

if TYPE_CHECKING:
    from train.clip_random import ClipDraw
    from train.recipe import AugmentRecipe

Box = tuple[int, int, int, int]
"""Rows `[top, bottom)` and columns `[left, right)` of a frame: top, bottom, left, right."""

_BOX_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Draws:
    """What one clip undergoes; all its frames alike."""

    flip: bool
    """Mirror the resized frames left to right, before the crop."""
    top: int
    """First row of the crop, in pixels of the resized (and flipped) frame."""
    left: int
    """First column of the crop, likewise."""
    box: Box | None = None
    """Part of the decoded frame that is resized to the crop; None: `top` and `left` say it."""
    operations: tuple[Operation, ...] = ()
    """RandAugment's, on the decoded frames."""


def draw_clip(clip: ClipDraw, recipe: AugmentRecipe, size: tuple[int, int]) -> Draws:
    """Draw all that a training clip undergoes; `size` is its decoded height and width in pixels."""
    resize = resized_size(size, recipe)
    draws = draw(clip, flip=recipe.flip, resize=resize, crop=recipe.crop)
    if recipe.crop_area[1]:
        box = draw_box(clip, area=recipe.crop_area, ratio=recipe.crop_ratio, size=size)
        draws = replace(draws, box=box)
    if recipe.rand_operations:
        operations = draw_operations(
            clip,
            count=recipe.rand_operations,
            magnitude=recipe.rand_magnitude,
            probability=recipe.rand_probability,
        )
        draws = replace(draws, operations=operations)
    return draws


def resized_size(size: tuple[int, int], recipe: AugmentRecipe) -> tuple[int, int]:
    """Return height and width, before the crop, of frames that are decoded at `size`.

    With `augment.short_side` the aspect is kept, rounded down as torchvision does.
    """
    if not recipe.short_side:
        return recipe.resize
    height, width = size
    long_side = int(recipe.short_side * max(size) / min(size))
    return (recipe.short_side, long_side) if height <= width else (long_side, recipe.short_side)


def draw(
    clip: ClipDraw,
    *,
    flip: float,
    resize: tuple[int, int],
    crop: tuple[int, int],
) -> Draws:
    """Draw the flip and the crop of one clip.

    Args:
        clip: and the epoch, and the seed.
        flip: probability of a horizontal flip, in [0, 1].
        resize: height and width of the frames before the crop, in pixels.
        crop: height and width of the crop, in pixels; at most `resize`.

    Returns:
        Draws with `top` uniform over the `resize[0] - crop[0] + 1` places, `left` likewise.
    """
    first, second, third = _words(clip)
    return Draws(
        flip=first < flip * 2**64,
        top=_below(second, resize[0] - crop[0] + 1),
        left=_below(third, resize[1] - crop[1] + 1),
    )


def draw_box(
    clip: ClipDraw,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    size: tuple[int, int],
) -> Box:
    """Draw the box of a random resized crop, as torchvision's `RandomResizedCrop` does.

    Args:
        clip: and the epoch, and the seed.
        area: shares of the frame's area between which the box's is drawn, uniformly.
        ratio: its width over its height, uniform in the logarithm.
        size: height and width of the frame in pixels.

    Returns:
        A box inside the frame; where ten draws do not fit, the largest one in the middle.
    """
    generator = clip.generator("box")
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_BOX_ATTEMPTS):
        pixels = height * width * (area[0] + (area[1] - area[0]) * generator.random())
        shape = math.exp(low + (high - low) * generator.random())
        columns, rows = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        top = int(generator.random() * (height - rows + 1))
        left = int(generator.random() * (width - columns + 1))
        if 0 < columns <= width and 0 < rows <= height:
            return top, top + rows, left, left + columns
    return _middle_box(size, ratio)


def _middle_box(size: tuple[int, int], ratio: tuple[float, float]) -> Box:
    """Return the largest box in the middle of a frame whose shape is within `ratio`."""
    height, width = size
    rows = min(height, round(width / ratio[0]))
    columns = min(width, round(height * ratio[1]))
    top, left = (height - rows) // 2, (width - columns) // 2
    return top, top + rows, left, left + columns


def _words(clip: ClipDraw) -> tuple[int, int, int]:
    """Return three independent uniform 64-bit integers."""
    digest = clip.digest("kprep augment v1", 24)
    return (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:16], "little"),
        int.from_bytes(digest[16:], "little"),
    )


def _below(word: int, count: int) -> int:
    """Map a 64-bit integer to `[0, count)`; each result is off uniform by less than 2^-50."""
    return word * count >> 64
