"""BatchNorm over channels-last clips in Triton: two passes over memory forward, two backward.

torch.compile's own kernels for these layers reach half of the memory's rate (docs/performance.md,
"Training"). Here 8 pixels are seen as one row where their number allows it, so that rows are a
multiple of 64 numbers whatever the channels are, and a program goes down the rows with its columns'
sums and constants in registers. Sums begin at the end of memory, which the convolution before has
written last and the cache may still hold, and what is computed with them at its start, for the same
reason. Every sum has a fixed order: the same clips give the same bits.

What a layer keeps of its forward pass is (5, C) float32, `kept`: mean, 1 / standard deviation
(rstd), scale and shift, for clips * scale + shift, and variance. Zero channels behind the layer's
own have scale and shift 0.

Imported only where Triton is (train/fused_norm.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import custom_op

_PIXELS = 8  # of a row
_ROWS, _COLUMNS = 32, 128  # that a program holds at once
_PROGRAMS = 528  # 4 for each multiprocessor of a Hopper GPU


@triton.jit
def _moments_kernel(clips, centre, sums, rows, width, channels, block: tl.constexpr,
                    lanes: tl.constexpr) -> None:  # fmt: skip
    columns = tl.program_id(1) * lanes + tl.arange(0, lanes)
    there = columns < width
    middle = tl.load(centre + columns % channels, mask=there, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((block, lanes), dtype=tl.float32)
    square = tl.zeros((block, lanes), dtype=tl.float32)
    last = (tl.cdiv(rows, block) - 1) * block
    begin, jump = tl.program_id(0) * block, tl.num_programs(0) * block
    for start in tl.range(begin, rows, jump, num_stages=3):
        places = last - start + tl.arange(0, block)
        inside = (places < rows)[:, None] & there[None, :]
        at = places.to(tl.int64)[:, None] * width + columns[None, :]
        value = tl.load(clips + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - middle, 0.0)
        total += value
        square += value * value
    out = sums + tl.program_id(0) * 2 * width + columns
    tl.store(out, tl.sum(total, 0), mask=there)
    tl.store(out + width, tl.sum(square, 0), mask=there)


@triton.jit
def _gradient_kernel(gradient, clips, kept, sums, rows, width, channels, relu: tl.constexpr,
                     block: tl.constexpr, lanes: tl.constexpr) -> None:  # fmt: skip
    columns = tl.program_id(1) * lanes + tl.arange(0, lanes)
    there = columns < width
    channel = columns % channels
    mean = tl.load(kept + channel, mask=there, other=0.0)[None, :]
    scale = tl.load(kept + 2 * channels + channel, mask=there, other=0.0)[None, :]
    shift = tl.load(kept + 3 * channels + channel, mask=there, other=0.0)[None, :]
    total = tl.zeros((block, lanes), dtype=tl.float32)
    product = tl.zeros((block, lanes), dtype=tl.float32)
    last = (tl.cdiv(rows, block) - 1) * block
    begin, jump = tl.program_id(0) * block, tl.num_programs(0) * block
    for start in tl.range(begin, rows, jump, num_stages=3):
        places = last - start + tl.arange(0, block)
        inside = (places < rows)[:, None] & there[None, :]
        at = places.to(tl.int64)[:, None] * width + columns[None, :]
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(clips + at, mask=inside, other=0.0).to(tl.float32)
        if relu:
            slope = tl.where(value * scale + shift > 0, slope, 0.0)
        total += slope
        product += slope * (value - mean)  # beyond the rows the slope is zero
    out = sums + tl.program_id(0) * 2 * width + columns
    tl.store(out, tl.sum(total, 0), mask=there)
    tl.store(out + width, tl.sum(product, 0), mask=there)


@triton.jit
def _sum_of_blocks(sums, blocks, channels, column, there, pixels: tl.constexpr,
                   lines: tl.constexpr, lanes: tl.constexpr):  # fmt: skip
    first = tl.zeros((lines, lanes), dtype=tl.float32)
    second = tl.zeros((lines, lanes), dtype=tl.float32)
    for start in range(0, blocks * pixels, lines):
        line = start + tl.arange(0, lines)
        inside = (line < blocks * pixels)[:, None] & there[None, :]
        row = line // pixels * 2 * pixels + line % pixels
        at = row[:, None] * channels + column[None, :]
        first += tl.load(sums + at, mask=inside, other=0.0)
        second += tl.load(sums + at + pixels * channels, mask=inside, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _statistics_kernel(sums, blocks, centre, weight, bias, kept, own, channels, count, eps,
                       pixels: tl.constexpr, lines: tl.constexpr,
                       lanes: tl.constexpr) -> None:  # fmt: skip
    column = tl.program_id(0) * lanes + tl.arange(0, lanes)
    there = column < channels
    total, square = _sum_of_blocks(sums, blocks, channels, column, there, pixels, lines, lanes)
    off = total / count
    mean = off + tl.load(centre + column, mask=there, other=0.0).to(tl.float32)
    variance = square / count - off * off
    variance = tl.where(variance < 0, 0.0, variance)  # what is not a number stays so
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    scale = rstd * tl.load(weight + column, mask=column < own, other=0.0)
    shift = tl.load(bias + column, mask=column < own, other=0.0) - mean * scale
    tl.store(kept + column, mean, mask=there)
    tl.store(kept + channels + column, rstd, mask=there)
    tl.store(kept + 2 * channels + column, scale, mask=there)
    tl.store(kept + 3 * channels + column, shift, mask=there)
    tl.store(kept + 4 * channels + column, variance, mask=there)


@triton.jit
def _channels_kernel(sums, blocks, kept, found, channels, count, pixels: tl.constexpr,
                   lines: tl.constexpr, lanes: tl.constexpr) -> None:  # fmt: skip
    column = tl.program_id(0) * lanes + tl.arange(0, lanes)
    there = column < channels
    total, product = _sum_of_blocks(sums, blocks, channels, column, there, pixels, lines, lanes)
    mean = tl.load(kept + column, mask=there, other=0.0)
    rstd = tl.load(kept + channels + column, mask=there, other=0.0)
    scale = tl.load(kept + 2 * channels + column, mask=there, other=0.0)
    product = product * rstd
    factor = -scale * rstd * product / count
    tl.store(found + column, product, mask=there)
    tl.store(found + channels + column, total, mask=there)
    tl.store(found + 2 * channels + column, factor, mask=there)
    tl.store(found + 3 * channels + column, -scale * total / count - mean * factor, mask=there)


@triton.jit
def _normalise_kernel(clips, kept, result, rows, width, channels, relu: tl.constexpr,
                      block: tl.constexpr, lanes: tl.constexpr) -> None:  # fmt: skip
    columns = tl.program_id(1) * lanes + tl.arange(0, lanes)
    there = columns < width
    channel = columns % channels
    scale = tl.load(kept + 2 * channels + channel, mask=there, other=0.0)[None, :]
    shift = tl.load(kept + 3 * channels + channel, mask=there, other=0.0)[None, :]
    begin, jump = tl.program_id(0) * block, tl.num_programs(0) * block
    for start in range(begin, rows, jump):
        places = start + tl.arange(0, block)
        inside = (places < rows)[:, None] & there[None, :]
        at = places.to(tl.int64)[:, None] * width + columns[None, :]
        value = tl.load(clips + at, mask=inside, other=0.0).to(tl.float32) * scale + shift
        if relu:
            value = tl.where(value < 0, 0.0, value)  # what is not a number stays so
        tl.store(result + at, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(gradient, clips, kept, found, result, rows, width, channels,
                     relu: tl.constexpr, block: tl.constexpr,
                     lanes: tl.constexpr) -> None:  # fmt: skip
    columns = tl.program_id(1) * lanes + tl.arange(0, lanes)
    there = columns < width
    channel = columns % channels
    scale = tl.load(kept + 2 * channels + channel, mask=there, other=0.0)[None, :]
    shift = tl.load(kept + 3 * channels + channel, mask=there, other=0.0)[None, :]
    factor = tl.load(found + 2 * channels + channel, mask=there, other=0.0)[None, :]
    offset = tl.load(found + 3 * channels + channel, mask=there, other=0.0)[None, :]
    begin, jump = tl.program_id(0) * block, tl.num_programs(0) * block
    for start in range(begin, rows, jump):
        places = start + tl.arange(0, block)
        inside = (places < rows)[:, None] & there[None, :]
        at = places.to(tl.int64)[:, None] * width + columns[None, :]
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(clips + at, mask=inside, other=0.0).to(tl.float32)
        if relu:
            slope = tl.where(value * scale + shift > 0, slope, 0.0)
        slope = slope * scale + (value * factor + offset)
        tl.store(result + at, slope.to(result.dtype.element_ty), mask=inside)


class _Grid:
    """How kernels go over clips (N, C, T, H, W), channels last: as rows of some pixels."""

    def __init__(self, clips: torch.Tensor) -> None:
        self._clips = clips
        self.channels = clips.shape[1]
        self.count = clips.numel() // self.channels
        self._pixels = 1 if self.count % _PIXELS else _PIXELS
        self._rows, self._width = self.count // self._pixels, self.channels * self._pixels
        self._across = -(-self._width // _COLUMNS)
        self._blocks = max(1, min(-(-self._rows // _ROWS), _PROGRAMS // self._across))

    def sums(self, kernel: Any, *given: torch.Tensor, **options: bool) -> torch.Tensor:
        """Return the two sums of every block and column that a kernel takes, float32."""
        shape = (self._blocks, 2, self._width)
        sums = self._clips.new_empty(shape, dtype=torch.float32)
        self.run(kernel, *given, sums, warps=4, **options)
        return sums

    def run(self, kernel: Any, *given: torch.Tensor, warps: int, **options: bool) -> None:
        """Start a kernel that goes down the rows."""
        kernel[(self._blocks, self._across)](
            *given, self._rows, self._width, self.channels, **options,
            block=_ROWS, lanes=_COLUMNS, num_warps=warps,
        )  # fmt: skip

    def finish(self, kernel: Any, sums: torch.Tensor, *given: Any) -> None:
        """Start a kernel that adds up the sums of all blocks."""
        lanes = 8
        kernel[(-(-self.channels // lanes),)](
            sums, self._blocks, *given, pixels=self._pixels, lines=512, lanes=lanes, num_warps=8
        )


@custom_op("kprep::batchnorm_statistics", mutates_args=())
def statistics(
    clips: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return what the layer keeps (5, C) of (N, C, T, H, W); `weight` may have fewer channels."""
    grid = _Grid(clips)
    # sums around a pixel's values cancel little; one from inside, as padding acts at the edges
    n, _, t, h, w = clips.shape
    centre = clips[n // 2, :, t // 2, h // 2, w // 2]
    sums = grid.sums(_moments_kernel, clips, centre)
    kept = clips.new_empty((5, grid.channels), dtype=torch.float32)
    grid.finish(
        _statistics_kernel, sums, centre, weight, bias, kept, len(weight), grid.channels,
        grid.count, eps,
    )  # fmt: skip
    return kept


@custom_op("kprep::batchnorm_channel_gradients", mutates_args=())
def channel_gradients(
    gradient: torch.Tensor, clips: torch.Tensor, kept: torch.Tensor, relu: bool
) -> torch.Tensor:
    """Return the gradients of weight and bias, and two constants of `backward`: (4, C)."""
    grid = _Grid(clips)
    gradient = gradient.contiguous(memory_format=torch.channels_last_3d)  # compiled, it may not be
    sums = grid.sums(_gradient_kernel, gradient, clips, kept, relu=relu)
    found = torch.empty_like(kept[:4])
    grid.finish(_channels_kernel, sums, kept, found, grid.channels, grid.count)
    return found


@custom_op("kprep::batchnorm_normalise", mutates_args=())
def normalise(clips: torch.Tensor, kept: torch.Tensor, relu: bool) -> torch.Tensor:
    """Return the normalised clips."""
    result = torch.empty_like(clips)
    _Grid(clips).run(_normalise_kernel, clips, kept, result, relu=relu, warps=8)
    return result


@custom_op("kprep::batchnorm_backward", mutates_args=())
def backward(
    gradient: torch.Tensor, clips: torch.Tensor, kept: torch.Tensor, found: torch.Tensor,
    relu: bool,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of the clips from one that is channels last, too.

    `found` is what `channel_gradients` gives.
    """
    result = torch.empty_like(clips)
    given = (gradient, clips, kept, found, result)
    _Grid(clips).run(_backward_kernel, *given, relu=relu, warps=8)
    return result


@statistics.register_fake
def _(clips: torch.Tensor, *_: object) -> torch.Tensor:
    return clips.new_empty((5, clips.shape[1]), dtype=torch.float32)


@channel_gradients.register_fake
def _(_: torch.Tensor, clips: torch.Tensor, *__: object) -> torch.Tensor:
    return clips.new_empty((4, clips.shape[1]), dtype=torch.float32)


@normalise.register_fake
def _(clips: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(clips)


@backward.register_fake
def _(_: torch.Tensor, clips: torch.Tensor, *__: object) -> torch.Tensor:
    return torch.empty_like(clips)
