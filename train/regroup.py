"""The same optimiser step on another number of ranks: a run that comes back smaller or larger."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from prep.errors import UsageError
from train.checkpoint import load_checkpoint
from train.progress import log

if TYPE_CHECKING:
    from pathlib import Path

    from train.distributed import World
    from train.recipe import Recipe


def keep_global_batch(recipe: Recipe, path: Path, world: World) -> Recipe:
    """Return the recipe with batches such that a step takes the clips it took in a checkpoint.

    Only where the recipe's own batches would give another step, and the checkpoint is another
    number of ranks' or was given the same batches, changed here before: otherwise it is the user
    who changed something, which the stream refuses by name. Raises UsageError where the ranks
    cannot share a step evenly.
    """
    saved = load_checkpoint(path, in_place=True)
    wanted = saved.loader.get("global_batch")
    ranks = max((len(states) for states in saved.rng.values()), default=0)
    data = recipe.data
    is_same = wanted == world.size * data.batch_size * data.accumulate
    is_users = ranks == world.size and saved.given != [data.batch_size, data.accumulate]
    if is_same or not isinstance(wanted, int) or not ranks or is_users:
        return recipe
    is_paired = bool(recipe.augment.mixup or recipe.augment.cutmix)
    shared = share_step(wanted, world.size, data.batch_size, is_paired=is_paired)
    if shared is None:
        how = "in pairs" if is_paired else "evenly"
        raise UsageError(
            f"checkpoint {path} takes {wanted} clips a step, which {world.size} ranks cannot share "
            f"{how}; continue on a number of ranks that divides it"
        )
    batch_size, accumulate = shared
    (log.info if world.is_first else log.debug)(
        "a step stays %d clips, on %d rank(s)%s: data.batch_size %d, data.accumulate %d",
        wanted,
        world.size,
        "" if ranks == world.size else f" instead of {ranks}",
        batch_size,
        accumulate,
    )
    return replace(recipe, data=replace(data, batch_size=batch_size, accumulate=accumulate))


def share_step(
    global_batch: int, ranks: int, most: int, *, is_paired: bool
) -> tuple[int, int] | None:
    """Return clips of a batch (the most possible) and batches of a step for each rank, or None.

    Args:
        global_batch: clips of a step.
        ranks: that share it.
        most: clips of one batch, at most.
        is_paired: whether a batch must be even.
    """
    each, rest = divmod(global_batch, ranks)
    if rest:
        return None
    for size in range(min(most, each), 0, -1):
        if each % size == 0 and not (is_paired and size % 2):
            return size, each // size
    return None
