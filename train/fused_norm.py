"""BatchNorm in training by kernels of our own, with the ReLU behind it, on a GPU.

BatchNorm and ReLU are a third and more of a training step of the Video ResNets, and nearly all of
it is memory that is read and written. `train/norm_kernels.py` has the kernels, docs/performance.md
("Training") what they give. Weights, statistics, their names and their gradients stay as they were;
evaluation and frozen layers are PyTorch's own.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from train.tensor_cores import PaddedBatchNorm3d, become
from train.triton_support import failure, why_no_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_EPS = 1e-5
_TOLERANCE = 0.02  # of norms: bfloat16 is off by 0.2 to 0.4 %


class _Normalise(torch.autograd.Function):
    """Batch normalisation of (N, C, T, H, W), channels last, with or without ReLU.

    Takes clips, weight, bias, what norm_kernels.statistics gives for them, and whether with ReLU.
    Where it is compiled, the compiler writes the results, fused with what comes next.
    """

    @staticmethod
    def forward(
        context: Any, clips: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,  # noqa: ARG004
        kept: torch.Tensor, relu: bool,
    ) -> torch.Tensor:  # fmt: skip
        from train import norm_kernels

        context.save_for_backward(clips, kept)
        context.own, context.relu = len(weight), relu
        if not torch.compiler.is_compiling():
            return cast("torch.Tensor", norm_kernels.normalise(clips, kept, relu))
        # in float32; no tensor may be another's alias here: PyTorch 2.11 then loses the gradient
        _, _, scale, shift, _ = kept
        result = clips * _by_channel(scale) + _by_channel(shift)
        result = result.relu() if relu else result
        return result if clips.dtype == torch.float32 else result.to(clips.dtype)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        from train import norm_kernels

        (clips, kept), relu = context.saved_tensors, context.relu
        compiles = torch.compiler.is_compiling()
        if not compiles:
            gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        found = norm_kernels.channel_gradients(gradient, clips, kept, relu)
        of_weight, of_bias, factor, offset = found
        if not compiles:
            result = norm_kernels.backward(gradient, clips, kept, found, relu)
        else:
            _, _, scale, shift, _ = kept
            if relu:
                is_on = clips * _by_channel(scale) + _by_channel(shift) > 0
                gradient = torch.where(is_on, gradient, 0.0)
            result = clips * _by_channel(factor) + _by_channel(offset)
            result = (gradient * _by_channel(scale) + result).to(clips.dtype)
        return result, of_weight[: context.own], of_bias[: context.own], None, None


def _normalised(
    clips: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, relu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised clips, and what their layer keeps."""
    from train import norm_kernels

    with torch.no_grad():
        kept = norm_kernels.statistics(clips, weight, bias, eps)
    return cast("torch.Tensor", _Normalise.apply(clips, weight, bias, kept, relu)), kept


class _FusedBatchNorm3d(PaddedBatchNorm3d):
    """BatchNorm3d that may do the ReLU behind it, and leaves zero channels behind its own zero."""

    relu = False

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, T, H, W)."""
        fits = self.takes_zeros or clips.shape[1] == self.num_features
        if not (self.training and fits and _suits(clips)):
            result = super().forward(clips)
            return result.relu() if self.relu else result
        own, count = self.num_features, clips.numel() // clips.shape[1]
        result, kept = _normalised(clips, self.weight, self.bias, self.eps, relu=self.relu)
        with torch.no_grad():
            momentum = cast("float", self.momentum)
            mean, _, _, _, variance = kept[:, :own]
            cast("torch.Tensor", self.running_mean).lerp_(mean, momentum)
            unbiased = variance * (count / (count - 1))
            cast("torch.Tensor", self.running_var).lerp_(unbiased, momentum)
            cast("torch.Tensor", self.num_batches_tracked).add_(1)
        return result


class _DoneReLU(nn.ReLU):
    """Stands behind a layer that does the ReLU itself."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Return the clips."""
        return clips


def use_fused_norm(model: nn.Module, *, with_relu: bool) -> None:
    """Give a network's 3-D batch normalisation this form, in place; after `use_tensor_cores`.

    Layers of other types, and without weights or running statistics, stay as they are. With
    `with_relu`, a ReLU that follows in an nn.Sequential is done with it: for networks that are
    known to use nothing in between.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm3d) and _is_usual(module):
            become(module, _FusedBatchNorm3d)
    for module in list(model.modules()) if with_relu else ():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for norm, after in pairwise(module):
                if isinstance(norm, _FusedBatchNorm3d) and type(after) is nn.ReLU:
                    norm.relu = True
                    become(after, _DoneReLU)


def restore_norm(model: nn.Module) -> None:
    """Undo `use_fused_norm`, but for the padding."""
    for module in model.modules():
        if isinstance(module, _FusedBatchNorm3d):
            module.relu = False
            become(module, PaddedBatchNorm3d)
        elif isinstance(module, _DoneReLU):
            become(module, nn.ReLU)


def has_fused_norm(model: nn.Module) -> bool:
    """Return whether a network has layers that take this form, or have it."""
    return any(
        isinstance(module, _FusedBatchNorm3d) or _is_usual(module) for module in model.modules()
    )


@cache
def why_not_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a device cannot take this form, or None: a layer is tried on it.

    Triton needs a C compiler and Python's headers, and a GPU with bfloat16 (compute capability
    8.0). Where one is missing, or the result is wrong, training goes on with PyTorch's kernels.
    """
    if reason := why_no_triton(device):
        return reason
    try:
        off = _error_of_a_layer(device, dtype)
    except Exception as error:  # noqa: BLE001 - the compiler may raise anything
        return failure(error)
    return None if off <= _TOLERANCE else f"Triton's results are off by {off:.1%}"


@torch.enable_grad()
def _error_of_a_layer(device: torch.device, dtype: torch.dtype) -> float:
    """Return by how much a layer's results or gradients are off those of PyTorch in float32."""
    generator = torch.Generator().manual_seed(0)  # the run's own generators stay untouched
    drawn = [torch.randn((2, 32, 4, 8, 8), generator=generator).to(device, dtype) for _ in "cg"]
    clips, gradient = (one.contiguous(memory_format=torch.channels_last_3d) for one in drawn)
    weight, bias = torch.linspace(0.5, 1.5, 32), torch.linspace(-0.5, 0.5, 32)
    given = [clips, weight.to(device), bias.to(device)]
    exact = [one.float() for one in given]
    for leaf in (*given, *exact):
        leaf.requires_grad_()
    result, _ = _normalised(given[0], given[1], given[2], _EPS, relu=True)
    found = [result, *torch.autograd.grad(result, given, gradient)]
    plain = functional.batch_norm(
        exact[0], None, None, exact[1], exact[2], training=True, eps=_EPS
    ).relu()
    wanted = [plain, *torch.autograd.grad(plain, exact, gradient.float())]
    errors = [
        (one.float() - other).norm() / other.norm()
        for one, other in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(errors).detach().max())  # which keeps what is not a number


def _is_usual(norm: nn.Module) -> bool:
    return (
        type(norm) in (nn.BatchNorm3d, PaddedBatchNorm3d)
        and isinstance(norm, nn.BatchNorm3d)
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype == cast("torch.Tensor", norm.running_mean).dtype == torch.float32
    )


def _suits(clips: torch.Tensor) -> bool:
    """Return whether the kernels take these clips; PyTorch says what is wrong with one pixel."""
    return (
        clips.ndim == 5
        and clips.dtype in _DTYPES
        and clips.shape[1] % 8 == 0
        and clips.numel() > clips.shape[1]
        and clips.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _by_channel(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
