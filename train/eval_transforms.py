"""From decoded clips to the network's input in evaluation: one resize, one crop or three of it.

With one crop the arithmetic is that of torchvision's reference (`VideoClassificationPresetEval`);
with `augment.round_resized`, and `augment.short_side` where the preset gives one size, it is that
of `weights.transforms()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from train.augment import resized_size
from train.fused_clips import Cut, cut_clips
from train.rand_augment import constant
from train.transforms import clips_by_size, goes_in_one_pass, resize_clips, rgb_planes

if TYPE_CHECKING:
    from stream.batch import ClipBatch
    from train.recipe import AugmentRecipe, Recipe


def eval_clips(batch: ClipBatch, recipe: Recipe) -> torch.Tensor:
    """Prepare the clips of an evaluation batch, never flipped.

    Returns:
        float32 (S, N, 3, T, crop height, crop width), normalised: S crops of each of N clips, as
        `crop_places` places them.
    """
    augment, crops = recipe.augment, recipe.eval.crops
    height, width = augment.crop
    frames, device = batch.video.shape[1], batch.video.device
    if goes_in_one_pass(batch):
        cut = cut_clips(
            batch.video, _cuts(batch, augment, crops), augment.crop, augment.mean, augment.std,
            is_rounded=augment.round_resized,
        )  # fmt: skip
        return cut.view(crops, len(batch), *cut.shape[1:])
    clips = torch.empty((crops, len(batch), 3, frames, height, width), device=device)
    for size, members in clips_by_size(batch).items():
        target = resized_size(size, augment)
        pixels = rgb_planes(batch, members, *size)
        pixels = resize_clips(pixels, target, is_rounded=augment.round_resized)
        for crop, (top, left) in enumerate(crop_places(target, augment.crop, crops)):
            cut = pixels[..., top : top + height, left : left + width]
            clips[crop, members] = cut.transpose(1, 2)
    mean = constant(augment.mean, device).view(3, 1, 1, 1)
    std = constant(augment.std, device).view(3, 1, 1, 1)
    return clips.sub_(mean).div_(std)


def _cuts(batch: ClipBatch, augment: AugmentRecipe, crops: int) -> list[Cut]:
    """Return the first crop of every clip, then the second, and so on."""
    cuts = []
    for member, (height, width) in enumerate(batch.size.tolist()):
        target = resized_size((height, width), augment)
        for top, left in crop_places(target, augment.crop, crops):
            cuts.append(Cut(member, (height, width), (0, height, 0, width), target, top, left))
    return [cut for crop in range(crops) for cut in cuts[crop::crops]]


def crop_places(size: tuple[int, int], crop: tuple[int, int], crops: int) -> list[tuple[int, int]]:
    """Return top and left of each crop within a resized frame.

    One crop is the centre one. Three stand at the beginning, in the middle and at the end of the
    side where the crop leaves more room (the width when equal), in the middle of the other.
    """
    room = [side - part for side, part in zip(size, crop, strict=True)]
    # torchvision's center_crop rounds half to even: (171 - 112) / 2 = 29.5 -> 30
    top, left = round(room[0] / 2), round(room[1] / 2)
    if crops == 1:
        return [(top, left)]
    if room[0] > room[1]:
        return [(0, left), (top, left), (room[0], left)]
    return [(top, 0), (top, left), (top, room[1])]
