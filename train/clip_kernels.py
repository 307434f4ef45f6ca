"""From planar YUV to the network's input in one pass over memory, in Triton.

Every pixel of the result reads the four pixels around its place in the decoded frame, which mostly
are in the cache, and is written once. One launch takes clips of all sizes. Levels are those of
`stream.color.yuv420_to_rgb` exactly; the bilinear weights are PyTorch's.

Imported only where Triton is (train/fused_clips.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stream.color import CB_TO_B, CB_TO_G, CR_TO_G, CR_TO_R

_BLOCK = 512  # pixels of a program
COLUMNS = 13
"""Numbers that say where a clip of the result comes from, float32.

Its place in the batch; the frame's height and width; the box that is resized: top, left, height and
width; its height and width over those to which it is resized, whose width is next; the crop's top
and left in that; whether it is flipped. All but the two ratios are whole.
"""

# A level is floor((85 Y + whole) / 73), whole = floor(73 chroma + 36.5 - 85 * 16): see stream.color
_POINT = 40  # bits behind the point: 73 chroma needs 15 before it, and is 2^-25 off a whole number
_RED = tl.constexpr(round(73 * CR_TO_R * 2**_POINT))
_GREEN_OF_BLUE = tl.constexpr(round(73 * CB_TO_G * 2**_POINT))
_GREEN_OF_RED = tl.constexpr(round(73 * CR_TO_G * 2**_POINT))
_BLUE = tl.constexpr(round(73 * CB_TO_B * 2**_POINT))
_OFFSET = tl.constexpr(round((73 / 2 - 85 * 16 + 1e-9) * 2**_POINT))
_BITS = tl.constexpr(_POINT)
# adding it leaves no bits behind the point, which rounds half to even
_WHOLE = tl.constexpr(1.5 * 2**23)


@triton.jit
def _level(bright, mixed):
    """Return the level of 85 Y and of 73 times what chroma adds, in fixed point."""
    whole = ((mixed + _OFFSET) >> _BITS).to(tl.int32)
    # half of a 73rd keeps float32 away from whole levels
    level = ((tl.maximum(bright + whole, 0).to(tl.float32) + 0.5) * (1 / 73)).to(tl.int32)
    return tl.minimum(level, 255).to(tl.float32)


@triton.jit
def _pixel(frame, y, x, height, width, there):
    """Return red, green and blue of pixels of a planar frame, 0 to 255."""
    bright = 85 * tl.load(frame + y * width + x, mask=there, other=16).to(tl.int32)
    at = height * width + y // 2 * (width // 2) + x // 2
    blue = tl.load(frame + at, mask=there, other=128).to(tl.int64) - 128
    red = tl.load(frame + at + height * width // 4, mask=there, other=128).to(tl.int64) - 128
    return (
        _level(bright, red * _RED),
        _level(bright, blue * _GREEN_OF_BLUE + red * _GREEN_OF_RED),
        _level(bright, blue * _BLUE),
    )


@triton.jit
def _place(resized, size, scale):
    """Return the two pixels between which a resized pixel lies, and the share of the second."""
    at = tl.maximum((resized + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(at, size - 1).to(tl.int32)
    second = tl.minimum(first + 1, size.to(tl.int32) - 1)
    return first, second, at - first


@triton.jit
def _between(first, second, share):
    return (1 - share) * first + share * second


@triton.jit
def _channel(level, factor, offset, rounded: tl.constexpr):
    if rounded:
        level = level + _WHOLE - _WHOLE
    return level * factor + offset


@triton.jit
def _prepare_kernel(video, table, clips, frame_bytes, height, width, red_factor, green_factor,
                    blue_factor, red_offset, green_offset, blue_offset, rounded: tl.constexpr,
                    columns: tl.constexpr, block: tl.constexpr) -> None:  # fmt: skip
    number, frames = tl.program_id(1), tl.num_programs(1)
    clip = tl.program_id(2)
    row = table + clip * columns
    place = tl.program_id(0) * block + tl.arange(0, block)
    there = place < height * width
    y = (place // width).to(tl.float32) + tl.load(row + 10)
    x = (place % width).to(tl.float32) + tl.load(row + 11)
    x = tl.where(tl.load(row + 12) > 0, tl.load(row + 9) - 1 - x, x)
    first_y, second_y, down = _place(y, tl.load(row + 5), tl.load(row + 7))
    first_x, second_x, across = _place(x, tl.load(row + 6), tl.load(row + 8))
    top, left = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    first_y, second_y, first_x, second_x = (
        first_y + top, second_y + top, first_x + left, second_x + left,
    )  # fmt: skip
    full_height, full_width = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    frame = video + (tl.load(row).to(tl.int64) * frames + number) * frame_bytes
    r, g, b = _pixel(frame, first_y, first_x, full_height, full_width, there)
    r2, g2, b2 = _pixel(frame, first_y, second_x, full_height, full_width, there)
    r, g, b = _between(r, r2, across), _between(g, g2, across), _between(b, b2, across)
    r2, g2, b2 = _pixel(frame, second_y, first_x, full_height, full_width, there)
    r3, g3, b3 = _pixel(frame, second_y, second_x, full_height, full_width, there)
    r = _between(r, _between(r2, r3, across), down)
    g = _between(g, _between(g2, g3, across), down)
    b = _between(b, _between(b2, b3, across), down)
    plane = frames.to(tl.int64) * height * width
    out = clips + clip * 3 * plane + number * height * width + place
    tl.store(out, _channel(r, red_factor, red_offset, rounded), mask=there)
    tl.store(out + plane, _channel(g, green_factor, green_offset, rounded), mask=there)
    tl.store(out + 2 * plane, _channel(b, blue_factor, blue_offset, rounded), mask=there)


def prepare(
    video: torch.Tensor, table: torch.Tensor, crop: tuple[int, int],
    factors: tuple[float, ...], offsets: tuple[float, ...], *, rounded: bool,
) -> torch.Tensor:  # fmt: skip
    """Return clips cut out of a batch's, resized and normalised.

    Args:
        video: uint8 (N, T, F), planar, contiguous.
        table: float32 (M, COLUMNS) on the same device, one row a clip of the result.
        crop: height and width of the result, in pixels.
        factors: of red, green and blue levels (0 to 255) in the result.
        offsets: that are added to them.
        rounded: round resized levels to whole numbers first.

    Returns:
        float32 (M, 3, T, *crop).
    """
    frames, height, width = video.shape[1], *crop
    clips = video.new_empty((len(table), 3, frames, height, width), dtype=torch.float32)
    _prepare_kernel[(-(-height * width // _BLOCK), frames, len(table))](
        video, table, clips, video.shape[2], height, width, *factors, *offsets, rounded=rounded,
        columns=COLUMNS, block=_BLOCK, num_warps=4,
    )  # fmt: skip
    return clips
