"""Prints by how much train/fused_norm.py is off PyTorch's BatchNorm and ReLU, as JSON.

A program of its own: see triton_device.py.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import torch
from triton_device import choose_device

DEVICE = choose_device()

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torchvision.models import video  # noqa: E402

from train import norm_kernels  # noqa: E402
from train.fused_norm import use_fused_norm  # noqa: E402
from train.models import keep_channels_last  # noqa: E402
from train.tensor_cores import use_tensor_cores  # noqa: E402

LAST = torch.channels_last_3d
PROGRAMS = norm_kernels._PROGRAMS


class Block(nn.Module):
    """Layers of R(2+1)D's kind, with channels that are padded between them, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(8, 21, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(21), nn.ReLU(inplace=True),
            nn.Conv3d(21, 8, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(8, eps=0.01, momentum=0.3),
        )  # fmt: skip

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        out = self.layers(clips)
        out += clips
        return torch.relu_(out)


class Copies(TorchDispatchMode):
    """Counts clips that are copied into another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        is_copy = function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        if is_copy and result.ndim == 5 and min(result.shape[1:3]) > 1:
            self.count += result.dtype == torch.bfloat16
        return result


def results(model: nn.Module, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return outputs, gradients and statistics of one step, and outputs of an evaluation."""
    given = clips.detach().requires_grad_()
    found = model(given)
    (found**2).mean().backward()
    values = {"output": found.detach(), "clips": given.grad}
    values |= {f"gradient of {name}": one.grad for name, one in model.named_parameters()}
    values |= {name: one for name, one in model.state_dict().items() if "running" in name}
    with torch.no_grad():
        return values | {"evaluation": model.eval()(clips)}


def errors() -> dict[str, float]:
    """Compare with float64."""
    torch.manual_seed(0)
    plain = Block().to(DEVICE)
    for module in plain.layers:
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    off: dict[str, float] = {}
    # the second is no multiple of 8 pixels; the last has 72 blocks of rows, whose sums are more
    # than are added up at once, and in the end few programs, which take several blocks each
    sizes = [(2, 8, 4, 16, 16), (3, 8, 3, 5, 5), (1, 8, 2, 3, 2), (2, 8, 16, 24, 24)]
    for size, programs in (*((size, PROGRAMS) for size in sizes), (sizes[-1], 5)):
        norm_kernels._PROGRAMS = programs
        clips = (torch.randn(size, device=DEVICE) * 3 + 5).contiguous(memory_format=LAST)
        wanted = results(copy.deepcopy(plain).double(), clips.double())
        for compiled in (False, True):
            if compiled and size not in sizes[:2]:
                continue  # compiling takes long, and the kernels are the same
            ours = copy.deepcopy(plain).to(memory_format=LAST)
            use_tensor_cores(ours, pads_between=True)
            use_fused_norm(ours, with_relu=True)
            if compiled:
                torch.compiler.reset()  # clips of one size, as in training
                ours.compile()
            for name, value in results(ours, clips).items():
                off[name] = max(off.get(name, 0.0), distance(value, wanted[name]))
    norm_kernels._PROGRAMS = PROGRAMS
    return off


def distance(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return by how much of its norm a value is off; infinity for what is not finite."""
    error = float((value.double() - wanted).norm() / wanted.norm())
    return error if math.isfinite(error) else math.inf


def lost() -> list[str]:
    """Name what is a number here, but not with PyTorch, when one of the clips is none."""
    found = []
    for bad in (math.nan, math.inf, -math.inf):
        plain = nn.Sequential(nn.BatchNorm3d(8), nn.ReLU()).to(DEVICE)
        ours = copy.deepcopy(plain)
        use_fused_norm(ours, with_relu=True)
        clips = torch.randn(2, 8, 2, 4, 4, device=DEVICE).contiguous(memory_format=LAST)
        clips[1, 3, 0, 2, 1] = bad
        wanted, values = ([model(clips), *model.state_dict().values()] for model in (plain, ours))
        for number, (value, other) in enumerate(zip(values, wanted, strict=True)):
            if not torch.equal(value.isfinite(), other.isfinite()):
                found.append(f"{bad} in value {number}")
    return found


def reduced_errors() -> dict[str, float]:
    """Compare a compiled step in bf16 with float64, as training has it."""
    torch.manual_seed(0)
    plain = Block().to(DEVICE)
    clips = (torch.randn((2, 8, 4, 16, 16), device=DEVICE) * 3 + 5).contiguous(memory_format=LAST)
    wanted = results(copy.deepcopy(plain).double(), clips.double())
    ours = copy.deepcopy(plain).to(memory_format=LAST)
    use_tensor_cores(ours, pads_between=True)
    use_fused_norm(ours, with_relu=True)
    torch.compiler.reset()
    ours.compile()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(ours, clips)
    return {name: distance(value, wanted[name]) for name, value in found.items()}


def copies() -> int:
    """Count the clips that a step of R(2+1)D copies, which costs as much as the convolutions."""
    network = video.r2plus1d_18(num_classes=3).to(DEVICE)
    keep_channels_last(network)
    use_tensor_cores(network, pads_between=True)
    use_fused_norm(network, with_relu=True)
    clips = torch.randn(2, 3, 4, 16, 16, device=DEVICE).contiguous(memory_format=LAST)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = network(clips).float().sum()
    with Copies() as found:
        loss.backward()
    return found.count


def main() -> None:
    """Print all of it."""
    torch.backends.cudnn.allow_tf32 = False
    found = {"errors": errors(), "reduced": reduced_errors(), "copies": copies()}
    print(json.dumps({**found, "lost": lost()}))


if __name__ == "__main__":
    main()
