"""kprep's training: batches of clips in, a trained video classifier out.

    from train import load_recipe, train

    metrics = train(load_recipe("resnet", ["optim.lr=0.02"]), "s3://bucket/k400", "runs/first")

Names are imported on first use: reading a recipe or asking for help does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.accuracy import Accuracy
    from train.distributed import World, joined_world
    from train.evaluation import evaluate
    from train.models import build_model
    from train.recipe import Recipe, load_recipe
    from train.run import train
    from train.trainer import Trainer

_HOMES = {
    "Accuracy": "train.accuracy",
    "Recipe": "train.recipe",
    "Trainer": "train.trainer",
    "World": "train.distributed",
    "build_model": "train.models",
    "evaluate": "train.evaluation",
    "joined_world": "train.distributed",
    "load_recipe": "train.recipe",
    "train": "train.run",
}

__all__ = [
    "Accuracy",
    "Recipe",
    "Trainer",
    "World",
    "build_model",
    "evaluate",
    "joined_world",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision"):
            raise
        text = f"train.{name} needs torch and torchvision; pip install 'kprep[train]'"
        raise ModuleNotFoundError(text, name=error.name) from error
