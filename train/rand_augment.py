"""RandAugment for clips: a few operations drawn for a clip, applied to all its frames alike.

Operations, strengths and arithmetic are those of torchvision's `RandAugment` (31 strengths,
bilinear), on uint8 and on the device the clip is on. Where torchvision copies constants from the
host, which makes the host wait for the device, the same is computed from numbers here.

Source: Cubuk et al., "RandAugment" (2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torchvision.transforms.v2 import functional as tv

if TYPE_CHECKING:
    from collections.abc import Callable

    from train.clip_random import ClipDraw

STRONGEST = 30
"""The largest `magnitude`: torchvision's 31 strengths are counted from 0."""

# name: (strength at 0, strength at 30, whether its sign is drawn)
_OPERATIONS: dict[str, tuple[float, float, bool]] = {
    "Identity": (0, 0, False),
    "ShearX": (0, 0.3, True),
    "ShearY": (0, 0.3, True),
    "TranslateX": (0, 150 / 331, True),
    "TranslateY": (0, 150 / 331, True),
    "Rotate": (0, 30, True),
    "Brightness": (0, 0.9, True),
    "Color": (0, 0.9, True),
    "Contrast": (0, 0.9, True),
    "Sharpness": (0, 0.9, True),
    "Posterize": (8, 4, False),
    "Solarize": (255, 0, False),
    "AutoContrast": (0, 0, False),
    "Equalize": (0, 0, False),
}


@dataclass(frozen=True)
class Operation:
    """One operation: its name in torchvision, and its strength in torchvision's unit.

    That is an angle in degrees, a tangent, a share of a side, a factor less 1, bits or a level.
    """

    name: str
    strength: float


def draw_operations(
    clip: ClipDraw, *, count: int, magnitude: int, probability: float
) -> tuple[Operation, ...]:
    """Draw the operations of one clip.

    Args:
        clip: and the epoch, and the seed.
        count: operations that are drawn, with repetition.
        magnitude: strength of each, from 0 to `STRONGEST`.
        probability: that a drawn operation is applied; those that are not are left out.
    """
    generator = clip.generator("rand")
    names, drawn = list(_OPERATIONS), []
    for _ in range(count):
        name = names[int(generator.random() * len(names))]
        sign = -1 if generator.random() < 0.5 else 1
        if generator.random() < probability:
            first, last, signed = _OPERATIONS[name]
            strength = first + (last - first) * magnitude / STRONGEST
            drawn.append(Operation(name, sign * strength if signed else strength))
    return tuple(drawn)


def apply_operations(
    frames: torch.Tensor, operations: tuple[Operation, ...], fill: tuple[float, float, float]
) -> torch.Tensor:
    """Apply operations in order.

    Args:
        frames: uint8 (T, 3, H, W).
        operations: from `draw_operations`.
        fill: levels of red, green and blue, in [0, 1], of what a shear or shift leaves empty.

    Returns:
        uint8 (T, 3, H, W), a new tensor where there are operations.
    """
    for operation in operations:
        matrix = _matrix(operation, *frames.shape[-2:])
        if matrix is not None:
            frames = _warp(frames, matrix, fill)
        elif operation.name != "Identity":
            frames = _COLORS[operation.name](frames, operation.strength)
    return frames


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return numbers as a float32 tensor on a device, copied there once: a copy waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device)


Matrix = tuple[float, float, float, float, float, float]
"""From output to input: x' = m0 x + m1 y + m2, y' = m3 x + m4 y + m5, in pixels from the centre."""


def _matrix(operation: Operation, height: int, width: int) -> Matrix | None:
    """Return where a geometric operation takes its pixels from; None for the others."""
    strength = operation.strength
    match operation.name:
        case "ShearX":  # about the corner: in the first row nothing moves
            return (1.0, strength, strength * height / 2, 0.0, 1.0, 0.0)
        case "ShearY":
            return (1.0, 0.0, 0.0, strength, 1.0, strength * width / 2)
        case "TranslateX":
            return (1.0, 0.0, -float(int(strength * width)), 0.0, 1.0, 0.0)
        case "TranslateY":
            return (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(strength * height)))
        case "Rotate":
            cosine, sine = math.cos(math.radians(strength)), math.sin(math.radians(strength))
            return (cosine, -sine, 0.0, sine, cosine, 0.0)
    return None


def _warp(frames: torch.Tensor, matrix: Matrix, fill: tuple[float, float, float]) -> torch.Tensor:
    """Sample every frame at the places that the matrix gives, bilinear, with `fill` outside."""
    count, _, height, width = frames.shape
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=frames.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=frames.device)[:, None]
    grid = torch.stack(
        [
            (x * matrix[0] + y * matrix[1] + matrix[2]) / (width / 2),
            (x * matrix[3] + y * matrix[4] + matrix[5]) / (height / 2),
        ],
        dim=-1,
    ).expand(count, height, width, 2)
    pixels = frames.float()
    pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    sampled = functional.grid_sample(pixels, grid, mode="bilinear", align_corners=False)
    inside, levels = sampled[:, 3:], constant(fill, frames.device).view(3, 1, 1) * 255
    return ((sampled[:, :3] - levels) * inside + levels).round_().to(torch.uint8)


def _sharpen(frames: torch.Tensor, strength: float) -> torch.Tensor:
    """Blend with the mean of 3 x 3 pixels, the middle one counted five times."""
    height, width = frames.shape[-2:]
    if height <= 2 or width <= 2:
        return frames
    pixels = frames.float()
    middle = pixels[..., 1:-1, 1:-1]
    columns = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    sums = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    blurred = ((sums + 4 * middle) / 13).round_()
    pixels[..., 1:-1, 1:-1] = middle + (blurred - middle) * -strength
    return pixels.clamp_(0, 255).to(torch.uint8)


_COLORS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "Brightness": lambda frames, strength: tv.adjust_brightness(frames, 1 + strength),
    "Color": lambda frames, strength: tv.adjust_saturation(frames, 1 + strength),
    "Contrast": lambda frames, strength: tv.adjust_contrast(frames, 1 + strength),
    "Sharpness": _sharpen,
    "Posterize": lambda frames, strength: tv.posterize(frames, round(strength)),
    "Solarize": tv.solarize,
    "AutoContrast": lambda frames, _: tv.autocontrast(frames),
    "Equalize": lambda frames, _: tv.equalize(frames),
}
