"""Floating-point operations of a network, counted on the network itself without computing them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from train.fused_norm import restore_norm
from train.tensor_cores import restore_layers

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ClipFlops:
    """Operations for one clip; a multiplication and an addition are two."""

    forward: int
    training: int
    """Forward and backward; weights that are frozen need no gradient and cost less."""

    def __str__(self) -> str:
        """Say both in GFLOP."""
        return f"{self.forward / 1e9:.4g} GFLOP a clip, {self.training / 1e9:.4g} with the backward"


def count_flops(model: nn.Module, clip_shape: Sequence[int]) -> ClipFlops:
    """Count the operations of one clip through the network, in training.

    Args:
        model: takes float32 (N, 3, T, H, W); it stays as it is.
        clip_shape: (T, H, W).

    Counted are convolutions, matrix products and attention (`torch.utils.flop_counter`), which are
    nearly all there is. A copy of the network on PyTorch's meta device runs, which has shapes and
    no values: no memory is taken, and nothing is computed. Raises whatever a network raises that
    cannot run so, such as one whose path depends on values.
    """
    twin = _without_values(model)
    clip = torch.empty(1, 3, *clip_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        loss = twin(clip).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return ClipFlops(forward=forward, training=counter.get_total_flops())


def _without_values(model: nn.Module) -> nn.Module:
    """Copy a network onto the meta device, its weights' memory not even for a moment."""
    memo: dict[int, object] = {}
    for weight in model.parameters():
        bare = weight.detach().to("meta")
        memo[id(weight)] = nn.Parameter(bare, requires_grad=weight.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    twin = copy.deepcopy(model, memo)
    restore_norm(twin)
    restore_layers(twin)
    for module in twin.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # in training it would talk to other ranks
    return twin
