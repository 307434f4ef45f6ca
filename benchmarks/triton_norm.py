"""BatchNorm and ReLU in training with sums by Triton: a contender of network_step.py.

What it is after: torch.compile's own kernels for these sums reach half of the memory's rate (see
docs/performance.md, "Training"). Here each sum over (N, T, H, W) is one pass over memory as it
lies: channels last, 8 pixels seen as one row, so that rows are a multiple of 64 numbers whatever
the channels are. Everything else of the layer stays PyTorch's, for torch.compile to fuse. Channels
must be a multiple of 8, as train/tensor_cores.py pads them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import nn
from torch.library import custom_op

_PIXELS = 8
_ROWS, _COLUMNS = 32, 64  # of one block: with 4 warps two loads of 16 bytes a thread
_PROGRAMS = 2048  # at the most; a Hopper GPU holds 132 multiprocessors with some 8 each


@triton.jit
def _moments_kernel(clips, shift, sums, squares, rows, each, width, channels,
                    block: tl.constexpr, lanes: tl.constexpr) -> None:  # fmt: skip
    columns = tl.program_id(1) * lanes + tl.arange(0, lanes)
    there = columns < width
    middle = tl.load(shift + columns % channels, mask=there, other=0.0)
    begin = tl.program_id(0) * each
    total = tl.zeros((block, lanes), dtype=tl.float32)
    square = tl.zeros((block, lanes), dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + each, rows), block):
        places = start + tl.arange(0, block)
        inside = (places < rows)[:, None] & there[None, :]
        at = places.to(tl.int64)[:, None] * width + columns[None, :]
        value = tl.load(clips + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - middle[None, :], 0.0)
        total += value
        square += value * value
    out = tl.program_id(0) * width + columns
    tl.store(sums + out, tl.sum(total, 0), mask=there)
    tl.store(squares + out, tl.sum(square, 0), mask=there)


@triton.jit
def _gradient_kernel(gradient, clips, mean, rate, weight, bias, sums, products, rows, each, width,
                     channels, relu: tl.constexpr, block: tl.constexpr,
                     lanes: tl.constexpr) -> None:  # fmt: skip
    columns = tl.program_id(1) * lanes + tl.arange(0, lanes)
    there = columns < width
    channel = columns % channels
    middle = tl.load(mean + channel, mask=there, other=0.0)[None, :]
    scale = tl.load(rate + channel, mask=there, other=0.0)[None, :]
    factor = tl.load(weight + channel, mask=there, other=0.0)[None, :]
    offset = tl.load(bias + channel, mask=there, other=0.0)[None, :]
    begin = tl.program_id(0) * each
    total = tl.zeros((block, lanes), dtype=tl.float32)
    product = tl.zeros((block, lanes), dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + each, rows), block):
        places = start + tl.arange(0, block)
        inside = (places < rows)[:, None] & there[None, :]
        at = places.to(tl.int64)[:, None] * width + columns[None, :]
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(clips + at, mask=inside, other=0.0).to(tl.float32)
        value = (value - middle) * scale
        if relu:
            slope = tl.where(value * factor + offset > 0, slope, 0.0)
        total += slope
        product += slope * value  # beyond the rows the slope is zero
    out = tl.program_id(0) * width + columns
    tl.store(sums + out, tl.sum(total, 0), mask=there)
    tl.store(products + out, tl.sum(product, 0), mask=there)


@custom_op("kprep_bench::moments", mutates_args=())
def _moments(clips: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return sums over (pixels, C) less `shift`, and of its squares, by block: (2, blocks, C)."""
    return _by_blocks(_moments_kernel, clips, [clips, shift], {})


@custom_op("kprep_bench::gradient_sums", mutates_args=())
def _gradient_sums(
    gradient: torch.Tensor, clips: torch.Tensor, mean: torch.Tensor, rate: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, relu: bool,
) -> torch.Tensor:  # fmt: skip
    """Return sums of the gradient before ReLU, and of it times the normalised clips, by block."""
    arguments = [gradient.contiguous(), clips, mean, rate, weight, bias]
    return _by_blocks(_gradient_kernel, clips, arguments, {"relu": relu})


@_moments.register_fake
def _(clips: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return _room(clips)


@_gradient_sums.register_fake
def _(_: torch.Tensor, clips: torch.Tensor, *__: object) -> torch.Tensor:
    return _room(clips)


def _grid(clips: torch.Tensor) -> tuple[int, int, int]:
    """Return blocks of rows, blocks of columns, and how many pixels a row has."""
    pixels, channels = clips.shape
    together = 1 if pixels % _PIXELS else _PIXELS
    across = -(-channels * together // _COLUMNS)
    return max(1, min(-(-pixels // together // _ROWS), _PROGRAMS // across)), across, together


def _room(clips: torch.Tensor) -> torch.Tensor:
    """Return memory for two sums of every block, column and channel, float32."""
    blocks, _, together = _grid(clips)
    return clips.new_empty((2, blocks * together, clips.shape[1]), dtype=torch.float32)


def _by_blocks(
    kernel: Any, clips: torch.Tensor, arguments: list[torch.Tensor], options: dict[str, Any]
) -> torch.Tensor:
    """Run a kernel over blocks of rows; what the blocks give is added up in a fixed order."""
    (blocks, across, together), channels = _grid(clips), clips.shape[1]
    width, rows = channels * together, len(clips) // together
    each = -(-rows // (blocks * _ROWS)) * _ROWS
    result = _room(clips)
    kernel[(blocks, across)](
        *arguments, result[0], result[1], rows, each, width, channels, **options,
        block=_ROWS, lanes=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return result


class _Normalise(torch.autograd.Function):
    """BatchNorm in training over (pixels, C), with or without the ReLU behind it."""

    @staticmethod
    def forward(  # type: ignore[override]
        context: Any, clips: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
        relu: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        count = clips.shape[0]
        shift = clips[0].float()  # sums of squares around it do not cancel
        total, square = _moments(clips, shift).sum(1)
        mean = total / count + shift
        variance = (square / count - (total / count) ** 2).clamp(min=0)
        rate = torch.rsqrt(variance + eps)
        result = (clips.float() - mean) * rate * weight + bias
        if relu:
            result = result.relu()
        context.save_for_backward(clips, mean, rate, weight, bias)
        context.relu = relu
        context.mark_non_differentiable(mean, variance)
        return result.to(clips.dtype), mean, variance

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:  # type: ignore[override]
        clips, mean, rate, weight, bias = context.saved_tensors
        gradient = gradients[0]
        sums = _gradient_sums(gradient, clips, mean, rate, weight, bias, context.relu)
        total, product = sums.sum(1)
        value, slope = (clips.float() - mean) * rate, gradient.float()
        if context.relu:
            slope = torch.where(value * weight + bias > 0, slope, 0.0)
        result = (slope - (total + value * product) / clips.shape[0]) * (rate * weight)
        return result.to(clips.dtype), product, total, None, None


class _TritonBatchNorm3d(nn.BatchNorm3d):
    """Normalises (N, C, T, H, W), channels last, and does the ReLU that stands behind it."""

    relu = False

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Normalise over (N, T, H, W)."""
        own, size = self.num_features, clips.shape[1]
        weight = nn.functional.pad(self.weight, (0, size - own))
        bias = nn.functional.pad(self.bias, (0, size - own))
        pixels = clips.permute(0, 2, 3, 4, 1)
        flat = pixels.reshape(-1, size)
        result, mean, variance = _Normalise.apply(flat, weight, bias, self.eps, self.relu)
        with torch.no_grad():
            rate, count = cast("float", self.momentum), len(flat)
            cast("torch.Tensor", self.running_mean).lerp_(mean[:own], rate)
            spread = variance[:own] * (count / (count - 1))
            cast("torch.Tensor", self.running_var).lerp_(spread, rate)
            cast("torch.Tensor", self.num_batches_tracked).add_(1)
        return cast("torch.Tensor", result.view(pixels.shape).permute(0, 4, 1, 2, 3))


def use_triton_norm(model: nn.Module) -> None:
    """Give a network's BatchNorm3d layers this form, in place, for training alone."""
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            layers = list(module)
            for norm, after in pairwise(layers):
                if isinstance(norm, nn.BatchNorm3d) and type(after) is nn.ReLU:
                    norm.__class__, after.__class__ = _TritonBatchNorm3d, nn.Identity
                    cast("_TritonBatchNorm3d", norm).relu = True
        if isinstance(module, nn.BatchNorm3d):
            module.__class__ = _TritonBatchNorm3d
