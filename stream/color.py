"""Planar YUV 4:2:0 to RGB: ITU-R BT.601, limited range, chroma replicated, rounded.

`yuv420_to_rgb` is the reference conversion of the format, exact, and so the same on every device.
swscale's default differs from it by up to 3 levels, `write_rgb` by 1 level in 1.5 % of the values:
both work in fixed point.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

UInt8 = npt.NDArray[np.uint8]

# ITU-R BT.601-7, section 2.5.1: Y in 16..235 and Cb, Cr in 16..240 around 128.
# R = 255/219 (Y - 16) + 2 (1 - Kr) 255/224 (Cr - 128), with Kr = 0.299, Kb = 0.114.
_LUMA = 255 / 219  # = 85/73
CR_TO_R = 2 * (1 - 0.299) * 255 / 224
CB_TO_B = 2 * (1 - 0.114) * 255 / 224
CB_TO_G = -CB_TO_B * 0.114 / 0.587
CR_TO_G = -CR_TO_R * 0.299 / 0.587

# write_rgb sums in int16 with 5 bits behind the point; chroma is multiplied with 16 more
_LEVEL = 32
_FINE = 16
_FINE_CR_TO_R, _FINE_CB_TO_G, _FINE_CR_TO_G, _FINE_CB_TO_B = (
    round(factor * _LEVEL * 2**_FINE) for factor in (CR_TO_R, CB_TO_G, CR_TO_G, CB_TO_B)
)
_PIXELS_AT_ONCE = 90_000  # with more, malloc returns what was computed to the system each time


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

    It needs a device with float64, as CPUs and CUDA devices are.
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
    bright = luma.reshape(*lead, height // 2, 2, width // 2, 2).float() * _LUMA
    half = (*lead, height // 2, 1, width // 2, 1)  # each chroma sample serves 2 x 2 pixels
    blue = cb.reshape(half).double() - 128
    red = cr.reshape(half).double() - 128
    mixed = (red * CR_TO_R, blue * CB_TO_G + red * CR_TO_G, blue * CB_TO_B)
    levels = ((bright + _exact_offset(chroma)).clamp_(0, 255) for chroma in mixed)
    return [level.to(torch.uint8).reshape(*lead, height, width) for level in levels]


def _exact_offset(chroma: torch.Tensor) -> torch.Tensor:
    """Return what is to be added to 85/73 Y, so that the sum cut off is the exact level.

    A level is floor((85 (Y - 16) + 73 chroma + 36.5) / 73). As 85 Y is whole, all the rest above
    the line may be cut off first: there float64 is far more exact than the exact values are close
    to a whole number (1 in 26 million). Half of a 73rd then keeps float32 away from whole levels.
    """
    whole = chroma.mul_(73).add_(73 / 2 - 85 * 16 + 1e-9).floor_()
    return whole.float().add_(0.5).div_(73)


def write_rgb(frames: UInt8, out: UInt8) -> None:
    """Convert planar frames to RGB on a CPU, within 1 level of `yuv420_to_rgb`, much faster.

    Args:
        frames: uint8 (T, F) with F >= `frame_bytes(height, width)`; bytes beyond are padding.
        out: uint8 (T, height, width, 3), written with full range; both sizes are even.
    """
    step = max(1, _PIXELS_AT_ONCE // (out.shape[1] * out.shape[2]))
    for first in range(0, len(frames), step):
        _write_rgb(frames[first : first + step], out[first : first + step])


def _write_rgb(frames: UInt8, out: UInt8) -> None:
    count, height, width, _ = out.shape
    rows, columns = height // 2, width // 2
    luma_size, chroma_size = height * width, rows * columns
    fine = frames[:, :luma_size].astype(np.uint16)
    fine *= round(_LUMA * _LEVEL * 4)  # 255 times this is below 2 ** 16
    fine += 2
    fine >>= 2
    bright = fine.view(np.int16).reshape(count, rows, 2, width)
    bright -= round(16 * _LUMA * _LEVEL) - _LEVEL // 2  # and half a level, to round at the end
    chroma = frames[:, luma_size : luma_size + 2 * chroma_size].astype(np.int32) - 128
    blue, red = chroma[:, :chroma_size], chroma[:, chroma_size:]
    wide = np.empty((count, rows, 1, width), np.int16)  # a chroma sample serves 2 x 2 pixels
    target = out.reshape(count, rows, 2, width, 3)
    for channel, mixed in enumerate(
        (red * _FINE_CR_TO_R, blue * _FINE_CB_TO_G + red * _FINE_CR_TO_G, blue * _FINE_CB_TO_B)
    ):
        samples = ((mixed + (1 << (_FINE - 1))) >> _FINE).reshape(count, rows, 1, columns)
        wide[..., ::2] = samples
        wide[..., 1::2] = samples
        value = bright + wide
        value >>= _LEVEL.bit_length() - 1
        np.clip(value, 0, 255, out=value)
        target[..., channel] = value
