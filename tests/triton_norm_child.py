"""Prints by how much benchmarks/triton_norm.py is off PyTorch's BatchNorm and ReLU, as JSON.

A program of its own: without a GPU, Triton must be told to interpret its kernels before it is
imported.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from torch import nn  # noqa: E402
from triton_norm import use_triton_norm  # noqa: E402

from train.tensor_cores import use_tensor_cores  # noqa: E402


def network() -> nn.Module:
    """Return two layers of R(2+1)D's kind, with channels that are padded between them."""
    return nn.Sequential(
        nn.Conv3d(8, 21, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(21), nn.ReLU(),
        nn.Conv3d(21, 16, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(16),
    )  # fmt: skip


def results(layers: nn.Module, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return outputs, gradients and statistics of one step."""
    clips = clips.detach().requires_grad_()
    found = layers(clips)
    (found.relu() ** 2).mean().backward()
    values = {"output": found.detach(), "clips": clips.grad}
    values |= {f"gradient of {name}": one.grad for name, one in layers.named_parameters()}
    return values | {name: one for name, one in layers.state_dict().items() if "running" in name}


def main() -> None:
    """Compare with float64."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    plain = network().to(DEVICE)
    for module in plain:
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    off: dict[str, float] = {}
    for size in ((2, 8, 4, 16, 16), (3, 8, 3, 5, 5)):  # the second: no multiple of 8 pixels
        clips = (torch.randn(size, device=DEVICE) * 3 + 5).contiguous(
            memory_format=torch.channels_last_3d
        )
        wanted = results(copy.deepcopy(plain).double(), clips.double())
        for compiled in (False, True):
            ours = copy.deepcopy(plain).to(memory_format=torch.channels_last_3d)
            use_tensor_cores(ours, pads_between=True)
            use_triton_norm(ours)
            if compiled:
                ours.compile()
            for name, value in results(ours, clips).items():
                error = (value.double() - wanted[name]).norm() / wanted[name].norm()
                off[name] = max(off.get(name, 0.0), float(error))
    print(json.dumps(off))


if __name__ == "__main__":
    main()
