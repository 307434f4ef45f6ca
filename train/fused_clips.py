"""Clips prepared for the network in one pass on a GPU, instead of one for every step of it.

`train/clip_kernels.py` has the kernel, docs/performance.md ("Training") what it gives. Clips that
RandAugment changes, or that come as RGB, go PyTorch's way; so does everything where Triton does not
work. A recipe decides which way its clips go, never the other clips of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from prep.errors import UsageError
from stream.color import frame_bytes, yuv420_to_rgb_planes
from train.triton_support import failure, why_no_triton

if TYPE_CHECKING:
    from train.augment import Box

_TOLERANCE = 1e-3  # of normalised values; a level is 0.018


@dataclass(frozen=True)
class Cut:
    """Where one clip of the result comes from; all in pixels."""

    member: int
    """Of the batch."""
    size: tuple[int, int]
    """Height and width of the decoded frames."""
    box: Box
    """Part of a frame that is resized."""
    resized: tuple[int, int]
    """The height and width to which it is."""
    top: int
    """First row of the crop in what is resized and flipped."""
    left: int
    """First column, likewise."""
    flip: bool = False


def cut_clips(
    video: torch.Tensor,
    cuts: list[Cut],
    crop: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    is_rounded: bool,
) -> torch.Tensor:
    """Convert, resize, flip, crop and normalise clips on a GPU, whose host does not wait.

    Args:
        video: uint8 (N, T, F), planar, of a `ClipBatch`.
        cuts: one for each clip of the result.
        crop: height and width of the result, in pixels.
        mean: of red, green and blue in [0, 1].
        std: likewise.
        is_rounded: round resized levels to whole numbers, as torchvision does with uint8.

    Returns:
        float32 (len(cuts), 3, T, *crop).

    Raises UsageError for a size that is odd or larger than F bytes hold, or a box beyond it: the
    kernel would read what lies behind.
    """
    from train import clip_kernels

    for cut in cuts:
        _check(cut, video.shape[2])

    rows = [_row(cut) for cut in cuts]
    table = torch.tensor(rows, dtype=torch.float32)
    if video.is_cuda:
        table = table.pin_memory().to(video.device, non_blocking=True)
    return clip_kernels.prepare(
        video.contiguous(), table, crop, tuple(1 / (255 * one) for one in std),
        tuple(-of_mean / of_std for of_mean, of_std in zip(mean, std, strict=True)),
        rounded=is_rounded,
    )  # fmt: skip


def _check(cut: Cut, most_bytes: int) -> None:
    (height, width), (top, bottom, left, right) = cut.size, cut.box
    is_even = height > 0 < width and height % 2 == width % 2 == 0
    if not (is_even and frame_bytes(height, width) <= most_bytes):
        raise UsageError(
            f"a batch has clips of {width}x{height} in frames of {most_bytes} bytes; planar "
            "pictures have even sides and 3/2 bytes a pixel: correct what transform_batch returns"
        )
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"box {cut.box} is not within a picture of {width}x{height}")


def _row(cut: Cut) -> list[float]:
    """Return what `clip_kernels.COLUMNS` says."""
    top, bottom, left, right = cut.box
    height, width = bottom - top, right - left
    to_height, to_width = cut.resized
    return [
        cut.member, *cut.size, top, left, height, width, height / to_height, width / to_width,
        to_width, cut.top, cut.left, cut.flip,
    ]  # fmt: skip


@cache
def why_not_cut(device: torch.device) -> str | None:
    """Return why a device cannot take this form, or None: one clip is tried on it."""
    if reason := why_no_triton(device):
        return reason
    try:
        off = _error_of_a_clip(device)
    except Exception as error:  # noqa: BLE001 - the compiler may raise anything
        return failure(error)
    return None if off <= _TOLERANCE else f"Triton's results are off by {off:.3g}"


def _error_of_a_clip(device: torch.device) -> float:
    """Return by how much a clip is off what PyTorch makes of it on a CPU."""
    generator = torch.Generator().manual_seed(0)  # the run's own generators stay untouched
    shape = (1, 2, frame_bytes(24, 32))
    video = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    cut = Cut(0, (24, 32), (0, 24, 0, 32), (30, 44), top=5, left=9, flip=True)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    levels = yuv420_to_rgb_planes(video[0], 24, 32).float()
    levels = functional.interpolate(levels, size=(30, 44), mode="bilinear", align_corners=False)
    levels = levels.flip(-1)[:, :, 5:25, 9:29].transpose(0, 1)
    of_mean, of_std = (torch.tensor(one).view(3, 1, 1, 1) for one in (mean, std))
    errors = []
    for is_rounded in (False, True):
        clips = cut_clips(video.to(device), [cut], (20, 20), mean, std, is_rounded=is_rounded)
        wanted = ((levels.round() if is_rounded else levels) / 255 - of_mean) / of_std
        off = (clips[0].cpu() - wanted).abs().flatten()
        # halves may round the other way
        errors.append(off.quantile(0.95) if is_rounded else off.max())
    return float(torch.stack(errors).max())  # which keeps what is not a number
