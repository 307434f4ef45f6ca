"""BatchNorm in training by kernels of our own, with the ReLU behind it, on a GPU.

BatchNorm and ReLU are a third and more of a training step of the Video ResNets, and nearly all of
it is memory that is read and written. `train/norm_kernels.py` has the kernels, docs/performance.md
("Training") what they give. Weights, statistics, their names and their gradients stay as they were;
evaluation and frozen layers are PyTorch's own.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from train.tensor_cores import PaddedBatchNorm3d, become

_MEAN, _SCALE, _SHIFT, _VARIANCE = 0, 2, 3, 4  # rows of what a layer keeps
_KINDS = (torch.bfloat16, torch.float16, torch.float32)
_EPS = 1e-5
_TOLERANCE = 0.02  # of norms: bfloat16 is off by 0.2 to 0.4 %


class _Normalise(torch.autograd.Function):
    """Batch normalisation of (N, C, T, H, W), channels last, with or without ReLU.

    Takes clips, weight, bias, what norm_kernels.statistics gives for them, and whether with ReLU.
    Where it is compiled, the compiler writes the results, fused with what comes next.
    """

    @staticmethod
    def forward(
        context: Any, clips: torch.Tensor, weight: torch.Tensor, _: torch.Tensor,
        kept: torch.Tensor, relu: bool,
    ) -> torch.Tensor:  # fmt: skip
        from train import norm_kernels

        context.save_for_backward(clips, kept)
        context.own, context.relu = len(weight), relu
        if not torch.compiler.is_compiling():
            return cast("torch.Tensor", norm_kernels.normalise(clips, kept, relu))
        # in float32; no tensor may be another's alias here: PyTorch 2.11 then loses the gradient
        result = clips * _by_channel(kept[_SCALE]) + _by_channel(kept[_SHIFT])
        result = result.relu() if relu else result
        return result if clips.dtype == torch.float32 else result.to(clips.dtype)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        from train import norm_kernels

        (clips, kept), relu = context.saved_tensors, context.relu
        slopes = norm_kernels.slopes(gradient, clips, kept, relu)
        of_weight, of_bias, factor, offset = slopes
        if not torch.compiler.is_compiling():
            result = norm_kernels.backward(gradient, clips, kept, slopes, relu)
        else:
            slope, scale = gradient, _by_channel(kept[_SCALE])
            if relu:
                slope = torch.where(clips * scale + _by_channel(kept[_SHIFT]) > 0, slope, 0.0)
            result = slope * scale + (clips * _by_channel(factor) + _by_channel(offset))
            result = result.to(clips.dtype)
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
        if not (self.training and _suits(clips)):
            result = super().forward(clips)
            return result.relu() if self.relu else result
        own, count = self.num_features, clips.numel() // clips.shape[1]
        result, kept = _normalised(clips, self.weight, self.bias, self.eps, relu=self.relu)
        with torch.no_grad():
            rate = cast("float", self.momentum)
            variance = kept[_VARIANCE, :own] * (count / (count - 1))
            cast("torch.Tensor", self.running_mean).lerp_(kept[_MEAN, :own], rate)
            cast("torch.Tensor", self.running_var).lerp_(variance, rate)
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
            become(module, PaddedBatchNorm3d)
        elif isinstance(module, _DoneReLU):
            become(module, nn.ReLU)


@cache
def why_not_fused(device: torch.device, kind: torch.dtype) -> str | None:
    """Return why a device cannot take this form, or None: a layer is tried on it.

    Triton needs a C compiler, and a GPU with bfloat16 (compute capability 8.0). Where either is
    missing, or the result is wrong, training goes on with PyTorch's kernels.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        off = _error_of_a_layer(device, kind)
    except Exception as error:  # noqa: BLE001 - the compiler may raise anything
        lines = str(error).splitlines()
        return f"Triton failed: {lines[0] if lines else repr(error)}"
    return None if off <= _TOLERANCE else f"Triton's results are off by {off:.1%}"


def _error_of_a_layer(device: torch.device, kind: torch.dtype) -> float:
    """Return by how much a layer's results or gradients are off those of PyTorch in float32."""
    generator = torch.Generator().manual_seed(0)  # the run's own generators stay untouched
    drawn = [torch.randn((2, 32, 4, 8, 8), generator=generator).to(device, kind) for _ in "cg"]
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
    return max(
        float(((one.float() - other).norm() / other.norm()).detach())
        for one, other in zip(found, wanted, strict=True)
    )


def _is_usual(norm: nn.BatchNorm3d) -> bool:
    is_plain = type(norm) in (nn.BatchNorm3d, PaddedBatchNorm3d)
    return is_plain and norm.affine and norm.track_running_stats and norm.momentum is not None


def _suits(clips: torch.Tensor) -> bool:
    """Return whether the kernels take these clips; PyTorch says what is wrong with one pixel."""
    return (
        clips.ndim == 5
        and clips.dtype in _KINDS
        and clips.shape[1] % 8 == 0
        and clips.numel() > clips.shape[1]
        and clips.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _by_channel(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
