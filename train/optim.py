"""The optimisers; their learning rate is set at every step, from `train.schedule`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prep.errors import UsageError
from train.param_groups import parameter_groups

if TYPE_CHECKING:
    from train.recipe import Recipe


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over all weights that are trained.

    Weight decay acts on all of them, biases and BatchNorm included, as in torchvision's reference,
    but for the kinds that `optim.no_decay` names.
    """
    groups = parameter_groups(model, recipe.optim)
    optim = recipe.optim
    if optim.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=optim.lr, betas=(0.9, optim.beta2), weight_decay=optim.weight_decay
        )
    return torch.optim.SGD(
        groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def describe_groups(optimizer: torch.optim.Optimizer) -> str | None:
    """Return a line on rates and decays that differ between weights; None where none do."""
    groups = optimizer.param_groups
    if len(groups) == 1 and groups[0]["lr_scale"] == 1:
        return None
    scales = sorted({group["lr_scale"] for group in groups})
    free = sum(len(group["params"]) for group in groups if not group["weight_decay"])
    total = sum(len(group["params"]) for group in groups)
    return (
        f"{len(groups)} groups of weights: {scales[0]:.3g} to {scales[-1]:.3g} of the learning "
        f"rate; {free} of {total} tensors without weight decay"
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take momenta and the like from a checkpoint, weight by weight, but keep this run's settings.

    PyTorch's own `load_state_dict` would silently bring back the old weight decay and momentum, and
    goes by position: with other groups it would give weights the momenta of others. Weights that
    the checkpoint did not train begin without any.

    Raises UsageError for a state without names, or of tensors of another shape.
    """
    saved: dict[str, dict[str, Any]] = {}
    for group in state["param_groups"]:
        if "param_names" not in group:
            raise UsageError("the optimiser's state holds no names of weights; start anew")
        for name, number in zip(group["param_names"], group["params"], strict=True):
            saved[name] = state["state"].get(number, {})
    own = optimizer.state_dict()
    moved = {
        number: _fitting(saved[name], weight, name)
        for group, kept in zip(own["param_groups"], optimizer.param_groups, strict=True)
        for name, number, weight in zip(
            group["param_names"], group["params"], kept["params"], strict=True
        )
        if saved.get(name)
    }
    optimizer.load_state_dict({"state": moved, "param_groups": own["param_groups"]})


def _fitting(values: dict[str, Any], weight: torch.Tensor, name: str) -> dict[str, Any]:
    """Return the state of a weight; UsageError where one of its tensors is of another shape."""
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != weight.shape:
            raise UsageError(
                f"the optimiser's {key} of {name} has shape {list(value.shape)}, and the weight "
                f"{list(weight.shape)}: it belongs to another network"
            )
    return values
