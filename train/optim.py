"""The optimisers; their learning rate is set at every step, from `train.schedule`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from train.recipe import Recipe


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over all weights that are trained.

    Weight decay acts on all of them, biases and BatchNorm included, as in torchvision's reference.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optim = recipe.optim
    if optim.name == "adamw":
        return torch.optim.AdamW(
            weights, lr=optim.lr, betas=(0.9, optim.beta2), weight_decay=optim.weight_decay
        )
    return torch.optim.SGD(
        weights, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take momenta and the like from a checkpoint, but keep this run's settings.

    PyTorch's own `load_state_dict` would silently bring back the old weight decay and momentum.
    """
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
