"""From decoded clips to the network's input, on the device the clips are on.

The arithmetic is torchvision's reference (`VideoClassificationPresetTrain`): float in [0, 1],
bilinear resize without antialias to a fixed size, horizontal flip, normalise, crop. The random
draws come from `train.augment`. RandAugment and random resized crops come before all that, on the
decoded levels. On a GPU one kernel does all of it, but for RandAugment (`train.fused_clips`).
Evaluation has `train.eval_transforms`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from stream.color import yuv420_to_rgb_planes
from train.augment import Box, Draws, draw_clip, resized_size
from train.clip_random import ClipDraw
from train.fused_clips import Cut, cut_clips, why_not_cut
from train.rand_augment import apply_operations, constant

if TYPE_CHECKING:
    from stream.batch import ClipBatch
    from train.recipe import AugmentRecipe, Recipe


def train_clips(batch: ClipBatch, recipe: AugmentRecipe, seed: int, epoch: int) -> torch.Tensor:
    """Augment the clips of a training batch.

    Returns:
        float32 (N, 3, T, crop height, crop width), normalised.
    """
    draws = [
        draw_clip(ClipDraw(seed, epoch, key, view), recipe, (height, width))
        for key, view, (height, width) in zip(
            batch.key, batch.view.tolist(), batch.size.tolist(), strict=True
        )
    ]
    return clips_from_draws(batch, recipe, draws)


def clips_from_draws(batch: ClipBatch, recipe: AugmentRecipe, draws: list[Draws]) -> torch.Tensor:
    """Augment, resize, flip, crop and normalise each clip by its own draws.

    Returns:
        float32 (N, 3, T, crop height, crop width).
    """
    height, width = recipe.crop
    frames = batch.video.shape[1]
    device = batch.video.device
    if not recipe.rand_operations and goes_in_one_pass(batch):
        sizes = batch.size.tolist()
        cuts = [
            _cut(member, (height, width), draws[member], recipe)
            for member, (height, width) in enumerate(sizes)
        ]
        return cut_clips(
            batch.video, cuts, recipe.crop, recipe.mean, recipe.std,
            is_rounded=recipe.round_resized,
        )  # fmt: skip
    clips = torch.empty((len(batch), 3, frames, height, width), dtype=torch.float32, device=device)
    for size, members in clips_by_size(batch).items():
        pixels = rgb_planes(batch, members, *size)
        if not any(draws[member].box or draws[member].operations for member in members):
            pixels = resize_clips(
                pixels, resized_size(size, recipe), is_rounded=recipe.round_resized
            )
        for position, member in enumerate(members):
            clips[member] = _prepared(pixels[position], draws[member], recipe, size)
    mean = constant(recipe.mean, device).view(3, 1, 1, 1)
    std = constant(recipe.std, device).view(3, 1, 1, 1)
    return clips.sub_(mean).div_(std)


def goes_in_one_pass(batch: ClipBatch) -> bool:
    """Return whether one kernel can prepare the clips: the same for all batches of a run."""
    device = batch.video.device
    return batch.layout == "yuv420" and device.type == "cuda" and why_not_cut(device) is None


def why_slow_clips(recipe: Recipe, device: torch.device) -> str | None:
    """Say why clips are prepared in several passes, where one could do."""
    is_planar = recipe.data.layout == "yuv420"
    reason = why_not_cut(device) if is_planar and device.type == "cuda" else None
    return reason and f"clips are prepared by PyTorch's kernels, which take longer: {reason}"


def _cut(member: int, size: tuple[int, int], draws: Draws, recipe: AugmentRecipe) -> Cut:
    if draws.box is None:
        whole = (0, size[0], 0, size[1])
        resized = resized_size(size, recipe)
        return Cut(member, size, whole, resized, draws.top, draws.left, draws.flip)
    return Cut(member, size, draws.box, recipe.crop, 0, 0, draws.flip)


def _prepared(
    pixels: torch.Tensor, draws: Draws, recipe: AugmentRecipe, size: tuple[int, int]
) -> torch.Tensor:
    """Turn one clip (T, 3, h, w), decoded uint8 or resized float, into (3, T, *crop) in [0, 1]."""
    if pixels.dtype != torch.uint8:
        return _flip_and_crop(pixels, draws, *recipe.crop)
    pixels = apply_operations(pixels, draws.operations, recipe.mean)
    if draws.box is None:
        resize = resized_size(size, recipe)
        resized = resize_clips(pixels[None], resize, is_rounded=recipe.round_resized)
        return _flip_and_crop(resized[0], draws, *recipe.crop)
    crop = _resized_crop(pixels, draws.box, recipe)
    return (crop.flip(-1) if draws.flip else crop).transpose(0, 1)


def _resized_crop(pixels: torch.Tensor, box: Box, recipe: AugmentRecipe) -> torch.Tensor:
    """Resize a box of uint8 frames (T, 3, h, w) to float32 (T, 3, *crop) in [0, 1]."""
    top, bottom, left, right = box
    part = pixels[None, :, :, top:bottom, left:right]
    return resize_clips(part, recipe.crop, is_rounded=recipe.round_resized)[0]


def video_on(batch: ClipBatch, device: torch.device) -> ClipBatch:
    """Return the batch with its pixels on `device`; sizes, labels and views stay on the CPU.

    They decide which kernels are started: reading them back from a device would wait for its queue.
    """
    return replace(batch, video=batch.video.to(device, non_blocking=True))


def rgb_planes(batch: ClipBatch, members: list[int], height: int, width: int) -> torch.Tensor:
    """Return clips of one size as uint8 (n, T, 3, height, width), full-range RGB."""
    chosen = batch.video
    if len(members) < len(batch):  # indexing with a list would copy it to the device, and wait
        chosen = torch.stack([batch.video[member] for member in members])
    if batch.layout == "yuv420":
        return yuv420_to_rgb_planes(chosen, height, width)
    return chosen[:, :, :height, :width].permute(0, 1, 4, 2, 3)


def resize_clips(
    pixels: torch.Tensor, size: tuple[int, int], *, is_rounded: bool = False
) -> torch.Tensor:
    """Resize every frame to `size` (height, width), bilinear without antialias.

    Args:
        pixels: uint8 (n, T, 3, h, w).
        size: height and width in pixels; the aspect ratio is not kept.
        is_rounded: round the resized levels to whole numbers, as torchvision does with uint8.

    Returns:
        float32 (n, T, 3, *size) in [0, 1].
    """
    frames = pixels.flatten(0, 1).to(torch.float32)
    if not is_rounded:
        frames = frames.div_(255)
    if tuple(frames.shape[-2:]) != size:
        frames = functional.interpolate(
            frames, size=size, mode="bilinear", align_corners=False, antialias=False
        )
    if is_rounded:
        frames = frames.round_().div_(255)
    return frames.reshape(*pixels.shape[:2], *frames.shape[1:])


def clips_by_size(batch: ClipBatch) -> dict[tuple[int, int], list[int]]:
    """Group the clips of a batch by height and width."""
    groups: dict[tuple[int, int], list[int]] = {}
    for member, (height, width) in enumerate(batch.size.tolist()):
        groups.setdefault((height, width), []).append(member)
    return groups


def _flip_and_crop(clip: torch.Tensor, draws: Draws, height: int, width: int) -> torch.Tensor:
    """Turn one clip (T, 3, H, W) into its crop (3, T, height, width)."""
    if draws.flip:
        # the crop of the flipped frame is the flip of the crop that lies as far from the right
        right = clip.shape[-1] - draws.left
        crop = clip[..., draws.top : draws.top + height, right - width : right].flip(-1)
    else:
        crop = clip[..., draws.top : draws.top + height, draws.left : draws.left + width]
    return crop.transpose(0, 1)
