"""The protocol of an evaluation in words: it stands beside every number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.errors import UsageError
from stream.rates import parse_rate

if TYPE_CHECKING:
    from stream.loader import ClipLoader
    from stream.options import StreamOptions
    from train.recipe import Recipe


def protocol(recipe: Recipe, *, is_averaged: bool = False) -> str:
    """Return the protocol of evaluation; sizes are height x width, in pixels.

    `is_averaged` says whether the weights that are evaluated are a moving average.
    """
    augment, how = recipe.augment, recipe.eval
    size = f"short side {augment.short_side}" if augment.short_side else _size(augment.resize)
    crops = "centre crop" if how.crops == 1 else f"{how.crops} crops"
    text = (
        f"{how.clips_per_video} x {recipe.eval_frames} frames @ {recipe.data.fps:g} fps, "
        f"{how.placement} placement, resized to {size}, {crops} {_size(augment.crop)}, "
        f"averaged {how.average}"
    )
    if augment.round_resized:
        text += ", whole levels"
    if recipe.data.short == "pad":
        text += ", short videos padded"
    if is_averaged:
        text += ", averaged weights"
    if recipe.run.precision != "float32":
        text += f", {recipe.run.precision}"
    return text


def check_clips(options: StreamOptions, recipe: Recipe, *, is_transformed: bool) -> None:
    """Raise UsageError where a loader gives other clips than the protocol says.

    `is_transformed` says that batches are changed behind the loader, maybe to other frames.
    """
    wanted = {
        "mode": "eval",
        "frames": recipe.eval_frames,
        "fps": parse_rate(recipe.data.fps),
        "clips_per_video": recipe.eval.clips_per_video,
        "placement": recipe.eval.placement,
        "short": recipe.data.short,
    }
    for name, value in wanted.items():
        given = getattr(options, name)
        if given != value and not (is_transformed and name in ("frames", "fps")):
            raise UsageError(
                f"the loader's {name} ({given}) must be {value}, as the recipe's protocol says, "
                "which stands beside the accuracy; change the one or the other"
            )


def check_training_clips(loader: ClipLoader, recipe: Recipe, *, is_transformed: bool) -> None:
    """Raise UsageError where a loader gives a training other batches than the recipe says.

    The recipe is written into every checkpoint. `is_transformed` says that batches are changed
    behind the loader, maybe to other frames.
    """
    options, plan = loader.stream.options, loader.stream.plan
    compared: dict[str, tuple[object, object]] = {
        "mode": (options.mode, "train"),
        "batch_size": (plan.batch_size, recipe.data.batch_size),
        "accumulate": (plan.accumulate, recipe.data.accumulate),
        "clips_per_video": (options.clips_per_video, recipe.data.clips_per_video),
        "short": (options.short, recipe.data.short),
    }
    if not is_transformed:
        compared["frames"] = (options.frames, recipe.data.frames)
        compared["fps"] = (options.fps, parse_rate(recipe.data.fps))
    for name, (given, wanted) in compared.items():
        if given != wanted:
            raise UsageError(
                f"the training loader's {name} ({given}) must be {wanted}, as the recipe says; "
                "change the one or the other"
            )


def check_crops(recipe: Recipe) -> None:
    """Raise UsageError where three crops would be the same one."""
    augment = recipe.augment
    if recipe.eval.crops == 3 and not augment.short_side and augment.crop == augment.resize:
        raise UsageError(
            f"eval.crops=3 needs augment.resize {list(augment.resize)} to leave the crop "
            f"{list(augment.crop)} room to move; make one larger, or the other smaller"
        )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
