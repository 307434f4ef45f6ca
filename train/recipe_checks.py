"""Settings of a recipe that cannot work together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.errors import UsageError
from train.toml_values import check_known

if TYPE_CHECKING:
    from train.recipe import AugmentRecipe, Recipe

MOST_EPOCHS = 10**9  # as steps they are integers that a float holds exactly


def check_together(recipe: Recipe) -> None:
    """Raise UsageError, naming the keys, for settings that exclude each other."""
    augment = recipe.augment
    if not recipe.data.fps > 0:
        raise UsageError(f"data.fps ({recipe.data.fps}) must be above 0")
    if recipe.optim.name == "adamw" and recipe.optim.beta2 == 1:
        raise UsageError("optim.beta2 (1.0) must be below 1 for AdamW, such as 0.999")
    if not all(0 <= milestone <= MOST_EPOCHS for milestone in recipe.schedule.milestones):
        raise UsageError(
            f"schedule.milestones {list(recipe.schedule.milestones)} must be epochs from 0 to "
            f"{MOST_EPOCHS}"
        )
    if bool(recipe.data.cache_dir) != bool(recipe.data.cache_limit):
        raise UsageError("data.cache_dir and data.cache_limit must be given together, or neither")
    _check_sizes(augment)
    if (augment.mixup or augment.cutmix) and recipe.data.batch_size % 2:
        raise UsageError(
            f"data.batch_size ({recipe.data.batch_size}) must be even: augment.mixup and "
            "augment.cutmix mix neighbours, in the same pairs on any number of ranks"
        )
    if recipe.model.new_head and recipe.model.remap_classes:
        raise UsageError("model.new_head and model.remap_classes exclude each other")
    for kind in recipe.optim.no_decay:
        check_known(kind, ["norm", "bias", "position"], "kind of weights", "optim.no_decay")
    if not all(std > 0 for std in augment.std):
        raise UsageError(f"augment.std {list(augment.std)} must be above 0")
    if recipe.model.freeze_batchnorm and recipe.model.sync_batchnorm:
        raise UsageError("model.freeze_batchnorm and model.sync_batchnorm exclude each other")


def _check_sizes(augment: AugmentRecipe) -> None:
    """Refuse crops that do not fit, and ranges that are none."""
    resize, what = augment.resize, f"augment.resize {list(augment.resize)}"
    if augment.short_side:
        resize = (augment.short_side, augment.short_side)
        what = f"augment.short_side {augment.short_side}"
    if not all(0 < crop <= size for crop, size in zip(augment.crop, resize, strict=True)):
        raise UsageError(f"augment.crop {list(augment.crop)} must fit into {what}")
    low, high = augment.crop_area
    if not (0 < low <= high <= 1 or low == high == 0):
        raise UsageError(
            f"augment.crop_area {list(augment.crop_area)} must be two shares above 0, the smaller "
            "one first, such as [0.08, 1.0]; [0, 0] for none"
        )
    low, high = augment.crop_ratio
    if not 0 < low <= high:
        raise UsageError(
            f"augment.crop_ratio {list(augment.crop_ratio)} must be two numbers above 0, the "
            "smaller one first"
        )
