"""3-D convolutions in the form that tensor cores take, with nothing changed that is stored.

Tensor cores read bf16 and fp16 activations in groups of 8 channels. R(2+1)D's middle layers have
45, 230, 460 and 921 channels, and every network begins with 3: cuDNN then takes kernels that are
several times slower. Here such layers compute with zeros up to a multiple of 8 or 128, those in the
middle where the network is kprep's or torchvision's; the first one sees squares of pixels as one
pixel with more channels. And convolutions along space or time alone, which cuDNN does better in two
dimensions, are done there: with channels last that is another view of the same memory. Weights,
their names and their gradients stay as they were. What it gives: docs/performance.md, "Training".
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

_GROUP = 8
_RGB = 3


class _TensorCoreConv3d(nn.Conv3d):
    """Computes with zero channels, for RGB and where its neighbours do."""

    takes_zeros = False
    """Whether the clips that come have zero channels behind the layer's own."""
    gives_zeros = False
    """Whether what follows takes zero channels behind the layer's own."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Convolve (N, C, T, H, W)."""
        weight, stride, padding = self.weight, self.stride, cast("tuple[int, ...]", self.padding)
        if self.in_channels == clips.shape[1] == _RGB:
            clips = _reduced(clips)
            if stride[1] == stride[2] > 1 and self.dilation[1:] == (1, 1):
                clips, weight = _space_to_depth(clips, weight, stride[1], padding[1:])
                stride, padding = (stride[0], 1, 1), (padding[0], 0, 0)
            size = _multiple(clips.shape[1], _GROUP)
            clips, weight = _pad(clips, 1, size), _pad(weight, 1, size)
        elif self.takes_zeros:
            weight = _pad(weight, 1, _padded(self.in_channels))
        if self.gives_zeros:
            weight = _pad(weight, 0, _padded(self.out_channels))
        return _convolve(clips, weight, self.bias, stride, padding, self.dilation)


class PaddedBatchNorm3d(nn.BatchNorm3d):
    """Leaves the zero channels behind its own zero."""

    takes_zeros = False
    """Whether the clips that come may have zero channels behind the layer's own."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, T, H, W)."""
        own, size = self.num_features, clips.shape[1]
        if size == own or not self.takes_zeros:
            return super().forward(clips)  # which refuses another number of channels
        mean = _pad(cast("torch.Tensor", self.running_mean), 0, size)
        variance = _pad(cast("torch.Tensor", self.running_var), 0, size)
        weight, bias = _pad(self.weight, 0, size), _pad(self.bias, 0, size)
        momentum = cast("float", self.momentum)
        result = functional.batch_norm(
            clips, mean, variance, weight, bias, self.training, momentum, self.eps
        )
        if self.training:
            with torch.no_grad():
                cast("torch.Tensor", self.running_mean).copy_(mean[:own])
                cast("torch.Tensor", self.running_var).copy_(variance[:own])
                cast("torch.Tensor", self.num_batches_tracked).add_(1)
        return result


def use_tensor_cores(model: nn.Module, *, pads_between: bool) -> None:
    """Give a network's 3-D convolutions that form, in place.

    Layers that are no plain nn.Conv3d stay as they are. With `pads_between`, channels between two
    of them are padded where they stand in a row in an nn.Sequential, with a BatchNorm3d and a ReLU
    between them: for networks that are known to use nothing in between.
    """
    for module in list(model.modules()):
        if _is_plain(module) and type(module) is nn.Conv3d:
            become(module, _TensorCoreConv3d)
    for module in list(model.modules()) if pads_between else ():
        # a forward of its own may use what is in between
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            layers = list(module)
            for place in range(len(layers) - 3):
                _pad_between(*layers[place : place + 4])


def restore_layers(model: nn.Module) -> None:
    """Undo `use_tensor_cores`, for counting a network's operations without those on zeros."""
    for module in model.modules():
        if isinstance(module, _TensorCoreConv3d):
            become(module, nn.Conv3d)
        elif isinstance(module, PaddedBatchNorm3d):
            become(module, nn.BatchNorm3d)


def _pad_between(first: nn.Module, norm: nn.Module, relu: nn.Module, last: nn.Module) -> None:
    """Let the channels between two convolutions be a multiple of 8 or 128."""
    if not (isinstance(first, _TensorCoreConv3d) and isinstance(last, _TensorCoreConv3d)):
        return
    if not (type(norm) is nn.BatchNorm3d and type(relu) is nn.ReLU) or first.bias is not None:
        return
    is_usual = norm.affine and norm.track_running_stats and norm.momentum is not None
    if is_usual and norm.num_features % _GROUP:
        first.gives_zeros = last.takes_zeros = True
        become(norm, PaddedBatchNorm3d)
        cast("PaddedBatchNorm3d", norm).takes_zeros = True


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a layer another forward pass; weights, names and hooks stay."""
    module.__class__ = kind


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv3d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _space_to_depth(
    clips: torch.Tensor, weight: torch.Tensor, stride: int, padding: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return clips and weights of the same convolution with a stride of 1 in space, unpadded.

    Squares of stride x stride pixels become one pixel with as many times the channels: RGB has too
    few of them for tensor cores. A kernel of 7 x 7 pixels, which stands 3 before its output's
    first, becomes one of 4 x 4 such squares: with a zero before it, it begins at a square's edge.
    """
    clips, weight = clips.permute(0, 2, 3, 4, 1), weight.permute(0, 2, 3, 4, 1)
    for axis in (2, 3):
        size, kernel, before = clips.shape[axis], weight.shape[axis], padding[axis - 2]
        front = -before % stride
        squares = -(-(kernel + front) // stride)
        length = (size + 2 * before - kernel) // stride + squares
        weight = _pad(weight, axis, squares * stride - front, at=front)
        clips = _pad(clips, axis, length * stride - before - front, at=before + front)
    return _squares(clips, stride), _squares(weight, stride)


def _squares(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Return (N, T, H, W, C) as (N, side * side * C, T, H / side, W / side), channels last."""
    n, t, height, width, channels = pixels.shape
    split = pixels.reshape(n, t, height // side, side, width // side, side, channels)
    return split.transpose(3, 4).flatten(4).permute(0, 4, 1, 2, 3)


def _convolve(
    clips: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
) -> torch.Tensor:  # fmt: skip
    """Convolve, in two dimensions where the kernel looks along space or time alone."""
    if (weight.shape[2], stride[0], padding[0]) == (1, 1, 0):  # each frame by itself
        frames = clips.transpose(1, 2).flatten(0, 1)
        result = functional.conv2d(
            frames, weight[:, :, 0], bias, stride[1:], padding[1:], dilation[1:]
        )
        return result.view(clips.shape[0], clips.shape[2], *result.shape[1:]).transpose(1, 2)
    if weight.shape[3:] == stride[1:] == (1, 1) and padding[1:] == (0, 0):  # each pixel by itself
        pixels = clips.flatten(3)
        result = functional.conv2d(
            pixels, weight[..., 0], bias, (stride[0], 1), (padding[0], 0), (dilation[0], 1)
        )
        return result.view(*result.shape[:3], *clips.shape[3:])
    return functional.conv3d(clips, weight, bias, stride, padding, dilation)


def _reduced(clips: torch.Tensor) -> torch.Tensor:
    """Return the clips in autocast's type, in which the convolution takes them anyway."""
    kind = clips.device.type
    return clips.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else clips


def _pad(tensor: torch.Tensor, axis: int, size: int, at: int = 0) -> torch.Tensor:
    """Return the tensor with zeros: `at` before an axis, and behind it up to `size` from there."""
    missing = size - tensor.shape[axis]
    if not (missing or at):
        return tensor
    return functional.pad(tensor, [0, 0] * (tensor.ndim - axis - 1) + [at, missing])


def _padded(channels: int) -> int:
    """Return to how many channels a layer between two others is padded.

    cuDNN's kernels take 64 or 128 channels at a time: to fill them pays where it adds little.
    """
    whole = _multiple(channels, 128)
    return whole if whole <= channels * 9 / 8 else _multiple(channels, _GROUP)


def _multiple(channels: int, of: int) -> int:
    return -(-channels // of) * of
