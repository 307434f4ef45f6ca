"""Mixup and CutMix over neighbours of the global sequence, and random erasing.

Clips 2i and 2i + 1 of a batch are mixed with each other. Batches are slices of one global sequence
and even in size, so the pairs are the same on any number of ranks; what happens to a pair is a
function of (seed, epoch, key, view) of its first clip.

Sources: Zhang et al., "mixup" (2018); Yun et al., "CutMix" (2019); Zhong et al., "Random Erasing"
(2020), with torchvision's `RandomErasing` defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from train.clip_random import ClipDraw

if TYPE_CHECKING:
    from stream.batch import ClipBatch
    from train.augment import Box
    from train.recipe import AugmentRecipe

# torchvision.transforms.RandomErasing: share of the area, aspect ratio, attempts
_ERASE_AREA = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)
_ERASE_ATTEMPTS = 10


@dataclass(frozen=True)
class Mix:
    """What a pair of clips undergoes."""

    share: float
    """Share of each clip, and of its label, that stays; the rest is the other clip's."""
    box: Box | None
    """CutMix: the part that is exchanged; None mixes all pixels."""


def draw_mix(clip: ClipDraw, recipe: AugmentRecipe, crop: tuple[int, int]) -> Mix:
    """Draw what happens to the pair whose first clip is `clip`.

    `augment.mixup` and `augment.cutmix` are the alphas of Beta(alpha, alpha), 0 for never; with
    both, each pair takes one of them, at even odds.
    """
    generator = clip.generator("mix")
    cut = bool(recipe.cutmix) and (not recipe.mixup or generator.random() < 0.5)
    alpha = recipe.cutmix if cut else recipe.mixup
    share = generator.betavariate(alpha, alpha)
    if not cut:
        return Mix(share, None)
    height, width = crop
    side = math.sqrt(1 - share) / 2
    row, column = generator.randrange(height), generator.randrange(width)
    box = (
        max(0, row - int(side * height)),
        min(height, row + int(side * height)),
        max(0, column - int(side * width)),
        min(width, column + int(side * width)),
    )
    area = (box[1] - box[0]) * (box[3] - box[2])
    return Mix(1 - area / (height * width), box)


def draw_erasure(clip: ClipDraw, erase: float, crop: tuple[int, int]) -> Box | None:
    """Draw the box of a clip that is erased, in all its frames; None for most clips."""
    generator = clip.generator("erase")
    if generator.random() >= erase:
        return None
    height, width = crop
    low, high = map(math.log, _ERASE_RATIO)
    for _ in range(_ERASE_ATTEMPTS):
        area = generator.uniform(*_ERASE_AREA) * height * width
        ratio = math.exp(generator.uniform(low, high))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top, left = generator.randint(0, height - rows), generator.randint(0, width - columns)
            return top, top + rows, left, left + columns
    return None


def erase_clips(
    clips: torch.Tensor, batch: ClipBatch, recipe: AugmentRecipe, seed: int, epoch: int
) -> torch.Tensor:
    """Set a box of some clips to 0, the mean colour, in place; float32 (N, 3, T, H, W)."""
    if recipe.erase:
        for pixels, key, view in zip(clips, batch.key, batch.view.tolist(), strict=True):
            clip = ClipDraw(seed, epoch, key, view)
            box = draw_erasure(clip, recipe.erase, recipe.crop)
            if box is not None:
                top, bottom, left, right = box
                pixels[..., top:bottom, left:right] = 0
    return clips


def mix_clips(
    clips: torch.Tensor,
    labels: torch.Tensor,
    batch: ClipBatch,
    recipe: AugmentRecipe,
    seed: int,
    epoch: int,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each clip with its neighbour.

    Args:
        clips: float32 (N, 3, T, H, W), N even.
        labels: int64 (N,), on the clips' device.
        batch: that the clips are from.
        recipe: with the alphas.
        seed: of the run.
        epoch: counted from 0.
        num_classes: C.

    Returns:
        The mixed clips, and the classes' shares as float32 (N, C); or clips and labels as they
        were, where the recipe does not mix.
    """
    if not (recipe.mixup or recipe.cutmix):
        return clips, labels
    shares = functional.one_hot(labels, num_classes).to(torch.float32)
    mixed, mixed_shares = clips.clone(), shares.clone()
    views = batch.view.tolist()
    for first in range(0, len(batch) - 1, 2):
        clip = ClipDraw(seed, epoch, batch.key[first], views[first])
        mix = draw_mix(clip, recipe, recipe.crop)
        pair = slice(first, first + 2)
        # not clips[[first + 1, first]]: a list would be copied to the device, and waited for
        others, other_shares = clips[pair].flip(0), shares[pair].flip(0)
        mixed_shares[pair].lerp_(other_shares, 1 - mix.share)
        if mix.box is None:
            mixed[pair].lerp_(others, 1 - mix.share)
        else:
            top, bottom, left, right = mix.box
            mixed[pair, ..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, mixed_shares
