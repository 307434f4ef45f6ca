"""The moving average of the weights: often a better network than the last weights themselves."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a network's weights and BatchNorm statistics.

    After step n (from 1): average += (1 - d) * (weights - average), with
    d = min(decay, (1 + n) / (10 + n)), so that the first steps are soon forgotten (as TensorFlow's
    ExponentialMovingAverage with `num_updates`). Integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the network's weights."""
        self.model = copy.deepcopy(model).requires_grad_(requires_grad=False)
        """The network with the averaged weights."""
        self._decay = decay
        self._source = model
        self._names = _names(self.model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, values = [], []
        new, own = self._source.state_dict(), self.model.state_dict()
        for name in self._names:
            average = own[name]
            if average.is_floating_point():
                averages.append(average)
                values.append(new[name])
            else:
                average.copy_(new[name])
        torch._foreach_lerp_(averages, values, 1 - decay)


def _names(model: nn.Module) -> list[str]:
    """Return the names of a network's tensors, one for each that stands under several."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    return list(first.values())
