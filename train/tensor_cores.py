"""3-D convolutions in the form that tensor cores take, with nothing changed that is stored.

Tensor cores read bf16 and fp16 activations in groups of 8 channels. R(2+1)D's middle layers have
45, 230, 460 and 921 channels, and every network begins with 3: cuDNN then takes kernels that are
several times slower. Here such layers compute with zeros up to the next multiple of 8, those in the
middle where the network is kprep's or torchvision's. And convolutions along space or time alone,
which cuDNN does better in two dimensions, are done there: with channels last that is another view
of the same memory. Weights, their names and their gradients stay as they were. What it gives:
docs/performance.md, "Training".
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
        weight, size = self.weight, _rounded_up(self.in_channels)
        if self.in_channels == clips.shape[1] == _RGB:
            clips = _pad(_reduced(clips), 1, size)
            weight = _pad(weight, 1, size)
        elif self.takes_zeros:
            weight = _pad(weight, 1, size)
        if self.gives_zeros:
            weight = _pad(weight, 0, _rounded_up(self.out_channels))
        return _convolve(clips, weight, self)


class _PaddedBatchNorm3d(nn.BatchNorm3d):
    """Leaves the zero channels behind its own zero."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, T, H, W)."""
        own, size = self.num_features, clips.shape[1]
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
            _become(module, _TensorCoreConv3d)
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
            _become(module, nn.Conv3d)
        elif isinstance(module, _PaddedBatchNorm3d):
            _become(module, nn.BatchNorm3d)


def _pad_between(first: nn.Module, norm: nn.Module, relu: nn.Module, last: nn.Module) -> None:
    """Let the channels between two convolutions be a multiple of 8."""
    if not (isinstance(first, _TensorCoreConv3d) and isinstance(last, _TensorCoreConv3d)):
        return
    if not (type(norm) is nn.BatchNorm3d and type(relu) is nn.ReLU) or first.bias is not None:
        return
    is_usual = norm.affine and norm.track_running_stats and norm.momentum is not None
    if is_usual and norm.num_features % _GROUP:
        first.gives_zeros = last.takes_zeros = True
        _become(norm, _PaddedBatchNorm3d)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a layer another forward pass; weights, names and hooks stay."""
    module.__class__ = kind


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv3d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _convolve(clips: torch.Tensor, weight: torch.Tensor, layer: nn.Conv3d) -> torch.Tensor:
    """Convolve as `layer` does, in two dimensions where it looks along space or time alone."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    padding = cast("tuple[int, ...]", layer.padding)
    if (kernel[0], stride[0], padding[0]) == (1, 1, 0):  # each frame by itself
        frames = clips.transpose(1, 2).flatten(0, 1)
        result = functional.conv2d(
            frames, weight[:, :, 0], layer.bias, stride[1:], padding[1:], dilation[1:]
        )
        return result.view(clips.shape[0], clips.shape[2], *result.shape[1:]).transpose(1, 2)
    if kernel[1:] == stride[1:] == (1, 1) and padding[1:] == (0, 0):  # each pixel by itself
        pixels = clips.flatten(3)
        result = functional.conv2d(
            pixels, weight[..., 0], layer.bias,
            (stride[0], 1), (padding[0], 0), (dilation[0], 1),
        )  # fmt: skip
        return result.view(*result.shape[:3], *clips.shape[3:])
    return functional.conv3d(clips, weight, layer.bias, stride, padding, dilation)


def _reduced(clips: torch.Tensor) -> torch.Tensor:
    """Return the clips in autocast's type, in which the convolution takes them anyway."""
    kind = clips.device.type
    return clips.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else clips


def _pad(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Return the tensor with zeros at the end of an axis, up to `size`."""
    missing = size - tensor.shape[axis]
    if not missing:
        return tensor
    return functional.pad(tensor, [0, 0] * (tensor.ndim - axis - 1) + [0, missing])


def _rounded_up(channels: int) -> int:
    return -(-channels // _GROUP) * _GROUP
