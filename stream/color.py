"""Planar YUV 4:2:0 to RGB, exactly: ITU-R BT.601, limited range, chroma replicated, rounded.

This is the reference conversion of the format. swscale's default differs from it by up to 3 levels
(it works in fixed point); the functions here are the same arithmetic on a CPU and on a device.
"""

from __future__ import annotations

import torch

# ITU-R BT.601-7, section 2.5.1: Y in 16..235 and Cb, Cr in 16..240 around 128.
# R = 255/219 (Y - 16) + 2 (1 - Kr) 255/224 (Cr - 128), with Kr = 0.299, Kb = 0.114.
_LUMA = 255 / 219
_CR_TO_R = 2 * (1 - 0.299) * 255 / 224
_CB_TO_B = 2 * (1 - 0.114) * 255 / 224
_CB_TO_G = -_CB_TO_B * 0.114 / 0.587
_CR_TO_G = -_CR_TO_R * 0.299 / 0.587


def frame_bytes(height: int, width: int) -> int:
    """Return the bytes of one planar 4:2:0 frame of even size."""
    return height * width * 3 // 2


def yuv420_to_rgb(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert planar frames to RGB.

    Args:
        frames: uint8 (..., F) with F >= `frame_bytes(height, width)`; bytes beyond are padding.
        height: of the picture in pixels, even.
        width: of the picture in pixels, even.

    Returns:
        uint8 (..., height, width, 3), full range.
    """
    return torch.stack(_channels(frames, height, width), dim=-1)


def yuv420_to_rgb_planes(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert as `yuv420_to_rgb`, channels first: uint8 (..., 3, height, width)."""
    return torch.stack(_channels(frames, height, width), dim=-3)


def _channels(frames: torch.Tensor, height: int, width: int) -> list[torch.Tensor]:
    lead = frames.shape[:-1]
    luma_size, chroma_size = height * width, height * width // 4
    planes = frames[..., : frame_bytes(height, width)]
    luma, cb, cr = torch.split(planes, [luma_size, chroma_size, chroma_size], dim=-1)
    bright = (luma.reshape(*lead, height // 2, 2, width // 2, 2).float() - 16) * _LUMA
    half = (*lead, height // 2, 1, width // 2, 1)  # each chroma sample serves 2 x 2 pixels
    blue = cb.reshape(half).float() - 128
    red = cr.reshape(half).float() - 128
    mixed = (
        bright + red * _CR_TO_R,
        bright + (blue * _CB_TO_G + red * _CR_TO_G),
        bright + blue * _CB_TO_B,
    )
    return [
        channel.round().clamp(0, 255).to(torch.uint8).reshape(*lead, height, width)
        for channel in mixed
    ]
