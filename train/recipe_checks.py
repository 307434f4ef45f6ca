"""Settings of a recipe that are out of range, or cannot work together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.errors import UsageError
from train.toml_values import check_known

if TYPE_CHECKING:
    from train.recipe import AugmentRecipe, OptimRecipe, Recipe

MOST_EPOCHS = 10**9  # as steps they are integers that a float holds exactly

# key: (least, most); a bound that is None does not exist
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "data.frames": (1, None),
    "data.clips_per_video": (1, None),
    "data.batch_size": (1, None),
    "data.accumulate": (1, None),
    "data.workers": (0, None),
    "data.shuffle_block": (1, None),
    "data.bad_clip_limit": (0, None),
    "data.storage_patience_seconds": (0, None),
    "data.prefetch_batches": (1, None),
    "optim.lr_batch": (1, None),
    "optim.lr": (0, None),
    "optim.momentum": (0, 1),
    "optim.beta2": (0, 1),
    "optim.weight_decay": (0, None),
    "optim.layer_decay": (0, 1),
    "optim.head_rate": (0, None),
    "optim.label_smoothing": (0, 1),
    "optim.clip_grad_norm": (0, None),
    "model.ema_decay": (0, 1),
    "model.stochastic_depth": (-1, 1),
    "schedule.final_factor": (0, 1),
    "augment.mixup": (0, 10**6),  # Python draws no Beta of much larger ones
    "augment.cutmix": (0, 10**6),
    "augment.erase": (0, 1),
    "augment.short_side": (0, None),
    "augment.rand_operations": (0, None),
    "augment.rand_magnitude": (0, 30),
    "augment.rand_probability": (0, 1),
    "schedule.epochs": (1, MOST_EPOCHS),
    "schedule.warmup_epochs": (0, MOST_EPOCHS),
    "schedule.warmup_factor": (0, 1),
    "schedule.gamma": (0, None),
    "augment.flip": (0, 1),
    "eval.frames": (0, None),
    "eval.clips_per_video": (1, None),
    "eval.bad_clip_limit": (0, None),
    "eval.batch_size": (0, None),
    "eval.every_epochs": (1, None),
    "run.seed": (0, 2**63 - 1),
    "run.log_every_steps": (1, None),
    "run.keep_checkpoints": (1, None),
    "run.checkpoint_steps": (0, None),
    "run.checkpoint_minutes": (0, None),
    "run.max_loss": (0, None),
    "run.max_rollbacks": (0, None),
    "run.profile_steps": (0, None),
}


def check_ranges(recipe: Recipe) -> None:
    """Raise UsageError, naming the key, for a value out of its range."""
    for key, (least, most) in _RANGES.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if not ((least is None or value >= least) and (most is None or value <= most)):
            limit = f"at least {least}" if most is None else f"from {least} to {most}"
            raise UsageError(f"{key} ({value}) must be {limit}")


def check_together(recipe: Recipe) -> None:
    """Raise UsageError, naming the keys, for settings that exclude each other."""
    augment = recipe.augment
    if not recipe.data.fps > 0:
        raise UsageError(f"data.fps ({recipe.data.fps}) must be above 0")
    if not all(0 <= milestone <= MOST_EPOCHS for milestone in recipe.schedule.milestones):
        raise UsageError(
            f"schedule.milestones {list(recipe.schedule.milestones)} must be epochs from 0 to "
            f"{MOST_EPOCHS}"
        )
    if bool(recipe.data.cache_dir) != bool(recipe.data.cache_limit):
        raise UsageError("data.cache_dir and data.cache_limit must be given together, or neither")
    _check_optim(recipe.optim)
    _check_sizes(augment)
    if (augment.mixup or augment.cutmix) and recipe.data.batch_size % 2:
        raise UsageError(
            f"data.batch_size ({recipe.data.batch_size}) must be even: augment.mixup and "
            "augment.cutmix mix neighbours, in the same pairs on any number of ranks"
        )
    if recipe.model.new_head and recipe.model.remap_classes:
        raise UsageError("model.new_head and model.remap_classes exclude each other")
    if not all(std > 0 for std in augment.std):
        raise UsageError(f"augment.std {list(augment.std)} must be above 0")
    if recipe.model.freeze_batchnorm and recipe.model.sync_batchnorm:
        raise UsageError("model.freeze_batchnorm and model.sync_batchnorm exclude each other")


def _check_optim(optim: OptimRecipe) -> None:
    """Refuse shares of 1 that leave nothing, and kinds of weights that there are not."""
    if optim.name == "adamw" and optim.beta2 == 1:
        raise UsageError("optim.beta2 (1.0) must be below 1 for AdamW, such as 0.999")
    if optim.label_smoothing == 1:
        raise UsageError("optim.label_smoothing (1.0) must be below 1: labels would have no part")
    for kind in optim.no_decay:
        check_known(kind, ["norm", "bias", "position"], "kind of weights", "optim.no_decay")


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
